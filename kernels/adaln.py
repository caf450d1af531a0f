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
    column_sum,
    every_other,
    interleave,
    load_vector,
    part,
    row_sum,
    row_sums,
    split_tokens,
    squared_deviation,
    store_vector,
    token_rows,
)  # fmt: skip
from dit_fast.kernels.launch import accumulator, as_vectors, cast, cdiv, launch, tuned_rows
from dit_fast.kernels.op import check_shapes, define_op, is_centred, uses_triton


@triton.jit
def modulate(x, mean, rstd, shift_ptr, scale_ptr, START: tl.constexpr, D: tl.constexpr):
    """(x - mean) * rstd * (1 + scale) + shift on one part of the columns."""
    shift = load_vector(shift_ptr, START, x.shape[1], D, x.dtype)
    scale = load_vector(scale_ptr, START, x.shape[1], D, x.dtype)
    return (x - mean) * rstd * (1 + scale) + shift


@triton.jit
def norm_backward_sums(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, o_t, m_t, START: tl.constexpr, SIZE: tl.constexpr,
    D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of one part: d_shift and d_scale (1, SIZE), and the sums of g and g * h (rows,)."""
    offsets, mask = part(o_t, m_t, START, SIZE, D)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACC)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    mean = tl.load(mean_ptr + o_t, mask=m_t, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + o_t, mask=m_t, other=0.0)[:, None]
    h = (x - mean) * rstd
    dshift, dscale = column_sum(dy), column_sum(dy * h)
    g = dy * (1 + load_vector(scale_ptr, START, SIZE, D, ACC))
    sum_g, sum_gh = row_sums(g, g * h)
    return dshift, dscale, sum_g, sum_gh


@triton.jit
def norm_backward_means(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, left, D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, ACC: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """First pass over a tile: d_shift and d_scale of both parts, and mean_D(g), mean_D(g * h) (ROWS,).

    The main part goes by even and odd rows, which halves the registers of a tile; the tail needs all rows at
    once for 128-bit accesses. `left` is the number of tokens from the tile's first on. Not CENTRED: 0 for mean_D(g).
    """
    dshift, dscale = tl.zeros([1, MAIN], ACC), tl.zeros([1, MAIN], ACC)
    even_g, even_gh = tl.zeros([ROWS // 2], ACC), tl.zeros([ROWS // 2], ACC)
    odd_g, odd_gh = even_g, even_gh
    for half in range(2):
        even_g, even_gh = odd_g, odd_gh
        o_t = half + 2 * tl.arange(0, ROWS // 2)
        half_shift, half_scale, odd_g, odd_gh = norm_backward_sums(
            dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, o_t, o_t < left, 0, MAIN, D, ACC
        )
        dshift += half_shift
        dscale += half_scale
    sum_g, sum_gh = interleave(even_g, odd_g), interleave(even_gh, odd_gh)
    if TAIL > 0:
        o_t = tl.arange(0, ROWS)
        tail_shift, tail_scale, tail_g, tail_gh = norm_backward_sums(
            dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, o_t, o_t < left, MAIN, TAIL, D, ACC
        )
        sum_g += tail_g
        sum_gh += tail_gh
    else:
        tail_shift, tail_scale = tl.zeros([1, 1], ACC), tl.zeros([1, 1], ACC)
    mean_g = sum_g / D if CENTRED else tl.zeros_like(sum_g)
    return dshift, dscale, tail_shift, tail_scale, mean_g, sum_gh / D


@triton.jit
def norm_backward(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, mean_g, mean_gh, o_t, m_t, START: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d_x = rstd * (g - mean_D(g) - h * mean_D(g * h)) of one part; mean_g, mean_gh (rows, 1).

    Reads the rows a second time, from the cache: keeping them from the first pass would spill registers. The
    cache modifier, the default one, keeps the compiler from merging the two loads.
    """
    offsets, mask = part(o_t, m_t, START, SIZE, D)
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0, cache_modifier=".ca").to(ACC)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0, cache_modifier=".ca").to(ACC)
    mean = tl.load(mean_ptr + o_t, mask=m_t, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + o_t, mask=m_t, other=0.0)[:, None]
    g = dy * (1 + load_vector(scale_ptr, START, SIZE, D, ACC))
    return rstd * (g - mean_g - (x - mean) * rstd * mean_gh)


@triton.jit
def _adaln_bwd_tile(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, dx_ptr, mean_g, mean_gh, o_t, m_t, START: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store d_x of one part."""
    dx = norm_backward(
        dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, mean_g, mean_gh, o_t, m_t, START, SIZE, D, ACC
    )
    offsets, mask = part(o_t, m_t, START, SIZE, D)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adaln_fwd_kernel(
    # pointers
    x_ptr, shift_ptr, scale_ptr, y_ptr, mean_ptr, rstd_ptr,
    # sizes, strides
    T, stride_shift, stride_scale,
    # meta
    EPS: tl.constexpr, CENTRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b, o_t, m_t = token_rows(tl.program_id(0), T, ROWS)
    shift_ptr += b * stride_shift
    scale_ptr += b * stride_scale
    x_ptr += b * T * D
    y_ptr += b * T * D
    mean_ptr += b * T
    rstd_ptr += b * T

    o_main, m_main = part(o_t, m_t, 0, MAIN, D)
    x_main = tl.load(x_ptr + o_main, mask=m_main, other=0.0).to(ACC)
    mean = row_sum(x_main)
    if TAIL > 0:
        o_tail, m_tail = part(o_t, m_t, MAIN, TAIL, D)
        x_tail = tl.load(x_ptr + o_tail, mask=m_tail, other=0.0).to(ACC)
        mean += row_sum(x_tail)
    mean = mean / D if CENTRED else tl.zeros_like(mean)
    variance = squared_deviation(x_main, mean, 0, MAIN, D)
    if TAIL > 0:
        variance += squared_deviation(x_tail, mean, MAIN, TAIL, D)
    rstd = 1 / tl.sqrt(variance / D + EPS)

    y = modulate(x_main, mean, rstd, shift_ptr, scale_ptr, 0, D)
    tl.store(y_ptr + o_main, y.to(y_ptr.dtype.element_ty), mask=m_main)
    if TAIL > 0:
        y = modulate(x_tail, mean, rstd, shift_ptr, scale_ptr, MAIN, D)
        tl.store(y_ptr + o_tail, y.to(y_ptr.dtype.element_ty), mask=m_tail)
    tl.store(mean_ptr + o_t[:, None], mean, mask=m_t[:, None])
    tl.store(rstd_ptr + o_t[:, None], rstd, mask=m_t[:, None])


@triton.jit
def _adaln_bwd_kernel(
    # pointers
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    # sizes, strides
    B, T, stride_scale,
    # meta
    SPLITS: tl.constexpr, CENTRED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    split = pid % SPLITS
    share = split_tokens(T, SPLITS, ROWS)
    scale_ptr += b * stride_scale
    dy_ptr += (b * T + split * share) * D
    x_ptr += (b * T + split * share) * D
    dx_ptr += (b * T + split * share) * D
    mean_ptr += b * T + split * share
    rstd_ptr += b * T + split * share
    dshift_main, dscale_main = tl.zeros([1, MAIN], ACC), tl.zeros([1, MAIN], ACC)
    dshift_tail, dscale_tail = tl.zeros([1, TAIL or 1], ACC), tl.zeros([1, TAIL or 1], ACC)

    for start in range(split * share, (split + 1) * share, ROWS):
        main_shift, main_scale, tail_shift, tail_scale, mean_g, mean_gh = norm_backward_means(
            dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, T - start, D, ROWS, MAIN, TAIL, ACC, CENTRED
        )
        dshift_main += main_shift
        dscale_main += main_scale
        dshift_tail += tail_shift
        dscale_tail += tail_scale
        for half in range(2):
            g, gh = every_other(mean_g, half), every_other(mean_gh, half)
            o_t = half + 2 * tl.arange(0, ROWS // 2)
            _adaln_bwd_tile(
                dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, dx_ptr, g, gh, o_t, o_t < T - start, 0, MAIN, D, ACC
            )  # fmt: skip
        if TAIL > 0:
            g, gh = mean_g[:, None], mean_gh[:, None]
            o_t = tl.arange(0, ROWS)
            _adaln_bwd_tile(
                dy_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, dx_ptr, g, gh, o_t, o_t < T - start, MAIN, TAIL, D, ACC
            )  # fmt: skip
        dy_ptr += ROWS * D
        x_ptr += ROWS * D
        dx_ptr += ROWS * D
        mean_ptr += ROWS
        rstd_ptr += ROWS

    # partial is (2, B, SPLITS, D): d_shift, then d_scale.
    partial_ptr += (b * SPLITS + split) * D
    stride_sum = tl.cast(B, tl.int64) * SPLITS * D
    store_vector(partial_ptr, dshift_main, 0, MAIN, D)
    store_vector(partial_ptr + stride_sum, dscale_main, 0, MAIN, D)
    if TAIL > 0:
        store_vector(partial_ptr, dshift_tail, MAIN, TAIL, D)
        store_vector(partial_ptr + stride_sum, dscale_tail, MAIN, TAIL, D)


def _forward(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    x, shift, scale = x.contiguous(), as_vectors(shift), as_vectors(scale)
    y = torch.empty_like(x, dtype=scale.dtype)
    mean = x.new_empty(B, T, dtype=reference.accumulator(x))
    rstd = torch.empty_like(mean)
    cfg = tuned_rows(_adaln_fwd_kernel, x, y)
    launch(
        _adaln_fwd_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        x_ptr=x, shift_ptr=shift, scale_ptr=scale, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
        T=T, stride_shift=shift.stride(0), stride_scale=scale.stride(0),
        EPS=eps, CENTRED=centred, D=D, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip
    return y, mean, rstd


def _forward_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y = reference.adaln_modulate(x, shift, scale, eps, centred)
    return y.contiguous(), *reference.moments(x, eps, centred)


def _forward_fake(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty(x.shape[:2], dtype=reference.accumulator(x))
    return x.new_empty(x.shape, dtype=scale.dtype), moments, torch.empty_like(moments)


def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """d_x and (2, B, D) = [d_shift, d_scale] in the dtype of `scale`."""
    B, T, D = x.shape
    dy, x, scale = dy.contiguous(), x.contiguous(), as_vectors(scale)
    dx = torch.empty_like(x)
    cfg = tuned_rows(_adaln_bwd_kernel, x, dy)
    partial = x.new_empty(2, B, cfg.splits, D, dtype=mean.dtype)
    launch(
        _adaln_bwd_kernel, (B * cfg.splits,), on=x, num_warps=cfg.num_warps,
        dy_ptr=dy, x_ptr=x, scale_ptr=scale, mean_ptr=mean, rstd_ptr=rstd, dx_ptr=dx, partial_ptr=partial,
        B=B, T=T, stride_scale=scale.stride(0),
        SPLITS=cfg.splits, CENTRED=centred, D=D, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip
    return dx, cast(partial.sum(2), scale.dtype)


def _backward_reference(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    dx, dshift, dscale = reference.adaln_modulate_backward(dy, x, scale, mean, rstd, centred)
    return dx.contiguous(), torch.stack([dshift, dscale])


def _backward_fake(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(2, *scale.shape)


_backward_op = define_op(
    "adaln_modulate_backward",
    triton_impl=_backward,
    reference_impl=_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _, ctx.centred = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.shift_dtype = shift.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _autograd(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dmod = _backward_op(dy, *ctx.saved_tensors, ctx.centred)
    return dx, cast(dmod[0], ctx.shift_dtype), dmod[1], None, None


_forward_op = define_op(
    "adaln_modulate",
    triton_impl=_forward,
    reference_impl=_forward_reference,
    fake=_forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
)


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
    return adaln_with_moments(x, shift, scale, eps, norm)[0]


def adaln_with_moments(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: str = "layernorm"
) -> tuple[Tensor, Tensor, Tensor]:
    """`adaln_modulate` by the registered operation, and mean and 1 / deviation (B, T) of the rows of x.

    Of an RMSNorm the mean is 0 and the deviation that from 0: `adaln_from_moments` takes either.
    """
    B, _, D = check_shapes("adaln_modulate", x)
    check_shapes("adaln_modulate", x, shift=(shift, (B, D)), scale=(scale, (B, D)))
    return _forward_op(x, shift, scale, eps, is_centred(norm))
