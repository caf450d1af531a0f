"""Attention on values and tangents, any number of tokens: tiles of queries against tiles of keys, online softmax.
                    (Lu & Song 2024, appendix F: the forward-mode derivative beside the running maximum and sum)

          S_t = (q_t k^T + q k_t^T) / sqrt(K), P_t = P (S_t - sum(P S_t)), out_t = P_t v + P v_t
Online    beside the sums of p and of p v run m, the mean of s_t so far, weighted by p, and the sum of
          p (s_t - m) v + p v_t, corrected by (m_old - m) times that of p v when a tile changes m. Where one key has all
          the weight, s_t - m is then 0 and not a difference of sums.
Bias      as in tiles.py: b_k and its tangent change each row of S and of S_t by a constant, which cancels; b_v is added
          to out, its tangent to out_t.
Traffic   with U = B * T * H * K elements and tiles of a head sharing the cache: 6 U read and 2 U written, twice those
          of the values alone. Six products where the values alone need two.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
from dit_fast.kernels.attention.long import LongLaunch
from dit_fast.kernels.attention.tiles import (
    LOG2E,
    accumulate,
    add_bias,
    contract,
    head_parts,
    load_head,
    load_queries,
    not_finite,
    read_in_place,
    sample_head_tile,
    store_head,
    zeros_head,
)
from dit_fast.kernels.launch import accumulator, as_bias, capability, cdiv, next_power_of_2, prepare
from dit_fast.kernels.library import Run


@triton.jit
def _attention_dual_kernel(
    # pointers
    qkv_ptr,  # (B, T, 3 * H * K) packed projection, strided
    qkv_t_ptr,  # (B, T, 3 * H * K) its tangent, strided
    bias_ptr,  # (3 * H * K,) of the projection, or None
    bias_t_ptr,  # (3 * H * K,), or None
    out_ptr,  # (B, T, H * K)
    out_t_ptr,  # (B, T, H * K) its tangent
    lse_ptr,  # (B, H, T) in ACC: log2 of each row's sum of exponentials
    # sizes, strides
    T,  # tokens of a sample
    H,  # heads
    stride_b8,  # elements between samples of qkv, over 8
    stride_t8,  # elements between tokens of qkv, over 8
    stride_b8_t,  # the same of the tangent
    stride_t8_t,  # the same of the tangent
    TILES,  # programs of a head
    # meta
    SCALE: tl.constexpr,  # 1 / sqrt(K)
    K: tl.constexpr,  # columns of a head
    MAIN: tl.constexpr,  # columns of the main part, a power of two
    TAIL: tl.constexpr,  # columns of the padded rest, or 0
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # keys of a tile
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token
    STAGES: tl.constexpr,  # tiles that are loaded ahead of their use, with the one in use
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    b, h, tile = sample_head_tile(H, TILES)
    width8 = H * (K // 8)
    width = width8 * 8
    qkv_ptr += b * stride_b8 * 8 + h * K
    qkv_t_ptr += b * stride_b8_t * 8 + h * K
    out_ptr += b * T * width + h * K
    out_t_ptr += b * T * width + h * K
    lse_ptr += (b * H + h) * T
    bias_v_ptr = None
    bias_v_t_ptr = None
    lost = 0.0
    lost_t = 0.0
    if bias_ptr is not None:
        bias_ptr += h * K
        bias_v_ptr = bias_ptr + 2 * width
        lost = not_finite(bias_ptr + width, K, MAIN, TAIL, ACC)
        lost_t = lost + not_finite(bias_v_ptr, K, MAIN, TAIL, ACC)
    if bias_t_ptr is not None:
        bias_t_ptr += h * K
        bias_v_t_ptr = bias_t_ptr + 2 * width
        lost_t += not_finite(bias_t_ptr + width, K, MAIN, TAIL, ACC)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, q_tail = load_queries(qkv_ptr, bias_ptr, o_m, T, stride_t8, K, MAIN, TAIL, EVEN, ACC)
    q_t, q_t_tail = load_queries(qkv_t_ptr, bias_t_ptr, o_m, T, stride_t8_t, K, MAIN, TAIL, EVEN, ACC)
    out, out_tail = zeros_head(BLOCK_M, MAIN, TAIL, ACC)
    out_t, out_t_tail = zeros_head(BLOCK_M, MAIN, TAIL, ACC)
    largest = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    mean = tl.zeros([BLOCK_M], ACC)
    for start in tl.range(0, T, BLOCK_N, num_stages=STAGES):
        o_n = start + tl.arange(0, BLOCK_N)
        k, k_tail = load_head(qkv_ptr + width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        k_t, k_t_tail = load_head(qkv_t_ptr + width, o_n, T, stride_t8_t, K, MAIN, TAIL, EVEN)
        s = contract(q, q_tail, k, k_tail, TAIL, ACC)
        s_t = contract(q_t, q_t_tail, k, k_tail, TAIL, ACC)
        s_t = (s_t + contract(q, q_tail, k_t, k_t_tail, TAIL, ACC)) * SCALE
        if not EVEN:
            s = tl.where((o_n < T)[None, :], s, float("-inf"))
            # A product of what is not finite with the zeros beyond the last key would be NaN.
            s_t = tl.where((o_n < T)[None, :], s_t, 0.0)
        maximum = tl.maximum(largest, tl.max(s, axis=1) * (SCALE * LOG2E))
        # A row that is -inf so far must not become NaN: -inf - (-inf). A NaN that the maximum drops stays in the sum.
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        p = tl.exp2(s * (SCALE * LOG2E) - shift[:, None])
        decay = tl.exp2(largest - shift)
        before = total * decay
        total = before + tl.sum(p, axis=1)
        # Nothing but -inf so far: no weight and no mean.
        mean_t = (before * mean + tl.sum(p * s_t, axis=1)) / tl.where(total == 0.0, 1.0, total)
        p_t = p * (s_t - mean_t[:, None])
        change = (mean - mean_t)[:, None]
        out_t = (out_t + change * out) * decay[:, None]
        out = out * decay[:, None]
        if TAIL > 0:
            out_t_tail = (out_t_tail + change * out_tail) * decay[:, None]
            out_tail = out_tail * decay[:, None]
        mean = mean_t
        v, v_tail = load_head(qkv_ptr + 2 * width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        v_t, v_t_tail = load_head(qkv_t_ptr + 2 * width, o_n, T, stride_t8_t, K, MAIN, TAIL, EVEN)
        p = p.to(v.dtype)
        out, out_tail = accumulate(out, out_tail, p, v, v_tail, TAIL, ACC)
        out_t, out_t_tail = accumulate(out_t, out_t_tail, p_t.to(v.dtype), v, v_tail, TAIL, ACC)
        out_t, out_t_tail = accumulate(out_t, out_t_tail, p, v_t, v_t_tail, TAIL, ACC)
        largest = maximum
    tl.store(lse_ptr + o_m, largest + tl.log2(total) + lost, mask=o_m < T)
    inverse = 1 / total[:, None]
    out, out_tail = out * inverse, out_tail * inverse
    out_t, out_t_tail = out_t * inverse + lost_t, out_t_tail * inverse + lost_t
    out, out_tail = add_bias(bias_v_ptr, out + lost, out_tail + lost, K, MAIN, TAIL, ACC)
    out_t, out_t_tail = add_bias(bias_v_t_ptr, out_t, out_t_tail, K, MAIN, TAIL, ACC)
    store_head(out_ptr, out, out_tail, o_m, T, width8, K, MAIN, TAIL, EVEN)
    store_head(out_t_ptr, out_t, out_t_tail, o_m, T, width8, K, MAIN, TAIL, EVEN)


@functools.cache
def dual_launch(itemsize: int, T: int, K: int, capability: int) -> LongLaunch:
    """The tile for elements of `itemsize` bytes on sm_<capability> (0 under the interpreter): as `long_launch`."""
    most = max(next_power_of_2(T), 16)
    if capability == 0:
        return LongLaunch(min(256, most), min(128, most), 4, 1)
    if itemsize > 2:
        # Products on the ordinary units, operands in registers; those of float64 spill even so.
        return LongLaunch(min(16, most), min(16, most), 8, 1)
    # Two accumulators for each of the scores and the outputs: what `long_launch` gives to one of each.
    return LongLaunch(64, 32, 4 if K <= 80 else 8, 2)


def plan(qkv: Tensor, num_heads: int) -> Run:
    """run(qkv, num_heads, bias, qkv_t, bias_t) -> out (B, T, H * K), lse (B, H, T) and out_t."""
    B, T, packed = qkv.shape
    width = packed // 3
    K = width // num_heads
    parts, acc = head_parts(K), reference.accumulator(qkv)
    cfg = dual_launch(qkv.itemsize, T, K, capability(qkv))
    tiles = cdiv(T, cfg.block_m)
    start = prepare(
        _attention_dual_kernel, (B * num_heads * tiles,), on=qkv, num_warps=cfg.num_warps,
        T=T, H=num_heads, TILES=tiles, SCALE=K**-0.5, K=K, MAIN=parts.main, TAIL=parts.tail,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, EVEN=T % cfg.block_m == 0 and T % cfg.block_n == 0,
        STAGES=cfg.stages, ACC=accumulator(qkv),
    )  # fmt: skip

    def run(
        qkv: Tensor, num_heads: int, bias: Tensor | None, qkv_t: Tensor, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, out_t = qkv.new_empty((B, T, width)), qkv.new_empty((B, T, width))
        lse = qkv.new_empty((B, num_heads, T), dtype=acc)
        (qkv, strides), (qkv_t, strides_t) = read_in_place(qkv), read_in_place(qkv_t)
        start(
            qkv_ptr=qkv, qkv_t_ptr=qkv_t, bias_ptr=as_bias(bias), bias_t_ptr=as_bias(bias_t), out_ptr=out,
            out_t_ptr=out_t, lse_ptr=lse, **strides, **{f"{name}_t": value for name, value in strides_t.items()},
        )  # fmt: skip
        return out, lse, out_t

    return run
