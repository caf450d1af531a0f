"""The AdamW kernels compiled for GPUs that are not there: no spills, 128-bit accesses, 38 bytes a parameter."""

import re

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.compile.aot import Compiled, ahead_of_time
from dit_fast.kernels import AdamWSettings, AdamWTensors, adamw_ema, grad_square_sum
from dit_fast.kernels.launch import record_launches
from tests.architectures import each_capability

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="interpreted functions cannot be compiled"
)
SHAPES = ((1152, 4608), (1152,), (3,), (0,))


def meta(shapes, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def step(
    grad_dtype=torch.float32,
    copy: torch.dtype | None = torch.bfloat16,
    average=True,
    shapes=SHAPES,
    max_norm=1.0,
) -> AdamWTensors:
    """One step on meta tensors, from which launches are recorded."""
    tensors = AdamWTensors(
        *(meta(shapes, torch.float32) for _ in range(3)),
        meta([()] * len(shapes), torch.float32),
        meta(shapes, torch.float32) if average else None,
        meta(shapes, copy) if copy else None,
    )
    grads, (lr, found_inf) = meta(shapes, grad_dtype), meta([(), ()], torch.float32)
    square_sum = grad_square_sum(tensors, grads, kernels="triton") if max_norm else None
    settings = AdamWSettings(weight_decay=0.1, ema_warmup=True, max_norm=max_norm)
    adamw_ema(tensors, grads, lr, settings, square_sum=square_sum, found_inf=found_inf, kernels="triton")
    return tensors


def wide_bytes(kernel: Compiled, tensors: AdamWTensors) -> float:
    """Bytes an element that a program moves which has a whole, aligned block: all its 128-bit accesses."""
    accesses = kernel.accesses()
    return (
        (accesses.get("ld128", 0) + accesses.get("st128", 0))
        * 16
        * kernel.num_warps
        * 32
        / tensors.config.block
    )


@each_capability
@pytest.mark.parametrize(
    ("grad_dtype", "copy", "average", "least"),
    [
        (torch.float32, torch.bfloat16, True, 38),
        (torch.float32, None, True, 36),
        (torch.float32, None, False, 28),
        (torch.bfloat16, torch.bfloat16, True, 36),
        (torch.float16, torch.float16, False, 28),
    ],
    ids=["fp32", "no copy", "no average", "bf16 gradients", "fp16"],
)
def test_no_spills_and_least_bytes(grad_dtype, copy, average, least, capability) -> None:
    """A whole block takes nothing but 128-bit accesses: what it must read and write, once."""
    kernels = ahead_of_time(lambda: step(grad_dtype, copy, average), capability)
    names = ["_square_sum_kernel", "_adamw_scalars_kernel", "_adamw_ema_kernel"]
    assert [kernel.kernel for kernel in kernels] == names
    with record_launches(capability):
        tensors = step(grad_dtype, copy, average)
    elements = sum(p.numel() for p in tensors.params)
    assert tensors.bytes_moved(grad_dtype.itemsize) == least * elements
    for kernel in kernels:
        assert kernel.spills == 0, f"{kernel.kernel} spills {kernel.spills} bytes"
        assert kernel.shared <= 16 * 1024
    square_sum, scalars, update = kernels
    assert wide_bytes(square_sum, tensors) == grad_dtype.itemsize
    assert wide_bytes(update, tensors) == least <= 40
    # The other branch, for tails and unaligned tensors, moves one element a thread and array.
    narrow = update.accesses()
    assert narrow["st32"] == (4 if average else 3)
    assert narrow.get("st16", 0) == (copy is not None)
    assert not {"ld8", "st8", "st64"} & narrow.keys()
    assert update.registers <= 64
    # float64 is for the few scalars of a step alone.
    assert not square_sum.float64()
    assert not update.float64()
    assert scalars.float64()


@each_capability
def test_both_branches_round_alike(capability) -> None:
    """Shards get the bits of the whole: the 8 elements of a wide thread and the one of a narrow thread fuse alike."""
    update = ahead_of_time(step, capability)[-1]
    for instruction in (
        "fma.rn.f32",
        "mul.f32",
        "mul.rn.f32",
        "sub.f32",
        "add.f32",
        "div.rn.f32",
        "sqrt.rn.f32",
    ):
        count = len(re.findall(rf"\b{re.escape(instruction)}\b", update.ptx))
        assert count % 9 == 0, f"{count} {instruction} for 8 + 1 elements"
    assert "div.rn.f32" in update.ptx
    assert "sqrt.rn.f32" in update.ptx


@pytest.mark.parametrize(("max_norm", "launches"), [(1.0, 3), (None, 2)])
def test_launches_do_not_grow_with_the_model(max_norm, launches) -> None:
    for count in (1, 300):
        with record_launches() as recorded:
            step(shapes=[(40, 30)] * count, max_norm=max_norm)
        assert len(recorded) == launches
    with record_launches() as recorded:
        step(shapes=[(0,)], max_norm=max_norm)
    # Nothing to update: the kernel of the update has no blocks.
    assert len(recorded) == launches - 1
