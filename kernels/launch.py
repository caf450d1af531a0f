"""How a launch is cut and carried out: launch configurations, layouts, and the recording that needs no device."""

from collections.abc import Callable, Iterator
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
    """A launch that was recorded instead of carried out."""

    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    arguments: dict[str, Any]


_recorder: Callable[[Launch], None] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of carrying them out; tensors may be on the meta device."""
    global _recorder
    launches: list[Launch] = []
    _recorder, previous = launches.append, _recorder
    try:
        yield launches
    finally:
        _recorder = previous


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, num_warps: int, **arguments: Any) -> None:
    """Run `kernel` on the device of `on`; an empty grid is no launch."""
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder(Launch(kernel, grid, num_warps, arguments))
        return
    with torch.cuda.device_of(on):
        kernel[grid](**arguments, num_warps=num_warps, maxnreg=MAX_REGISTERS)
