"""Adaptive layer norm, the gated residual, and both in one pass.          (Peebles & Xie 2023, figure 3, adaLN-Zero)

Three operations: `adaln_modulate`, y = norm(x) * (1 + scale) + shift; `gated_residual`,
out = x + gate * (branch + bias); `gated_residual_adaln`, out and the modulated norm y of out.

Norm      a layer norm or, not CENTRED, an RMSNorm (Zhang & Sennrich 2019, equation 4): 0 for the mean, mean_D(x^2)
          for the variance and no mean_D(g) in the gradient; all else is the same.
Shapes    x, branch, out, y (B, T, D); gate, shift, scale (B, D), also strided views of one modulation tensor; bias
          (D,) or None.
Backward  with h = (x - mean) * rstd and g = dy * (1 + scale):
          d_x = rstd * (g - mean_D(g) - h * mean_D(g * h)), d_shift = sum_T(dy), d_scale = sum_T(dy * h).
          Of the gated residual d_x = d_out, d_branch = gate * d_x, d_gate = sum_T(d_x * (branch + bias)),
          d_bias = sum_B(gate * sum_T(d_x)). Of both, the norm's d_x at `out` is added to d_out: from that sum come
          d_branch, d_gate and d_bias.
Traffic   in token tensors, forward and backward: adaln_modulate 2 and 3; gated_residual 3 and 3; gated_residual_adaln
          4 and 6. Vectors and sums over tokens cost rows of D values a sample. Bound by memory.
Numerics  moments and sums in float32 (float64 for float64 input), one rounding at each store. y has the dtype of
          `scale`: under autocast x is float32 and y what the next linear layer takes; out has the dtype of x. Sums
          over tokens are partial sums added in a fixed order, without atomics: two runs agree to the bit. y and the
          moments of gated_residual_adaln are those of `out` as it is stored, so that the backward pass and a
          recomputation of y, which read it again, see what the forward pass saw.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import adaln_dual, reference
from dit_fast.kernels.device import (
    PLAIN,
    column_sum,
    first_token,
    load_part,
    load_rows,
    load_vector,
    main_part,
    moments,
    no_sum,
    of_rows,
    row_lanes,
    row_sums,
    split_tokens,
    store_part,
    store_rows,
    store_sum,
    tail_part,
)
from dit_fast.kernels.launch import accumulator, as_bias, as_vectors, cast, cdiv, prepare, tuned_rows
from dit_fast.kernels.library import Dual, Run, check_shapes, define_op, is_centred, uses_triton


@triton.jit
def modulate(x, mean, rstd, shift_ptr, scale_ptr, P: tl.constexpr):
    """(x - mean) * rstd * (1 + scale) + shift on one part; mean, rstd one value a row, as wide as x or one column."""
    scale, shift = load_vector(scale_ptr, P, x.dtype), load_vector(shift_ptr, P, x.dtype)
    return (x - mean) * rstd * (1 + scale) + shift


@triton.jit
def norm_gradient(
    dy_ptr,
    x_ptr,
    mean_ptr,
    scale_ptr,
    left,
    P: tl.constexpr,
    ACC: tl.constexpr,
    MODIFIER: tl.constexpr = PLAIN,
):
    """Of one part: dy, g = dy * (1 + scale), and x - mean."""
    dy = load_part(dy_ptr, left, P, ACC, MODIFIER)
    deviation = load_part(x_ptr, left, P, ACC, MODIFIER) - load_rows(mean_ptr, left, P)
    return dy, dy * (1 + load_vector(scale_ptr, P, ACC)), deviation


@triton.jit
def norm_sums(dy, g, deviation, rstd_ptr, left, dshift, dscale, P: tl.constexpr):
    """d_shift and d_scale with one part of a tile added; `row_lanes` of g and g * h."""
    h = deviation * load_rows(rstd_ptr, left, P)
    return dshift + column_sum(dy), dscale + column_sum(dy * h), row_lanes(g, P), row_lanes(g * h, P)


@triton.jit
def norm_means(g, gh, D: tl.constexpr, CENTRED: tl.constexpr):
    """mean_D(g) and mean_D(g * h) (ROWS,) of their `row_lanes`. Not CENTRED: 0 for mean_D(g)."""
    sum_g, sum_gh = row_sums(g, gh)
    mean_g, mean_gh = sum_g / D, sum_gh / D
    if not CENTRED:
        mean_g = tl.zeros_like(mean_gh)
    return mean_g, mean_gh


@triton.jit
def norm_backward(g, deviation, mean_g, mean_gh, rstd_ptr, left, P: tl.constexpr, CENTRED: tl.constexpr):
    """d_x = rstd * (g - mean_D(g) - h * mean_D(g * h)) of one part."""
    rstd = load_rows(rstd_ptr, left, P)
    away = deviation * (rstd * rstd * of_rows(mean_gh, P))
    if CENTRED:
        away += rstd * of_rows(mean_g, P)
    return g * rstd - away


@triton.jit
def _adaln_fwd_kernel(
    # pointers
    x_ptr,  # (B, T, D) residual stream
    shift_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    y_ptr,  # (B, T, D) modulated norm, dtype of scale
    mean_ptr,  # (B, T) in ACC
    rstd_ptr,  # (B, T) in ACC: 1 / deviation
    # sizes, strides
    T,  # tokens of a sample
    stride_shift,  # elements between the shifts of two samples
    stride_scale,  # elements between the scales of two samples
    # meta
    EPS: tl.constexpr,  # added to the variance
    CENTRED: tl.constexpr,  # whether the mean is subtracted: a layer norm, else an RMSNorm
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    b, start = first_token(tl.program_id(0), T, ROWS)
    left = T - start
    shift_ptr += b * stride_shift
    scale_ptr += b * stride_scale
    x_ptr += (b * T + start) * D
    y_ptr += (b * T + start) * D
    mean_ptr += b * T + start
    rstd_ptr += b * T + start

    main = load_part(x_ptr, left, MAIN, ACC)
    tail = main
    if TAIL.size > 0:
        tail = load_part(x_ptr, left, TAIL, ACC)
    mean, rstd = moments(main, tail, MAIN, TAIL, EPS, CENTRED)
    y = modulate(main, of_rows(mean, MAIN), of_rows(rstd, MAIN), shift_ptr, scale_ptr, MAIN)
    store_part(y_ptr, y, left, MAIN)
    if TAIL.size > 0:
        y = modulate(tail, of_rows(mean, TAIL), of_rows(rstd, TAIL), shift_ptr, scale_ptr, TAIL)
        store_part(y_ptr, y, left, TAIL)
    store_rows(mean_ptr, mean, left, MAIN)
    store_rows(rstd_ptr, rstd, left, MAIN)


@triton.jit
def _adaln_bwd_kernel(
    # pointers
    dy_ptr,  # (B, T, D) gradient of y
    x_ptr,  # (B, T, D) residual stream
    scale_ptr,  # (B, D)
    mean_ptr,  # (B, T) in ACC
    rstd_ptr,  # (B, T) in ACC: 1 / deviation
    dx_ptr,  # (B, T, D) gradient of x
    partial_ptr,  # (2, B, SPLITS, D) in ACC: d_shift and d_scale of each program's tokens
    # sizes, strides
    B,  # samples
    T,  # tokens of a sample
    stride_scale,  # elements between the scales of two samples
    # meta
    SPLITS: tl.constexpr,  # programs that share the tokens of a sample
    CENTRED: tl.constexpr,  # whether the mean is subtracted: a layer norm, else an RMSNorm
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    MAIN: tl.constexpr = main_part(D, ROWS, WARPS, EVEN)
    TAIL: tl.constexpr = tail_part(D, ROWS, WARPS, EVEN)
    pid = tl.program_id(0)
    b = tl.cast(pid // SPLITS, tl.int64)
    split = pid % SPLITS
    share = split_tokens(T, SPLITS, ROWS)
    scale_ptr += b * stride_scale
    dy_ptr += (b * T + split * share) * D
    x_ptr += (b * T + split * share) * D
    dx_ptr += (b * T + split * share) * D
    mean_ptr += b * T + split * share
    rstd_ptr += b * T + split * share
    dshift_main, dscale_main = no_sum(MAIN, ACC), no_sum(MAIN, ACC)
    if TAIL.size > 0:
        dshift_tail, dscale_tail = no_sum(TAIL, ACC), no_sum(TAIL, ACC)

    for start in range(split * share, tl.minimum((split + 1) * share, T), ROWS):
        left = T - start
        dy, g_main, x_main = norm_gradient(dy_ptr, x_ptr, mean_ptr, scale_ptr, left, MAIN, ACC)
        dshift_main, dscale_main, g, gh = norm_sums(
            dy, g_main, x_main, rstd_ptr, left, dshift_main, dscale_main, MAIN
        )
        if TAIL.size > 0:
            dy, g_tail, x_tail = norm_gradient(dy_ptr, x_ptr, mean_ptr, scale_ptr, left, TAIL, ACC)
            dshift_tail, dscale_tail, tail_g, tail_gh = norm_sums(
                dy, g_tail, x_tail, rstd_ptr, left, dshift_tail, dscale_tail, TAIL
            )
            g += tail_g
            gh += tail_gh
        mean_g, mean_gh = norm_means(g, gh, D, CENTRED)
        dx = norm_backward(g_main, x_main, mean_g, mean_gh, rstd_ptr, left, MAIN, CENTRED)
        store_part(dx_ptr, dx, left, MAIN)
        if TAIL.size > 0:
            dx = norm_backward(g_tail, x_tail, mean_g, mean_gh, rstd_ptr, left, TAIL, CENTRED)
            store_part(dx_ptr, dx, left, TAIL)
        dy_ptr += ROWS * D
        x_ptr += ROWS * D
        dx_ptr += ROWS * D
        mean_ptr += ROWS
        rstd_ptr += ROWS

    # partial is (2, B, SPLITS, D): d_shift, then d_scale.
    partial_ptr += (b * SPLITS + split) * D
    stride_sum = tl.cast(B, tl.int64) * SPLITS * D
    store_sum(partial_ptr, dshift_main, MAIN)
    store_sum(partial_ptr + stride_sum, dscale_main, MAIN)
    if TAIL.size > 0:
        store_sum(partial_ptr, dshift_tail, TAIL)
        store_sum(partial_ptr + stride_sum, dscale_tail, TAIL)


def _adaln_check(x: Tensor, shift: Tensor, scale: Tensor, *rest: Any) -> None:
    B, _, D = check_shapes("adaln_modulate", x)
    check_shapes("adaln_modulate", x, shift=(shift, (B, D)), scale=(scale, (B, D)))


def _adaln_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool) -> Run:
    B, T, _ = x.shape
    dtype, acc = scale.dtype, reference.accumulator(x)
    cfg = tuned_rows(_adaln_fwd_kernel, x, dtype)
    start = prepare(
        _adaln_fwd_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        T=T, EPS=eps, CENTRED=centred, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip

    def run(x: Tensor, shift: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, shift, scale = x.contiguous(), as_vectors(shift), as_vectors(scale)
        y = torch.empty_like(x, dtype=dtype)
        mean = x.new_empty((B, T), dtype=acc)
        rstd = torch.empty_like(mean)
        start(
            x_ptr=x, shift_ptr=shift, scale_ptr=scale, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
            stride_shift=shift.stride(0), stride_scale=scale.stride(0),
        )  # fmt: skip
        return y, mean, rstd

    return run


def _adaln_forward_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = reference.adaln_modulate(x, shift, scale, eps, centred)
    return y.contiguous(), *reference.moments(x, eps, centred)


def _adaln_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool) -> Run:
    B, T, D = x.shape
    cfg = tuned_rows(_adaln_bwd_kernel, x, dy.dtype, sums=2)
    dtype, acc, partials = scale.dtype, mean.dtype, (2, B, cfg.splits, D)
    start = prepare(
        _adaln_bwd_kernel, (B * cfg.splits,), on=x, num_warps=cfg.num_warps,
        B=B, T=T, SPLITS=cfg.splits, CENTRED=centred, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip

    def run(
        dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool
    ) -> tuple[Tensor, Tensor]:
        x, scale = x.contiguous(), as_vectors(scale)
        dx, partial = torch.empty_like(x), x.new_empty(partials, dtype=acc)
        start(
            dy_ptr=dy.contiguous(), x_ptr=x, scale_ptr=scale, mean_ptr=mean, rstd_ptr=rstd, dx_ptr=dx,
            partial_ptr=partial, stride_scale=scale.stride(0),
        )  # fmt: skip
        return dx, cast(partial.sum(2), dtype)

    return run


def _adaln_backward_reference(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """d_x and (2, B, D) = [d_shift, d_scale] in the dtype of `scale`."""
    dx, dshift, dscale = reference.adaln_modulate_backward(dy, x, scale, mean, rstd, centred)
    return dx.contiguous(), torch.stack([dshift, dscale])


_adaln_backward_op = define_op(
    "adaln_modulate_backward", plan=_adaln_backward, reference_impl=_adaln_backward_reference
)


def _adaln_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _, ctx.centred = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _adaln_autograd(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dmod = _adaln_backward_op.in_backward(ctx, None, dy, *ctx.saved_tensors, ctx.centred)
    dshift, dscale = dmod.unbind()
    return dx, cast(dshift, ctx.shift_dtype), dscale, None, None


def _adaln_dual_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool, x_t: Tensor, shift_t: Tensor | None,
    scale_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, rstd = _adaln_forward_reference(x, shift, scale, eps, centred)
    y_t = reference.modulated_tangent(x, scale, mean, rstd, centred, x_t, shift_t, scale_t)
    return y, mean, rstd, y_t.contiguous()


adaln_with_moments = define_op(
    "adaln_modulate",
    plan=_adaln_forward,
    reference_impl=_adaln_forward_reference,
    check=_adaln_check,
    backward=_adaln_autograd,
    setup_context=_adaln_setup_context,
    dual=Dual(_adaln_dual_reference, adaln_dual.plan_norm),
)
"""adaln_with_moments(x, shift, scale, eps, centred): the registered operation, which returns y and the moments of x.

The moments are mean and 1 / deviation (B, T) of each row; not centred (an RMSNorm), the mean is 0 and the deviation
that from 0. `adaln_from_moments` takes either.
"""


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    norm: str = "layernorm",
    kernels: str = "auto",
) -> Tensor:
    """norm(x) * (1 + scale) + shift, norm a layer norm or an RMSNorm without affine parameters.

    x (B, T, D); shift, scale (B, D), rows contiguous or strided; returns (B, T, D) in the dtype of `scale`.
    `norm`: "layernorm" or "rmsnorm"; `kernels`: "auto", "triton" or "reference". Raises ValueError for an unknown value
    and for shapes that do not fit.
    """
    if not uses_triton(kernels, x):
        return reference.adaln_modulate(x, shift, scale, eps, is_centred(norm))
    return adaln_with_moments(x, shift, scale, eps, is_centred(norm))[0]


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
    x_ptr,  # (B, T, D) residual stream
    branch_ptr,  # (B, T, D) output of attention or of the MLP
    gate_ptr,  # (B, D)
    bias_ptr,  # (D,) of the branch, or None
    out_ptr,  # (B, T, D) new residual stream, dtype of x
    # sizes, strides
    T,  # tokens of a sample
    stride_gate,  # elements between the gates of two samples
    # meta
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
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
    dout_ptr,  # (B, T, D) gradient of out
    branch_ptr,  # (B, T, D) output of attention or of the MLP
    gate_ptr,  # (B, D)
    bias_ptr,  # (D,) of the branch, or None
    dbranch_ptr,  # (B, T, D) gradient of the branch
    dgate_ptr,  # (B, SPLITS, D) in ACC: d_gate of each program's tokens
    dbias_ptr,  # (B, SPLITS, D) in ACC: terms of d_bias, or None
    # sizes, strides
    T,  # tokens of a sample
    stride_gate,  # elements between the gates of two samples
    # meta
    SPLITS: tl.constexpr,  # programs that share the tokens of a sample
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
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

    # The sums over this program's tokens, rows of (B, SPLITS, D).
    dgate_ptr += (b * SPLITS + split) * D
    if bias_ptr is not None:
        dbias_ptr += (b * SPLITS + split) * D
    store_gate_sums(dgate_ptr, dbias_ptr, branch_main, dx_main, gate_ptr, bias_ptr, MAIN)
    if TAIL.size > 0:
        store_gate_sums(dgate_ptr, dbias_ptr, branch_tail, dx_tail, gate_ptr, bias_ptr, TAIL)


def _residual_check(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> None:
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


def _residual_dual_reference(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None, x_t: Tensor, branch_t: Tensor,
    gate_t: Tensor | None, bias_t: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out_t = reference.gated_residual_tangent(branch, gate, bias, x_t, branch_t, gate_t, bias_t)
    return _residual_reference(x, branch, gate, bias), out_t.contiguous()


_residual_op = define_op(
    "gated_residual",
    plan=_residual,
    reference_impl=_residual_reference,
    check=_residual_check,
    backward=_residual_autograd,
    setup_context=_residual_context,
    dual=Dual(_residual_dual_reference, adaln_dual.plan_residual),
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


@triton.jit
def _store_stream(x_ptr, branch_ptr, bias_ptr, gate_ptr, out_ptr, left, P: tl.constexpr, ACC: tl.constexpr):
    """Store one part of the new residual stream; return it as it is stored, rounded, in ACC."""
    out = load_sum(x_ptr, branch_ptr, bias_ptr, gate_ptr, left, P, ACC).to(out_ptr.dtype.element_ty)
    store_part(out_ptr, out, left, P)
    return out.to(ACC)


@triton.jit
def _gated_residual_adaln_fwd_kernel(
    # pointers
    x_ptr,  # (B, T, D) residual stream
    branch_ptr,  # (B, T, D) output of attention or of the MLP
    gate_ptr,  # (B, D)
    shift_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    bias_ptr,  # (D,) of the branch, or None
    out_ptr,  # (B, T, D) new residual stream, dtype of x
    y_ptr,  # (B, T, D) modulated norm, dtype of scale
    mean_ptr,  # (B, T) in ACC, of out
    rstd_ptr,  # (B, T) in ACC: 1 / deviation of out
    # sizes, strides
    T,  # tokens of a sample
    stride_gate,  # elements between the gates of two samples
    stride_shift,  # elements between the shifts of two samples
    stride_scale,  # elements between the scales of two samples
    # meta
    EPS: tl.constexpr,  # added to the variance
    CENTRED: tl.constexpr,  # whether the mean is subtracted: a layer norm, else an RMSNorm
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
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
    dout_ptr,  # (B, T, D) gradient of out
    dy_ptr,  # (B, T, D) gradient of y
    out_ptr,  # (B, T, D) new residual stream, dtype of x
    branch_ptr,  # (B, T, D) output of attention or of the MLP
    gate_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    mean_ptr,  # (B, T) in ACC
    rstd_ptr,  # (B, T) in ACC: 1 / deviation
    bias_ptr,  # (D,) of the branch, or None
    dx_ptr,  # (B, T, D) gradient of x
    dbranch_ptr,  # (B, T, D) gradient of the branch
    partial_ptr,  # (3, B, SPLITS, D) in ACC: d_shift, d_scale and d_gate of each program's tokens
    dbias_ptr,  # (B, SPLITS, D) in ACC: terms of d_bias, or None
    # sizes, strides
    B,  # samples
    T,  # tokens of a sample
    stride_gate,  # elements between the gates of two samples
    stride_scale,  # elements between the scales of two samples
    # meta
    SPLITS: tl.constexpr,  # programs that share the tokens of a sample
    CENTRED: tl.constexpr,  # whether the mean is subtracted: a layer norm, else an RMSNorm
    D: tl.constexpr,  # columns of a row
    ROWS: tl.constexpr,  # rows of a tile
    WARPS: tl.constexpr,  # num_warps, which share the columns of a row
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token, so that no row is masked
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
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


def _residual_adaln_check(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, *_: Any
) -> None:
    check_residual("gated_residual_adaln", x, branch, bias, gate=gate, shift=shift, scale=scale)


def _residual_adaln_forward(
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


def _residual_adaln_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, y, and the mean and 1 / deviation (B, T) of each row of out."""
    out, y = reference.gated_residual_adaln(x, branch, gate, shift, scale, bias, eps, centred)
    return out.contiguous(), y.contiguous(), *reference.moments(out, eps, centred)


def _residual_adaln_backward(
    dout: Tensor, dy: Tensor, out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    bias: Tensor | None, centred: bool,
) -> Run:  # fmt: skip
    B, T, D = out.shape
    # An RMSNorm over a wider dtype than the branch's takes a few registers more, which spill at full height.
    sums = 4 if centred or out.dtype == branch.dtype else 5
    cfg = tuned_rows(_gated_residual_adaln_bwd_kernel, out, branch.dtype, dy.dtype, sums=sums)
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


def _residual_adaln_backward_reference(
    dout: Tensor, dy: Tensor, out: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    bias: Tensor | None, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d_x, d_branch, (3, B, D) = [d_shift, d_scale, d_gate] in the dtype of `scale`, and d_bias (D,) or empty."""
    dx, dbranch, dgate, dshift, dscale, dbias = reference.gated_residual_adaln_backward(
        dout, dy, out, branch, gate, scale, mean, rstd, bias, centred
    )
    return dx.contiguous(), dbranch.contiguous(), torch.stack([dshift, dscale, dgate.to(scale.dtype)]), dbias


_residual_adaln_backward_op = define_op(
    "gated_residual_adaln_backward",
    plan=_residual_adaln_backward,
    reference_impl=_residual_adaln_backward_reference,
)


def _residual_adaln_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, bias, _, ctx.centred = inputs
    out, _, mean, rstd = output
    ctx.save_for_backward(out, branch, gate, scale, mean, rstd, bias)
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _residual_adaln_autograd(
    ctx: Any, dout: Tensor | None, dy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    out, branch, gate, scale, mean, rstd, bias = ctx.saved_tensors
    # None for an output that is not used.
    dout = torch.zeros_like(out) if dout is None else dout
    dy = torch.zeros_like(out, dtype=scale.dtype) if dy is None else dy
    # The first gradient is looked at there, the second one here.
    plain = type(dy) is Tensor and not dy.is_neg()
    run = (
        functools.partial(_residual_adaln_backward_op.in_backward, ctx, None)
        if plain
        else _residual_adaln_backward_op
    )
    dx, dbranch, dmod, dbias = run(dout, dy, out, branch, gate, scale, mean, rstd, bias, ctx.centred)
    dshift, dscale, dgate = dmod.unbind()
    dshift, dgate = cast(dshift, ctx.shift_dtype), cast(dgate, gate.dtype)
    return dx, dbranch, dgate, dshift, dscale, None if bias is None else dbias, None, None


def _residual_adaln_dual_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, eps: float,
    centred: bool, x_t: Tensor, branch_t: Tensor, gate_t: Tensor | None, shift_t: Tensor | None,
    scale_t: Tensor | None, bias_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, y, mean, rstd = _residual_adaln_reference(x, branch, gate, shift, scale, bias, eps, centred)
    out_t = reference.gated_residual_tangent(branch, gate, bias, x_t, branch_t, gate_t, bias_t)
    y_t = reference.modulated_tangent(out, scale, mean, rstd, centred, out_t, shift_t, scale_t)
    return out, y, mean, rstd, out_t.contiguous(), y_t.contiguous()


gated_residual_adaln_with_moments = define_op(
    "gated_residual_adaln",
    plan=_residual_adaln_forward,
    reference_impl=_residual_adaln_reference,
    check=_residual_adaln_check,
    backward=_residual_adaln_autograd,
    setup_context=_residual_adaln_context,
    dual=Dual(_residual_adaln_dual_reference, adaln_dual.plan_residual_norm),
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
