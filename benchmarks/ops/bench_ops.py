"""Microbenchmarks of every registered operation and of the optimizer: `pytest benchmarks/ [-k gelu] [--results=DIR]`.

A case is (operation, shape, dtypes, pass, provider). Before anything is timed, outputs and gradients are checked
against float64: a case that is wrong fails and leaves no figure. All passes and providers of one operation, shape and
dtypes are timed in turn, round after round; pytest-benchmark is then given the times of each. Beside them stand bytes,
GB/s, TFLOP/s and the share of what a copy and a product reach on this device in this run. bf16: all tensors bfloat16;
autocast: residual stream float32, the rest bfloat16. `--results=benchmarks/results` keeps a row for each case, the
skipped and failed ones with their reason; `--benchmark-compare` compares with runs that `--benchmark-autosave` kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from benchmarks.compile.static_report import DTYPES
from benchmarks.ops.op_bench import OptimizerBench
from benchmarks.ops.operations import (
    DEVICE,
    DIRECTIONS,
    MODEL,
    OPTIMIZER,
    SETTINGS,
    SHAPES,
    Times,
    Wrong,
    row_of,
    time_operation,
    time_optimizers,
    work,
)
from benchmarks.ops.peers import Missing, providers_of
from benchmarks.ops.registry import REGISTRY, Shape
from benchmarks.ops.rows import Row
from dit_fast.training.optimizer import OPTIMIZERS


class Replay:
    """A timer that gives pytest-benchmark the times that were measured before, one after the other."""

    __name__ = "times measured in turn"

    def __init__(self) -> None:
        self.instants: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        self.instants = (instant for time in seconds for instant in (0.0, time))

    def __call__(self) -> float:
        return next(self.instants)


REPLAY = Replay()
CASES = [
    pytest.param(
        name, shape, dtypes, direction, provider,
        id=f"{name}-{'x'.join(map(str, shape))}-{dtypes}-{direction}-{provider}",
        marks=pytest.mark.benchmark(group=f"{name} {'x'.join(map(str, shape))} {dtypes} {direction}", timer=REPLAY),
    )
    for name in REGISTRY
    for shape in SHAPES
    for dtypes in SETTINGS
    for provider in providers_of(name)
    for direction in DIRECTIONS
]  # fmt: skip


class Measured:
    """Times of the group of cases that the present one is of: all that pytest has selected are measured at once."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.selected = [
            (item.originalname, item.callspec.params) for item in items if hasattr(item, "callspec")
        ]
        self.group: tuple[Any, ...] = ()
        self.times: dict[Any, Times] = {}

    def operation(self, name: str, shape: Shape, dtypes: str) -> Mapping[Any, Times]:
        """By (provider, pass)."""
        group = (name, shape, dtypes)
        if self.group != group:
            cases = [params for test, params in self.selected if test == "test_op"]
            mine = [p for p in cases if (p["name"], p["shape"], p["dtypes"]) == group]
            self.group, self.times = group, {}
            self.times = time_operation(name, shape, dtypes, [(p["provider"], p["direction"]) for p in mine])
        return self.times

    def optimizers(self) -> Mapping[Any, Times]:
        """By provider."""
        if self.group != ("adamw_ema",):
            wanted = [params["provider"] for test, params in self.selected if test == "test_adamw_ema"]
            self.group, self.times = ("adamw_ema",), {}
            self.times = time_optimizers(wanted)
        return self.times


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.session.items)


def report(
    case: tuple[str, tuple[int, ...], str, str, str],
    times: Times,
    bytes_moved: int,
    products: float,
    benchmark: Any,
    record: Callable[[Row], None],
) -> None:
    """Give times to pytest-benchmark and `record`, or say why not: what is missing is skipped, what is wrong fails.

    case: operation, shape, dtypes, provider and pass.
    """
    name, shape, dtypes, provider, direction = case
    benchmark.extra_info.update(
        op=name, shape=list(shape), dtypes=dtypes, direction=direction, provider=provider
    )
    row = row_of(case, times, bytes_moved, products)
    record(row)
    if isinstance(times, Missing | torch.OutOfMemoryError):
        pytest.skip(row.failed or "")
    if isinstance(times, Wrong):
        pytest.fail(row.failed or "", pytrace=False)
    if isinstance(times, Exception):
        raise times
    REPLAY.load(times)
    benchmark.pedantic(lambda: None, rounds=len(times))
    benchmark.extra_info.update(row.metrics)


@pytest.mark.parametrize(("name", "shape", "dtypes", "direction", "provider"), CASES)
def test_op(
    name: str,
    shape: Shape,
    dtypes: str,
    direction: str,
    provider: str,
    benchmark: Any,
    measured: Measured,
    record: Callable[[Row], None],
) -> None:
    times = measured.operation(name, shape, dtypes)[provider, direction]
    done = work(REGISTRY[name], shape, DTYPES[dtypes][1].itemsize, direction)
    report((name, shape, dtypes, provider, direction), times, *done, benchmark, record)


@pytest.mark.benchmark(group=f"adamw_ema {MODEL}", timer=REPLAY)
@pytest.mark.parametrize("provider", OPTIMIZERS)
def test_adamw_ema(provider: str, benchmark: Any, measured: Measured, record: Callable[[Row], None]) -> None:
    """AdamW and averaging of a model's parameters; shape is their number."""
    count = OptimizerBench(MODEL, DEVICE).count
    case = (OPTIMIZER, (count,), "fp32", provider, "step")
    report(case, measured.optimizers()[provider], OptimizerBench.BYTES * count, 0.0, benchmark, record)
