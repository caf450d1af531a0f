"""Time as the device sees it, and what the device can do at best, measured in the same run."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
"""More than the second-level cache of any GPU so far: written between repeats, it leaves nothing in it."""
LEAD_CYCLES = 2_000_000
"""About a millisecond of a GPU's clock."""


class DeviceInstant:
    """A point in a CUDA stream. The difference of two, in seconds, waits until the device has passed both."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "DeviceInstant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) * 1e-3


def now() -> Any:
    """An instant on the CUDA device where there is one, else on the host's clock; instants subtract to seconds."""
    return DeviceInstant() if torch.cuda.is_available() else time.perf_counter()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def cold() -> None:
    """Empty the second-level cache, and keep the device busy until the host has queued what is timed.

    Without that lead, the time of an operation of many small launches would be the host's. On a CPU nothing is done:
    there, cases are timed warm.
    """
    if torch.cuda.is_available():
        _flush_buffer().zero_()
        torch.cuda._sleep(LEAD_CYCLES)


def seconds(function: Callable[[], Any], repeats: int, warmup: int = 3) -> list[float]:
    """Times of `repeats` calls, caches cold, after `warmup` calls that are not counted."""
    times = in_turn({None: Timed(function)}, repeats, warmup)[None]
    if isinstance(times, Exception):
        raise times
    return times


@dataclass(frozen=True)
class Timed:
    """`run(*before())`, of which `run` is timed."""

    run: Callable[..., Any]
    before: Callable[[], tuple[Any, ...]] = tuple


def in_turn(cases: Mapping[Any, Timed], rounds: int, warmup: int = 5) -> dict[Any, list[float] | Exception]:
    """Times of `rounds` calls of each, one of each in turn, caches cold, after `warmup` rounds that are not counted.

    What raises leaves its exception, and the others go on.
    """
    found: dict[Any, list[float] | Exception] = {key: [] for key in cases}
    for number in range(warmup + rounds):
        for key, case in cases.items():
            times = found[key]
            if isinstance(times, Exception):
                continue
            try:
                arguments = case.before()
                cold()
                start = now()
                case.run(*arguments)
                elapsed = now() - start
            except Exception as error:
                found[key] = error
            else:
                times.extend([elapsed] if number >= warmup else [])
    return found


@dataclass(frozen=True)
class Ceiling:
    """Best of the device: bytes per second of a copy, read and written, and operations per second of a product."""

    copy: float
    product: float


@functools.cache
def ceiling(dtype: torch.dtype) -> Ceiling:
    """Measured once per dtype and process: a large copy and a large square product, the fastest of 20."""
    on_gpu = torch.cuda.is_available()
    device, size, side = ("cuda", 2**28, 8192) if on_gpu else ("cpu", 2**23, 1024)
    # Zeros would be one page of memory, read from the cache.
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    factor = torch.randn(side, side, dtype=dtype, device=device)
    copied = min(seconds(lambda: target.copy_(source), 20))
    multiplied = min(seconds(lambda: factor @ factor, 20))
    return Ceiling(2 * size / copied, 2 * side**3 / multiplied)
