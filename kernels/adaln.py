"""Adaptive layer norm: y = norm(x) * (1 + scale) + shift.          (Peebles & Xie 2023, figure 3, adaLN)

Norm      a layer norm or, not CENTRED, an RMSNorm (Zhang & Sennrich 2019, equation 4): 0 for the mean, mean_D(x^2)
          for the variance and no mean_D(g) in the gradient; all else is the same.
Shapes    x (B, T, D); shift, scale (B, D), also strided views of one modulation tensor; y (B, T, D).
Backward  with h = (x - mean) * rstd and g = dy * (1 + scale):
          d_x = rstd * (g - mean_D(g) - h * mean_D(g * h)), d_shift = sum_T(dy), d_scale = sum_T(dy * h).
Traffic   forward reads x and writes y; backward reads dy and x and writes d_x, the sums over tokens cost
          2 * splits rows a sample. Bound by memory.
Numerics  moments and sums in float32 (float64 for float64 input), one rounding at each store. y has the dtype of
          `scale`: under autocast x is float32 and y what the next linear layer wants. Sums over tokens are partial
          sums added in a fixed order, without atomics: two runs agree to the bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.device import (
    PLAIN,
    column_sum,
    first_token,
    load_part,
    load_rows,
    load_vector,
    main_part,
    no_sum,
    of_rows,
    row_lanes,
    row_sums,
    split_tokens,
    store_part,
    store_rows,
    store_sum,
    tail_part,
)  # fmt: skip
from dit_fast.kernels.launch import accumulator, as_vectors, cast, cdiv, prepare, tuned_rows
from dit_fast.kernels.op import Run, check_shapes, define_op, is_centred, uses_triton


@triton.jit
def moments(main, tail, MAIN: tl.constexpr, TAIL: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr):
    """Mean and 1 / deviation (ROWS,) of the rows of a tile; not CENTRED: 0, and the deviation is that from 0.

    The variance is a second pass over registers: no cancellation.
    """
    mean = tl.full([MAIN.rows], 0.0, main.dtype)
    if CENTRED:
        total = row_lanes(main, MAIN)
        if TAIL.size > 0:
            total += row_lanes(tail, TAIL)
        mean = tl.sum(total, axis=1) / MAIN.width
    square = row_lanes(squared_deviation(main, mean, MAIN), MAIN)
    if TAIL.size > 0:
        square += row_lanes(squared_deviation(tail, mean, TAIL), TAIL)
    return mean, 1 / tl.sqrt(tl.sum(square, axis=1) / MAIN.width + EPS)


@triton.jit
def squared_deviation(x, mean, P: tl.constexpr):
    """(x - mean)^2, 0 beyond the last column."""
    deviation = x - of_rows(mean, P)
    if not P.exact:
        o_c = tl.arange(0, P.warps)[None, :, None, None] * P.own + P.start
        deviation = tl.where(o_c + tl.arange(0, P.size)[None, None, None, :] < P.width, deviation, 0.0)
    return deviation * deviation


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
    x_ptr, shift_ptr, scale_ptr, y_ptr, mean_ptr, rstd_ptr,
    # sizes, strides
    T, stride_shift, stride_scale,
    # meta
    EPS: tl.constexpr, CENTRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
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
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    # sizes, strides
    B, T, stride_scale,
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


def _check(x: Tensor, shift: Tensor, scale: Tensor, *rest: Any) -> None:
    B, _, D = check_shapes("adaln_modulate", x)
    check_shapes("adaln_modulate", x, shift=(shift, (B, D)), scale=(scale, (B, D)))


def _forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool) -> Run:
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


def _forward_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = reference.adaln_modulate(x, shift, scale, eps, centred)
    return y.contiguous(), *reference.moments(x, eps, centred)


def _backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool) -> Run:
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


def _backward_reference(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """d_x and (2, B, D) = [d_shift, d_scale] in the dtype of `scale`."""
    dx, dshift, dscale = reference.adaln_modulate_backward(dy, x, scale, mean, rstd, centred)
    return dx.contiguous(), torch.stack([dshift, dscale])


_backward_op = define_op("adaln_modulate_backward", plan=_backward, reference_impl=_backward_reference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _, ctx.centred = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dmod = _backward_op.in_backward(ctx, None, dy, *ctx.saved_tensors, ctx.centred)
    dshift, dscale = dmod.unbind()
    return dx, cast(dshift, ctx.shift_dtype), dscale, None, None


adaln_with_moments = define_op(
    "adaln_modulate",
    plan=_forward,
    reference_impl=_forward_reference,
    check=_check,
    backward=_autograd,
    setup_context=_setup_context,
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
    `norm`: "layernorm" or "rmsnorm"; `kernels`: "auto", "triton" or "reference". Raises ValueError for another word
    and for shapes that do not fit.
    """
    if not uses_triton(kernels, x):
        return reference.adaln_modulate(x, shift, scale, eps, is_centred(norm))
    return adaln_with_moments(x, shift, scale, eps, is_centred(norm))[0]
