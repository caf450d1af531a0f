"""Microbenchmarks of every registered operation and of the optimiser: `pytest benchmarks/ [-k gelu] [--results=DIR]`.

A case is (operation, shape, dtypes, pass, provider). Before anything is timed, outputs and gradients are checked
against float64: a case that is wrong fails and leaves no figure. All passes and providers of one operation, shape and
dtypes are timed in turn, round after round; pytest-benchmark is then given the times of each. Beside them stand bytes,
GB/s, TFLOP/s and the share of what a copy and a product reach on this device in this run. bf16: all tensors bfloat16;
autocast: residual stream float32, the rest bfloat16. `--results=benchmarks/results` keeps a row for each case, the
skipped and failed ones with their reason; `--benchmark-compare` compares with runs that `--benchmark-autosave` kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.clock import Ceiling, ceiling, in_turn
from benchmarks.op_bench import Bench, OptimizerBench, Timed
from benchmarks.peers import Missing, providers_of
from benchmarks.rows import Row
from benchmarks.static_report import DTYPES
from dit_fast.errors import ConfigError
from dit_fast.kernels.registry import REGISTRY, OpSpec, Shape
from dit_fast.training.torch_optimizer import OPTIMIZERS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# DiT-XL/2 at 256 and 512 px, and DiT-S/2; on a CPU one that takes milliseconds.
SHAPES: tuple[Shape, ...] = ((32, 256, 1152), (8, 1024, 1152), (64, 256, 384)) if ON_GPU else ((2, 64, 384),)
SETTINGS = ("bf16", "autocast") if ON_GPU else ("fp32",)
ROUNDS = 50
MODEL = "DiT-XL/2" if ON_GPU else "DiT-S/8"


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
    for direction in ("forward", "backward", "both")
]  # fmt: skip


class Wrong(Exception):
    """An operation or a provider whose results are not what they should be."""


Times = list[float] | Exception


def time_operation(
    name: str, shape: Shape, dtypes: str, wanted: Sequence[tuple[str, str]]
) -> dict[Any, Times]:
    """Times of the wanted (provider, pass), measured in turn, or why there are none."""
    bench = Bench(REGISTRY[name], shape, dtypes, DEVICE)
    found: dict[Any, Times] = {}
    built: dict[Any, Timed] = {}
    for provider in dict.fromkeys(provider for provider, _ in wanted):
        mine = [key for key in wanted if key[0] == provider]
        try:
            function = providers_of(name)[provider](REGISTRY[name])
            if (wrong := bench.disagreement(function)) is not None:
                raise Wrong(f"not timed: {wrong}")
            passes = bench.passes(function)
        except Exception as error:
            found |= {key: error for key in mine}
        else:
            built |= {key: passes[key[1]] for key in mine}
    return found | in_turn(built, ROUNDS)


def time_optimisers(wanted: Sequence[str]) -> dict[Any, Times]:
    """Times of the wanted providers' steps, measured in turn, or why there are none."""
    bench = OptimizerBench(MODEL, DEVICE)
    found: dict[Any, Times] = {}
    built: dict[Any, Timed] = {}
    for provider in wanted:
        try:
            if (wrong := bench.disagreement(provider)) is not None:
                raise Wrong(f"not timed: {wrong}")
            built[provider] = bench.step(provider)
        except ConfigError as error:
            found[provider] = Missing(str(error))
        except Exception as error:
            found[provider] = error
    return found | in_turn(built, 10)


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

    def optimisers(self) -> Mapping[Any, Times]:
        """By provider."""
        if self.group != ("adamw_ema",):
            wanted = [params["provider"] for test, params in self.selected if test == "test_adamw_ema"]
            self.group, self.times = ("adamw_ema",), {}
            self.times = time_optimisers(wanted)
        return self.times


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.session.items)


def work(spec: OpSpec, shape: Shape, itemsize: int, direction: str) -> tuple[int, float]:
    """Unavoidable bytes, and operations of the matrix products, of a pass."""
    forward, backward = spec.bytes_moved(shape, itemsize), spec.bytes_moved(shape, itemsize, backward=True)
    products = spec.products(*shape)
    return {
        "forward": (forward, products),
        "backward": (backward, spec.backward_products * products),
        "both": (forward + backward, (1 + spec.backward_products) * products),
    }[direction]


def figures(bytes_moved: int, products: float, median: float, best: Ceiling) -> dict[str, float]:
    """Rates at the median time, and the share of the limit: the longer of the copy's and the product's time."""
    limit = max(bytes_moved / best.copy, products / best.product)
    return {
        "bytes": bytes_moved,
        "product_flops": products,
        "GB/s": bytes_moved / median * 1e-9,
        "TFLOP/s": products / median * 1e-12,
        "copy GB/s": best.copy * 1e-9,
        "product TFLOP/s": best.product * 1e-12,
        "share of the ceiling": limit / median,
    }


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
    if isinstance(times, Exception):
        reason = next(iter(str(times).splitlines()), "") or type(times).__name__
        record(Row("op", *case, failed=reason))
        if isinstance(times, Missing | torch.OutOfMemoryError):
            pytest.skip(reason)
        if isinstance(times, Wrong):
            pytest.fail(reason, pytrace=False)
        raise times
    REPLAY.load(times)
    benchmark.pedantic(lambda: None, rounds=len(times))
    row = Row.timed("op", *case, times)
    found = figures(bytes_moved, products, row.median or 0.0, ceiling(DTYPES[dtypes][1]))
    benchmark.extra_info.update(found)
    record(replace(row, metrics=found))


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
    case = ("adamw_ema", (count,), "fp32", provider, "step")
    report(case, measured.optimisers()[provider], OptimizerBench.BYTES * count, 0.0, benchmark, record)
