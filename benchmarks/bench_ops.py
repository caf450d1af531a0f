"""Microbenchmarks of every registered operation and of the optimiser: `pytest benchmarks/ [-k gelu] [--results=DIR]`.

A case is (operation, shape, dtypes, pass, provider). Before anything is timed, outputs and gradients are checked
against float64: a case that is wrong fails and leaves no figure. Beside the times stand bytes, GB/s, TFLOP/s and the
share of what a copy and a product reach on this device in this run. bf16: all tensors bfloat16; autocast: residual
stream float32, the rest bfloat16. `--results=benchmarks/results` keeps a row for each case, the skipped and failed ones
with their reason; `--benchmark-compare` compares with runs that `--benchmark-autosave` kept.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.clock import Ceiling, ceiling, cold, now
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
CASES = [
    pytest.param(
        name, shape, dtypes, direction, provider,
        id=f"{name}-{'x'.join(map(str, shape))}-{dtypes}-{direction}-{provider}",
        marks=pytest.mark.benchmark(group=f"{name} {'x'.join(map(str, shape))} {dtypes} {direction}", timer=now),
    )
    for name in REGISTRY
    for shape in SHAPES
    for dtypes in SETTINGS
    for provider in providers_of(name)
    for direction in ("forward", "backward", "both")
]  # fmt: skip


class Wrong(Exception):
    """An operation or a provider whose results are not what they should be."""


class Prepared:
    """The case before, kept for its other passes: checking and compiling are done once for all three."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.passes: dict[str, Timed] = {}
        self.error: Exception | None = None

    def of(self, name: str, shape: Shape, dtypes: str, provider: str) -> dict[str, Timed]:
        """What to time, by pass. Raises Missing, Wrong or what the provider raises."""
        if self.key != (name, shape, dtypes, provider):
            self.key, self.passes, self.error = (name, shape, dtypes, provider), {}, None
            try:
                self.passes = self._prepare(name, shape, dtypes, provider)
            except Exception as error:
                self.error = error
        if self.error is not None:
            raise self.error
        return self.passes

    def _prepare(self, name: str, shape: Shape, dtypes: str, provider: str) -> dict[str, Timed]:
        function = providers_of(name)[provider](REGISTRY[name])
        bench = Bench(REGISTRY[name], shape, dtypes, DEVICE)
        if (wrong := bench.disagreement(function)) is not None:
            raise Wrong(f"not timed: {wrong}")
        return bench.passes(function)


@pytest.fixture(scope="session")
def prepared() -> Prepared:
    return Prepared()


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


def time_case(
    case: tuple[str, tuple[int, ...], str, str, str],
    prepare: Callable[[], Timed],
    bytes_moved: int,
    products: float,
    benchmark: Any,
    record: Callable[[Row], None],
    rounds: int = ROUNDS,
) -> None:
    """Time what `prepare` returns, or record why not: what is missing or does not fit is skipped, what is wrong fails.

    case: operation, shape, dtypes, provider and pass.
    """
    name, shape, dtypes, provider, direction = case
    benchmark.extra_info.update(
        op=name, shape=list(shape), dtypes=dtypes, direction=direction, provider=provider
    )
    try:
        timed = prepare()

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = timed.before()
            cold()
            return arguments, {}

        benchmark.pedantic(timed.run, setup=setup, rounds=rounds, warmup_rounds=5)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        record(Row("op", *case, failed=reason))
        if isinstance(error, Missing | torch.OutOfMemoryError):
            pytest.skip(reason)
        if isinstance(error, Wrong):
            pytest.fail(reason, pytrace=False)
        raise
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        found = figures(bytes_moved, products, stats.median, ceiling(DTYPES[dtypes][1]))
        benchmark.extra_info.update(found)
        record(Row.timed("op", *case, stats.data, found))


@pytest.mark.parametrize(("name", "shape", "dtypes", "direction", "provider"), CASES)
def test_op(
    name: str,
    shape: Shape,
    dtypes: str,
    direction: str,
    provider: str,
    benchmark: Any,
    prepared: Prepared,
    record: Callable[[Row], None],
) -> None:
    low = DTYPES[dtypes][1]
    time_case(
        (name, shape, dtypes, provider, direction),
        lambda: prepared.of(name, shape, dtypes, provider)[direction],
        *work(REGISTRY[name], shape, low.itemsize, direction),
        benchmark,
        record,
    )


@pytest.mark.benchmark(group=f"adamw_ema {MODEL}", timer=now)
@pytest.mark.parametrize("provider", OPTIMIZERS)
def test_adamw_ema(provider: str, benchmark: Any, record: Callable[[Row], None]) -> None:
    """AdamW and averaging of a model's parameters; shape is their number."""
    bench = OptimizerBench(MODEL, DEVICE)

    def prepare() -> Timed:
        try:
            if (wrong := bench.disagreement(provider)) is not None:
                raise Wrong(f"not timed: {wrong}")
            return bench.step(provider)
        except ConfigError as error:
            raise Missing(str(error)) from error

    case = ("adamw_ema", (bench.count,), "fp32", provider, "step")
    time_case(case, prepare, OptimizerBench.BYTES * bench.count, 0.0, benchmark, record, rounds=10)
