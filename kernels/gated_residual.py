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
from dit_fast.kernels.device import (
    column_sum,
    first_token,
    load_part,
    load_vector,
    main_part,
    no_sum,
    split_tokens,
    store_part,
    store_sum,
    tail_part,
)  # fmt: skip
from dit_fast.kernels.launch import accumulator, as_bias, as_vectors, cast, cdiv, prepare, tuned_rows
from dit_fast.kernels.op import Run, check_shapes, define_op, uses_triton


@triton.jit
def load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, left, P: tl.constexpr, ACC: tl.constexpr):
    """x + gate * (branch + bias) on one part of the columns; bias_ptr None means no bias."""
    x, branch = load_part(x_ptr, left, P, ACC), load_part(branch_ptr, left, P, ACC)
    if bias_ptr is not None:
        branch += load_vector(bias_ptr, P, ACC)
    return x + load_vector(gate_ptr, P, ACC) * branch


@triton.jit
def branch_backward(dx, branch_ptr, dbranch_ptr, gate_ptr, left, dx_branch, dx_sum, P: tl.constexpr):
    """Store d_branch = gate * dx of one part; the sums over tokens of dx * branch and of dx with this tile added."""
    branch = load_part(branch_ptr, left, P, dx.dtype)
    store_part(dbranch_ptr, load_vector(gate_ptr, P, dx.dtype) * dx, left, P)
    return dx_branch + column_sum(dx * branch), dx_sum + column_sum(dx)


@triton.jit
def store_gate_sums(dgate_ptr, dbias_ptr, dx_branch, dx_sum, gate_ptr, bias_ptr, P: tl.constexpr):
    """Store d_gate = sum(dx * branch) + bias * sum(dx), and gate * sum(dx), a term of the bias gradient."""
    if bias_ptr is not None:
        dx_branch += load_vector(bias_ptr, P, dx_sum.dtype) * dx_sum
        store_sum(dbias_ptr, load_vector(gate_ptr, P, dx_sum.dtype) * dx_sum, P)
    store_sum(dgate_ptr, dx_branch, P)


@triton.jit
def _gated_residual_fwd_kernel(
    # pointers
    x_ptr, branch_ptr, gate_ptr, bias_ptr, out_ptr,
    # sizes, strides
    T, stride_gate,
    # meta
    D: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    b, start = first_token(tl.program_id(0), T, ROWS)
    left = T - start
    gate_ptr += b * stride_gate
    x_ptr += (b * T + start) * D
    branch_ptr += (b * T + start) * D
    out_ptr += (b * T + start) * D
    store_part(out_ptr, load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, left, MAIN, ACC), left, MAIN)
    if TAIL.size > 0:
        store_part(out_ptr, load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, left, TAIL, ACC), left, TAIL)


@triton.jit
def _gated_residual_bwd_kernel(
    # pointers
    dout_ptr, branch_ptr, gate_ptr, bias_ptr, dbranch_ptr, dgate_ptr, dbias_ptr,
    # sizes, strides
    T, stride_gate,
    # meta
    SPLITS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    pid = tl.program_id(0)
    b = tl.cast(pid // SPLITS, tl.int64)
    split = pid % SPLITS
    share = split_tokens(T, SPLITS, ROWS)
    gate_ptr += b * stride_gate
    dout_ptr += (b * T + split * share) * D
    branch_ptr += (b * T + split * share) * D
    dbranch_ptr += (b * T + split * share) * D
    branch_main, dx_main = no_sum(MAIN, ACC), no_sum(MAIN, ACC)
    if TAIL.size > 0:
        branch_tail, dx_tail = no_sum(TAIL, ACC), no_sum(TAIL, ACC)

    for start in range(split * share, tl.minimum((split + 1) * share, T), ROWS):
        left = T - start
        dx = load_part(dout_ptr, left, MAIN, ACC)
        branch_main, dx_main = branch_backward(
            dx, branch_ptr, dbranch_ptr, gate_ptr, left, branch_main, dx_main, MAIN
        )
        if TAIL.size > 0:
            dx = load_part(dout_ptr, left, TAIL, ACC)
            branch_tail, dx_tail = branch_backward(
                dx, branch_ptr, dbranch_ptr, gate_ptr, left, branch_tail, dx_tail, TAIL
            )
        dout_ptr += ROWS * D
        branch_ptr += ROWS * D
        dbranch_ptr += ROWS * D

    # The sums of this share of tokens, rows of (B, SPLITS, D).
    dgate_ptr += (b * SPLITS + split) * D
    if bias_ptr is not None:
        dbias_ptr += (b * SPLITS + split) * D
    store_gate_sums(dgate_ptr, dbias_ptr, branch_main, dx_main, gate_ptr, bias_ptr, MAIN)
    if TAIL.size > 0:
        store_gate_sums(dgate_ptr, dbias_ptr, branch_tail, dx_tail, gate_ptr, bias_ptr, TAIL)


def _check(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> None:
    check_residual("gated_residual", x, branch, bias, gate=gate)


def _residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Run:
    B, T, _ = x.shape
    cfg = tuned_rows(_gated_residual_fwd_kernel, x, branch.dtype)
    start = prepare(
        _gated_residual_fwd_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        T=T, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip

    def run(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
        x, gate = x.contiguous(), as_vectors(gate)
        out = torch.empty_like(x)
        start(
            x_ptr=x, branch_ptr=branch.contiguous(), gate_ptr=gate, bias_ptr=as_bias(bias), out_ptr=out,
            stride_gate=gate.stride(0),
        )  # fmt: skip
        return out

    return run


def _residual_reference(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    return reference.gated_residual(x, branch, gate, bias).contiguous()


def _residual_backward(dout: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> Run:
    B, T, D = dout.shape
    cfg = tuned_rows(_gated_residual_bwd_kernel, dout, branch.dtype, sums=2)
    dtype, acc, sums = gate.dtype, reference.accumulator(dout), (B, cfg.splits, D)
    start = prepare(
        _gated_residual_bwd_kernel, (B * cfg.splits,), on=dout, num_warps=cfg.num_warps,
        T=T, SPLITS=cfg.splits, **cfg.meta, ACC=accumulator(dout),
    )  # fmt: skip

    def run(dout: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        branch, gate = branch.contiguous(), as_vectors(gate)
        dbranch, dgate = torch.empty_like(branch), dout.new_empty(sums, dtype=acc)
        dbias = None if bias is None else torch.empty_like(dgate)
        start(
            dout_ptr=dout.contiguous(), branch_ptr=branch, gate_ptr=gate, bias_ptr=as_bias(bias),
            dbranch_ptr=dbranch, dgate_ptr=dgate, dbias_ptr=dbias, stride_gate=gate.stride(0),
        )  # fmt: skip
        return dbranch, cast(dgate.sum(1), dtype), bias_gradient(dbias, bias, gate)

    return run


def bias_gradient(sums: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """d_bias (D,), the sum of (B, SPLITS, D) sums in the dtype of `bias`; empty without a bias."""
    if sums is None or bias is None:
        return like.new_empty(0)
    return cast(sums.sum((0, 1)), bias.dtype)


def _residual_backward_reference(
    dout: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d_branch, d_gate (B, D), d_bias (D,), empty without a bias."""
    dbranch, dgate, dbias = reference.gated_residual_backward(dout, branch, gate, bias)
    return dbranch.contiguous(), dgate, dbias


_residual_backward_op = define_op(
    "gated_residual_backward", plan=_residual_backward, reference_impl=_residual_backward_reference
)


def _residual_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate, bias = inputs
    ctx.save_for_backward(branch, gate, bias)


def _residual_autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate, bias = ctx.saved_tensors
    dbranch, dgate, dbias = _residual_backward_op.in_backward(ctx, None, dout, branch, gate, bias)
    return dout, dbranch, dgate, None if bias is None else dbias


_residual_op = define_op(
    "gated_residual",
    plan=_residual,
    reference_impl=_residual_reference,
    check=_check,
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
