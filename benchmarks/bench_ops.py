"""Microbenchmarks of every registered operation: `pytest benchmarks/ [-k gelu] [--benchmark-compare]`.

A case is (operation, shape, dtypes, pass, provider). Before anything is timed, outputs and gradients are checked
against float64: a case that is wrong fails and leaves no figure. Beside the times stand bytes, GB/s, TFLOP/s and the
share of what a copy and a product reach on this device in this run. bf16: all tensors bfloat16; autocast: residual
stream float32, the rest bfloat16.
"""

import math
from typing import Any

import pytest
import torch

from benchmarks.clock import Ceiling, ceiling, cold, now
from benchmarks.op_bench import Bench
from benchmarks.peers import Missing, providers_of
from benchmarks.static_report import DTYPES
from dit_fast.kernels.registry import REGISTRY, OpSpec, Shape

ON_GPU = torch.cuda.is_available()
# DiT-XL/2 at 256 and 512 px, and DiT-S/2; on a CPU one that takes milliseconds.
SHAPES: tuple[Shape, ...] = ((32, 256, 1152), (8, 1024, 1152), (64, 256, 384)) if ON_GPU else ((2, 64, 384),)
SETTINGS = ("bf16", "autocast") if ON_GPU else ("fp32",)
ROUNDS = 50 if ON_GPU else 10
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


class Prepared:
    """The case before, kept for its other passes: checking and compiling are done once for all three."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.passes: dict[str, Any] = {}
        self.reason = ""

    def of(self, name: str, shape: Shape, dtypes: str, provider: str) -> dict[str, Any]:
        """What to time, by pass. Skips or fails with the reason why not."""
        if self.key != (name, shape, dtypes, provider):
            self.key, self.passes, self.reason = (name, shape, dtypes, provider), {}, ""
            bench = Bench(REGISTRY[name], shape, dtypes, "cuda" if ON_GPU else "cpu")
            try:
                function = providers_of(name)[provider](REGISTRY[name])
            except Missing as error:
                self.reason = str(error)
            else:
                if (wrong := bench.disagreement(function)) is not None:
                    self.key = ()
                    pytest.fail(f"not timed: {wrong}", pytrace=False)
                self.passes = bench.passes(function)
        if self.reason:
            pytest.skip(self.reason)
        return self.passes


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


@pytest.mark.parametrize(("name", "shape", "dtypes", "direction", "provider"), CASES)
def test_op(
    name: str, shape: Shape, dtypes: str, direction: str, provider: str, benchmark: Any, prepared: Prepared
) -> None:
    function = prepared.of(name, shape, dtypes, provider)[direction]
    benchmark.pedantic(function, setup=cold, rounds=ROUNDS, warmup_rounds=5)
    low = DTYPES[dtypes][1]
    benchmark.extra_info.update(
        op=name, shape=list(shape), dtypes=dtypes, direction=direction, provider=provider
    )
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        assert math.isfinite(median)
        benchmark.extra_info.update(
            figures(*work(REGISTRY[name], shape, low.itemsize, direction), median, ceiling(low))
        )
