"""How a launch is cut and carried out: launch configurations, layouts, and the recording that needs no device."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class RowLaunch:
    """One tile of a row kernel: `rows` rows of `main` + `tail` columns on `num_warps` warps.

    `splits` programs share the tokens of one sample in kernels that reduce over tokens.
    """

    rows: int
    main: int
    tail: int
    num_warps: int
    splits: int

    @property
    def meta(self) -> dict[str, int]:
        return {"ROWS": self.rows, "MAIN": self.main, "TAIL": self.tail}


def row_launch(batch: int, tokens: int, width: int, itemsize: int) -> RowLaunch:
    """The launch for (batch, tokens, width) token tensors whose narrowest dtype has `itemsize` bytes.

    A function of the shape alone, so that the order of every sum, hence every bit, is the same on any device.
    """
    main = 1 << (width.bit_length() - 1)
    tail = triton.next_power_of_2(width - main) if width > main else 0
    if tail == main:
        main, tail = 2 * main, 0
    # A warp covers 256 columns with 8 elements a thread: a column then lives in one thread for every row of the
    # tile, and sums over rows stay in registers.
    num_warps = min(max(main // 256, 1), 8)
    vector = 16 // max(itemsize, 2)
    # The tail fills 128-bit accesses only when enough rows share it: 8 rows for 128 columns on 4 warps.
    rows = max(4, num_warps * 32 * vector // tail) if tail else 4
    rows = min(rows, 8, max(2, triton.next_power_of_2(tokens)))
    # About 4 programs for each of 132 multiprocessors; partial sums stay a few percent of the tokens' bytes.
    splits = min(triton.cdiv(512, max(batch, 1)), max(triton.cdiv(tokens, rows), 1))
    return RowLaunch(rows=rows, main=main, tail=tail, num_warps=num_warps, splits=splits)


def accumulator(x: Tensor) -> tl.dtype:
    """Triton's name of the dtype that sums are kept in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def as_vectors(x: Tensor) -> Tensor:
    """(B, D) or (D,) with contiguous rows; the views that `chunk` makes pass as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bias(bias: Tensor | None) -> Tensor | None:
    """The contiguous (D,) bias, or None."""
    return None if bias is None else bias.contiguous()


MAX_REGISTERS = 255
"""The hardware's limit, given to the assembler: left to itself it aims lower for some kernels, and spills."""


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of carried out. `options` are the compiler's: num_warps, num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]


@dataclass(frozen=True)
class Recording:
    """Where launches go instead of to a device, and the compute capability that launchers are told meanwhile."""

    launches: list[Launch]
    capability: int


_recording: Recording | None = None


@contextmanager
def record_launches(capability: int = 90) -> Iterator[list[Launch]]:
    """Collect launches for sm_<capability> instead of carrying them out; tensors may be on the meta device.

    Registered operations on meta tensors launch too, forward and backward, whatever autograd calls.
    """
    global _recording
    previous, _recording = _recording, Recording([], capability)
    try:
        yield _recording.launches
    finally:
        _recording = previous


def recording() -> bool:
    """Whether launches are being recorded."""
    return _recording is not None


def capability(on: Tensor) -> int:
    """Compute capability (80, 90, 100, ...) that a launch on the device of `on` runs on.

    That of the recording where launches are recorded, 0 for a CPU tensor (Triton's interpreter).
    """
    if _recording is not None:
        return _recording.capability
    return device_capability(on.get_device()) if on.is_cuda else 0


@functools.cache
def device_capability(index: int) -> int:
    """Compute capability of CUDA device `index`."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    on: Tensor,
    num_warps: int,
    *,
    num_stages: int | None = None,
    **arguments: Any,
) -> None:
    """Run `kernel` on the device of `on`; an empty grid is no launch. `num_stages` None: the compiler's own choice."""
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "maxnreg": MAX_REGISTERS}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, options))
        return
    with torch.cuda.device_of(on):
        kernel[grid](**arguments, **options)
