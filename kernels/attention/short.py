"""Attention over at most 256 tokens: all keys of a head in one tile, a plain softmax, one kernel each way.

Forward   a program holds all keys and values of a head and walks through query tiles: scores, softmax, output.
Backward  a program owns a head. It holds a tile of keys with its d_k and d_v in registers and walks through the
          queries; all else is made where it is used (P from lse, delta = sum(P * d_P), d_S), so that d_q, d_k and d_v
          come out of one pass without atomics. Registers set the tile: at K = 72, d_k and d_v of 256 keys are 160 of a
          thread's 255 registers, and the scores beside them spill. Where the keys do not fit one tile, the program
          takes two, one after the other: d_q of the first stays in float32 scratch that no other program sees, and
          delta is sum(d_out * (out - b_v)).
Traffic   with U = B * T * H * K elements, forward reads 3 U and writes U; backward reads 4 U and writes 3 U. With two
          tiles of keys it reads out as well and passes U float32 through the scratch, and q and d_out a second time
          through the cache.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference, tuned
from dit_fast.kernels.attention.tiles import (
    LOG2E,
    accumulate,
    add_bias,
    add_head,
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
from dit_fast.kernels.launch import (
    accumulator,
    as_bias,
    capability,
    cast,
    cdiv,
    next_power_of_2,
    prepare,
    require_powers_of_two,
)
from dit_fast.kernels.library import Run

MOST_TOKENS = 256
WIDEST = 96


def runs_on(capability: int, dtype: torch.dtype, T: int, K: int) -> bool:
    """Whether these kernels are the ones for T tokens and heads of K on sm_<capability> (0 under the interpreter).

    wgmma (sm_90) and tcgen05 (sm_100) read their operands from shared or tensor memory. Elsewhere operands are in
    registers beside the scores of all keys, and spill; so do those of float32 and float64, and heads wider than 96.
    """
    built_for = capability // 10 in (9, 10) and dtype.itemsize == 2 and K <= WIDEST
    return (capability == 0 or built_for) and T <= MOST_TOKENS


@triton.jit
def _attention_short_fwd_kernel(
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
    STEPS: tl.constexpr,  # tiles of queries that a program walks through
    SCALE: tl.constexpr,  # 1 / sqrt(K)
    K: tl.constexpr,  # columns of a head
    MAIN: tl.constexpr,  # columns of the main part, a power of two
    TAIL: tl.constexpr,  # columns of the padded rest, or 0
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # keys, all of them in one tile
    EVEN: tl.constexpr,  # whether no tile reaches beyond the last token
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    b, h, tile = sample_head_tile(H, TILES)
    width8 = H * (K // 8)
    qkv_ptr += b * stride_b8 * 8 + h * K
    out_ptr += b * T * (width8 * 8) + h * K
    lse_ptr += (b * H + h) * T
    bias_v_ptr = None
    lost = 0.0
    if bias_ptr is not None:
        bias_ptr += h * K
        bias_v_ptr = bias_ptr + 2 * (width8 * 8)
        lost = not_finite(bias_ptr + width8 * 8, K, MAIN, TAIL, ACC)
    o_n = tl.arange(0, BLOCK_N)
    k, k_tail = load_head(qkv_ptr + width8 * 8, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
    v, v_tail = load_head(qkv_ptr + 2 * (width8 * 8), o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
    for step in tl.range(0, STEPS, num_stages=1, disable_licm=True):
        o_m = (tile * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        q, q_tail = load_queries(qkv_ptr, bias_ptr, o_m, T, stride_t8, K, MAIN, TAIL, EVEN, ACC)
        s = contract(q, q_tail, k, k_tail, TAIL, ACC)
        if not EVEN:
            s = tl.where((o_n < T)[None, :], s, float("-inf"))
        largest = tl.max(s, axis=1) * (SCALE * LOG2E)
        # A NaN that the maximum drops is in the sum of the row, and so in its output.
        p = tl.exp2(s * (SCALE * LOG2E) - largest[:, None])
        total = tl.sum(p, axis=1)
        tl.store(lse_ptr + o_m, largest + tl.log2(total) + lost, mask=o_m < T)
        out, out_tail = zeros_head(BLOCK_M, MAIN, TAIL, ACC)
        out, out_tail = accumulate(out, out_tail, p.to(v.dtype), v, v_tail, TAIL, ACC)
        out, out_tail = out / total[:, None] + lost, out_tail / total[:, None] + lost
        out, out_tail = add_bias(bias_v_ptr, out, out_tail, K, MAIN, TAIL, ACC)
        store_head(out_ptr, out, out_tail, o_m, T, width8, K, MAIN, TAIL, EVEN)


@triton.jit
def _attention_short_bwd_kernel(
    # pointers
    dout_ptr,  # (B, T, H * K) gradient of out
    qkv_ptr,  # (B, T, 3 * H * K) packed projection, strided
    bias_ptr,  # (3 * H * K,) of the projection, or None
    out_ptr,  # (B, T, H * K)
    lse_ptr,  # (B, H, T) in ACC: log2 of each row's sum of exponentials
    dqkv_ptr,  # (B, T, 3 * H * K) gradient of qkv, contiguous
    delta_ptr,  # (B, H, T) in ACC: sum(P * d_P) of each query
    scratch_ptr,  # (B, H, T, K) in ACC: d_q between two tiles of keys
    partial_ptr,  # (B, tiles of keys, 3 * H * K) in ACC: terms of d_bias; not written without a bias
    # sizes, strides
    T,  # tokens of a sample
    H,  # heads
    stride_b8,  # elements between samples of qkv, over 8
    stride_t8,  # elements between tokens of qkv, over 8
    # meta
    KEY_TILES: tl.constexpr,  # tiles of keys of a head
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
    b, h, _ = sample_head_tile(H, 1)
    dtype = qkv_ptr.dtype.element_ty
    width8 = H * (K // 8)
    width = width8 * 8
    qkv_ptr += b * stride_b8 * 8 + h * K
    dqkv_ptr += b * T * (3 * width) + h * K
    dout_ptr += b * T * width + h * K
    lse_ptr += (b * H + h) * T
    if KEY_TILES > 1:
        out_ptr += b * T * width + h * K
        scratch_ptr += (b * H + h) * T * K
        delta_ptr += (b * H + h) * T
    bias_v_ptr = None
    lost = 0.0
    if bias_ptr is not None:
        bias_ptr += h * K
        bias_v_ptr = bias_ptr + 2 * width
        partial_ptr += b * KEY_TILES * (3 * width) + h * K
        lost = not_finite(bias_v_ptr, K, MAIN, TAIL, ACC)
    if KEY_TILES > 1:
        for start in tl.range(0, T, BLOCK_M, num_stages=1):
            o_m = start + tl.arange(0, BLOCK_M)
            dout, dout_tail = load_head(dout_ptr, o_m, T, width8, K, MAIN, TAIL, EVEN)
            out, out_tail = load_head(out_ptr, o_m, T, width8, K, MAIN, TAIL, EVEN)
            out, out_tail = subtract_bias(bias_v_ptr, out, out_tail, K, MAIN, TAIL, ACC)
            delta = row_dot(dout, dout_tail, out, out_tail, TAIL, ACC) + lost
            tl.store(delta_ptr + o_m, delta, mask=o_m < T)
        tl.debug_barrier()
    for j in range(KEY_TILES):
        o_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        k, k_tail = load_head(qkv_ptr + width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        v, v_tail = load_head(qkv_ptr + 2 * width, o_n, T, stride_t8, K, MAIN, TAIL, EVEN)
        dk, dk_tail = zeros_head(BLOCK_N, MAIN, TAIL, ACC)
        dv, dv_tail = zeros_head(BLOCK_N, MAIN, TAIL, ACC)
        ds_sum = tl.zeros([BLOCK_N], ACC)
        for start in tl.range(0, T, BLOCK_M, num_stages=STAGES, disable_licm=True):
            o_m = start + tl.arange(0, BLOCK_M)
            q, q_tail = load_queries(qkv_ptr, bias_ptr, o_m, T, stride_t8, K, MAIN, TAIL, EVEN, ACC)
            dout, dout_tail = load_head(dout_ptr, o_m, T, width8, K, MAIN, TAIL, EVEN)
            # Scores are (keys, queries): P and d_S are then the left operands of d_v and d_k as they stand.
            s = contract(k, k_tail, q, q_tail, TAIL, ACC)
            lse = tl.load(lse_ptr + o_m, mask=o_m < T, other=0.0)
            p = tl.exp2(s * (SCALE * LOG2E) - lse[None, :])
            if not EVEN:
                p = tl.where((o_n < T)[:, None] & (o_m < T)[None, :], p, 0.0)
            dv, dv_tail = accumulate(dv, dv_tail, p.to(dtype), dout, dout_tail, TAIL, ACC)
            dp = contract(v, v_tail, dout, dout_tail, TAIL, ACC)
            if KEY_TILES > 1:
                delta = tl.load(delta_ptr + o_m, mask=o_m < T, other=0.0)
            else:
                delta = tl.sum(p * dp, axis=0) + lost
            ds = p * (dp - delta[None, :])
            ds_sum += tl.sum(ds, axis=1)
            ds = ds.to(dtype)
            dk, dk_tail = accumulate(dk, dk_tail, ds, q, q_tail, TAIL, ACC)
            dq, dq_tail = zeros_head(BLOCK_M, MAIN, TAIL, ACC)
            dq, dq_tail = accumulate(dq, dq_tail, tl.trans(ds), k, k_tail, TAIL, ACC)
            if KEY_TILES > 1:
                if j > 0:
                    dq, dq_tail = add_head(scratch_ptr, dq, dq_tail, o_m, T, K // 8, K, MAIN, TAIL, EVEN)
                if j < KEY_TILES - 1:
                    store_head(scratch_ptr, dq, dq_tail, o_m, T, K // 8, K, MAIN, TAIL, EVEN)
            if j == KEY_TILES - 1:
                dq, dq_tail = dq * SCALE, dq_tail * SCALE
                store_head(dqkv_ptr, dq, dq_tail, o_m, T, 3 * width8, K, MAIN, TAIL, EVEN)
        dk, dk_tail = dk * SCALE, dk_tail * SCALE
        store_head(dqkv_ptr + width, dk, dk_tail, o_n, T, 3 * width8, K, MAIN, TAIL, EVEN)
        store_head(dqkv_ptr + 2 * width, dv, dv_tail, o_n, T, 3 * width8, K, MAIN, TAIL, EVEN)
        if bias_ptr is not None:
            store_bias_shares(
                partial_ptr + j * (3 * width), width, ds_sum * SCALE, k, k_tail, dk, dk_tail, dv, dv_tail,
                K, MAIN, TAIL, ACC,
            )  # fmt: skip
        if KEY_TILES > 1:
            # The scratch is read by other threads than those that wrote it.
            tl.debug_barrier()


@dataclass(frozen=True)
class ShortLaunch:
    """`block_m` queries at a time against `block_n` keys, on `num_warps` warps; `steps` query tiles a program."""

    block_m: int
    block_n: int
    num_warps: int
    steps: int

    tunable: ClassVar = ("block_m", "block_n", "num_warps")

    def __post_init__(self) -> None:
        require_powers_of_two(
            block_m=(self.block_m, 16, 256), block_n=(self.block_n, 16, 256), num_warps=(self.num_warps, 1, 8),
            steps=(self.steps, 1, 16),
        )  # fmt: skip

    def candidates(self) -> Iterator["ShortLaunch"]:
        """What a search tries: other tiles of keys and queries, and warps."""
        for block_m, block_n in itertools.product((16, 32, 64), (64, 128)):
            for num_warps in (4, 8):
                yield replace(self, block_m=block_m, block_n=block_n, num_warps=num_warps)


class ForwardLaunch(ShortLaunch):
    """All keys are one tile: `block_n` is not free, `steps` is."""

    tunable: ClassVar = ("block_m", "num_warps", "steps")

    def candidates(self) -> Iterator[ShortLaunch]:
        """What a search tries: other tiles of queries, warps, and numbers of query tiles a program."""
        for block_m, num_warps, steps in itertools.product((32, 64, 128), (4, 8), (1, 2, 4, 8)):
            if block_m * steps <= self.block_n:
                yield replace(self, block_m=block_m, num_warps=num_warps, steps=steps)


@functools.cache
def forward_launch(B: int, T: int, H: int) -> ForwardLaunch:
    """All keys in one tile; programs take more query tiles each, up to all, while that leaves 512 programs."""
    block_n = max(next_power_of_2(T), 16)
    block_m = min(block_n, 64)
    tiles = cdiv(T, block_m)
    steps = max(1, min(tiles, B * H * tiles // 512))
    return ForwardLaunch(block_m, block_n, 4, 1 << (steps.bit_length() - 1))


@functools.cache
def backward_launch(T: int, K: int) -> ShortLaunch:
    """The largest tile of keys whose d_k and d_v leave registers for the scores without spills.

    64 keys on 8 warps where they are all; else, against 32 queries, 128 on 8 warps or 64 on 4, and 64 on 8 for K
    above 80.
    """
    if T <= 32:
        return ShortLaunch(16, max(next_power_of_2(T), 16), 4, 1)
    if T <= 64:
        return ShortLaunch(64, 64, 8, 1)
    if K > 80:
        return ShortLaunch(32, 64, 8, 1)
    return ShortLaunch(32, 64, 4, 1) if T <= 128 else ShortLaunch(32, 128, 8, 1)


def forward(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Run:
    """run(qkv, num_heads, bias) -> out (B, T, H * K) and lse (B, H, T); qkv (B, T, 3 * H * K), T at most 256."""
    B, T, packed = qkv.shape
    width = packed // 3
    K = width // num_heads
    parts, acc = head_parts(K), reference.accumulator(qkv)
    heuristic = forward_launch(B, T, num_heads)
    # How many query tiles a program takes depends on how many programs there are.
    sizes = (("T", T), ("K", K), ("heads", next_power_of_2(max(B * num_heads, 1))))
    cfg = tuned.config_for(_attention_short_fwd_kernel, sizes, qkv.dtype, heuristic, capability(qkv))
    tiles = cdiv(T, cfg.block_m * cfg.steps)
    start = prepare(
        _attention_short_fwd_kernel, (B * num_heads * tiles,), on=qkv, num_warps=cfg.num_warps,
        T=T, H=num_heads, TILES=tiles,
        STEPS=cfg.steps, SCALE=K**-0.5, K=K, MAIN=parts.main, TAIL=parts.tail,
        BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
        EVEN=cfg.block_n == T and T % (cfg.block_m * cfg.steps) == 0, ACC=accumulator(qkv),
    )  # fmt: skip

    def run(qkv: Tensor, num_heads: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out = qkv.new_empty((B, T, width))
        lse = qkv.new_empty((B, num_heads, T), dtype=acc)
        qkv, strides = read_in_place(qkv)
        start(qkv_ptr=qkv, bias_ptr=as_bias(bias), out_ptr=out, lse_ptr=lse, **strides)
        return out, lse

    return run


def backward(qkv: Tensor, num_heads: int, bias: Tensor | None) -> Run:
    """run(dout, qkv, num_heads, bias, out, lse) -> d_qkv, packed as qkv, and d_bias, empty without a bias."""
    B, T, packed = qkv.shape
    width = packed // 3
    K = width // num_heads
    parts = head_parts(K)
    heuristic, sizes = backward_launch(T, K), (("T", T), ("K", K))
    cfg = tuned.config_for(_attention_short_bwd_kernel, sizes, qkv.dtype, heuristic, capability(qkv))
    tiles = cdiv(T, cfg.block_n)
    several, shared = tiles > 1, 0 if bias is None else tiles
    start = prepare(
        _attention_short_bwd_kernel, (B * num_heads,), on=qkv, num_warps=cfg.num_warps,
        T=T, H=num_heads, 
        KEY_TILES=tiles, SCALE=K**-0.5, K=K, MAIN=parts.main, TAIL=parts.tail, BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n, EVEN=T % max(cfg.block_m, cfg.block_n) == 0, STAGES=2, ACC=accumulator(qkv),
    )  # fmt: skip

    def run(
        dout: Tensor, qkv: Tensor, num_heads: int, bias: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        dout, (qkv, strides) = dout.contiguous(), read_in_place(qkv)
        bias = as_bias(bias)
        dqkv = qkv.new_empty((B, T, packed))
        shares = lse.new_empty((B, shared, packed))
        start(
            dout_ptr=dout, qkv_ptr=qkv, bias_ptr=bias, out_ptr=out, lse_ptr=lse,
            dqkv_ptr=dqkv, delta_ptr=torch.empty_like(lse) if several else lse,
            scratch_ptr=lse.new_empty((B, num_heads, T, K)) if several else lse, partial_ptr=shares, **strides,
        )  # fmt: skip
        return dqkv, shares.new_empty(0) if bias is None else cast(shares.sum((0, 1)), bias.dtype)

    return run
