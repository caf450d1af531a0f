"""Operations beside their peers, without pytest: `python -m benchmarks.ops.operations --ops attention mlp`.

All passes and providers of one operation, shape and dtypes are timed in turn, round after round, after outputs and
gradients have been checked against float64: what is wrong leaves its reason and no figure. Beside the times stand
bytes, GB/s, TFLOP/s and the share of what a copy and a product reach on this device in this run. The rows of an
operation are kept in `--out` as soon as it is timed; one that is there already, of the same commit and day, is not
timed again. `--once` runs every pass once, unchecked and untimed: it fills the compilers' caches, and gives a profiler
something to look at. `pytest benchmarks/` (`bench_ops.py`) times the same cases through pytest-benchmark.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Ceiling, Timed, ceiling, in_turn
from benchmarks.compile.static_report import DTYPES
from benchmarks.ops.op_bench import Bench, OptimizerBench
from benchmarks.ops.peers import PROVIDERS, Missing, providers_of
from benchmarks.ops.registry import REGISTRY, OpSpec, Shape
from benchmarks.ops.rows import Recorder, Row, read_results
from dit_fast.errors import ConfigError, DitFastError
from dit_fast.training.optimizer import OPTIMIZERS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# DiT-XL/2 at 256 and 512 px, and DiT-S/2; on a CPU one that takes milliseconds. At batch 32 a token tensor (19 MB)
# would lie partly in the second-level cache of an H100.
SHAPES: tuple[Shape, ...] = (
    ((256, 256, 1152), (64, 1024, 1152), (256, 256, 384)) if ON_GPU else ((2, 64, 384),)
)
SETTINGS = ("bf16", "autocast") if ON_GPU else ("fp32",)
DIRECTIONS = ("forward", "backward", "both")
ROUNDS = 50
MODEL = "DiT-XL/2" if ON_GPU else "DiT-S/8"
OPTIMIZER = "adamw_ema"


class Wrong(Exception):
    """An operation or a provider whose results are not what they should be."""


Times = list[float] | Exception


def time_operation(
    name: str, shape: Shape, dtypes: str, wanted: Sequence[tuple[str, str]], rounds: int = ROUNDS
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
    return found | in_turn(built, rounds)


def time_optimizers(wanted: Sequence[str], rounds: int = 10) -> dict[Any, Times]:
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
    return found | in_turn(built, rounds)


def run_once(name: str, shape: Shape, dtypes: str, providers: Sequence[str]) -> dict[str, Exception]:
    """Run every pass of the providers once; why some did not, by provider."""
    bench = Bench(REGISTRY[name], shape, dtypes, DEVICE)
    failed: dict[str, Exception] = {}
    for provider in providers:
        try:
            passes = bench.passes(providers_of(name)[provider](REGISTRY[name]))
            for each in passes.values():
                each.run(*each.before())
        except Exception as error:
            failed[provider] = error
    if ON_GPU:
        torch.cuda.synchronize()
    return failed


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


def row_of(
    case: tuple[str, tuple[int, ...], str, str, str], times: Times, bytes_moved: int, products: float
) -> Row:
    """The row of (operation, shape, dtypes, provider, pass): its times with their figures, or why there are none."""
    if isinstance(times, Exception):
        return Row("op", *case, failed=reason(times))
    row = Row.timed("op", *case, times)
    return replace(
        row, metrics=figures(bytes_moved, products, row.median or 0.0, ceiling(DTYPES[case[2]][1]))
    )


def reason(error: Exception) -> str:
    """The error's first line, or its class where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def wanted_of(name: str, providers: Sequence[str] | None, directions: Sequence[str]) -> list[tuple[str, str]]:
    """(provider, pass) of an operation, of the `providers` that it has; None: of all."""
    return [
        (provider, direction)
        for provider in providers_of(name)
        if providers is None or provider in providers
        for direction in directions
    ]


def is_finished(rows: Mapping[Any, Row], keys: Sequence[Any]) -> bool:
    """Whether rows of before answer all of `keys`; a peer's may be the reason why there is no figure."""
    return all(
        key in rows and (rows[key].failed is None or rows[key].provider not in PROVIDERS) for key in keys
    )


def time_all(args: argparse.Namespace, keep: Callable[[Row], None], known: Mapping[Any, Row]) -> int:
    """Time what the command asks for and `known` does not hold; returns how many of our own results were wrong."""
    wrong = 0

    def record(
        case: tuple[str, tuple[int, ...], str, str, str], times: Times, done: tuple[int, float]
    ) -> None:
        nonlocal wrong
        row = row_of(case, times, *done)
        keep(row)
        wrong += isinstance(times, Wrong) and case[3] == "ours"
        said = (
            row.failed
            or f"{1e6 * (row.median or 0):.1f} us, {row.metrics['share of the ceiling']:.0%} of the ceiling"
        )
        print(f"{case[0]} {'x'.join(map(str, case[1]))} {case[2]} {case[4]} {case[3]}: {said}", flush=True)

    for name in args.ops:
        for dtypes in args.dtypes:
            wanted = wanted_of(name, args.providers, args.passes)
            cases = {key: (name, tuple(args.shape), dtypes, *key) for key in wanted}
            if is_finished(known, [("op", *case) for case in cases.values()]):
                print(f"{name} {dtypes}: known from before", flush=True)
                continue
            try:
                times = time_operation(name, args.shape, dtypes, wanted, args.rounds)
            # The inputs alone may be too large; of whatever kind, the other operations go on.
            except Exception as error:
                times = {key: error for key in wanted}
            for key, case in cases.items():
                record(case, times[key], work(REGISTRY[name], args.shape, DTYPES[dtypes][1].itemsize, key[1]))
            if ON_GPU:
                torch.cuda.empty_cache()
    if args.optimizer:
        providers = [name for name in OPTIMIZERS if args.providers is None or name in args.providers]
        count = OptimizerBench(MODEL, DEVICE).count
        for provider, each in time_optimizers(providers, min(args.rounds, 10)).items():
            case = (OPTIMIZER, (count,), "fp32", provider, "step")
            record(case, each, (OptimizerBench.BYTES * count, 0.0))
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    args.shape = tuple(args.shape)
    if args.once:
        for name in args.ops:
            for dtypes in args.dtypes:
                providers = list(dict.fromkeys(p for p, _ in wanted_of(name, args.providers, ("both",))))
                failed = run_once(name, args.shape, dtypes, providers)
                for provider in providers:
                    said = reason(failed[provider]) if provider in failed else "run"
                    print(f"{name} {dtypes} {provider}: {said}", flush=True)
        return 0
    keep: Callable[[Row], None] = lambda row: None  # noqa: E731
    known: dict[Any, Row] = {}
    try:
        if args.out is not None:
            recorder = Recorder(args.out)
            keep = recorder.add
            if recorder.path.exists():
                known = {row.key: row for row in read_results(recorder.path).rows}
        return int(time_all(args, keep, known) > 0)
    except DitFastError as error:
        print(f"operations: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.operations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--ops", nargs="*", choices=tuple(REGISTRY), default=list(REGISTRY), help="(default: all)"
    )
    made.add_argument("--shape", nargs=3, type=int, metavar=("B", "T", "D"), default=SHAPES[0])
    made.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=SETTINGS[:1])
    every = list(dict.fromkeys(provider for name in REGISTRY for provider in providers_of(name)))
    every += [name for name in OPTIMIZERS if name not in every]
    made.add_argument("--providers", nargs="+", choices=every, help="(default: all)")
    made.add_argument("--passes", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    made.add_argument("--optimizer", action="store_true", help="a step of AdamW and averaging as well")
    made.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default: {ROUNDS})")
    made.add_argument("--once", action="store_true", help="run everything once, untimed; no rows")
    made.add_argument("--out", type=Path, help="folder of result files, e.g. benchmarks/results")
    return made


if __name__ == "__main__":
    sys.exit(main())
