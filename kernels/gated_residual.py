"""Gated residual: out = x + gate * (branch + bias).              (Peebles & Xie 2023, figure 3, adaLN-Zero)

Shapes    x, branch (B, T, D); gate (B, D), also a strided view; bias (D,) or None.
Backward  d_x = d_out, d_branch = gate * d_x, d_gate = sum_T(d_x * (branch + bias)),
          d_bias = sum_B(gate * sum_T(d_x)).
Traffic   forward reads x and branch and writes out; backward reads d_out and branch and writes d_branch: the
          vectors and the branch's bias gradient come out of that one pass.
Numerics  float32 sums (float64 for float64), one rounding at each store, out in the dtype of x, sums over tokens
          in a fixed order without atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.device import column_sum, load_vector, part, split_tokens, store_vector, token_rows
from dit_fast.kernels.launch import accumulator, as_bias, as_vectors, cast, cdiv, launch, tuned_rows
from dit_fast.kernels.op import check_shapes, define_op, uses_triton


@triton.jit
def load_sum(
    x_ptr, branch_ptr, bias_ptr, gate_ptr, offsets, mask, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x + gate * (branch + bias) on one part of the columns; bias_ptr None means no bias."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        branch += load_vector(bias_ptr, START, SIZE, D, ACC)
    return x + load_vector(gate_ptr, START, SIZE, D, ACC) * branch


@triton.jit
def store_gate_sums(
    partial_ptr, stride_sum, dx_branch, dx_sum, gate_ptr, bias_ptr, START: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """d_gate = sum(dx * branch) + bias * sum(dx), and gate * sum(dx), which is the bias gradient's share."""
    if bias_ptr is not None:
        dx_branch += load_vector(bias_ptr, START, SIZE, D, dx_sum.dtype) * dx_sum
        dbranch_sum = load_vector(gate_ptr, START, SIZE, D, dx_sum.dtype) * dx_sum
        store_vector(partial_ptr + stride_sum, dbranch_sum, START, SIZE, D)
    store_vector(partial_ptr, dx_branch, START, SIZE, D)


@triton.jit
def branch_backward(
    dx, branch_ptr, dbranch_ptr, gate_ptr, offsets, mask, START: tl.constexpr, D: tl.constexpr
):
    """Store d_branch = gate * dx; return the sums over rows of dx * branch and of dx."""
    gate = load_vector(gate_ptr, START, dx.shape[1], D, dx.dtype)
    branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(dx.dtype)
    tl.store(dbranch_ptr + offsets, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)
    return column_sum(dx * branch), column_sum(dx)


@triton.jit
def _gated_residual_fwd_kernel(
    # pointers
    x_ptr, branch_ptr, gate_ptr, bias_ptr, out_ptr,
    # sizes, strides
    T, stride_gate,
    # meta
    D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, o_t, m_t = token_rows(tl.program_id(0), T, ROWS)
    gate_ptr += b * stride_gate
    x_ptr += b * T * D
    branch_ptr += b * T * D
    out_ptr += b * T * D
    o_main, m_main = part(o_t, m_t, 0, MAIN, D)
    out = load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, o_main, m_main, 0, MAIN, D, ACC)
    tl.store(out_ptr + o_main, out.to(out_ptr.dtype.element_ty), mask=m_main)
    if TAIL > 0:
        o_tail, m_tail = part(o_t, m_t, MAIN, TAIL, D)
        out = load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, o_tail, m_tail, MAIN, TAIL, D, ACC)
        tl.store(out_ptr + o_tail, out.to(out_ptr.dtype.element_ty), mask=m_tail)


@triton.jit
def _gated_residual_bwd_kernel(
    # pointers
    dout_ptr, branch_ptr, gate_ptr, bias_ptr, dbranch_ptr, partial_ptr,
    # sizes, strides
    B, T, stride_gate,
    # meta
    SPLITS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    split = pid % SPLITS
    share = split_tokens(T, SPLITS, ROWS)
    gate_ptr += b * stride_gate
    dout_ptr += (b * T + split * share) * D
    branch_ptr += (b * T + split * share) * D
    dbranch_ptr += (b * T + split * share) * D
    branch_main, dx_main = tl.zeros([1, MAIN], ACC), tl.zeros([1, MAIN], ACC)
    if TAIL > 0:
        branch_tail, dx_tail = tl.zeros([1, TAIL], ACC), tl.zeros([1, TAIL], ACC)

    o_t = tl.arange(0, ROWS)
    for start in range(split * share, (split + 1) * share, ROWS):
        m_t = start + o_t < T
        o_main, m_main = part(o_t, m_t, 0, MAIN, D)
        dx = tl.load(dout_ptr + o_main, mask=m_main, other=0.0).to(ACC)
        dx_branch, dx_sum = branch_backward(dx, branch_ptr, dbranch_ptr, gate_ptr, o_main, m_main, 0, D)
        branch_main += dx_branch
        dx_main += dx_sum
        if TAIL > 0:
            o_tail, m_tail = part(o_t, m_t, MAIN, TAIL, D)
            dx = tl.load(dout_ptr + o_tail, mask=m_tail, other=0.0).to(ACC)
            dx_branch, dx_sum = branch_backward(
                dx, branch_ptr, dbranch_ptr, gate_ptr, o_tail, m_tail, MAIN, D
            )
            branch_tail += dx_branch
            dx_tail += dx_sum
        dout_ptr += ROWS * D
        branch_ptr += ROWS * D
        dbranch_ptr += ROWS * D

    # partial is (2, B, SPLITS, D): d_gate, then the bias gradient's shares.
    partial_ptr += (b * SPLITS + split) * D
    stride_sum = tl.cast(B, tl.int64) * SPLITS * D
    store_gate_sums(partial_ptr, stride_sum, branch_main, dx_main, gate_ptr, bias_ptr, 0, MAIN, D)
    if TAIL > 0:
        store_gate_sums(partial_ptr, stride_sum, branch_tail, dx_tail, gate_ptr, bias_ptr, MAIN, TAIL, D)


def _residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    B, T, D = x.shape
    x, branch, gate = x.contiguous(), branch.contiguous(), as_vectors(gate)
    out = torch.empty_like(x)
    cfg = tuned_rows(_gated_residual_fwd_kernel, x, branch)
    launch(
        _gated_residual_fwd_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        x_ptr=x, branch_ptr=branch, gate_ptr=gate, bias_ptr=as_bias(bias), out_ptr=out,
        T=T, stride_gate=gate.stride(0),
        D=D, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip
    return out


def _residual_reference(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    return reference.gated_residual(x, branch, gate, bias).contiguous()


def _residual_fake(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _residual_backward(
    dout: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d_branch, d_gate (B, D), d_bias (D,), empty without a bias."""
    B, T, D = dout.shape
    dout, branch, gate = dout.contiguous(), branch.contiguous(), as_vectors(gate)
    dbranch = torch.empty_like(branch)
    cfg = tuned_rows(_gated_residual_bwd_kernel, dout, branch)
    partial = dout.new_empty(1 if bias is None else 2, B, cfg.splits, D, dtype=reference.accumulator(dout))
    launch(
        _gated_residual_bwd_kernel, (B * cfg.splits,), on=dout, num_warps=cfg.num_warps,
        dout_ptr=dout, branch_ptr=branch, gate_ptr=gate, bias_ptr=as_bias(bias),
        dbranch_ptr=dbranch, partial_ptr=partial,
        B=B, T=T, stride_gate=gate.stride(0),
        SPLITS=cfg.splits, D=D, **cfg.meta, ACC=accumulator(dout),
    )  # fmt: skip
    return dbranch, cast(partial[0].sum(1), gate.dtype), bias_gradient(partial[1:], bias, gate)


def bias_gradient(shares: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The sum of (1, B, SPLITS, D) shares over samples and splits; empty without a bias."""
    return like.new_empty(0) if bias is None else cast(shares[0].sum((0, 1)), bias.dtype)


def _residual_backward_fake(
    dout: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = gate.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape), dbias


def _residual_backward_reference(
    dout: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dbranch, dgate, dbias = reference.gated_residual_backward(dout, branch, gate, bias)
    return dbranch.contiguous(), dgate, dbias


_residual_backward_op = define_op(
    "gated_residual_backward",
    triton_impl=_residual_backward,
    reference_impl=_residual_backward_reference,
    fake=_residual_backward_fake,
)


def _residual_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate, bias = inputs
    ctx.save_for_backward(branch, gate, bias)


def _residual_autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, bias = ctx.saved_tensors
    dbranch, dgate, dbias = _residual_backward_op(dout, branch, gate, bias)
    return dout, dbranch, dgate, None if bias is None else dbias


_residual_op = define_op(
    "gated_residual",
    triton_impl=_residual,
    reference_impl=_residual_reference,
    fake=_residual_fake,
    backward=_residual_autograd,
    setup_context=_residual_context,
)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None = None, *, kernels: str = "auto"
) -> Tensor:
    """x + gate * (branch + bias).

    x, branch (B, T, D); gate (B, D); bias (D,) or None; returns (B, T, D) in the dtype of `x`.
    `kernels`: "auto", "triton" or "reference". Raises ValueError for shapes that do not fit.
    """
    if not uses_triton(kernels, x):
        return reference.gated_residual(x, branch, gate, bias)
    check_residual("gated_residual", x, branch, bias, gate=gate)
    return _residual_op(x, branch, gate, bias)


def check_residual(op: str, x: Tensor, branch: Tensor, bias: Tensor | None, **vectors: Tensor) -> None:
    """ValueError naming the first argument of a gated operation that does not fit x."""
    B, T, D = check_shapes(op, x)
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        name: (vector, (B, D)) for name, vector in vectors.items()
    }
    if bias is not None:
        expected["bias"] = (bias, (D,))
    check_shapes(op, x, branch=(branch, (B, T, D)), **expected)
