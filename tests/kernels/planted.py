"""An operation with planted faults: what each proof must catch. out = x * scale, x (B, T, D), scale (B, D).

The fault is an argument of the operation; "" has none and passes every proof. Faults of a kernel (FAULT in it):
"batch" takes the first sample's scale, "load" has no mask, "store" has none, "gap" writes beside a row of scale,
"int32" scales an int32 sample index, "rows" leaves the last token unwritten, "nan" drops NaN by a maximum,
"odd" forgets the last column of an odd width, "strides" believes that scale is contiguous, "half" rounds the product
to float16, "order" sums the gradient of scale the other way round at every second call.
Faults around it: "gradient" doubles that gradient, "fake" promises another dtype, "empty" leaves that gradient
unwritten without tokens, "unchecked" takes whatever comes.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.ops.registry import OpSpec
from dit_fast.kernels.launch import accumulator, launch, recording
from dit_fast.kernels.library import check_shapes, uses_triton

ROWS = 4
_calls = itertools.count()


@triton.jit
def _scale_rows_fwd_kernel(
    # pointers
    x_ptr, scale_ptr, out_ptr,
    # sizes, strides
    T, stride_scale,
    # meta
    D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    b = pid // tiles
    if FAULT != "int32":
        b = b.to(tl.int64)
    x_ptr += b * T * D
    out_ptr += b * T * D
    if FAULT != "batch":
        scale_ptr += b * (D if FAULT == "strides" else stride_scale)
    o_t, o_d = (pid % tiles) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    m_d = o_d < (D - D % 2 if FAULT == "odd" else D)
    mask = (o_t < T)[:, None] & m_d[None, :]
    offsets = o_t[:, None] * D + o_d[None, :]
    read = mask | True if FAULT == "load" else mask
    x = tl.load(x_ptr + offsets, mask=read, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0).to(ACC)
    out = x * scale[None, :]
    if FAULT == "half":
        out = out.to(tl.float16).to(ACC)
    if FAULT == "nan":
        out = tl.where(out != out, tl.max(out, axis=1)[:, None], out)
    if FAULT == "gap":
        tl.store(scale_ptr + D, tl.sum(tl.sum(out, axis=0), axis=0).to(scale_ptr.dtype.element_ty))
    if FAULT == "rows":
        mask = mask & (o_t < T - 1)[:, None]
    if FAULT == "odd":
        mask = (o_t < T)[:, None] & (o_d < D)[None, :]
    if FAULT == "store":
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_rows_bwd_kernel(
    # pointers
    dout_ptr, x_ptr, scale_ptr, dx_ptr, dscale_ptr,
    # sizes, strides
    T, stride_scale,
    # meta
    D: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, SIZE)
    m_d = o_d < D
    scale = tl.load(scale_ptr + b * stride_scale + o_d, mask=m_d, other=0.0).to(ACC)
    dscale = tl.zeros([SIZE], ACC)
    for step in range(T):
        row = b * T + (T - 1 - step if BACKWARDS else step)
        dout = tl.load(dout_ptr + row * D + o_d, mask=m_d, other=0.0).to(ACC)
        x = tl.load(x_ptr + row * D + o_d, mask=m_d, other=0.0).to(ACC)
        dscale += dout * x
        tl.store(dx_ptr + row * D + o_d, (dout * scale).to(dx_ptr.dtype.element_ty), mask=m_d)
    tl.store(dscale_ptr + b * D + o_d, dscale.to(dscale_ptr.dtype.element_ty), mask=m_d)


def _forward(x: Tensor, scale: Tensor, fault: str) -> Tensor:
    B, T, D = x.shape
    x = x.contiguous()
    scale = scale if scale.stride(-1) == 1 else scale.contiguous()
    out = torch.empty_like(x)
    launch(
        _scale_rows_fwd_kernel, (B * triton.cdiv(T, ROWS),), on=x, num_warps=4,
        x_ptr=x, scale_ptr=scale, out_ptr=out, T=T, stride_scale=scale.stride(0),
        D=D, SIZE=triton.next_power_of_2(D), ROWS=ROWS, ACC=accumulator(x), FAULT=fault,
    )  # fmt: skip
    return out


def _backward(dout: Tensor, x: Tensor, scale: Tensor, fault: str) -> tuple[Tensor, Tensor]:
    B, T, D = x.shape
    dout, x = dout.contiguous(), x.contiguous()
    scale = scale if scale.stride(-1) == 1 else scale.contiguous()
    dx, dscale = torch.empty_like(x), scale.new_empty(B, D)
    # A grid over tokens would leave d_scale unwritten where there are none.
    launch(
        _scale_rows_bwd_kernel, (B if fault != "empty" or T else 0,), on=x, num_warps=4,
        dout_ptr=dout, x_ptr=x, scale_ptr=scale, dx_ptr=dx, dscale_ptr=dscale, T=T, stride_scale=scale.stride(0),
        D=D, SIZE=triton.next_power_of_2(D), ACC=accumulator(x),
        BACKWARDS=fault == "order" and next(_calls) % 2 == 1,
    )  # fmt: skip
    return dx, dscale


def _on_meta(x: Tensor, scale: Tensor, fault: str) -> Tensor:
    if recording():
        return _forward(x, scale, fault)
    return x.new_empty(x.shape, dtype=torch.float64 if fault == "fake" else x.dtype)


def _backward_on_meta(dout: Tensor, x: Tensor, scale: Tensor, fault: str) -> tuple[Tensor, Tensor]:
    return (
        _backward(dout, x, scale, fault)
        if recording()
        else (x.new_empty(x.shape), scale.new_empty(scale.shape))
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.fault = inputs
    ctx.save_for_backward(x, scale)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx, dscale = _backward_op(dout, *ctx.saved_tensors, ctx.fault)
    return dx, 2 * dscale if ctx.fault == "gradient" else dscale, None


_forward_op = torch.library.custom_op("planted::scale_rows", _forward, mutates_args=())
_forward_op.register_fake(_on_meta)
_forward_op.register_autograd(_autograd, setup_context=_context)
_backward_op = torch.library.custom_op("planted::scale_rows_backward", _backward, mutates_args=())
_backward_op.register_fake(_backward_on_meta)


def scale_rows(x: Tensor, scale: Tensor, fault: str = "", *, kernels: str = "auto") -> Tensor:
    """x * scale with a planted fault."""
    if not uses_triton(kernels, x):
        return _reference(x, scale, fault)
    if fault != "unchecked":
        B, _, D = check_shapes("scale_rows", x)
        check_shapes("scale_rows", x, scale=(scale, (B, D)))
    return _forward_op(x, scale, fault)


def _reference(x: Tensor, scale: Tensor, fault: str = "") -> Tensor:
    return (x * scale[:, None]).to(x.dtype)


def planted(fault: str) -> OpSpec:
    """The registry entry of the operation with this fault."""

    def inputs(shape: Any, stream: torch.dtype, low: torch.dtype, make: Any) -> tuple[Any, ...]:
        B, T, D = shape
        return make(B, T, D, dtype=stream), make(B, 2 * D, dtype=low).chunk(2, 1)[0], fault

    return OpSpec(
        "scale_rows",
        scale_rows,
        _reference,
        inputs,
        lambda B, T, D: 2 * B * T * D,
        lambda B, T, D: 3 * B * T * D,
    )
