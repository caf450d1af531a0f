"""SwiGLU: act = SiLU(g) * v, [g; v] = pre + bias, SiLU(g) = g * sigmoid(g).      (Shazeer 2020, equation 5)

Shapes    pre (..., 2 F), its rows the gate g and then the value v; bias (2 F,) or None; act (..., F).
Backward  with s = sigmoid(g): d_g = d_act * v * (s + g s (1 - s)), d_v = d_act * g s; d_pre = [d_g; d_v];
          d_bias = sum of d_pre over all rows. Only pre is saved: act can be recomputed in the same pass.
Tangents  act_t = (s + g s (1 - s)) g_t v + g s v_t, [g_t; v_t] = pre_t + bias_t, in one pass with act.
Traffic   in U = one (B, T, D) token tensor, F = 8/3 D: forward reads pre and writes act, 8 U; backward reads pre and
          d_act and writes d_pre, 13.3 U, and act on demand, 16 U.
Numerics  float32 (float64 for float64), one rounding at each store; rows are summed before they are rounded, in a
          fixed order that depends on the shape alone, without atomics.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.launch import (
    accumulator,
    as_bias,
    cast,
    cdiv,
    elementwise_launch,
    nothing_like,
    prepare,
)
from dit_fast.kernels.library import uses_triton
from dit_fast.kernels.mlp.activation import define_activation


@triton.jit
def _swiglu_fwd_kernel(
    # pointers
    pre_ptr,  # (N, 2 F) gates and values, without their bias
    bias_ptr,  # (2 F,), or None
    act_ptr,  # (N, F) activation
    # sizes
    N,  # rows
    F,  # features
    # meta
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK_F: tl.constexpr,  # columns of a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    blocks = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0)
    o_f = (pid % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    m_f = o_f < F
    row = (pid // blocks).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)[:, None]
    mask = (row + o_row < N) & m_f
    pre_ptr += row * 2 * F
    offsets = o_row * 2 * F + o_f
    g = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(ACC)
    v = tl.load(pre_ptr + F + offsets, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        g += tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(ACC)
        v += tl.load(bias_ptr + F + o_f, mask=m_f, other=0.0).to(ACC)
    act = g * tl.sigmoid(g) * v
    tl.store(act_ptr + row * F + o_row * F + o_f, act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    # pointers
    dact_ptr,  # (N, F) gradient of act
    pre_ptr,  # (N, 2 F) gates and values, without their bias
    bias_ptr,  # (2 F,), or None
    dpre_ptr,  # (N, 2 F) gradient of pre
    act_ptr,  # (N, F) activation, or None: not computed
    partial_ptr,  # (SPLITS, 2 F) in ACC: terms of d_bias, or None
    # sizes
    N,  # rows
    F,  # features
    # meta
    SPLITS: tl.constexpr,  # programs that share the rows of a block of columns
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK_F: tl.constexpr,  # columns of a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    blocks = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0)
    o_f = (pid % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    m_f = o_f < F
    split = (pid // blocks).to(tl.int64)
    share = tl.cdiv(tl.cdiv(N, ROWS), SPLITS) * ROWS
    if bias_ptr is not None:
        bias_g = tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(ACC)
        bias_v = tl.load(bias_ptr + F + o_f, mask=m_f, other=0.0).to(ACC)
    # One running sum for each value of the tile: rows meet once, after the loop.
    total_g = tl.zeros([ROWS, BLOCK_F], ACC)
    total_v = tl.zeros([ROWS, BLOCK_F], ACC)
    o_row = tl.arange(0, ROWS)[:, None]
    narrow, wide = o_row * F + o_f, o_row * 2 * F + o_f
    for start in range(0, share, ROWS):
        row = split * share + start
        mask = (row + o_row < N) & m_f
        dact = tl.load(dact_ptr + row * F + narrow, mask=mask, other=0.0).to(ACC)
        g = tl.load(pre_ptr + row * 2 * F + wide, mask=mask, other=0.0).to(ACC)
        v = tl.load(pre_ptr + row * 2 * F + F + wide, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            g += bias_g
            v += bias_v
        s = tl.sigmoid(g)
        silu = g * s
        dg = dact * v * (s + silu * (1.0 - s))
        dv = dact * silu
        total_g += dg
        total_v += dv
        tl.store(dpre_ptr + row * 2 * F + wide, dg.to(dpre_ptr.dtype.element_ty), mask=mask)
        tl.store(dpre_ptr + row * 2 * F + F + wide, dv.to(dpre_ptr.dtype.element_ty), mask=mask)
        if act_ptr is not None:
            tl.store(act_ptr + row * F + narrow, (silu * v).to(act_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        partial_ptr += split * 2 * F
        tl.store(partial_ptr + o_f, tl.sum(total_g, axis=0)[None, :], mask=m_f)
        tl.store(partial_ptr + F + o_f, tl.sum(total_v, axis=0)[None, :], mask=m_f)


@triton.jit
def _swiglu_dual_kernel(
    # pointers
    pre_ptr,  # (N, 2 F) gates and values, without their bias
    pre_t_ptr,  # (N, 2 F) their tangents
    bias_ptr,  # (2 F,), or None
    bias_t_ptr,  # (2 F,), or None
    act_ptr,  # (N, F) activation
    act_t_ptr,  # (N, F) its tangent
    # sizes
    N,  # rows
    F,  # features
    # meta
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK_F: tl.constexpr,  # columns of a tile
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    blocks = tl.cdiv(F, BLOCK_F)
    pid = tl.program_id(0)
    o_f = (pid % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    m_f = o_f < F
    row = (pid // blocks).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)[:, None]
    mask = (row + o_row < N) & m_f
    pre_ptr += row * 2 * F
    pre_t_ptr += row * 2 * F
    wide = o_row * 2 * F + o_f
    narrow = row * F + o_row * F + o_f
    g = tl.load(pre_ptr + wide, mask=mask, other=0.0).to(ACC)
    v = tl.load(pre_ptr + F + wide, mask=mask, other=0.0).to(ACC)
    g_t = tl.load(pre_t_ptr + wide, mask=mask, other=0.0).to(ACC)
    v_t = tl.load(pre_t_ptr + F + wide, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        g += tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(ACC)
        v += tl.load(bias_ptr + F + o_f, mask=m_f, other=0.0).to(ACC)
    if bias_t_ptr is not None:
        g_t += tl.load(bias_t_ptr + o_f, mask=m_f, other=0.0).to(ACC)
        v_t += tl.load(bias_t_ptr + F + o_f, mask=m_f, other=0.0).to(ACC)
    s = tl.sigmoid(g)
    silu = g * s
    act_t = (s + silu * (1.0 - s)) * g_t * v + silu * v_t
    tl.store(act_ptr + narrow, (silu * v).to(act_ptr.dtype.element_ty), mask=mask)
    tl.store(act_t_ptr + narrow, act_t.to(act_t_ptr.dtype.element_ty), mask=mask)


def plan_swiglu(on: Tensor, N: int, F: int) -> Callable[..., Tensor]:
    """run(pre, bias) of the activation for N rows of F gates and F values like `on`."""
    cfg = elementwise_launch(N, F, 8)
    start = prepare(
        _swiglu_fwd_kernel, (cdiv(N, cfg.rows) * cdiv(F, cfg.columns),), on=on, num_warps=cfg.num_warps,
        N=N, F=F, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip

    def run(pre: Tensor, bias: Tensor | None) -> Tensor:
        pre = pre.contiguous()
        act = pre.new_empty((*pre.shape[:-1], F))
        start(pre_ptr=pre, bias_ptr=as_bias(bias), act_ptr=act)
        return act

    return run


def plan_swiglu_backward(
    on: Tensor, N: int, F: int, activation: bool, bias_gradient: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """run(dact, pre, bias) -> (d_pre, act, d_bias), the last two empty unless asked for; sizes as in `plan_swiglu`."""
    # Five tiles: 8 rows of them are more than a thread's registers hold.
    cfg = elementwise_launch(N, F, 4)
    acc, empty = reference.accumulator(on), nothing_like(on)
    start = prepare(
        _swiglu_bwd_kernel, (cfg.splits * cdiv(F, cfg.columns),), on=on, num_warps=cfg.num_warps,
        N=N, F=F, SPLITS=cfg.splits, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip

    def run(dact: Tensor, pre: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        dact, pre = dact.contiguous(), pre.contiguous()
        dpre = torch.empty_like(pre)
        act = torch.empty_like(dact) if activation else empty
        like = pre if bias is None else bias
        partial = pre.new_empty((cfg.splits, 2 * F), dtype=acc) if bias_gradient else None
        start(
            dact_ptr=dact, pre_ptr=pre, bias_ptr=as_bias(bias), dpre_ptr=dpre,
            act_ptr=act if activation else None, partial_ptr=partial,
        )  # fmt: skip
        return dpre, act, like.new_empty(0) if partial is None else cast(partial.sum(0), like.dtype)

    return run


def plan_swiglu_dual(on: Tensor, N: int, F: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """run(pre, bias, pre_t, bias_t) -> (act, act_t); sizes as in `plan_swiglu`."""
    cfg = elementwise_launch(N, F, 4)
    start = prepare(
        _swiglu_dual_kernel, (cdiv(N, cfg.rows) * cdiv(F, cfg.columns),), on=on, num_warps=cfg.num_warps,
        N=N, F=F, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip

    def run(pre: Tensor, bias: Tensor | None, pre_t: Tensor, bias_t: Tensor | None) -> tuple[Tensor, Tensor]:
        pre, pre_t = pre.contiguous(), pre_t.contiguous()
        act = pre.new_empty((*pre.shape[:-1], F))
        act_t = torch.empty_like(act)
        start(
            pre_ptr=pre, pre_t_ptr=pre_t, bias_ptr=as_bias(bias), bias_t_ptr=as_bias(bias_t), act_ptr=act,
            act_t_ptr=act_t,
        )  # fmt: skip
        return act, act_t

    return run


_swiglu = define_activation("swiglu", plan_swiglu, plan_swiglu_backward, plan_swiglu_dual, parts=2)


def swiglu(pre: Tensor, bias: Tensor | None = None, *, kernels: str = "auto") -> Tensor:
    """SiLU(g) * v of [g; v] = pre + bias (Shazeer 2020, equation 5).

    pre (..., 2 F); bias (2 F,) or None; returns (..., F) in the dtype of `pre`. Saves `pre` for the backward pass,
    not the activation. `kernels`: "auto", "triton" or "reference". Raises ValueError for shapes that do not fit.
    """
    if not uses_triton(kernels, pre):
        return reference.swiglu(pre, bias)
    return _swiglu(pre, bias)
