"""Layers that keep how their input was made instead of the input: y = norm(x) * (1 + scale) + shift once more.

Shapes    x, y (B, T, D); mean, rstd (B, T); shift, scale (B, D), also strided views.
Traffic   `adaln_from_moments` reads x and writes y in the backward pass, 2 token tensors a norm; in exchange y is not
          kept between the passes. x is the residual stream, which the norm's own backward keeps anyway.
Numerics  the same expression on the same x and moments as in the forward pass.
"""

from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.adaln import modulate
from dit_fast.kernels.device import first_token, load_part, load_rows, main_part, store_part, tail_part
from dit_fast.kernels.launch import accumulator, as_vectors, cdiv, prepare, tuned_rows
from dit_fast.kernels.library import Run, define_op


class NormRecipe(NamedTuple):
    """What y = norm(x) * (1 + scale) + shift is made of: x (B, T, D), mean and rstd (B, T), shift, scale (B, D)."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    shift: Tensor
    scale: Tensor


@triton.jit
def _from_moments_part(
    x_ptr, mean_ptr, rstd_ptr, shift_ptr, scale_ptr, y_ptr, left, P: tl.constexpr, ACC: tl.constexpr
):
    """Store y of one part of the columns."""
    mean, rstd = load_rows(mean_ptr, left, P), load_rows(rstd_ptr, left, P)
    y = modulate(load_part(x_ptr, left, P, ACC), mean, rstd, shift_ptr, scale_ptr, P)
    store_part(y_ptr, y, left, P)


@triton.jit
def _adaln_from_moments_kernel(
    # pointers
    x_ptr,  # (B, T, D) residual stream
    mean_ptr,  # (B, T) in ACC
    rstd_ptr,  # (B, T) in ACC: 1 / deviation
    shift_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    y_ptr,  # (B, T, D) modulated norm, dtype of scale
    # sizes, strides
    T,  # tokens of a sample
    stride_shift,  # elements between the shifts of two samples
    stride_scale,  # elements between the scales of two samples
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
    shift_ptr += b * stride_shift
    scale_ptr += b * stride_scale
    x_ptr += (b * T + start) * D
    y_ptr += (b * T + start) * D
    mean_ptr += b * T + start
    rstd_ptr += b * T + start
    _from_moments_part(x_ptr, mean_ptr, rstd_ptr, shift_ptr, scale_ptr, y_ptr, left, MAIN, ACC)
    if TAIL.size > 0:
        _from_moments_part(x_ptr, mean_ptr, rstd_ptr, shift_ptr, scale_ptr, y_ptr, left, TAIL, ACC)


def _from_moments(x: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor) -> Run:
    B, T, _ = x.shape
    dtype = scale.dtype
    cfg = tuned_rows(_adaln_from_moments_kernel, x, dtype)
    start = prepare(
        _adaln_from_moments_kernel, (B * cdiv(T, cfg.rows),), on=x, num_warps=cfg.num_warps,
        T=T, **cfg.meta, ACC=accumulator(x),
    )  # fmt: skip

    def run(x: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x, shift, scale = x.contiguous(), as_vectors(shift), as_vectors(scale)
        y = torch.empty_like(x, dtype=dtype)
        start(
            x_ptr=x, mean_ptr=mean.contiguous(), rstd_ptr=rstd.contiguous(), shift_ptr=shift,
            scale_ptr=scale, y_ptr=y, stride_shift=shift.stride(0), stride_scale=scale.stride(0),
        )  # fmt: skip
        return y

    return run


adaln_from_moments = define_op(
    "adaln_from_moments", plan=_from_moments, reference_impl=reference.adaln_from_moments
)


class _RecomputingLinear(torch.autograd.Function):
    """F.linear on an input that is recomputed for the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, *recipe: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *recipe)
        return F.linear(y, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, *recipe = ctx.saved_tensors
        needs_y, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dout = dout.to(weight.dtype)
        rows = dout.flatten(0, 1)
        dy = dout @ weight if needs_y else None
        dweight = rows.t() @ adaln_from_moments(*recipe).flatten(0, 1) if needs_weight else None
        dbias = rows.sum(0) if needs_bias else None
        return dy, dweight, dbias, *[None] * len(recipe)


def linear(y: Tensor, weight: Tensor, bias: Tensor | None = None, recipe: NormRecipe | None = None) -> Tensor:
    """F.linear(y, weight, bias) that keeps `recipe` instead of `y` for the backward pass, when one is given.

    y (B, T, D); weight (F, D) and bias (F,) are cast to the dtype of y; `recipe` must be that of y, whose gradient
    goes through y alone. Chen et al. 2016, Training deep nets with sublinear memory cost.
    """
    value, tangent = fwAD.unpack_dual(y)
    if tangent is not None and all(w is None or fwAD.unpack_dual(w).tangent is None for w in (weight, bias)):
        # PyTorch multiplies y by the tangent of the weight as well, zeros, where it compiles.
        return fwAD.make_dual(
            linear(value, weight, bias, recipe), F.linear(tangent, weight.to(tangent.dtype))
        )
    if recipe is None:
        return F.linear(y, weight, bias)
    weight, bias = weight.to(y.dtype), None if bias is None else bias.to(y.dtype)
    if not torch.is_grad_enabled():
        return F.linear(y, weight, bias)
    # Detached: the gradient reaches them through y.
    return _RecomputingLinear.apply(y, weight, bias, *[part.detach() for part in recipe])
