"""Measure which launch configuration or provider is fastest: `python -m benchmarks.ops.tune OP [--shape B T D]`.

Asks the operation which questions it puts to the tuned tables (`kernels/tuned.py`), forward and backward, tries every
answer and writes the best ones to `kernels/tuned/<architecture>.json`, beside the time of the heuristic's. An answer is
timed only after its outputs and gradients agree with the reference as well as PyTorch does. Times are medians of
`triton.testing.do_bench`, on the device and with the L2 cache flushed; a launch configuration by its kernel alone, a
provider by the operation forward and backward. The heuristic stays unless another answer beats it by 2 %.
All answers are compiled before, by `--jobs` processes. The table is written after each question, so that what is cut
off keeps what it measured; `--missing` leaves out what the table answers for this shape already.
Needs a CUDA device; `--dry-run` walks the search on any machine with a made-up timer and writes nothing but a table
that `--out` asks for.
"""

import argparse
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from benchmarks.compile.compile_ahead import Answer, compile_answers
from benchmarks.compile.static_report import DTYPES, WIDTHS
from benchmarks.ops.op_bench import Bench
from benchmarks.ops.registry import REGISTRY
from dit_fast.kernels import tuned
from dit_fast.kernels.launch import Launch, record_launches
from dit_fast.utils.files import write_atomically

MARGIN = 0.02
"""By how much an answer must beat the heuristic's; smaller differences are noise between runs."""

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Measured:
    """One question with the microseconds of each answer; None where an answer was wrong or did not run."""

    request: tuned.Request
    times: tuple[float | None, ...]
    heuristic: float

    @property
    def best(self) -> Any:
        """The fastest answer, the heuristic's own unless another beats it by MARGIN."""
        timed = [(time, index) for index, time in enumerate(self.times) if time is not None]
        if not timed:
            return self.request.default
        time, index = min(timed)
        return self.request.options[index] if time < (1 - MARGIN) * self.heuristic else self.request.default

    def describe(self) -> str:
        """The outcome in a line."""
        request = self.request
        times = {str(option): time for option, time in zip(request.options, self.times, strict=True)}
        time = times.get(str(self.best)) or self.heuristic
        timed = sum(time is not None for time in self.times)
        return (
            f"{request.name} [{request.key}]: {timed} of {len(self.times)} answers ran; heuristic "
            f"{self.heuristic:.1f}, best {time:.1f} by {self.best}, microseconds"
        )

    def entry(self, shape: Sequence[int]) -> dict[str, Any] | None:
        """What the table keeps; None for a heuristic that stays and is not a choice of its own, as "" for no choice."""
        best = self.best
        if best not in self.request.options:
            return None
        times = [self.times[i] for i, option in enumerate(self.request.options) if option == best]
        entry = {
            "us": times[0] if times else self.heuristic,
            "heuristic_us": self.heuristic,
            "shape": list(shape),
        }
        if self.request.section == "choices":
            return {"choice": best, **entry}
        fields = {name: getattr(best, name) for name in type(best).tunable}
        return {"config": fields, **entry}


def replay(launches: Sequence[Launch]) -> None:
    """Execute recorded launches."""
    for launch in launches:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)


Given = Mapping[tuple[str, str], Any]
"""Answers to other questions, by (section, name), under which a question is asked."""


def questions(bench: Bench, capability: int) -> list[tuple[tuned.Request, Given]]:
    """What the operation asks the tables, each once, where there is more than one answer; launches before providers.

    A provider has questions of its own, which are asked where it is the answer.
    """

    def ask(given: Given) -> list[tuned.Request]:
        with tuned.search(given) as asked, record_launches(capability):
            # A provider that is not there asks nothing; why it is not is said when it is its turn to be timed.
            with contextlib.suppress(RuntimeError, ImportError, ValueError):
                bench.kernel()
            return asked

    found: dict[tuned.Request, Given] = {}
    for request in ask({}):
        found.setdefault(request, {})
        for option in request.options if request.section == "choices" else ():
            given = {(request.section, request.name): option}
            for follows in ask(given):
                found.setdefault(follows, given)
    several = [(request, given) for request, given in found.items() if len(request.options) > 1]
    return sorted(several, key=lambda item: item[0].section == "choices")


def measure(
    bench: Bench,
    request: tuned.Request,
    capability: int,
    timer: Timer,
    check: bool,
    say: Callable[[str], None],
    given: Given | None = None,
) -> Measured:
    """Time every answer to a question, with the answers `given` to others."""
    times: list[float | None] = []
    for option in tqdm(request.options, desc=f"{request.name} [{request.key}]", file=sys.stderr):
        try:
            times.append(_time(bench, request, option, capability, timer, check, given or {}))
        except (RuntimeError, ImportError, ValueError, triton.TritonError) as error:
            say(f"{request.name} [{request.key}] {option}: left out, {str(error).splitlines()[0]}")
            times.append(None)
    heuristic = _time(bench, request, request.default, capability, timer, check, given or {})
    return Measured(request, tuple(times), heuristic)


def _time(
    bench: Bench,
    request: tuned.Request,
    option: Any,
    capability: int,
    timer: Timer,
    check: bool,
    given: Given,
) -> float:
    with tuned.search({**given, (request.section, request.name): option}):
        if check and (wrong := bench.disagreement()) is not None:
            raise RuntimeError(wrong)
        if request.section == "choices":
            return timer(bench.kernel)
        launches = bench.launches(request.name, capability)
        return timer(lambda: replay(launches))


def write_table(
    path: Path, found: Sequence[Measured], shape: Sequence[int], device: str, command: str
) -> None:
    """Merge measurements into a table; entries of other versions, or of code that has changed, are dropped."""
    data: dict[str, Any] = {}
    if path.is_file():
        try:
            data = dict(tuned.read_table(path).sections)
        except ValueError as error:
            print(f"{path}: written anew: {error}", file=sys.stderr)
    for item in found:
        if (entry := item.entry(shape)) is None:
            continue
        parts = data.setdefault(item.request.section, {})
        part = parts.get(item.request.name)
        if part is None or part["source"] != item.request.source:
            part = parts[item.request.name] = {"source": item.request.source, "entries": {}}
        part["entries"][item.request.key] = entry
    head = {
        "schema": tuned.SCHEMA,
        "architecture": path.stem,
        **tuned.versions(),
        "device": device,
        "date": datetime.date.today().isoformat(),
        "command": command,
    }
    text = json.dumps({**head, **data}, indent=1, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))


def device_timer(function: Callable[[], Any]) -> float:
    """Microseconds on the device, the median over repeats with the L2 cache flushed before each."""
    return 1e3 * triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median")


def made_up_timer(function: Callable[[], Any]) -> float:
    """1 us for everything: a dry run has no device and measures nothing."""
    return 1.0


def search(
    names: Sequence[str],
    shape: tuple[int, int, int],
    dtypes: Sequence[str],
    device: str,
    capability: int,
    timer: Timer,
    jobs: int = 0,
    known: Callable[[tuned.Request], bool] = lambda request: False,
) -> Iterator[Measured]:
    """Every question of the operations that is not `known`, measured; on the meta device nothing is computed.

    jobs: processes that compile all launch configurations before the first is timed; 0: each is compiled when timed.
    """
    asked: dict[tuple[str, str], list[tuple[tuned.Request, Given]]] = {}
    for name in names:
        for kind in dtypes:
            wanted = questions(Bench(REGISTRY[name], shape, kind, device), capability)
            asked[name, kind] = [(request, given) for request, given in wanted if not known(request)]
    answers = [
        Answer(name, shape, kind, request.name, option, given)
        for (name, kind), requests in asked.items()
        for request, given in requests
        if request.section == "launches"
        for option in request.options
    ]
    for why in compile_answers(answers, capability, jobs) if answers and jobs > 0 else ():
        tqdm.write(f"not compiled: {why}")
    for (name, kind), requests in asked.items():
        if not requests:
            continue
        bench = Bench(REGISTRY[name], shape, kind, device)
        # Providers are compared with the launches that were found best for them.
        best: dict[tuple[str, str], Any] = {}
        for request, given in requests:
            item = measure(bench, request, capability, timer, device != "meta", tqdm.write, {**best, **given})
            if request.section == "launches":
                best[request.section, request.name] = item.best
            yield item


def answered(path: Path, shape: Sequence[int]) -> Callable[[tuned.Request], bool]:
    """Whether the table at `path` answers a question by a measurement at `shape` with the code as it is."""
    try:
        sections = tuned.read_table(path).sections if path.is_file() else {}
    except ValueError:
        sections = {}

    def known(request: tuned.Request) -> bool:
        part = sections.get(request.section, {}).get(request.name)
        if part is None or part["source"] != request.source:
            return False
        return part["entries"].get(request.key, {}).get("shape") == list(shape)

    return known


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure launch configurations and providers on this GPU.")
    parser.add_argument("op", nargs="+", choices=tuple(REGISTRY))
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("B", "T", "D"), help="default: 256 256 and each width"
    )
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=("bf16", "autocast"))
    parser.add_argument(
        "--out", type=Path, help="table to write (default: kernels/tuned/<architecture>.json)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="walk the search without a GPU; writes nothing but --out"
    )
    parser.add_argument("--missing", action="store_true", help="only what the table does not answer yet")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: one per core)"
    )
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("tune: no CUDA device here; --dry-run walks the search without one", file=sys.stderr)
        return 1
    device, timer = ("meta", made_up_timer) if args.dry_run else ("cuda", device_timer)
    capability = 90 if args.dry_run else tuned.current_capability()
    name = "none: a made-up timer" if args.dry_run else torch.cuda.get_device_name()
    path = args.out or tuned.FOLDER / f"sm{capability}.json"
    command = " ".join(
        ["python -m benchmarks.ops.tune", *(arguments if arguments is not None else sys.argv[1:])]
    )
    for shape in [tuple(args.shape)] if args.shape else [(256, 256, width) for width in WIDTHS]:
        known = answered(path, shape) if args.missing else lambda request: False
        # Compiling for nobody: a dry run without a table to write only walks.
        jobs = args.jobs if args.out or not args.dry_run else 0
        for item in search(args.op, shape, args.dtypes, device, capability, timer, jobs, known):
            print(item.describe(), "of a made-up timer" if args.dry_run else "on this device", flush=True)
            if args.out or not args.dry_run:
                write_table(path, [item], shape, name, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
