"""The command; see `benchmarks.models.ladder`."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.environment import commit, environment
from benchmarks.models import ladder
from benchmarks.models.ladder.climb import climb
from benchmarks.models.ladder.rungs import KINDS, RUNGS, Case, cpu_has_bf16
from benchmarks.ops.rows import Recorder, Results, Row, device_of, read_results
from benchmarks.report import Group, steps
from dit_fast.errors import DitFastError

EVERY = ("DiT-XL/2", "DiT-L/2", "DiT-B/2", "DiT-S/2")


def positive(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    found = environment()
    source = Results(device_of(found), time.strftime("%Y-%m-%d", time.gmtime()), commit(), found, ())
    known: dict[tuple, Row] = {}
    keep: Callable[[Row], None] = lambda row: None  # noqa: E731
    try:
        if args.out is not None:
            recorder = Recorder(args.out)
            keep = recorder.add
            if recorder.path.exists():
                known = {row.key: row for row in read_results(recorder.path).rows}
        for case in cases(args):
            say(f"{case.kind}, {case.name}, {case.image_size} px, batch {case.batch}" + ", bf16" * case.bf16)
            repeats = 0 if args.compile_only else args.repeats
            rows = climb(case, case.rungs(args.only), repeats, args.steps, say, keep, known)
            if args.compile_only:
                continue
            print("\n".join(steps([Group(KINDS[case.kind][0], case.name, source, tuple(rows))])), flush=True)
    except DitFastError as error:
        print(f"ladder: {error}", file=sys.stderr)
        return 1
    return 0


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """What is climbed, the most telling first: all kinds of the first model and size before the next."""
    for image_size in args.image_sizes:
        for model in args.models:
            for kind in args.kinds:
                train = max(1, args.batch * 256**2 // image_size**2)
                for batch in (train,) if kind.startswith("train") else args.images:
                    for dtype in args.dtypes:
                        yield Case(kind, model, image_size, batch, args.depth, dtype == "bf16")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    one = "DiT-XL/2" if on_gpu else "DiT-S/2"
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.models.ladder",
        description=ladder.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="(default: all)")
    made.add_argument("--models", nargs="+", default=[one], help=f"e.g. {' '.join(EVERY)} (default: {one})")
    made.add_argument(
        "--dtypes",
        nargs="+",
        choices=("fp32", "bf16"),
        default=["fp32", "bf16"] if not on_gpu and cpu_has_bf16() else ["fp32"],
        help="of the products on a CPU (default: both where it has bfloat16 instructions, else fp32)",
    )
    made.add_argument("--image-sizes", nargs="+", type=int, default=[256], help="pixels (default: 256)")
    batch = 128 if on_gpu else 8
    made.add_argument(
        "--batch",
        type=positive,
        default=batch,
        help=f"images of a training step at 256 px, as many pixels at others (default: {batch})",
    )
    made.add_argument(
        "--images", nargs="+", type=positive, default=[1, 8, 32], help="sampled at once (default: 1 8 32)"
    )
    names = [rung.name for rung in RUNGS]
    made.add_argument("--only", nargs="+", choices=names, help="these rungs only, in this order")
    made.add_argument(
        "--depth", type=positive, help="blocks in place of the model's own, for a look in seconds"
    )
    made.add_argument(
        "--compile-only", action="store_true", help="build every rung for the compilers' caches; no rows"
    )
    for name, number, what in (
        ("--repeats", 10 if on_gpu else 3, "half the times that each rung is timed"),
        ("--steps", 10 if on_gpu else 2, "of a sampled trajectory"),
    ):
        made.add_argument(name, type=positive, default=number, help=f"{what} (default: {number})")
    made.add_argument("--out", type=Path, help="folder of result files, e.g. benchmarks/results")
    return made


if __name__ == "__main__":
    sys.exit(main())
