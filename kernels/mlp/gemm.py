"""Matrix products whose epilogue is the GELU of gelu.py or its gradient: the two products of an MLP around it.

Forward   pre = x w^T + bias, act = GELU(pre):    x (M, K), w (N, K), bias (N,); pre, act (M, N).
Backward  d_act = dout w, d_pre = d_act * GELU'(pre), d_bias = sum_M(d_pre): dout (M, K), w (K, N), pre, d_pre
          (M, N), d_bias (N,); act = GELU(pre) again on demand.
Traffic   in U = one (B, T, D) token tensor, N = 4 D: the epilogues add 4 U for writing pre in the forward pass, 4 U
          for reading it in the backward pass and 4 U for writing act again; a pass of its own moves 8 + 16 U.
Numerics  float32 sums (float64 for float64), one rounding at each store. act comes from the rounded pre, so that
          the backward pass recomputes the same act. d_bias: one partial sum for each row of tiles, added in a
          fixed order, without atomics; no sum depends on the number of multiprocessors.

A program walks over output tiles (persistent). Where the architecture copies tiles by descriptor (TMA, sm_90 on) and
rows are multiples of 16 bytes, it does so; elsewhere the same kernel loads through pointers and masks.
"""

import contextvars
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_fast.kernels import reference, tuned
from dit_fast.kernels.launch import (
    accumulator,
    capability,
    cdiv,
    launch,
    next_power_of_2,
    require_powers_of_two,
)
from dit_fast.kernels.mlp.gelu import gelu_value, gelu_value_and_slope

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and B200: how many programs a recorded launch has."""


@dataclass(frozen=True)
class GemmLaunch:
    """Output tiles of `block_m` x `block_n` in steps of `block_k`, loaded by descriptor or through pointers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool

    # Not `block_k`: how a product's terms are grouped stays a function of the shape.
    tunable: ClassVar = ("block_m", "block_n", "num_warps", "num_stages")

    def __post_init__(self) -> None:
        require_powers_of_two(
            block_m=(self.block_m, 16, 256),
            block_n=(self.block_n, 16, 256),
            num_warps=(self.num_warps, 1, 16),
        )
        if not 1 <= self.num_stages <= 8:
            raise ValueError(f"num_stages is {self.num_stages}, expected a number from 1 to 8")

    def candidates(self) -> Iterator["GemmLaunch"]:
        """What a search tries: other tiles, warps and stages whose sums leave registers for an epilogue."""
        for block_m, block_n in ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128)):
            for num_warps, num_stages in itertools.product((4, 8), (3, 4)):
                if block_m * block_n <= 64 * 64 * num_warps:
                    yield replace(
                        self, block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages
                    )

    @property
    def meta(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "DESCRIPTORS": self.descriptors,
        }  # fmt: skip


def gemm_launch(
    M: int, N: int, K: int, itemsize: int, arch: int, aligned: bool, descriptors: bool
) -> GemmLaunch:
    """The launch of an (M, N, K) product on sm_<arch> (0: Triton's interpreter), of rows of whole 16 bytes or not.

    16-bit tiles of 128 x 128 divide 1536, 3072, 4096 and 4608; each of the 8 warps then holds 64 sums a thread, which
    leaves registers for the epilogue's second tile. Small tiles for float32, whose exact products run without tensor
    cores, and for rows that are not aligned: loads of single values take an address each.
    """
    size, depth = (128, 64) if itemsize == 2 and aligned else (64, 32)
    stages = 4 if itemsize == 2 and aligned and arch != 80 else 3
    return GemmLaunch(_fit(M, size), _fit(N, size), _fit(K, depth), 8, stages, descriptors)


def _fit(extent: int, block: int) -> int:
    """`block`, or less where the extent is smaller; tensor cores take 16 at least."""
    return max(16, min(block, next_power_of_2(max(extent, 1))))


@triton.jit
def output_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of output tile number `tile`: 8 tiles of rows share a column of the weight in cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (8 * tiles_n) * 8
    size = min(tiles_m - first, 8)
    within = tile % (8 * tiles_n)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_N


@triton.jit
def input_tiles(
    a_ptr, w_ptr, M, N, K, KN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Descriptors of a (M, K) and of w, (K, N) if KN else (N, K); the pointers themselves without descriptors."""
    if DESCRIPTORS:
        a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
        if KN:
            w = tl.make_tensor_descriptor(w_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
        else:
            w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    else:
        a, w = a_ptr, w_ptr
    return a, w


@triton.jit
def tile_product(
    a, w, row, column, M, N, K, KN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_M, BLOCK_N) sums of a w (KN) or a w^T from `row` and `column` on; a, w as `input_tiles` gives them."""
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if not DESCRIPTORS:
        o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        m_m, m_n = row + o_m < M, column + o_n < N
        a += row.to(tl.int64) * K
        w += column if KN else column.to(tl.int64) * K
    for start in tl.range(0, K, BLOCK_K):
        if DESCRIPTORS:
            left = a.load([row, start])
            right = w.load([start, column]) if KN else w.load([column, start]).T
        else:
            o_k = start + tl.arange(0, BLOCK_K)
            m_k = o_k < K
            left = tl.load(a + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            o_w = o_k[:, None] * N + o_n[None, :] if KN else o_k[:, None] + o_n[None, :] * K
            right = tl.load(w + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    return total


@triton.jit
def output_offsets(row, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64 start, int32 offsets and mask of one tile of an (M, N) tensor."""
    o_m, o_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return row.to(tl.int64) * N + column, o_m * N + o_n, (row + o_m < M) & (column + o_n < N)


@triton.jit
def store_gradients(dact, pre_ptr, dpre_ptr, act_ptr, partial_ptr, row, column, M, N):
    """Store d_pre = dact * GELU'(pre), act, and d_pre's sums over the rows of one tile, where they are asked for."""
    BLOCK_M: tl.constexpr = dact.shape[0]
    BLOCK_N: tl.constexpr = dact.shape[1]
    start, offsets, mask = output_offsets(row, column, M, N, BLOCK_M, BLOCK_N)
    pre = tl.load(pre_ptr + start + offsets, mask=mask, other=0.0).to(dact.dtype)
    act, slope = gelu_value_and_slope(pre)
    if act_ptr is not None:
        tl.store(act_ptr + start + offsets, act.to(act_ptr.dtype.element_ty), mask=mask)
    dpre = dact * slope
    tl.store(dpre_ptr + start + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        # Rows beyond M have a product of 0 * w, which an infinite weight makes NaN.
        shares = tl.sum(tl.where(mask, dpre, 0.0), axis=0)
        o_n = column + tl.arange(0, BLOCK_N)
        tl.store(partial_ptr + (row // BLOCK_M).to(tl.int64) * N + o_n, shares, mask=o_n < N)


@triton.jit
def _gemm_gelu_fwd_kernel(
    # pointers
    x_ptr,  # (M, K)
    w_ptr,  # (N, K), the weight as nn.Linear has it
    bias_ptr,  # (N,)
    pre_ptr,  # (M, N) pre-activation, or None: not kept
    act_ptr,  # (M, N) activation
    # sizes
    M,  # rows
    N,  # columns of the output
    K,  # terms of a sum
    # meta
    PROGRAMS: tl.constexpr,  # programs of the launch, each of which walks over output tiles
    BLOCK_M: tl.constexpr,  # rows of a tile
    BLOCK_N: tl.constexpr,  # columns of a tile
    BLOCK_K: tl.constexpr,  # terms that are added at a time
    DESCRIPTORS: tl.constexpr,  # whether tiles are copied by descriptor (TMA)
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    x, w = input_tiles(x_ptr, w_ptr, M, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=DESCRIPTORS):
        row, column = output_tile(tile, M, N, BLOCK_M, BLOCK_N)
        pre = tile_product(x, w, row, column, M, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, ACC)
        o_n = column + tl.arange(0, BLOCK_N)
        pre += tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(ACC)[None, :]
        pre = pre.to(act_ptr.dtype.element_ty)
        start, offsets, mask = output_offsets(row, column, M, N, BLOCK_M, BLOCK_N)
        if pre_ptr is not None:
            tl.store(pre_ptr + start + offsets, pre, mask=mask)
        tl.store(act_ptr + start + offsets, gelu_value(pre.to(ACC)).to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gemm_gelu_bwd_kernel(
    # pointers
    dout_ptr,  # (M, K) gradient of the MLP's output
    w_ptr,  # (K, N), fc2's weight as nn.Linear has it
    pre_ptr,  # (M, N) pre-activation
    dpre_ptr,  # (M, N) gradient of pre
    act_ptr,  # (M, N) activation, or None: not computed
    partial_ptr,  # (tiles of rows, N) in ACC: terms of d_bias, or None
    # sizes
    M,  # rows
    N,  # columns of the output
    K,  # terms of a sum
    # meta
    PROGRAMS: tl.constexpr,  # programs of the launch, each of which walks over output tiles
    BLOCK_M: tl.constexpr,  # rows of a tile
    BLOCK_N: tl.constexpr,  # columns of a tile
    BLOCK_K: tl.constexpr,  # terms that are added at a time
    DESCRIPTORS: tl.constexpr,  # whether tiles are copied by descriptor (TMA)
    ACC: tl.constexpr,  # dtype of sums: float32, float64 for float64 input
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    dout, w = input_tiles(dout_ptr, w_ptr, M, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=DESCRIPTORS):
        row, column = output_tile(tile, M, N, BLOCK_M, BLOCK_N)
        dact = tile_product(dout, w, row, column, M, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, ACC)
        # In halves: sums, pre and act of a whole tile are more than a thread's registers.
        halves = tl.split(tl.permute(tl.reshape(dact, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
        for half in tl.static_range(2):
            store_gradients(
                halves[half],
                pre_ptr,
                dpre_ptr,
                act_ptr,
                partial_ptr,
                row,
                column + half * (BLOCK_N // 2),
                M,
                N,
            )


KERNELS = (_gemm_gelu_fwd_kernel, _gemm_gelu_bwd_kernel)


def gemm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep_pre: bool, *, descriptors: bool | None = None
) -> tuple[Tensor, Tensor]:
    """(pre, act) of x (M, K), weight (N, K), bias (N,): pre = x weight^T + bias, empty unless `keep_pre`.

    `descriptors`: None chooses; False loads through pointers.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    M, K = x.shape
    N = weight.shape[0]
    act = x.new_empty(M, N)
    pre = torch.empty_like(act) if keep_pre else x.new_empty(0)
    cfg = _configuration(_gemm_gelu_fwd_kernel, x, weight, M, N, K, descriptors)
    _launch(
        _gemm_gelu_fwd_kernel, cfg, x, M, N, K,
        x_ptr=x, w_ptr=weight, bias_ptr=bias, pre_ptr=pre if keep_pre else None, act_ptr=act,
    )  # fmt: skip
    return pre, act


def gemm_gelu_backward(
    dout: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: bool,
    bias_gradient: bool,
    *,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_pre, act, d_bias) of dout (M, K), weight (K, N), pre (M, N); act, d_bias empty where not asked for."""
    dout, weight, pre = dout.contiguous(), weight.contiguous(), pre.contiguous()
    M, N = pre.shape
    K = dout.shape[1]
    dpre = torch.empty_like(pre)
    act = torch.empty_like(pre) if activation else pre.new_empty(0)
    cfg = _configuration(_gemm_gelu_bwd_kernel, dout, weight, M, N, K, descriptors)
    partial = None
    if bias_gradient:
        partial = pre.new_empty(cdiv(M, cfg.block_m), N, dtype=reference.accumulator(pre))
    _launch(
        _gemm_gelu_bwd_kernel, cfg, dout, M, N, K,
        dout_ptr=dout, w_ptr=weight, pre_ptr=pre, dpre_ptr=dpre, act_ptr=act if activation else None,
        partial_ptr=partial,
    )  # fmt: skip
    return dpre, act, pre.new_empty(0) if partial is None else partial.sum(0).to(pre.dtype)


def _configuration(
    kernel: Any, a: Tensor, weight: Tensor, M: int, N: int, K: int, descriptors: bool | None
) -> GemmLaunch:
    arch = capability(a)
    aligned = all(size * a.itemsize % 16 == 0 for size in (N, K))
    aligned = aligned and all(tensor.is_meta or tensor.data_ptr() % 16 == 0 for tensor in (a, weight))
    if descriptors is None:
        descriptors = aligned and (arch == 0 or arch >= 90)
    heuristic = gemm_launch(M, N, K, a.itemsize, arch, aligned, descriptors)
    if not aligned or a.itemsize != 2:
        return heuristic
    sizes = (("rows", next_power_of_2(max(M, 1))), ("N", N), ("K", K))
    return tuned.config_for(kernel, sizes, a.dtype, heuristic, arch)


def _programs(on: Tensor, arch: int) -> int:
    """One program for each multiprocessor; two in the interpreter, so that each walks over tiles there as well."""
    if arch == 0:
        return 2
    if on.is_meta:
        return MULTIPROCESSORS.get(arch, 132)
    return torch.cuda.get_device_properties(on.device).multi_processor_count


def _launch(
    kernel: Any, cfg: GemmLaunch, on: Tensor, M: int, N: int, K: int, **pointers: Tensor | None
) -> None:
    tiles = cdiv(M, cfg.block_m) * cdiv(N, cfg.block_n)
    programs = min(tiles, _programs(on, capability(on)))
    run = functools.partial(
        launch, kernel, (programs,), on, cfg.num_warps, num_stages=cfg.num_stages,
        **pointers, M=M, N=N, K=K, PROGRAMS=programs, **cfg.meta, ACC=accumulator(on),
    )  # fmt: skip
    if cfg.descriptors:
        # Descriptors live in memory that Triton asks its allocator for: ours for this launch, the user's elsewhere.
        contextvars.copy_context().run(_with_allocator, run, on)
    else:
        run()


def _with_allocator(run: Any, on: Tensor) -> None:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=on.device)

    triton.set_allocator(allocate)
    run()
