"""GELU in its tanh form: act = v * sigmoid(2 u), v = pre + bias, u = sqrt(2 / pi) * (v + 0.044715 v^3).
                                         (Hendrycks & Gimpel 2016, section 2; 1 + tanh(u) = 2 sigmoid(2 u))

Shapes    pre, act (..., F); bias (F,) or None.
Backward  with s = sigmoid(2 u): d_pre = d_act * (s + 2 v s (1 - s) u'), u' = sqrt(2 / pi) * (1 + 0.134145 v^2);
          d_bias = sum of d_pre over all rows. Only pre is saved: act can be recomputed in the same pass.
Tangents  act_t = (s + 2 v s (1 - s) u') (pre_t + bias_t), in one pass with act.
Traffic   in U = one (B, T, D) token tensor, F = 4 D: forward reads pre and writes act, 8 U; backward reads pre and
          d_act and writes d_pre, 12 U, and act on demand, 16 U. In the epilogue of a GEMM (gemm.py) the same work
          writes pre, 4 U, and reads it again, 4 U (and 4 U to write act again).
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
def gelu_gate(v):
    """sigmoid(2 u): the fraction of v that passes, and twice the slope of u."""
    square = v * v
    gate = tl.sigmoid(1.5957691216057308 * v * (1.0 + 0.044715 * square))
    return gate, 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def gelu_value(v):
    """act = GELU(v)."""
    gate, _ = gelu_gate(v)
    return v * gate


@triton.jit
def gelu_value_and_slope(v):
    """GELU(v) and its derivative."""
    gate, slope = gelu_gate(v)
    return v * gate, gate + v * gate * (1.0 - gate) * slope


@triton.jit
def _gelu_fwd_kernel(
    # pointers
    pre_ptr,  # (N, F) pre-activation without its bias
    bias_ptr,  # (F,), or None
    act_ptr,  # (N, F) activation, may be pre itself
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
    row = (pid // blocks).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)[:, None]
    mask = (row + o_row < N) & (o_f < F)
    offsets = o_row * F + o_f
    v = tl.load(pre_ptr + row * F + offsets, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + o_f, mask=o_f < F, other=0.0).to(ACC)
    tl.store(act_ptr + row * F + offsets, gelu_value(v).to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    # pointers
    dact_ptr,  # (N, F) gradient of act
    pre_ptr,  # (N, F) pre-activation without its bias
    bias_ptr,  # (F,), or None
    dpre_ptr,  # (N, F) gradient of pre, may be dact itself
    act_ptr,  # (N, F) activation, or None: not computed
    partial_ptr,  # (SPLITS, F) in ACC: terms of d_bias, or None
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
        bias = tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(ACC)
    # One running sum for each value of the tile: rows meet once, after the loop.
    total = tl.zeros([ROWS, BLOCK_F], ACC)
    o_row = tl.arange(0, ROWS)[:, None]
    offsets = o_row * F + o_f
    for start in range(0, share, ROWS):
        row = split * share + start
        mask = (row + o_row < N) & m_f
        v = tl.load(pre_ptr + row * F + offsets, mask=mask, other=0.0).to(ACC)
        dact = tl.load(dact_ptr + row * F + offsets, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            v += bias
        act, slope = gelu_value_and_slope(v)
        dpre = dact * slope
        total += dpre
        tl.store(dpre_ptr + row * F + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        if act_ptr is not None:
            tl.store(act_ptr + row * F + offsets, act.to(act_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + split * F + o_f, tl.sum(total, axis=0)[None, :], mask=m_f)


@triton.jit
def _gelu_dual_kernel(
    # pointers
    pre_ptr,  # (N, F) pre-activation without its bias
    pre_t_ptr,  # (N, F) its tangent
    bias_ptr,  # (F,), or None
    bias_t_ptr,  # (F,), or None
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
    row = (pid // blocks).to(tl.int64) * ROWS
    o_row = tl.arange(0, ROWS)[:, None]
    mask = (row + o_row < N) & (o_f < F)
    offsets = o_row * F + o_f
    v = tl.load(pre_ptr + row * F + offsets, mask=mask, other=0.0).to(ACC)
    v_t = tl.load(pre_t_ptr + row * F + offsets, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + o_f, mask=o_f < F, other=0.0).to(ACC)
    if bias_t_ptr is not None:
        v_t += tl.load(bias_t_ptr + o_f, mask=o_f < F, other=0.0).to(ACC)
    act, slope = gelu_value_and_slope(v)
    tl.store(act_ptr + row * F + offsets, act.to(act_ptr.dtype.element_ty), mask=mask)
    tl.store(act_t_ptr + row * F + offsets, (slope * v_t).to(act_t_ptr.dtype.element_ty), mask=mask)


def plan_gelu(on: Tensor, N: int, F: int) -> Callable[..., Tensor]:
    """run(pre, bias, act=None) of GELU(pre + bias) for N rows of F columns like `on`.

    `act` is where to write, a contiguous tensor or `pre` itself (None: a new one).
    """
    cfg = elementwise_launch(N, F, 8)
    start = prepare(
        _gelu_fwd_kernel, (cdiv(N, cfg.rows) * cdiv(F, cfg.columns),), on=on, num_warps=cfg.num_warps,
        N=N, F=F, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip

    def run(pre: Tensor, bias: Tensor | None, act: Tensor | None = None) -> Tensor:
        pre = pre.contiguous()
        act = torch.empty_like(pre) if act is None else act
        start(pre_ptr=pre, bias_ptr=as_bias(bias), act_ptr=act)
        return act

    return run


def plan_gelu_backward(
    on: Tensor, N: int, F: int, activation: bool, bias_gradient: bool
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """run(dact, pre, bias, dpre=None) -> (d_pre, act, d_bias) for N rows of F columns like `on`.

    act and d_bias are empty unless asked for. `dpre` is where to write, a contiguous tensor or `dact` itself (None: a
    new one).
    """
    # Three tiles: with 8 rows only two programs would fit a multiprocessor.
    cfg = elementwise_launch(N, F, 4)
    acc, empty = reference.accumulator(on), nothing_like(on)
    start = prepare(
        _gelu_bwd_kernel, (cfg.splits * cdiv(F, cfg.columns),), on=on, num_warps=cfg.num_warps,
        N=N, F=F, SPLITS=cfg.splits, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip

    def run(
        dact: Tensor, pre: Tensor, bias: Tensor | None, dpre: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre = pre.contiguous()
        dpre = torch.empty_like(pre) if dpre is None else dpre
        act = torch.empty_like(pre) if activation else empty
        like = pre if bias is None else bias
        partial = pre.new_empty((cfg.splits, F), dtype=acc) if bias_gradient else None
        start(
            dact_ptr=dact.contiguous(), pre_ptr=pre, bias_ptr=as_bias(bias), dpre_ptr=dpre,
            act_ptr=act if activation else None, partial_ptr=partial,
        )  # fmt: skip
        return dpre, act, like.new_empty(0) if partial is None else cast(partial.sum(0), like.dtype)

    return run


def plan_gelu_dual(on: Tensor, N: int, F: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """run(pre, bias, pre_t, bias_t) -> (act, act_t) for N rows of F columns like `on`."""
    cfg = elementwise_launch(N, F, 4)
    start = prepare(
        _gelu_dual_kernel, (cdiv(N, cfg.rows) * cdiv(F, cfg.columns),), on=on, num_warps=cfg.num_warps,
        N=N, F=F, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip

    def run(pre: Tensor, bias: Tensor | None, pre_t: Tensor, bias_t: Tensor | None) -> tuple[Tensor, Tensor]:
        pre, pre_t = pre.contiguous(), pre_t.contiguous()
        act = torch.empty_like(pre)
        act_t = torch.empty_like(act)
        start(
            pre_ptr=pre, pre_t_ptr=pre_t, bias_ptr=as_bias(bias), bias_t_ptr=as_bias(bias_t), act_ptr=act,
            act_t_ptr=act_t,
        )  # fmt: skip
        return act, act_t

    return run


_gelu = define_activation("gelu", plan_gelu, plan_gelu_backward, plan_gelu_dual)


def gelu(pre: Tensor, bias: Tensor | None = None, *, kernels: str = "auto") -> Tensor:
    """GELU(pre + bias) in the tanh form of nn.GELU(approximate="tanh").

    pre (..., F); bias (F,) or None; returns (..., F) in the dtype of `pre`. Saves `pre` for the backward pass, not
    the activation. `kernels`: "auto", "triton" or "reference". Raises ValueError for shapes that do not fit.
    """
    if not uses_triton(kernels, pre):
        return reference.gelu(pre, bias)
    return _gelu(pre, bias)
