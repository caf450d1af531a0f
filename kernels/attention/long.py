"""Attention over any number of tokens: tiles of queries against tiles of keys, online softmax.
                                                       (Milakov & Gimelshein 2018; Dao et al. 2022; Dao 2023)

Forward   a program owns a tile of queries and walks through the keys with a running maximum and sum.
Backward  two kernels without atomics. The first owns a tile of queries: delta = sum(d_out * (out - b_v)), which it
          leaves to the second, and d_q over all keys. The second owns a tile of keys: d_k, d_v and the terms of the
          bias gradients over all queries.
Traffic   with U = B * T * H * K elements and tiles of a head sharing the cache: forward reads 3 U and writes U;
          backward reads 5 U and writes U, then reads 4 U and writes 2 U. Seven products where one kernel needs five.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference
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
    row_dot,
    sample_head_tile,
    store_bias_shares,
    store_head,
    subtract_bias,
    zeros_head,
)
from dit_fast.kernels.launch import accumulator, as_bias, capability, cast, cdiv, next_power_of_2, prepare
from dit_fast.kernels.library import Run


@triton.jit
def _attention_long_fwd_kernel(
    # pointers
    qkv_ptr,  # (B, T, 3 * H * K) packed projection, strided
    bias_ptr,  # (3 * H * K,) of the projection, or None
    out_ptr,  # (B, T, H * K)
    lse_ptr,  # (B, H, T) in ACC: log2 of each row's sum of exponentials
    # sizes, strides
    T,  # tokens of a sample
    H,  # heads
    stride_b8,  # elements between samples of qkv, over 8
    stride_t8,  # elements between tokens of qkv, over 8
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
    out_ptr += b * T * width + h * K
    lse_ptr += (b * H + h) * T
    bias_v_ptr = None
    lost = 0.0
    if bias_ptr is not None:
        bias_ptr += h * K
        bias_v_ptr = bias_ptr + 2 * width
        lost = not_finite(bias_ptr + width, K, MAIN, TAIL, ACC)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q, q_tail = load_queries(qkv_ptr, bias_ptr, o_m, T, stride_t8, K, MAIN, TAIL, EVEN, ACC)
    out, out_tail = zeros_head(BLOCK_M, MAIN, TAIL, ACC)
    largest = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    for start in tl.range(0, T, BLOCK_N, num_stages=STAGES):
        o_n = start + tl.arange(0, BLOCK_N)
        k, k_tail = load_head(qkv_ptr + width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        v, v_tail = load_head(qkv_ptr + 2 * width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        s = contract(q, q_tail, k, k_tail, TAIL, ACC)
        if not EVEN:
            s = tl.where((o_n < T)[None, :], s, float("-inf"))
        maximum = tl.maximum(largest, tl.max(s, axis=1) * (SCALE * LOG2E))
        # A row that is -inf so far must not become NaN: -inf - (-inf). A NaN that the maximum drops stays in the sum.
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        p = tl.exp2(s * (SCALE * LOG2E) - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(p, axis=1)
        out, out_tail = out * decay[:, None], out_tail * decay[:, None] if TAIL > 0 else out_tail
        out, out_tail = accumulate(out, out_tail, p.to(v.dtype), v, v_tail, TAIL, ACC)
        largest = maximum
    tl.store(lse_ptr + o_m, largest + tl.log2(total) + lost, mask=o_m < T)
    out, out_tail = out / total[:, None] + lost, out_tail / total[:, None] + lost
    out, out_tail = add_bias(bias_v_ptr, out, out_tail, K, MAIN, TAIL, ACC)
    store_head(out_ptr, out, out_tail, o_m, T, width8, K, MAIN, TAIL, EVEN)


@triton.jit
def _attention_long_bwd_queries_kernel(
    # pointers
    dout_ptr,  # (B, T, H * K) gradient of out
    qkv_ptr,  # (B, T, 3 * H * K) packed projection, strided
    bias_ptr,  # (3 * H * K,) of the projection, or None
    out_ptr,  # (B, T, H * K)
    lse_ptr,  # (B, H, T) in ACC: log2 of each row's sum of exponentials
    delta_ptr,  # (B, H, T) in ACC: sum(P * d_P) of each query
    dqkv_ptr,  # (B, T, 3 * H * K) gradient of qkv, contiguous
    # sizes, strides
    T,  # tokens of a sample
    H,  # heads
    stride_b8,  # elements between samples of qkv, over 8
    stride_t8,  # elements between tokens of qkv, over 8
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
    dqkv_ptr += b * T * (3 * width) + h * K
    dout_ptr += b * T * width + h * K
    out_ptr += b * T * width + h * K
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    bias_v_ptr = None
    lost = 0.0
    if bias_ptr is not None:
        bias_ptr += h * K
        bias_v_ptr = bias_ptr + 2 * width
        lost = not_finite(bias_v_ptr, K, MAIN, TAIL, ACC)
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dout, dout_tail = load_head(dout_ptr, o_m, T, width8, K, MAIN, TAIL, EVEN)
    out, out_tail = load_head(out_ptr, o_m, T, width8, K, MAIN, TAIL, EVEN)
    out, out_tail = subtract_bias(bias_v_ptr, out, out_tail, K, MAIN, TAIL, ACC)
    delta = row_dot(dout, dout_tail, out, out_tail, TAIL, ACC) + lost
    tl.store(delta_ptr + o_m, delta, mask=o_m < T)
    lse = tl.load(lse_ptr + o_m, mask=o_m < T, other=0.0)
    q, q_tail = load_queries(qkv_ptr, bias_ptr, o_m, T, stride_t8, K, MAIN, TAIL, EVEN, ACC)
    dq, dq_tail = zeros_head(BLOCK_M, MAIN, TAIL, ACC)
    for start in tl.range(0, T, BLOCK_N, num_stages=STAGES):
        o_n = start + tl.arange(0, BLOCK_N)
        k, k_tail = load_head(qkv_ptr + width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        v, v_tail = load_head(qkv_ptr + 2 * width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        p = tl.exp2(contract(q, q_tail, k, k_tail, TAIL, ACC) * (SCALE * LOG2E) - lse[:, None])
        if not EVEN:
            p = tl.where((o_n < T)[None, :], p, 0.0)
        ds = p * (contract(dout, dout_tail, v, v_tail, TAIL, ACC) - delta[:, None])
        dq, dq_tail = accumulate(dq, dq_tail, ds.to(k.dtype), k, k_tail, TAIL, ACC)
    store_head(dqkv_ptr, dq * SCALE, dq_tail * SCALE, o_m, T, 3 * width8, K, MAIN, TAIL, EVEN)


@triton.jit
def _attention_long_bwd_keys_kernel(
    # pointers
    dout_ptr,  # (B, T, H * K) gradient of out
    qkv_ptr,  # (B, T, 3 * H * K) packed projection, strided
    bias_ptr,  # (3 * H * K,) of the projection, or None
    lse_ptr,  # (B, H, T) in ACC: log2 of each row's sum of exponentials
    delta_ptr,  # (B, H, T) in ACC: sum(P * d_P) of each query
    dqkv_ptr,  # (B, T, 3 * H * K) gradient of qkv, contiguous
    partial_ptr,  # (B, tiles of keys, 3 * H * K) in ACC: terms of d_bias; not written without a bias
    # sizes, strides
    T,  # tokens of a sample
    H,  # heads
    stride_b8,  # elements between samples of qkv, over 8
    stride_t8,  # elements between tokens of qkv, over 8
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
    dqkv_ptr += b * T * (3 * width) + h * K
    dout_ptr += b * T * width + h * K
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    if bias_ptr is not None:
        bias_ptr += h * K
        partial_ptr += (b * TILES + tile) * (3 * width) + h * K
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k, k_tail = load_head(qkv_ptr + width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
    v, v_tail = load_head(qkv_ptr + 2 * width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
    dk, dk_tail = zeros_head(BLOCK_N, MAIN, TAIL, ACC)
    dv, dv_tail = zeros_head(BLOCK_N, MAIN, TAIL, ACC)
    ds_sum = tl.zeros([BLOCK_N], ACC)
    for start in tl.range(0, T, BLOCK_M, num_stages=STAGES):
        o_m = start + tl.arange(0, BLOCK_M)
        q, q_tail = load_queries(qkv_ptr, bias_ptr, o_m, T, stride_t8, K, MAIN, TAIL, EVEN, ACC)
        dout, dout_tail = load_head(dout_ptr, o_m, T, width8, K, MAIN, TAIL, EVEN)
        lse = tl.load(lse_ptr + o_m, mask=o_m < T, other=0.0)
        p = tl.exp2(contract(k, k_tail, q, q_tail, TAIL, ACC) * (SCALE * LOG2E) - lse[None, :])
        if not EVEN:
            p = tl.where((o_n < T)[:, None] & (o_m < T)[None, :], p, 0.0)
        dv, dv_tail = accumulate(dv, dv_tail, p.to(k.dtype), dout, dout_tail, TAIL, ACC)
        delta = tl.load(delta_ptr + o_m, mask=o_m < T, other=0.0)
        ds = p * (contract(v, v_tail, dout, dout_tail, TAIL, ACC) - delta[None, :])
        ds_sum += tl.sum(ds, axis=1)
        dk, dk_tail = accumulate(dk, dk_tail, ds.to(k.dtype), q, q_tail, TAIL, ACC)
    dk, dk_tail = dk * SCALE, dk_tail * SCALE
    store_head(dqkv_ptr + width, dk, dk_tail, o_n, T, 3 * width8, K, MAIN, TAIL, EVEN)
    store_head(dqkv_ptr + 2 * width, dv, dv_tail, o_n, T, 3 * width8, K, MAIN, TAIL, EVEN)
    if bias_ptr is not None:
        store_bias_shares(
            partial_ptr, width, ds_sum * SCALE, k, k_tail, dk, dk_tail, dv, dv_tail, K, MAIN, TAIL, ACC
        )


@dataclass(frozen=True)
class LongLaunch:
    """Tiles of `block_m` queries and `block_n` keys on `num_warps` warps; `stages` of loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    stages: int


@functools.cache
def long_launch(kernel: str, dtype: torch.dtype, T: int, K: int, capability: int) -> LongLaunch:
    """The tile of `kernel` ("forward" | "queries" | "keys") on sm_<capability> (0 under the interpreter).

    A function of shape, dtype and architecture, so that the order of every sum is fixed on one machine.
    """
    most = max(next_power_of_2(T), 16)
    if capability == 0:
        # The interpreter's time goes with the number of tiles.
        return LongLaunch(min(256, most), min(128, most), 4, 1)
    if dtype.itemsize > 2:
        # Products of float32 and float64 run on the ordinary units, operands in registers: larger tiles of wider
        # heads spill, and 32 x 32 on 4 warps does. The backward kernels in float64 spill at K = 72 even so.
        side = min(32 if dtype.itemsize == 4 and head_parts(K).main < 128 else 16, most)
        return LongLaunch(side, side, 8, 1)
    if capability // 10 not in (9, 10):
        # Operands of mma.sync are in registers, beside the accumulators: more warps share them for wider heads.
        if kernel == "forward":
            return LongLaunch(128, 64 if K <= 96 else 32, 8, 2)
        return LongLaunch(32, 64, 8 if kernel == "keys" and K > 72 else 4, 2)
    if kernel == "forward":
        return LongLaunch(128, 64, 8, 2)
    return LongLaunch(64, 64, 4, 2) if kernel == "queries" else LongLaunch(64, 128 if K <= 80 else 64, 8, 2)


def _sizes(qkv: Tensor, num_heads: int, cfg: LongLaunch) -> dict[str, Any]:
    """Arguments of all three kernels."""
    _, T, packed = qkv.shape
    K = packed // (3 * num_heads)
    parts = head_parts(K)
    return {
        "T": T, "H": num_heads, 
        "SCALE": K**-0.5, "K": K, "MAIN": parts.main, "TAIL": parts.tail, "BLOCK_M": cfg.block_m,
        "BLOCK_N": cfg.block_n, "EVEN": T % cfg.block_m == 0 and T % cfg.block_n == 0, "STAGES": cfg.stages,
        "ACC": accumulator(qkv),
    }  # fmt: skip


def forward(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Run:
    """run(qkv, num_heads, bias) -> out (B, T, H * K) and lse (B, H, T) of packed qkv (B, T, 3 * H * K)."""
    B, T, packed = qkv.shape
    acc = reference.accumulator(qkv)
    cfg = long_launch("forward", qkv.dtype, T, packed // (3 * num_heads), capability(qkv))
    tiles = cdiv(T, cfg.block_m)
    start = prepare(
        _attention_long_fwd_kernel, (B * num_heads * tiles,), on=qkv, num_warps=cfg.num_warps,
        TILES=tiles, **_sizes(qkv, num_heads, cfg),
    )  # fmt: skip

    def run(qkv: Tensor, num_heads: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out = qkv.new_empty((B, T, packed // 3))
        lse = qkv.new_empty((B, num_heads, T), dtype=acc)
        qkv, strides = read_in_place(qkv)
        start(qkv_ptr=qkv, bias_ptr=as_bias(bias), out_ptr=out, lse_ptr=lse, **strides)
        return out, lse

    return run


def backward(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Run:
    """run(dout, qkv, num_heads, bias, out, lse) -> d_qkv, packed as qkv, and d_bias, empty without a bias."""
    B, T, packed = qkv.shape
    K = packed // (3 * num_heads)
    cfg = long_launch("queries", qkv.dtype, T, K, capability(qkv))
    tiles = cdiv(T, cfg.block_m)
    start_queries = prepare(
        _attention_long_bwd_queries_kernel, (B * num_heads * tiles,), on=qkv, num_warps=cfg.num_warps,
        TILES=tiles, **_sizes(qkv, num_heads, cfg),
    )  # fmt: skip
    cfg = long_launch("keys", qkv.dtype, T, K, capability(qkv))
    tiles = cdiv(T, cfg.block_n)
    shared = 0 if bias is None else tiles
    start_keys = prepare(
        _attention_long_bwd_keys_kernel, (B * num_heads * tiles,), on=qkv, num_warps=cfg.num_warps,
        TILES=tiles, **_sizes(qkv, num_heads, cfg),
    )  # fmt: skip

    def run(
        dout: Tensor, qkv: Tensor, num_heads: int, bias: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        dout, (qkv, strides) = dout.contiguous(), read_in_place(qkv)
        bias = as_bias(bias)
        dqkv = qkv.new_empty((B, T, packed))
        delta = torch.empty_like(lse)
        start_queries(
            dout_ptr=dout, qkv_ptr=qkv, bias_ptr=bias, out_ptr=out, lse_ptr=lse, delta_ptr=delta, dqkv_ptr=dqkv,
            **strides,
        )  # fmt: skip
        shares = lse.new_empty((B, shared, packed))
        start_keys(
            dout_ptr=dout, qkv_ptr=qkv, bias_ptr=bias, lse_ptr=lse, delta_ptr=delta, dqkv_ptr=dqkv, partial_ptr=shares,
            **strides,
        )  # fmt: skip
        return dqkv, shares.new_empty(0) if bias is None else cast(shares.sum((0, 1)), bias.dtype)

    return run
