"""What ranges cost a training step: `python -m benchmarks.models.nvtx_cost [--repeats 200] [--results FOLDER]`.

Three trainers make the same steps in turn: one whose code has its ranges taken out (from the source, before it is
compiled), one with ranges that are off, and one with NVTX on (extra `profile`, or a CUDA build of PyTorch). The model
is small and its steps short, which is where a fixed cost shows most. Differences are of steps of the same round.
"""

import argparse
import ast
import importlib
import statistics
import sys
import timeit
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.clock import now
from benchmarks.ops.rows import RESULTS, Recorder, Row
from dit_fast.data import open_data
from dit_fast.errors import MissingExtraError
from dit_fast.training import TrainConfig, Trainer
from dit_fast.utils.nvtx import OFF

NONE, SWITCHED_OFF, ON = "no ranges", "ranges off", "NVTX on"
WIDTH, DEPTH, BATCH = 64, 4, 16
OPTIONS: dict[str, Any] = dict(
    data="digits", hidden_size=WIDTH, depth=DEPTH, num_heads=2, patch_size=4, batch_size=BATCH, steps=10**6
)


class TakeOutRanges(ast.NodeTransformer):
    """`with self.ranges("forward"): body` becomes body; `taken` counts them."""

    taken = 0

    def visit_With(self, node: ast.With) -> Any:
        self.generic_visit(node)
        items = [item for item in node.items if not ast.unparse(item.context_expr).startswith("self.ranges(")]
        self.taken += len(node.items) - len(items)
        node.items = items
        return node if items else node.body


def without_ranges(name: str, **replaced: Any) -> types.ModuleType:
    """Module `name` rebuilt without its ranges, and with other objects under some of its names."""
    source = Path(str(importlib.import_module(name).__file__))
    transformer = TakeOutRanges()
    tree = ast.fix_missing_locations(transformer.visit(ast.parse(source.read_text())))
    if not transformer.taken:
        raise RuntimeError(f"{source}: no range was found, so there is nothing to compare with")
    module = sys.modules[f"{name}_without_ranges"] = types.ModuleType(f"{name}_without_ranges")
    exec(compile(tree, str(source), "exec"), vars(module))
    vars(module).update(replaced)
    return module


def trainers() -> Iterator[tuple[str, Trainer | str]]:
    """Each side with its trainer, or with the reason why there is none."""
    data = open_data("digits")
    step = without_ranges("dit_fast.training.step")
    plain = without_ranges("dit_fast.training.trainer", TrainStep=step.TrainStep)
    yield NONE, plain.Trainer(TrainConfig(**OPTIONS), data)
    yield SWITCHED_OFF, Trainer(TrainConfig(**OPTIONS), data)
    try:
        yield ON, Trainer(TrainConfig(**OPTIONS, nvtx=True), data)
    except MissingExtraError as error:
        yield ON, str(error)


def ranges_of_a_step(make: type[Trainer] = Trainer) -> list[str]:
    """The ranges that a step opens, those of blocks left out: blocks have none while ranges are off."""
    opened: list[str] = []

    def note(name: str) -> AbstractContextManager[None]:
        opened.append(name)
        return nullcontext()

    trainer = make(TrainConfig(**OPTIONS), open_data("digits"), ranges=note)
    trainer.train_step(*trainer.stream.stored(0))
    return [name for name in opened if not name.startswith("block_")]


def measure(sides: dict[str, Trainer], repeats: int, warmup: int = 10) -> dict[str, list[float]]:
    """Seconds of each step, side by side; who begins changes with every round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in tqdm(range(warmup + repeats), desc="steps"):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            batch = sides[name].stream.stored(number)
            start = now()
            sides[name].train_step(*batch)
            seconds = now() - start
            if number >= warmup:
                times[name].append(seconds)
    return times


def report(times: dict[str, list[float]]) -> list[str]:
    """The median of each side, and of its differences to no ranges, with quartiles."""
    lines = [f"{'side':12} {'median ms':>10} {'difference us':>14}  quartiles us"]
    for name, seconds in times.items():
        line = f"{name:12} {1e3 * statistics.median(seconds):10.3f}"
        if name != NONE:
            differences = [1e6 * (own - base) for own, base in zip(seconds, times[NONE], strict=True)]
            lower, median, upper = statistics.quantiles(differences, n=4, method="inclusive")
            line += f" {median:14.1f}  {lower:.1f} to {upper:.1f}"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    args = parser.parse_args()
    recorder = Recorder(args.results)
    made = dict(trainers())
    reasons = {name: side for name, side in made.items() if isinstance(side, str)}
    times = measure({name: side for name, side in made.items() if not isinstance(side, str)}, args.repeats)
    case, shape = f"DiT {WIDTH} wide, {DEPTH} blocks, digits", (BATCH, 8)
    recorder.add(
        *(Row.timed("ranges", case, shape, "fp32", name, "step", times[name]) for name in times),
        *(
            Row("ranges", case, shape, "fp32", name, "step", failed=reason)
            for name, reason in reasons.items()
        ),
    )
    print("\n".join([*report(times), *reasons.values()]))
    off = (
        min(timeit.repeat('with OFF("forward"): pass', globals={"OFF": OFF}, number=100_000, repeat=5)) / 1e5
    )
    count = len(ranges_of_a_step())
    share = count * off / statistics.median(times[SWITCHED_OFF])
    print(
        f"{count} ranges a step; one that is off takes {1e9 * off:.0f} ns, all of them {100 * share:.4f} % of a step"
    )


if __name__ == "__main__":
    main()
