"""Kernels of `gelu`, `swiglu` and `mlp` compiled for GPUs that this machine does not have, at the models' widths."""

import importlib
from dataclasses import replace
from functools import cache

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.compile.aot import MAX_SHARED, Compiled, ahead_of_time
from tests.architectures import sm_90_first

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
gelu = importlib.import_module("dit_fast.kernels.mlp.gelu")
gemm = importlib.import_module("dit_fast.kernels.mlp.gemm")
swiglu = importlib.import_module("dit_fast.kernels.mlp.swiglu")
ROWS = 65536


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def gelu_kernels(width: int, dtype: torch.dtype, capability: int) -> list[Compiled]:
    """Forward with a bias, backward with act and d_bias as `mlp` asks for it."""
    pre = meta(ROWS, width, dtype=dtype)

    def run() -> None:
        gelu.plan_gelu(pre, ROWS, width)(pre, meta(width, dtype=dtype))
        gelu.plan_gelu_backward(pre, ROWS, width, True, True)(pre, pre, None)

    return ahead_of_time(run, capability)


def swiglu_kernels(width: int, dtype: torch.dtype, capability: int) -> list[Compiled]:
    """As `gelu_kernels`, of so many gates and values."""
    act, pre = meta(ROWS, width, dtype=dtype), meta(ROWS, 2 * width, dtype=dtype)

    def run() -> None:
        swiglu.plan_swiglu(pre, ROWS, width)(pre, meta(2 * width, dtype=dtype))
        swiglu.plan_swiglu_backward(pre, ROWS, width, True, True)(act, pre, None)

    return ahead_of_time(run, capability)


@cache
def gemm_kernels(capability: int, dtype: torch.dtype = torch.bfloat16, D: int = 1152) -> list[Compiled]:
    """fc1 in training and in sampling, fc2's data gradient with act again and with act kept."""
    x, pre = meta(ROWS, D, dtype=dtype), meta(ROWS, 4 * D, dtype=dtype)

    def run() -> None:
        for keep_pre in (True, False):
            gemm.gemm_gelu(x, meta(4 * D, D, dtype=dtype), meta(4 * D, dtype=dtype), keep_pre)
        for activation in (True, False):
            gemm.gemm_gelu_backward(x, meta(D, 4 * D, dtype=dtype), pre, activation, True)

    return ahead_of_time(run, capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "width"),
    sm_90_first(
        [(90, torch.bfloat16, width) for width in (1536, 3072, 4096)]
        + [
            (capability, dtype, 4608)
            for capability in (80, 90, 100)
            for dtype in (torch.bfloat16, torch.float32)
        ]
    ),
)
def test_gelu_moves_128_bits_an_access(width, dtype, capability) -> None:
    """Exactly as many 128-bit accesses as the tile has, none narrower to a (rows, F) tensor, and no spills."""
    forward, backward = gelu_kernels(width, dtype, capability)
    for kernel, rows, loads, stores in (
        (forward, 8, ("pre_ptr",), ("act_ptr",)),
        (backward, 4, ("pre_ptr", "dact_ptr"), ("dpre_ptr", "act_ptr")),
    ):
        assert kernel.spills == 0
        assert not kernel.float64()
        accesses = kernel.accesses_by_tensor()
        tile = rows * 512 * dtype.itemsize // 16 // (32 * kernel.num_warps)
        for name in loads:
            assert accesses[name] == {"ld128": tile}
        for name in stores:
            assert accesses[name] == {"st128": tile}


@pytest.mark.parametrize(
    ("capability", "dtype", "width"),
    sm_90_first(
        [(90, torch.bfloat16, 2736)]
        + [
            (capability, dtype, 3072)
            for capability in (80, 90, 100)
            for dtype in (torch.bfloat16, torch.float32)
        ]
    ),
)
def test_swiglu_moves_128_bits_an_access(width, dtype, capability) -> None:
    """As for `gelu`; gate and value are two tiles of one tensor."""
    forward, backward = swiglu_kernels(width, dtype, capability)
    for kernel, rows, tiles in (
        (forward, 8, {"pre_ptr": ("ld128", 2), "act_ptr": ("st128", 1)}),
        (
            backward,
            4,
            {
                "pre_ptr": ("ld128", 2),
                "dact_ptr": ("ld128", 1),
                "dpre_ptr": ("st128", 2),
                "act_ptr": ("st128", 1),
            },
        ),
    ):
        assert kernel.spills == 0
        assert not kernel.float64()
        accesses = kernel.accesses_by_tensor()
        tile = rows * 512 * dtype.itemsize // 16 // (32 * kernel.num_warps)
        for name, (access, count) in tiles.items():
            assert accesses[name] == {access: count * tile}


@pytest.mark.parametrize(
    ("capability", "instruction"),
    sm_90_first([(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")]),
)
def test_products_use_tensor_cores_and_do_not_spill(capability, instruction) -> None:
    """Bulk copies by descriptor where the architecture has them; the epilogue's (M, N) tensors in 128-bit accesses."""
    for kernel in gemm_kernels(capability):
        assert kernel.spills == 0, (kernel.kernel, kernel.spills)
        assert kernel.shared <= MAX_SHARED[capability]
        assert instruction in kernel.ptx
        assert ("cp.async.bulk.tensor" in kernel.ptx) is (capability >= 90)
        assert not kernel.float64()
        accesses = kernel.accesses()
        assert accesses["st128"] >= 8
        # The bias and its partial sums, one value of a column each, are the only narrow ones.
        assert accesses.get("ld128", 0) >= (8 if "bwd" in kernel.kernel else 0)
        assert not {"st16", "st64", "ld64"} & accesses.keys(), accesses


@pytest.mark.parametrize(
    ("capability", "dtype", "D"),
    sm_90_first(
        [
            (90, torch.float16, 384),
            (80, torch.float32, 384),
            (80, torch.bfloat16, 99),
            (90, torch.bfloat16, 99),
        ]
    ),
)
def test_other_dtypes_and_unaligned_widths_compile(dtype, D, capability) -> None:
    """D = 99 has rows that are no multiple of 16 bytes: no descriptors on any architecture."""
    for kernel in gemm_kernels(capability, dtype, D):
        assert kernel.spills == 0, (kernel.kernel, kernel.spills)
        assert kernel.shared <= MAX_SHARED[capability]
        assert ("cp.async.bulk.tensor" in kernel.ptx) is (capability >= 90 and D != 99)


def test_a_tile_too_large_is_seen_to_spill(monkeypatch) -> None:
    """Negative control: a 128 x 256 tile on four warps holds more sums than a thread has registers."""
    chosen = gemm.gemm_launch
    monkeypatch.setattr(gemm, "gemm_launch", lambda *args: replace(chosen(*args), block_n=256, num_warps=4))
    (kernel,) = ahead_of_time(
        lambda: gemm.gemm_gelu_backward(meta(ROWS, 99), meta(99, 396), meta(ROWS, 396), False, False), 80
    )
    assert kernel.spills > 0
