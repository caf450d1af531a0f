"""Gated residual fused with the next adaptive layer norm, one pass each way. (Peebles & Xie 2023, figure 3)

Shapes    x, branch (B, T, D); gate, shift, scale (B, D), also strided views; bias (D,) or None. Returns the new
          residual stream out = x + gate * (branch + bias) and y = norm(out) * (1 + scale) + shift.
Norm      as in adaln.py.
Backward  with d_norm the norm's d_x (adaln.py) at `out`: d_x = d_out + d_norm, and from it d_branch, d_gate
          and d_bias as in gated_residual.py; d_shift and d_scale as in adaln.py.
Traffic   forward reads x and branch and writes out and y; backward reads d_out, d_y, out and branch and writes d_x
          and d_branch: all vectors and the branch's bias gradient come out of that one pass.
Numerics  as in adaln.py: float32 sums, one rounding at each store, `out` in the dtype of x, y in that of `scale`,
          sums over tokens in a fixed order without atomics. y and the moments are those of `out` as it is stored,
          so that the backward pass and a recomputation of y, which read it again, see what the forward pass saw.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.adaln import modulate, moments, norm_backward, norm_gradient, norm_means, norm_sums
from dit_fast.kernels.device import (
    first_token,
    load_part,
    main_part,
    no_sum,
    of_rows,
    split_tokens,
    store_part,
    store_rows,
    store_sum,
    tail_part,
)  # fmt: skip
from dit_fast.kernels.gated_residual import (
    bias_gradient,
    branch_backward,
    check_residual,
    load_sum,
    store_gate_sums,
)  # fmt: skip
from dit_fast.kernels.launch import accumulator, as_bias, as_vectors, cast, cdiv, prepare, tuned_rows
from dit_fast.kernels.op import Run, define_op, is_centred, uses_triton


@triton.jit
def _store_stream(x_ptr, branch_ptr, bias_ptr, gate_ptr, out_ptr, left, P: tl.constexpr, ACC: tl.constexpr):
    """Store one part of the new residual stream; return it as it is stored, rounded, in ACC."""
    out = load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, left, P, ACC).to(out_ptr.dtype.element_ty)
    store_part(out_ptr, out, left, P)
    return out.to(ACC)


@triton.jit
def _gated_residual_adaln_fwd_kernel(
    # pointers
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, bias_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    # sizes, strides
    T, stride_gate, stride_shift, stride_scale,
    # meta
    EPS: tl.constexpr, CENTRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    b, start = first_token(tl.program_id(0), T, ROWS)
    left = T - start
    gate_ptr += b * stride_gate
    shift_ptr += b * stride_shift
    scale_ptr += b * stride_scale
    x_ptr += (b * T + start) * D
    branch_ptr += (b * T + start) * D
    out_ptr += (b * T + start) * D
    y_ptr += (b * T + start) * D
    mean_ptr += b * T + start
    rstd_ptr += b * T + start

    main = _store_stream(x_ptr, branch_ptr, bias_ptr, gate_ptr, out_ptr, left, MAIN, ACC)
    tail = main
    if TAIL.size > 0:
        tail = _store_stream(x_ptr, branch_ptr, bias_ptr, gate_ptr, out_ptr, left, TAIL, ACC)
    mean, rstd = moments(main, tail, MAIN, TAIL, EPS, CENTRED)
    y = modulate(main, of_rows(mean, MAIN), of_rows(rstd, MAIN), shift_ptr, scale_ptr, MAIN)
    store_part(y_ptr, y, left, MAIN)
    if TAIL.size > 0:
        y = modulate(tail, of_rows(mean, TAIL), of_rows(rstd, TAIL), shift_ptr, scale_ptr, TAIL)
        store_part(y_ptr, y, left, TAIL)
    store_rows(mean_ptr, mean, left, MAIN)
    store_rows(rstd_ptr, rstd, left, MAIN)


@triton.jit
def _backward_part(
    dout_ptr, dy_ptr, out_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr,
    mean_g, mean_gh, left, dx_branch, dx_sum, P: tl.constexpr, ACC: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Store d_x and d_branch of one part; the sums over tokens of d_x * branch and of d_x with this tile added.

    Reads the rows a second time, from the cache: beside four sums over tokens a thread has no registers to keep them.
    The cache modifier, the default one, keeps the compiler from merging the two loads.
    """
    _, g, deviation = norm_gradient(dy_ptr, out_ptr, mean_ptr, scale_ptr, left, P, ACC, ".ca")
    dx = norm_backward(g, deviation, mean_g, mean_gh, rstd_ptr, left, P, CENTRED)
    dx += load_part(dout_ptr, left, P, ACC)
    store_part(dx_ptr, dx, left, P)
    return branch_backward(dx, branch_ptr, dbranch_ptr, gate_ptr, left, dx_branch, dx_sum, P)


@triton.jit
def _gated_residual_adaln_bwd_kernel(
    # pointers
    dout_ptr, dy_ptr, out_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, bias_ptr,
    dx_ptr, dbranch_ptr, partial_ptr, dbias_ptr,
    # sizes, strides
    B, T, stride_gate, stride_scale,
    # meta
    SPLITS: tl.constexpr, CENTRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    pid = tl.program_id(0)
    b = tl.cast(pid // SPLITS, tl.int64)
    split = pid % SPLITS
    share = split_tokens(T, SPLITS, ROWS)
    gate_ptr += b * stride_gate
    scale_ptr += b * stride_scale
    dout_ptr += (b * T + split * share) * D
    dy_ptr += (b * T + split * share) * D
    out_ptr += (b * T + split * share) * D
    branch_ptr += (b * T + split * share) * D
    dx_ptr += (b * T + split * share) * D
    dbranch_ptr += (b * T + split * share) * D
    mean_ptr += b * T + split * share
    rstd_ptr += b * T + split * share
    dshift_main, dscale_main, branch_main, dx_main = (
        no_sum(MAIN, ACC), no_sum(MAIN, ACC), no_sum(MAIN, ACC), no_sum(MAIN, ACC)
    )  # fmt: skip
    if TAIL.size > 0:
        dshift_tail, dscale_tail, branch_tail, dx_tail = (
            no_sum(TAIL, ACC), no_sum(TAIL, ACC), no_sum(TAIL, ACC), no_sum(TAIL, ACC)
        )  # fmt: skip

    for start in range(split * share, tl.minimum((split + 1) * share, T), ROWS):
        left = T - start
        dy, g, deviation = norm_gradient(dy_ptr, out_ptr, mean_ptr, scale_ptr, left, MAIN, ACC)
        dshift_main, dscale_main, g, gh = norm_sums(
            dy, g, deviation, rstd_ptr, left, dshift_main, dscale_main, MAIN
        )
        if TAIL.size > 0:
            dy, tail_g, deviation = norm_gradient(dy_ptr, out_ptr, mean_ptr, scale_ptr, left, TAIL, ACC)
            dshift_tail, dscale_tail, tail_g, tail_gh = norm_sums(
                dy, tail_g, deviation, rstd_ptr, left, dshift_tail, dscale_tail, TAIL
            )
            g += tail_g
            gh += tail_gh
        mean_g, mean_gh = norm_means(g, gh, D, CENTRED)
        branch_main, dx_main = _backward_part(
            dout_ptr, dy_ptr, out_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr,
            mean_g, mean_gh, left, branch_main, dx_main, MAIN, ACC, CENTRED,
        )  # fmt: skip
        if TAIL.size > 0:
            branch_tail, dx_tail = _backward_part(
                dout_ptr, dy_ptr, out_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr,
                mean_g, mean_gh, left, branch_tail, dx_tail, TAIL, ACC, CENTRED,
            )  # fmt: skip
        dout_ptr += ROWS * D
        dy_ptr += ROWS * D
        out_ptr += ROWS * D
        branch_ptr += ROWS * D
        dx_ptr += ROWS * D
        dbranch_ptr += ROWS * D
        mean_ptr += ROWS
        rstd_ptr += ROWS

    # partial is (3, B, SPLITS, D): d_shift, d_scale, d_gate; rows of it, and of the bias gradient's (B, SPLITS, D).
    partial_ptr += (b * SPLITS + split) * D
    if bias_ptr is not None:
        dbias_ptr += (b * SPLITS + split) * D
    stride_sum = tl.cast(B, tl.int64) * SPLITS * D
    store_sum(partial_ptr, dshift_main, MAIN)
    store_sum(partial_ptr + stride_sum, dscale_main, MAIN)
    partial_gate = partial_ptr + 2 * stride_sum
    store_gate_sums(partial_gate, dbias_ptr, branch_main, dx_main, gate_ptr, bias_ptr, MAIN)
    if TAIL.size > 0:
        store_sum(partial_ptr, dshift_tail, TAIL)
        store_sum(partial_ptr + stride_sum, dscale_tail, TAIL)
        store_gate_sums(partial_gate, dbias_ptr, branch_tail, dx_tail, gate_ptr, bias_ptr, TAIL)


def _check(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, *_: Any
) -> None:
    check_residual("gated_residual_adaln", x, branch, bias, gate=gate, shift=shift, scale=scale)


def _forward(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    centred: bool,
) -> Run:  # fmt: skip
    B, T, _ = x.shape
    dtype, acc = scale.dtype, reference.accumulator(x)
    cfg = tuned_rows(_gated_residual_adaln_fwd_kernel, x, branch.dtype, dtype)
    start = prepare(
        _gated_residual_adaln_fwd_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        T=T, EPS=eps, CENTRED=centred, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip

    def run(
        x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gate, shift, scale = x.contiguous(), as_vectors(gate), as_vectors(shift), as_vectors(scale)
        out, y = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        mean = x.new_empty((B, T), dtype=acc)
        rstd = torch.empty_like(mean)
        start(
            x_ptr=x, branch_ptr=branch.contiguous(), gate_ptr=gate, shift_ptr=shift, scale_ptr=scale,
            bias_ptr=as_bias(bias), out_ptr=out, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
            stride_gate=gate.stride(0), stride_shift=shift.stride(0), stride_scale=scale.stride(0),
        )  # fmt: skip
        return out, y, mean, rstd

    return run


def _reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, y, and the mean and 1 / deviation (B, T) of each row of out."""
    out, y = reference.gated_residual_adaln(x, branch, gate, shift, scale, bias, eps, centred)
    return out.contiguous(), y.contiguous(), *reference.moments(out, eps, centred)


def _backward(
    dout: Tensor, dy: Tensor, out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    bias: Tensor | None, centred: bool,
) -> Run:  # fmt: skip
    B, T, D = out.shape
    cfg = tuned_rows(_gated_residual_adaln_bwd_kernel, out, branch.dtype, dy.dtype, sums=4)
    dtype, acc, partials = scale.dtype, mean.dtype, (3, B, cfg.splits, D)
    start = prepare(
        _gated_residual_adaln_bwd_kernel, (B * cfg.splits,), on=out, num_warps=cfg.num_warps,
        B=B, T=T, SPLITS=cfg.splits, CENTRED=centred, **cfg.meta, ACC=accumulator(out),
    )  # fmt: skip

    def run(
        dout: Tensor, dy: Tensor, out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor,
        rstd: Tensor, bias: Tensor | None, centred: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        out, branch, gate, scale = out.contiguous(), branch.contiguous(), as_vectors(gate), as_vectors(scale)
        dx, dbranch, partial = (
            torch.empty_like(out),
            torch.empty_like(branch),
            out.new_empty(partials, dtype=acc),
        )
        dbias = None if bias is None else out.new_empty(partials[1:], dtype=acc)
        start(
            dout_ptr=dout.contiguous(), dy_ptr=dy.contiguous(), out_ptr=out, branch_ptr=branch,
            gate_ptr=gate, scale_ptr=scale, mean_ptr=mean, rstd_ptr=rstd, bias_ptr=as_bias(bias), dx_ptr=dx,
            dbranch_ptr=dbranch, partial_ptr=partial, dbias_ptr=dbias, stride_gate=gate.stride(0),
            stride_scale=scale.stride(0),
        )  # fmt: skip
        return dx, dbranch, cast(partial.sum(2), dtype), bias_gradient(dbias, bias, gate)

    return run


def _backward_reference(
    dout: Tensor, dy: Tensor, out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    bias: Tensor | None, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d_x, d_branch, (3, B, D) = [d_shift, d_scale, d_gate] in the dtype of `scale`, and d_bias (D,) or empty."""
    dx, dbranch, dgate, dshift, dscale, dbias = reference.gated_residual_adaln_backward(
        dout, dy, out, branch, gate, scale, mean, rstd, bias, centred
    )
    return dx.contiguous(), dbranch.contiguous(), torch.stack([dshift, dscale, dgate.to(scale.dtype)]), dbias


_backward_op = define_op("gated_residual_adaln_backward", plan=_backward, reference_impl=_backward_reference)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, bias, _, ctx.centred = inputs
    out, _, mean, rstd = output
    ctx.save_for_backward(out, branch, gate, scale, mean, rstd, bias)
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(
    ctx: Any, dout: Tensor | None, dy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    out, branch, gate, scale, mean, rstd, bias = ctx.saved_tensors
    # None for an output that is not used.
    dout = torch.zeros_like(out) if dout is None else dout
    dy = torch.zeros_like(out, dtype=scale.dtype) if dy is None else dy
    # The first gradient is looked at there, the second one here.
    plain = type(dy) is Tensor and not dy.is_neg()
    run = functools.partial(_backward_op.in_backward, ctx, None) if plain else _backward_op
    dx, dbranch, dmod, dbias = run(dout, dy, out, branch, gate, scale, mean, rstd, bias, ctx.centred)
    dshift, dscale, dgate = dmod.unbind()
    dshift, dgate = cast(dshift, ctx.shift_dtype), cast(dgate, gate.dtype)
    return dx, dbranch, dgate, dshift, dscale, None if bias is None else dbias, None, None


gated_residual_adaln_with_moments = define_op(
    "gated_residual_adaln",
    plan=_forward,
    reference_impl=_reference,
    check=_check,
    backward=_autograd,
    setup_context=_context,
)
"""(x, branch, gate, shift, scale, bias, eps, centred) -> out, y, and the moments of out as in `adaln_with_moments`."""


def gated_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: str = "layernorm",
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream out = x + gate * (branch + bias) and its norm(out) * (1 + scale) + shift, in one pass.

    x, branch (B, T, D); gate, shift, scale (B, D); bias (D,) or None. Returns out in the dtype of `x` and the
    modulated norm in that of `scale`. `norm`, `kernels` and errors as in `adaln_modulate`.
    """
    if not uses_triton(kernels, x):
        return reference.gated_residual_adaln(x, branch, gate, shift, scale, bias, eps, is_centred(norm))
    out, y, _, _ = gated_residual_adaln_with_moments(
        x, branch, gate, shift, scale, bias, eps, is_centred(norm)
    )
    return out, y
