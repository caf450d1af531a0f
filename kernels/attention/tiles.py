"""Device code and sizes that the attention kernels share: tiles of one head of a packed tensor.

A head's K columns are K = MAIN + TAIL, a power of two and a rest padded to at least 16 (72 = 64 + 8, padded to
64 + 16), so that products run on 80 columns and not on 128; TAIL = 0 where one part suffices. A tile is therefore
a pair (main, tail), the second meaningless when TAIL = 0. Strides of tokens and samples come divided by 8: the
compiler then knows that every row starts at a multiple of 16 bytes, which a stride of 72 hides from it.

The qkv bias is added to the queries only. With q' = q + b_q the scores q' (k + b_k) differ from q' k by a term that
is constant in each row, which softmax removes: b_k changes neither the output nor a gradient. b_v is added to the
output, since rows of the softmax sum to 1. `not_finite` keeps NaN and infinities of either from getting lost.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels.launch import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class HeadParts:
    """K columns as MAIN + TAIL, powers of two from 16 up (TAIL also 0)."""

    main: int
    tail: int


@functools.cache
def head_parts(K: int) -> HeadParts:
    """The cheapest split of K columns: 72 is 64 + 16, 96 is 64 + 32, 40 is 32 + 16, 104 is 128."""
    main = max(1 << (K.bit_length() - 1), 16)
    tail = max(next_power_of_2(K - main), 16) if main < K else 0
    return HeadParts(2 * main, 0) if tail == main else HeadParts(main, tail)


@triton.jit
def sample_head_tile(H, TILES):
    """Sample (int64), head and tile of this program; the TILES tiles of a head are neighbors and share its keys."""
    pid = tl.program_id(0)
    head = pid // TILES
    return (head // H).to(tl.int64), head % H, pid % TILES


@triton.jit
def _load_part(
    ptr, o_t, T, stride8, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr
):
    o_k = START + tl.arange(0, SIZE)[None, :]
    offsets = o_t[:, None] * (stride8 * 8) + o_k
    if EVEN and START + SIZE <= K:
        return tl.load(ptr + offsets)
    elif EVEN:
        return tl.load(ptr + offsets, mask=tl.broadcast_to(o_k < K, offsets.shape), other=0.0)
    else:
        return tl.load(ptr + offsets, mask=(o_t < T)[:, None] & (o_k < K), other=0.0)


@triton.jit
def load_head(
    ptr, o_t, T, stride8, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr
):
    """Both parts of tokens `o_t`, zeros where there are none; EVEN: all tokens exist."""
    main = _load_part(ptr, o_t, T, stride8, 0, MAIN, K, EVEN)
    tail = main
    if TAIL > 0:
        tail = _load_part(ptr, o_t, T, stride8, MAIN, TAIL, K, EVEN)
    return main, tail


@triton.jit
def add_head(
    ptr, main, tail, o_t, T, stride8, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Both parts plus those in memory."""
    main += _load_part(ptr, o_t, T, stride8, 0, MAIN, K, EVEN)
    if TAIL > 0:
        tail += _load_part(ptr, o_t, T, stride8, MAIN, TAIL, K, EVEN)
    return main, tail


@triton.jit
def _store_part(
    ptr, value, o_t, T, stride8, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr
):
    o_k = START + tl.arange(0, SIZE)[None, :]
    offsets = o_t[:, None] * (stride8 * 8) + o_k
    value = value.to(ptr.dtype.element_ty)
    if EVEN and START + SIZE <= K:
        tl.store(ptr + offsets, value)
    elif EVEN:
        tl.store(ptr + offsets, value, mask=tl.broadcast_to(o_k < K, offsets.shape))
    else:
        tl.store(ptr + offsets, value, mask=(o_t < T)[:, None] & (o_k < K))


@triton.jit
def store_head(
    ptr, main, tail, o_t, T, stride8, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Store both parts of tokens `o_t`, rounded to the tensor's dtype."""
    _store_part(ptr, main, o_t, T, stride8, 0, MAIN, K, EVEN)
    if TAIL > 0:
        _store_part(ptr, tail, o_t, T, stride8, MAIN, TAIL, K, EVEN)


@triton.jit
def _load_row(ptr, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    o_k = START + tl.arange(0, SIZE)[None, :]
    return tl.load(ptr + o_k, mask=o_k < K, other=0.0).to(ACC)


@triton.jit
def add_bias(ptr, main, tail, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):
    """Both parts plus one head's bias (K,), in ACC; ptr None means no bias."""
    if ptr is not None:
        main = main.to(ACC) + _load_row(ptr, 0, MAIN, K, ACC)
        if TAIL > 0:
            tail = tail.to(ACC) + _load_row(ptr, MAIN, TAIL, K, ACC)
    return main, tail


@triton.jit
def subtract_bias(
    ptr, main, tail, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr
):
    """Both parts less one head's bias (K,), in ACC; ptr None means no bias."""
    if ptr is not None:
        main = main.to(ACC) - _load_row(ptr, 0, MAIN, K, ACC)
        if TAIL > 0:
            tail = tail.to(ACC) - _load_row(ptr, MAIN, TAIL, K, ACC)
    return main, tail


@triton.jit
def load_queries(
    ptr, bias_ptr, o_t, T, stride8, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both parts of q + b_q of tokens `o_t`, in the dtype of q."""
    main, tail = load_head(ptr, o_t, T, stride8, K, MAIN, TAIL, EVEN)
    main, tail = add_bias(bias_ptr, main, tail, K, MAIN, TAIL, ACC)
    return main.to(ptr.dtype.element_ty), tail.to(ptr.dtype.element_ty)


@triton.jit
def not_finite(ptr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):
    """0 if one head's bias (K,) is finite, else NaN."""
    zero = tl.sum(0.0 * _load_row(ptr, 0, MAIN, K, ACC))
    if TAIL > 0:
        zero += tl.sum(0.0 * _load_row(ptr, MAIN, TAIL, K, ACC))
    return zero


@triton.jit
def zeros_head(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):
    """Accumulators of both parts."""
    if TAIL > 0:
        return tl.zeros([ROWS, MAIN], ACC), tl.zeros([ROWS, TAIL], ACC)
    else:
        return tl.zeros([ROWS, MAIN], ACC), tl.zeros([1, 1], ACC)


@triton.jit
def contract(a, a_tail, b, b_tail, TAIL: tl.constexpr, ACC: tl.constexpr):
    """a b^T over the columns of both parts: (ROWS of a, ROWS of b); never TF32."""
    total = tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=ACC)
    if TAIL > 0:
        total = tl.dot(a_tail, tl.trans(b_tail), total, input_precision="ieee", out_dtype=ACC)
    return total


@triton.jit
def accumulate(total, total_tail, weights, x, x_tail, TAIL: tl.constexpr, ACC: tl.constexpr):
    """total + weights x, into the columns of both parts."""
    total = tl.dot(weights, x, total, input_precision="ieee", out_dtype=ACC)
    if TAIL > 0:
        total_tail = tl.dot(weights, x_tail, total_tail, input_precision="ieee", out_dtype=ACC)
    return total, total_tail


@triton.jit
def row_dot(a, a_tail, b, b_tail, TAIL: tl.constexpr, ACC: tl.constexpr):
    """(ROWS,) sums of a * b over the columns of both parts."""
    total = tl.sum(a.to(ACC) * b.to(ACC), axis=1)
    if TAIL > 0:
        total += tl.sum(a_tail.to(ACC) * b_tail.to(ACC), axis=1)
    return total


@triton.jit
def _store_sum(ptr, x, START: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr):
    o_k = START + tl.arange(0, SIZE)
    tl.store(ptr + o_k, tl.sum(x, axis=0), mask=o_k < K)


@triton.jit
def store_bias_shares(
    ptr, width, ds_sum, k, k_tail, dk, dk_tail, dv, dv_tail,
    K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store what a tile of keys adds to one head's bias gradients, rows of (3, H, K).

    For b_q, sum over queries of d_q = sum over keys of ds_sum k, with ds_sum = scale * sum over queries of d_S.
    """
    _store_sum(ptr, ds_sum[:, None] * k.to(ACC), 0, MAIN, K)
    _store_sum(ptr + width, dk, 0, MAIN, K)
    _store_sum(ptr + 2 * width, dv, 0, MAIN, K)
    if TAIL > 0:
        _store_sum(ptr, ds_sum[:, None] * k_tail.to(ACC), MAIN, TAIL, K)
        _store_sum(ptr + width, dk_tail, MAIN, TAIL, K)
        _store_sum(ptr + 2 * width, dv_tail, MAIN, TAIL, K)


@functools.cache
def packed_strides(shape: torch.Size, stride: tuple[int, int, int]) -> dict[str, int] | None:
    """Strides of samples and of tokens over 8, of a view (B, T, 3 * H * K); None where it cannot be read as it lies.

    Rows must start at multiples of 8 elements, and a sample must not reach beyond 32-bit offsets.
    """
    B, T, packed = shape
    stride_b, stride_t, last = stride
    # Strides of a dimension of one element are never used and may be anything.
    aligned = last == 1 and (T <= 1 or stride_t % 8 == 0) and (B <= 1 or stride_b % 8 == 0)
    if not aligned or (T - 1) * stride_t + packed >= 2**31:
        return None
    return {"stride_b8": stride_b // 8, "stride_t8": stride_t // 8}


def read_in_place(qkv: Tensor) -> tuple[Tensor, dict[str, int]]:
    """qkv (B, T, 3 * H * K) as the kernels read it, copied where they cannot, and its strides as arguments."""
    strides = packed_strides(qkv.shape, qkv.stride())
    if strides is not None:
        return qkv, strides
    qkv = qkv.contiguous()
    strides = packed_strides(qkv.shape, qkv.stride())
    assert strides is not None, "rows of a contiguous qkv start at multiples of 8 elements"
    return qkv, strides
