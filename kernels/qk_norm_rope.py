"""Queries and keys between their projection and attention: bias, norm of each head, rotary positions.

          x = qkv + bias,   q, k: n = x / sqrt(mean_K(x^2) + eps) * weight,   out = R n,   v: out = x
          (RMSNorm: Zhang & Sennrich 2019, equation 4; of queries and keys: Dehghani et al. 2023, section 2;
          R turns neighboring pairs by their token's angles: Su et al. 2021, equation 34)
Shapes    qkv, out (B, T, 3 * H * K), rows [q; k; v] of (H, K) each; bias (3 * H * K,) or None; weight (2, K), of
          queries and of keys, or None: no norm; rotation (B or 1, T, K / 2, 2), cosine and sine of a pair, or None.
Backward  with h = x * rstd and d = R^T d_out: d_weight = sum_BTH(d * h), g = d * weight,
          d_x = rstd * (g - h * mean_K(g * h)), d_bias = sum_BT(d_x). rstd is recomputed from qkv; without a norm
          d_x = d, and qkv is not kept. rotation is a constant.
Tangents  n_t = rstd * (x_t - h * mean_K(h * x_t)) * weight + h * weight_t, out_t = R n_t, in one pass with out.
Traffic   U = B * T * H * K: forward 6 U (qkv, out); backward 8 U (d_out, q and k, d_qkv), 6 U without a norm.
Numerics  float32 (float64 for float64), one rounding at the store, out in the dtype of qkv; sums over tokens are
          partial sums added in a fixed order, without atomics.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.attention.attention import MAX_HEAD_DIM, check_packed
from dit_fast.kernels.device import part, row_sum, split_tokens
from dit_fast.kernels.launch import accumulator, as_bias, cast, cdiv, prepare, recording, row_parts
from dit_fast.kernels.library import Dual, Run, check_tensors, define_op, uses_triton


@dataclass(frozen=True)
class HeadLaunch:
    """Tiles of `tokens` tokens of `heads` heads, `main` + `tail` columns each; backward, `splits` share a sample."""

    tokens: int
    heads: int
    main: int
    tail: int
    num_warps: int
    splits: int

    @property
    def meta(self) -> dict[str, int]:
        return {"TOKENS": self.tokens, "HEADS": self.heads, "MAIN": self.main, "TAIL": self.tail}


@functools.cache
def head_launch(batch: int, tokens: int, heads: int, head_dim: int, num_warps: int) -> HeadLaunch:
    """The launch for (batch, tokens, 3 * heads * head_dim) tensors: a function of the shape alone.

    A head's columns stay within one warp, some 40 values a thread. That makes the accesses to a tail of 8 columns 64
    bits wide in 16-bit dtypes; twice the rows would fill 128, and spill.
    """
    main, tail = row_parts(head_dim)
    rows = min(32, 1 << ((1280 // (main + tail)).bit_length() - 1)) * num_warps
    # Neighboring heads make memory contiguous; their number divides H, so that no row of a tile is idle.
    together = min(heads & -heads, 4)
    groups = 3 * heads // together
    tile = rows // together
    # About 16 programs for each of 132 multiprocessors; partial sums stay a few percent of the tokens' bytes.
    splits = min(cdiv(2048, max(batch * groups, 1)), max(cdiv(tokens, tile), 1))
    return HeadLaunch(tile, together, main, tail, num_warps, splits)


@triton.jit
def load_heads(
    qkv_ptr, bias_ptr, o_row, o_head, m_t, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """qkv + bias of one part of the columns of rows `o_row` of K columns; bias_ptr None means no bias."""
    offsets, mask = part(o_row, m_t, START, SIZE, K)
    x = tl.load(qkv_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        o_bias, _ = part(o_head, m_t, START, SIZE, K)
        x += tl.load(bias_ptr + o_bias, mask=mask, other=0.0).to(ACC)
    return x


@triton.jit
def turned(x, rotation_ptr, o_t, m_t, START: tl.constexpr, K: tl.constexpr, BACK: tl.constexpr):
    """Neighboring pairs of one part of the columns turned by the angles of tokens `o_t`; BACK: turned back."""
    offsets, mask = part(o_t, m_t, START, x.shape[1], K)
    rotation = tl.load(rotation_ptr + offsets, mask=mask, other=0.0).to(x.dtype)
    cos, sin = tl.split(tl.reshape(rotation, [x.shape[0], x.shape[1] // 2, 2]))
    if BACK:
        sin = -sin
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    pairs = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(pairs, [x.shape[0], x.shape[1]])


@triton.jit
def store_heads(ptr, x, o_row, m_t, START: tl.constexpr, K: tl.constexpr):
    """Store one part of the columns of rows `o_row`."""
    offsets, mask = part(o_row, m_t, START, x.shape[1], K)
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tile(
    qkv_ptr, bias_ptr, weight_ptr, rotation_ptr, out_ptr, o_row, o_head, o_t, m_t, EPS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store `out` of a tile of rows: one head of one token each."""
    x = load_heads(qkv_ptr, bias_ptr, o_row, o_head, m_t, 0, MAIN, K, ACC)
    if TAIL > 0:
        tail = load_heads(qkv_ptr, bias_ptr, o_row, o_head, m_t, MAIN, TAIL, K, ACC)
    if weight_ptr is not None:
        squares = row_sum(x * x)
        if TAIL > 0:
            squares += row_sum(tail * tail)
        rstd = 1 / tl.sqrt(squares / K + EPS)
        x = x * rstd * load_heads(weight_ptr, None, o_head // H, o_head, m_t, 0, MAIN, K, ACC)
        if TAIL > 0:
            tail = tail * rstd * load_heads(weight_ptr, None, o_head // H, o_head, m_t, MAIN, TAIL, K, ACC)
    if rotation_ptr is not None:
        x = turned(x, rotation_ptr, o_t, m_t, 0, K, False)
        if TAIL > 0:
            tail = turned(tail, rotation_ptr, o_t, m_t, MAIN, K, False)
    store_heads(out_ptr, x, o_row, m_t, 0, K)
    if TAIL > 0:
        store_heads(out_ptr, tail, o_row, m_t, MAIN, K)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    # pointers
    qkv_ptr,  # (B, T, 3 * H * K) packed projection
    bias_ptr,  # (3 * H * K,) of the projection, or None
    weight_ptr,  # (2, K) of the norms of queries and keys, or None: no norm
    rotation_ptr,  # (B or 1, T, K / 2, 2) cosines and sines, or None
    out_ptr,  # (B, T, 3 * H * K)
    # sizes, strides
    T,  # tokens of a sample
    stride_rotation,  # elements between the rotations of two samples, 0 where all share one
    # meta
    EPS: tl.constexpr,  # added to the mean square
    H: tl.constexpr,  # heads
    K: tl.constexpr,  # columns of a head
    TOKENS: tl.constexpr,  # tokens of a tile
    HEADS: tl.constexpr,  # heads of a tile
    MAIN: tl.constexpr,  # columns of the main part, a power of two
    TAIL: tl.constexpr,  # columns of the rest, or 0
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    pid = tl.program_id(0)
    # Groups of HEADS heads in the order of memory: queries', keys', values'.
    group = pid % (3 * H // HEADS)
    tile = pid // (3 * H // HEADS)
    tiles = tl.cdiv(T, TOKENS)
    b = (tile // tiles).to(tl.int64)
    o_t = (tile % tiles) * TOKENS + tl.arange(0, TOKENS * HEADS) // HEADS
    m_t = o_t < T
    o_head = group * HEADS + tl.arange(0, TOKENS * HEADS) % HEADS
    o_row = o_t * (3 * H) + o_head
    qkv_ptr += b * T * (3 * H * K)
    out_ptr += b * T * (3 * H * K)
    if rotation_ptr is not None:
        rotation_ptr += b * stride_rotation
    if group < 2 * H // HEADS:
        _forward_tile(
            qkv_ptr, bias_ptr, weight_ptr, rotation_ptr, out_ptr, o_row, o_head, o_t, m_t,
            EPS, H, K, MAIN, TAIL, ACC,
        )  # fmt: skip
    else:
        _forward_tile(
            qkv_ptr, bias_ptr, None, None, out_ptr, o_row, o_head, o_t, m_t, EPS, H, K, MAIN, TAIL, ACC
        )


@triton.jit
def _dual_tile(
    qkv_ptr, qkv_t_ptr, bias_ptr, bias_t_ptr, weight_ptr, weight_t_ptr, rotation_ptr, out_ptr, out_t_ptr, o_row,
    o_head, o_t, m_t, EPS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Store `out` and its tangent of a tile of rows: one head of one token each."""
    x = load_heads(qkv_ptr, bias_ptr, o_row, o_head, m_t, 0, MAIN, K, ACC)
    x_t = load_heads(qkv_t_ptr, bias_t_ptr, o_row, o_head, m_t, 0, MAIN, K, ACC)
    if TAIL > 0:
        tail = load_heads(qkv_ptr, bias_ptr, o_row, o_head, m_t, MAIN, TAIL, K, ACC)
        tail_t = load_heads(qkv_t_ptr, bias_t_ptr, o_row, o_head, m_t, MAIN, TAIL, K, ACC)
    if weight_ptr is not None:
        squares, along = row_sum(x * x), row_sum(x * x_t)
        if TAIL > 0:
            squares += row_sum(tail * tail)
            along += row_sum(tail * tail_t)
        rstd = 1 / tl.sqrt(squares / K + EPS)
        along = along * rstd / K
        x, x_t = _normed(x, x_t, rstd, along, weight_ptr, weight_t_ptr, o_head // H, m_t, 0, MAIN, K)
        if TAIL > 0:
            tail, tail_t = _normed(
                tail, tail_t, rstd, along, weight_ptr, weight_t_ptr, o_head // H, m_t, MAIN, TAIL, K
            )
    if rotation_ptr is not None:
        x = turned(x, rotation_ptr, o_t, m_t, 0, K, False)
        x_t = turned(x_t, rotation_ptr, o_t, m_t, 0, K, False)
        if TAIL > 0:
            tail = turned(tail, rotation_ptr, o_t, m_t, MAIN, K, False)
            tail_t = turned(tail_t, rotation_ptr, o_t, m_t, MAIN, K, False)
    store_heads(out_ptr, x, o_row, m_t, 0, K)
    store_heads(out_t_ptr, x_t, o_row, m_t, 0, K)
    if TAIL > 0:
        store_heads(out_ptr, tail, o_row, m_t, MAIN, K)
        store_heads(out_t_ptr, tail_t, o_row, m_t, MAIN, K)


@triton.jit
def _normed(
    x, x_t, rstd, along, weight_ptr, weight_t_ptr, o_norm, m_t, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """h * weight and its tangent on one part, h_t = rstd * (x_t - h * along) with along = mean_K(h * x_t)."""
    weight = load_heads(weight_ptr, None, o_norm, o_norm, m_t, START, SIZE, K, x.dtype)
    h = x * rstd
    n_t = rstd * (x_t - h * along) * weight
    if weight_t_ptr is not None:
        n_t += h * load_heads(weight_t_ptr, None, o_norm, o_norm, m_t, START, SIZE, K, x.dtype)
    return h * weight, n_t


@triton.jit
def _qk_norm_rope_dual_kernel(
    # pointers
    qkv_ptr,  # (B, T, 3 * H * K) packed projection
    qkv_t_ptr,  # (B, T, 3 * H * K) its tangent
    bias_ptr,  # (3 * H * K,) of the projection, or None
    bias_t_ptr,  # (3 * H * K,), or None
    weight_ptr,  # (2, K) of the norms of queries and keys, or None: no norm
    weight_t_ptr,  # (2, K), or None
    rotation_ptr,  # (B or 1, T, K / 2, 2) cosines and sines, or None
    out_ptr,  # (B, T, 3 * H * K)
    out_t_ptr,  # (B, T, 3 * H * K) its tangent
    # sizes, strides
    T,  # tokens of a sample
    stride_rotation,  # elements between the rotations of two samples, 0 where all share one
    # meta
    EPS: tl.constexpr,  # added to the mean square
    H: tl.constexpr,  # heads
    K: tl.constexpr,  # columns of a head
    TOKENS: tl.constexpr,  # tokens of a tile
    HEADS: tl.constexpr,  # heads of a tile
    MAIN: tl.constexpr,  # columns of the main part, a power of two
    TAIL: tl.constexpr,  # columns of the rest, or 0
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    pid = tl.program_id(0)
    # Groups of HEADS heads in the order of memory: queries', keys', values'.
    group = pid % (3 * H // HEADS)
    tile = pid // (3 * H // HEADS)
    tiles = tl.cdiv(T, TOKENS)
    b = (tile // tiles).to(tl.int64)
    o_t = (tile % tiles) * TOKENS + tl.arange(0, TOKENS * HEADS) // HEADS
    m_t = o_t < T
    o_head = group * HEADS + tl.arange(0, TOKENS * HEADS) % HEADS
    o_row = o_t * (3 * H) + o_head
    sample = b * T * (3 * H * K)
    qkv_ptr += sample
    qkv_t_ptr += sample
    out_ptr += sample
    out_t_ptr += sample
    if rotation_ptr is not None:
        rotation_ptr += b * stride_rotation
    if group < 2 * H // HEADS:
        _dual_tile(
            qkv_ptr, qkv_t_ptr, bias_ptr, bias_t_ptr, weight_ptr, weight_t_ptr, rotation_ptr, out_ptr, out_t_ptr, o_row,
            o_head, o_t, m_t, EPS, H, K, MAIN, TAIL, ACC,
        )  # fmt: skip
    else:
        _dual_tile(
            qkv_ptr, qkv_t_ptr, bias_ptr, bias_t_ptr, None, None, None, out_ptr, out_t_ptr, o_row, o_head, o_t, m_t,
            EPS, H, K, MAIN, TAIL, ACC,
        )  # fmt: skip


@triton.jit
def head_sum(x, HEADS: tl.constexpr):
    """(HEADS, SIZE) sums over the tokens of a tile."""
    return tl.sum(tl.reshape(x, [x.shape[0] // HEADS, HEADS, x.shape[1]]), axis=0)


@triton.jit
def store_sums(ptr, main, tail, o_head, K: tl.constexpr, TAIL: tl.constexpr):
    """Store the sums of a group of heads; ptr None: nowhere."""
    if ptr is not None:
        store_heads(ptr, main, o_head, o_head >= 0, 0, K)
        if TAIL > 0:
            store_heads(ptr, tail, o_head, o_head >= 0, main.shape[1], K)


@triton.jit
def _backward_share(
    dout_ptr, qkv_ptr, bias_ptr, weight_ptr, rotation_ptr, dqkv_ptr, dbias_ptr, dweight_ptr, first,
    last, T, group, EPS: tl.constexpr, H: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store d_qkv of tokens `first` to `last` of a group of heads, and the sums over these tokens."""
    o_head = group * HEADS + tl.arange(0, TOKENS * HEADS) % HEADS
    dbias, dweight = tl.zeros([HEADS, MAIN], ACC), tl.zeros([HEADS, MAIN], ACC)
    dbias_tail, dweight_tail = tl.zeros([HEADS, TAIL or 1], ACC), tl.zeros([HEADS, TAIL or 1], ACC)
    for start in range(first, last, TOKENS):
        o_t = start + tl.arange(0, TOKENS * HEADS) // HEADS
        m_t = o_t < T
        o_row = o_t * (3 * H) + o_head
        dx = load_heads(dout_ptr, None, o_row, o_head, m_t, 0, MAIN, K, ACC)
        if TAIL > 0:
            dtail = load_heads(dout_ptr, None, o_row, o_head, m_t, MAIN, TAIL, K, ACC)
        if rotation_ptr is not None:
            dx = turned(dx, rotation_ptr, o_t, m_t, 0, K, True)
            if TAIL > 0:
                dtail = turned(dtail, rotation_ptr, o_t, m_t, MAIN, K, True)
        if weight_ptr is not None:
            h = load_heads(qkv_ptr, bias_ptr, o_row, o_head, m_t, 0, MAIN, K, ACC)
            squares = row_sum(h * h)
            if TAIL > 0:
                h_tail = load_heads(qkv_ptr, bias_ptr, o_row, o_head, m_t, MAIN, TAIL, K, ACC)
                squares += row_sum(h_tail * h_tail)
            rstd = 1 / tl.sqrt(squares / K + EPS)
            h = h * rstd
            dweight += head_sum(dx * h, HEADS)
            dx = dx * load_heads(weight_ptr, None, o_head // H, o_head, m_t, 0, MAIN, K, ACC)
            mean = row_sum(dx * h)
            if TAIL > 0:
                h_tail = h_tail * rstd
                dweight_tail += head_sum(dtail * h_tail, HEADS)
                dtail = dtail * load_heads(weight_ptr, None, o_head // H, o_head, m_t, MAIN, TAIL, K, ACC)
                mean += row_sum(dtail * h_tail)
            mean /= K
            dx = rstd * (dx - h * mean)
            if TAIL > 0:
                dtail = rstd * (dtail - h_tail * mean)
        store_heads(dqkv_ptr, dx, o_row, m_t, 0, K)
        if dbias_ptr is not None:
            dbias += head_sum(dx, HEADS)
        if TAIL > 0:
            store_heads(dqkv_ptr, dtail, o_row, m_t, MAIN, K)
            if dbias_ptr is not None:
                dbias_tail += head_sum(dtail, HEADS)
    o_sum = group * HEADS + tl.arange(0, HEADS)
    store_sums(dbias_ptr, dbias, dbias_tail, o_sum, K, TAIL)
    store_sums(dweight_ptr, dweight, dweight_tail, o_sum, K, TAIL)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    # pointers
    dout_ptr,  # (B, T, 3 * H * K) gradient of out
    qkv_ptr,  # (B, T, 3 * H * K) packed projection
    bias_ptr,  # (3 * H * K,) of the projection, or None
    weight_ptr,  # (2, K) of the norms of queries and keys, or None: no norm
    rotation_ptr,  # (B or 1, T, K / 2, 2) cosines and sines, or None
    dqkv_ptr,  # (B, T, 3 * H * K) gradient of qkv
    dbias_ptr,  # (B * SPLITS, 3, H, K) in ACC: terms of d_bias, or None
    dweight_ptr,  # (B * SPLITS, 2, H, K) in ACC: terms of d_weight, or None
    # sizes, strides
    T,  # tokens of a sample
    stride_rotation,  # elements between the rotations of two samples, 0 where all share one
    # meta
    SPLITS: tl.constexpr,  # programs that share the tokens of a sample
    EPS: tl.constexpr,  # added to the mean square
    H: tl.constexpr,  # heads
    K: tl.constexpr,  # columns of a head
    TOKENS: tl.constexpr,  # tokens of a tile
    HEADS: tl.constexpr,  # heads of a tile
    MAIN: tl.constexpr,  # columns of the main part, a power of two
    TAIL: tl.constexpr,  # columns of the rest, or 0
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    pid = tl.program_id(0)
    group = pid % (3 * H // HEADS)
    share = (pid // (3 * H // HEADS)).to(tl.int64)
    b = share // SPLITS
    tokens = split_tokens(T, SPLITS, TOKENS)
    first = (share % SPLITS).to(tl.int32) * tokens
    dout_ptr += b * T * (3 * H * K)
    dqkv_ptr += b * T * (3 * H * K)
    # The sums over each program's tokens are a row: (3, H, K) of d_bias, (2, H, K) of the weights.
    if dbias_ptr is not None:
        dbias_ptr += share * (3 * H * K)
    if weight_ptr is not None:
        qkv_ptr += b * T * (3 * H * K)
        dweight_ptr += share * (2 * H * K)
    if rotation_ptr is not None:
        rotation_ptr += b * stride_rotation
    if group < 2 * H // HEADS:
        _backward_share(
            dout_ptr, qkv_ptr, bias_ptr, weight_ptr, rotation_ptr, dqkv_ptr, dbias_ptr, dweight_ptr,
            first, first + tokens, T, group, EPS, H, K, TOKENS, HEADS, MAIN, TAIL, ACC,
        )  # fmt: skip
    else:
        _backward_share(
            dout_ptr, None, None, None, None, dqkv_ptr, dbias_ptr, None,
            first, first + tokens, T, group, EPS, H, K, TOKENS, HEADS, MAIN, TAIL, ACC,
        )  # fmt: skip


def _samples(rotation: Tensor | None) -> tuple[Tensor | None, int]:
    """A rotation whose samples are contiguous, and the stride between them: 0 where all have the same."""
    if rotation is None or rotation.numel() == 0:
        return rotation, 0
    if rotation.shape[0] == 1 and rotation.is_contiguous():
        return rotation, 0
    rotation = rotation if rotation[0].is_contiguous() else rotation.contiguous()
    same = rotation.shape[0] == 1 or rotation.stride(0) == 0
    return (rotation[:1], 0) if same else (rotation, rotation.stride(0))


def _check(
    qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float
) -> None:  # fmt: skip
    op = "qk_norm_rope"
    check_tensors(op, qkv=qkv, bias=bias, weight=weight, rotation=rotation)
    K = check_packed(op, qkv, num_heads, bias)
    if K > MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {K} of qkv is beyond {MAX_HEAD_DIM}; use kernels='reference'")
    if weight is not None and (tuple(weight.shape) != (2, K) or eps <= 0):
        raise ValueError(
            f"{op}: weight is {tuple(weight.shape)} with eps {eps}, expected {(2, K)} and more than 0"
        )
    B, T, _ = qkv.shape
    if rotation is not None and tuple(rotation.shape) not in ((1, T, K / 2, 2), (B, T, K / 2, 2)):
        raise ValueError(f"{op}: rotation is {tuple(rotation.shape)}, expected ({B} or 1, {T}, {K} / 2, 2)")


def _forward(
    qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float
) -> Run:  # fmt: skip
    B, T, packed = qkv.shape
    K = packed // (3 * num_heads)
    cfg = head_launch(B, T, num_heads, K, 4)
    start = prepare(
        _qk_norm_rope_fwd_kernel, (B * cdiv(T, cfg.tokens) * (3 * num_heads // cfg.heads),), on=qkv,
        num_warps=cfg.num_warps,
        T=T,
        EPS=eps, H=num_heads, K=K, **cfg.meta, ACC=accumulator(qkv),
    )  # fmt: skip

    def run(
        qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float
    ) -> Tensor:  # fmt: skip
        qkv, (rotation, stride) = qkv.contiguous(), _samples(rotation)
        out = torch.empty_like(qkv)
        start(
            qkv_ptr=qkv, bias_ptr=as_bias(bias), weight_ptr=as_bias(weight), rotation_ptr=rotation,
            out_ptr=out, stride_rotation=stride,
        )  # fmt: skip
        return out

    return run


def _backward(
    dout: Tensor,
    qkv: Tensor | None,
    num_heads: int,
    bias: Tensor | None,
    weight: Tensor | None,
    rotation: Tensor | None,
    eps: float,
) -> Run:
    B, T, packed = dout.shape
    K = packed // (3 * num_heads)
    cfg = head_launch(B, T, num_heads, K, 1)
    acc, recorded = reference.accumulator(dout), recording()
    start = prepare(
        _qk_norm_rope_bwd_kernel, (B * cfg.splits * (3 * num_heads // cfg.heads),), on=dout,
        num_warps=cfg.num_warps,
        T=T,
        SPLITS=cfg.splits, EPS=eps, H=num_heads, K=K, **cfg.meta, ACC=accumulator(dout),
    )  # fmt: skip

    def run(
        dout: Tensor,
        qkv: Tensor | None,
        num_heads: int,
        bias: Tensor | None,
        weight: Tensor | None,
        rotation: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, (rotation, stride) = dout.contiguous(), _samples(rotation)
        dqkv = torch.empty_like(dout)
        # Rows are the (3, H, K) and (2, H, K) sums over each program's tokens.
        dbias = None if bias is None else dout.new_empty((B * cfg.splits, packed), dtype=acc)
        dweight = None if weight is None else dout.new_empty((B * cfg.splits, 2, num_heads, K), dtype=acc)
        if qkv is not None:
            qkv = qkv.contiguous()
            # The values' columns are not read: a recorded launch counts the bytes of its arguments.
            qkv = qkv[..., : 2 * num_heads * K] if recorded else qkv
        start(
            dout_ptr=dout, qkv_ptr=qkv, bias_ptr=as_bias(bias), weight_ptr=as_bias(weight),
            rotation_ptr=rotation, dqkv_ptr=dqkv, dbias_ptr=dbias, dweight_ptr=dweight, stride_rotation=stride,
        )  # fmt: skip
        return (
            dqkv,
            dout.new_empty(0) if dbias is None or bias is None else cast(dbias.sum(0), bias.dtype),
            dout.new_empty(0)
            if dweight is None or weight is None
            else cast(dweight.sum((0, 2)), weight.dtype),
        )

    return run


def _dual(
    qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float,
    *_: Any,
) -> Run:  # fmt: skip
    B, T, packed = qkv.shape
    K = packed // (3 * num_heads)
    cfg = head_launch(B, T, num_heads, K, 4)
    start = prepare(
        _qk_norm_rope_dual_kernel, (B * cdiv(T, cfg.tokens) * (3 * num_heads // cfg.heads),), on=qkv,
        num_warps=cfg.num_warps,
        T=T,
        EPS=eps, H=num_heads, K=K, **cfg.meta, ACC=accumulator(qkv),
    )  # fmt: skip

    def run(
        qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float,
        qkv_t: Tensor, bias_t: Tensor | None, weight_t: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        qkv, (rotation, stride) = qkv.contiguous(), _samples(rotation)
        out, out_t = torch.empty_like(qkv), torch.empty_like(qkv)
        start(
            qkv_ptr=qkv, qkv_t_ptr=qkv_t.contiguous(), bias_ptr=as_bias(bias), bias_t_ptr=as_bias(bias_t),
            weight_ptr=as_bias(weight), weight_t_ptr=as_bias(weight_t), rotation_ptr=rotation,
            out_ptr=out, out_t_ptr=out_t, stride_rotation=stride,
        )  # fmt: skip
        return out, out_t

    return run


def _dual_reference(
    qkv: Tensor, num_heads: int, bias: Tensor | None, weight: Tensor | None, rotation: Tensor | None, eps: float,
    qkv_t: Tensor, bias_t: Tensor | None, weight_t: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = qkv, num_heads, bias, weight, rotation, eps
    return reference.qk_norm_rope(*given), reference.qk_norm_rope_tangent(*given, qkv_t, bias_t, weight_t)


_backward_op = define_op(
    "qk_norm_rope_backward", plan=_backward, reference_impl=reference.qk_norm_rope_backward
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, bias, weight, rotation, ctx.eps = inputs
    # Without a norm the gradient does not depend on qkv.
    ctx.save_for_backward(None if weight is None else qkv, bias, weight, rotation)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias, weight, rotation = ctx.saved_tensors
    dqkv, dbias, dweight = _backward_op.in_backward(
        ctx, None, dout, qkv, ctx.num_heads, bias, weight, rotation, ctx.eps
    )
    return dqkv, None, None if bias is None else dbias, None if weight is None else dweight, None, None


_forward_op = define_op(
    "qk_norm_rope",
    plan=_forward,
    reference_impl=reference.qk_norm_rope,
    check=_check,
    backward=_autograd,
    setup_context=_context,
    dual=Dual(_dual_reference, _dual),
)


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    rotation: Tensor | None = None,
    eps: float = 1e-6,
    *,
    kernels: str = "auto",
) -> Tensor:
    """qkv + bias, its queries and keys normalized over each head's columns and turned by their token's angles.

    qkv (B, T, 3 * H * K) as a projection to [q; k; v], each (H, K), gives it, K up to 128; num_heads H; bias
    (3 * H * K,) or None; weight (2, K), of the RMSNorm (with `eps` > 0) of queries and of keys, or None: no norm;
    rotation (B or 1, T, K / 2, 2), cosine and sine of each neighboring pair's angle, or None; it gets no gradient.
    Returns (B, T, 3 * H * K) in the dtype of `qkv`. `kernels`: "auto", "triton" or "reference". Raises ValueError
    for arguments that do not fit.
    """
    if not uses_triton(kernels, qkv):
        return reference.qk_norm_rope(qkv, num_heads, bias, weight, rotation, eps)
    return _forward_op(qkv, num_heads, bias, weight, rotation, eps)
