"""Everything there is to show on one GPU, within minutes: `make gpu`, or `python -m benchmarks.gpu_suite --out DIR`.

Stages run one after the other as commands of their own, the most telling first: correctness of every kernel, the
ladder of training and sampling steps, each kernel and the optimiser beside their peers, the roofline, profiles, the
sanitizer. Each has a share of the time; one that fails, hangs or is cut off costs the others nothing. They write rows
(`benchmarks.rows`) to DIR/<device>, to be kept in benchmarks/results, and what is there is whole at any moment:
stages.json and report.md are written anew after each stage. A second call with the same folder goes on with what is
missing. Needs torch, triton, numpy, pillow, safetensors, tqdm, pytest and pytest-benchmark; matplotlib for the plots.
`--dry-run` walks all stages with tiny shapes on any machine.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, commit, environment
from benchmarks.report import draw, full, load, plots
from benchmarks.rows import device_of, slug
from dit_fast.errors import DitFastError
from dit_fast.files import write_atomically
from dit_fast.kernels.registry import REGISTRY
from dit_fast.sampling.output import prepare_folder

FORMAT = "dit_fast gpu suite 2"
LAST_LINES = 40
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
LADDER = (sys.executable, "-m", "benchmarks.ladder", "--out", "{out}", "--kinds")
PROFILE = (sys.executable, "-m", "dit_fast.cli", "profile", "--data", "digits", "--patch-size", "2")


@dataclass(frozen=True)
class Stage:
    """A command; "{out}" in it is the folder of the results. most: seconds at which it is cut off; least: with fewer
    seconds left it is not begun.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float = 15.0
    interpreted: bool = False


@dataclass
class Outcome:
    """state: "done", "failed", "cut off" or "not begun"; said: its last lines."""

    name: str
    state: str
    seconds: float = 0.0
    summary: str = ""
    said: list[str] = field(default_factory=list)


def stages(dry: bool) -> list[Stage]:
    """What is run, in order of priority; `dry`: the same with tiny shapes."""
    bench = (*PYTEST, "benchmarks/bench_ops.py", "--results={out}", "-k")
    telling = ("attention", "gated_residual_adaln", "mlp", "gelu")

    def climb(name: str, kinds: Sequence[str], *options: str, most: float) -> Stage:
        tiny = (
            *("--models", "DiT-S/8", "--image-sizes", "64", "--batch", "1", "--images", "1"),
            *("--repeats", "1", "--steps", "1", "--only", "plain fp32", "ours, eager"),
        )
        return Stage(f"ladder: {name}", (*LADDER, *kinds, *(tiny if dry else options)), most)

    def operations(names: Iterable[str]) -> str:
        cases = " or ".join(f"{name}-{'2x64x384-fp32' if dry else '32x256x1152-bf16'}" for name in names)
        return f"test_op and ({cases})" + (" and eager" if dry else "")

    def profile(kind: str, *options: str) -> Stage:
        size = ("--batch-size", "8", "--first", "2", "--count", "1", "--trace", f"{{out}}/{kind}-trace.json")
        return Stage(f"profile: {kind}", (*PROFILE, *size, *options), most=60)

    others = "test_adamw_ema and torch" if dry else "test_adamw_ema or attention-8x1024x1152-bf16"
    proofs = ("tests/kernels/test_ops.py", "-k", "test_runs_agree and unpatchify")
    roofline = (sys.executable, "-m", "benchmarks.roofline", "--measure", "--results", "{out}")
    size = ("--model", "DiT-S/8", "--image-size", "64", "--batch", "1") if dry else ("--batch", "128")
    sizes = ("--models", "DiT-XL/2", "DiT-L/2", "DiT-B/2", "DiT-S/2", "--image-sizes", "256", "512")
    found = [
        Stage("environment", (sys.executable, "-m", "dit_fast.cli", "doctor"), most=60),
        Stage(
            "correctness",
            (*PYTEST, *(proofs if dry else ("tests/kernels", "-k", "not any_size"))),
            most=200,
            interpreted=dry,
        ),
        climb("training", ["train"], most=150),
        Stage("kernels: most telling", (*bench, f"({operations(telling)}) or ({others})"), most=150),
        climb("sampling", ["sample-cfg"], "--images", "1", "8", most=150),
        Stage("roofline", (*roofline, *size), most=60),
        Stage("kernels: others", (*bench, operations(n for n in REGISTRY if n not in telling)), most=120),
        profile("training"),
        profile("sampling", "--sample"),
        climb("from disk, without guidance, many images", ["train-disk", "sample", "sample-cfg"], most=240),
        climb("every size", ["train", "sample-cfg"], *sizes, "--images", "1", "8", most=400),
    ]
    if not dry and shutil.which("compute-sanitizer"):
        checked = (*PYTEST, "tests/kernels/test_ops.py", "-k", "test_as_accurate", "-x")
        for tool in ("memcheck", "racecheck"):
            sanitize = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *checked)
            found.append(Stage(f"sanitizer: {tool}", sanitize, most=90, least=30))
    return found


def run_stage(out: Path, stage: Stage, limit: float) -> Outcome:
    """Run one command; killed with its children after `limit` seconds."""
    command = [part.replace("{out}", str(out.resolve())) for part in stage.command]
    variables = {**os.environ, "TRITON_INTERPRET": "1"} if stage.interpreted else dict(os.environ)
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, start_new_session=True, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        return Outcome(stage.name, "failed", summary=f"{command[0]}: {error.strerror}")
    state = "done"
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        state = "cut off"
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, 9)
        raise
    if state == "done" and process.returncode:
        state = "failed"
    lines = [line.replace(str(out.resolve()), "").replace(str(ROOT), "") for line in said.splitlines()]
    seconds = round(time.monotonic() - start, 1)
    return Outcome(stage.name, state, seconds, summary_of(lines), lines[-LAST_LINES:])


def summary_of(lines: Sequence[str]) -> str:
    """pytest's last line, else the last one that says anything."""
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    spoken = [line for line in lines if line.strip()]
    return counts[-1] if counts else spoken[-1] if spoken else ""


def run_suite(
    plan: Sequence[Stage],
    out: Path,
    budget: float,
    say: Callable[[str], None],
    run: Callable[[Stage, float], Outcome] | None = None,
    clock: Callable[[], float] = time.monotonic,
    dry: bool = False,
) -> list[Outcome]:
    """Run what `out` does not hold yet, within `budget` seconds. Results are on disk after each stage."""
    run = run or partial(run_stage, out)
    deadline = clock() + budget
    outcomes = {outcome.name: outcome for outcome in earlier(out, dry)}
    for stage in plan:
        before = outcomes.get(stage.name)
        if before is not None and before.state in ("done", "failed"):
            say(f"{stage.name}: {before.state} before")
            continue
        left = deadline - clock()
        if left < stage.least:
            outcomes.setdefault(stage.name, Outcome(stage.name, "not begun"))
            say(f"{stage.name}: not begun, {max(left, 0):.0f} s left")
        else:
            say(f"{stage.name}: at most {min(stage.most, left):.0f} s")
            outcomes[stage.name] = outcome = run(stage, min(stage.most, left))
            say(f"{stage.name}: {outcome.state} in {outcome.seconds} s, {outcome.summary}")
        write(out, [outcomes[s.name] for s in plan if s.name in outcomes], dry)
    return [outcomes[stage.name] for stage in plan]


def earlier(out: Path, dry: bool) -> list[Outcome]:
    """Outcomes of calls before. SystemExit for a file that is not ours, or of another machine or version."""
    path = out / "stages.json"
    if not path.is_file():
        return []
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError
        before, outcomes = data["identity"], [Outcome(**item) for item in data["stages"]]
        changed = [key for key, value in identity(dry).items() if before.get(key) != value]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SystemExit(f"gpu_suite: {path} is no result of this suite; give another --out") from None
    if changed:
        raise SystemExit(f"gpu_suite: {path} was made with another {', '.join(changed)}; give another --out")
    return outcomes


def identity(dry: bool) -> dict[str, Any]:
    """What must be the same for results to stand in one folder."""
    found = environment()
    return {key: found.get(key) for key in ("gpu", "cpu", "torch", "triton", "dit_fast")} | {
        "commit": commit(),
        "dry_run": dry,
    }


def write(out: Path, outcomes: Sequence[Outcome], dry: bool) -> None:
    """stages.json, report.md and the plots, each replaced whole."""
    present, said = environment(), identity(dry)
    data = {
        "format": FORMAT,
        "identity": said,
        "environment": present,
        "stages": [asdict(o) for o in outcomes],
    }
    lines = [
        f"# {'Dry run of the GPU suite' if dry else 'GPU suite'}: {device_of(present)}",
        "",
        f"{time.strftime('%Y-%m-%d')}, commit {said['commit'] or 'unknown'}, torch {present['torch']}, "
        f"triton {present['triton']}.",
        "",
        "| stage | state | seconds | |",
        "|---|---|---|---|",
        *(f"| {o.name} | {o.state} | {o.seconds} | {o.summary[:120].replace('|', '/')} |" for o in outcomes),
        "",
        *results_in(out),
    ]
    for outcome in outcomes:
        if outcome.state == "failed" or outcome.name.startswith(("environment", "profile", "roofline")):
            lines += [f"## {outcome.name}: {outcome.state}", "", "```", *outcome.said, "```", ""]
    texts = {"stages.json": json.dumps(data, indent=1), "report.md": "\n".join(lines)}
    for name, text in texts.items():
        write_atomically(out / name, lambda path, text=text: path.write_text(text + "\n"))  # type: ignore[misc]


def results_in(out: Path) -> list[str]:
    """The rows that the stages have left, as Markdown; what could not be read or drawn, in a line."""
    lines: list[str] = []
    try:
        for device in load(out):
            lines += ["#" + full(device), ""]
            for name, parts in plots(device).items():
                draw(device.name, parts, out / slug(device.name) / name)
    except DitFastError as error:
        lines += [str(error), ""]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything there is to show on one GPU, within minutes.")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="(default: gpu-results)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on any machine; no GPU figure")
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: give a positive number")
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_suite: no CUDA device here; --dry-run walks the stages without one", file=sys.stderr)
        return 1
    try:
        prepare_folder(args.out)
        outcomes = run_suite(
            stages(args.dry_run),
            args.out,
            60 * args.minutes,
            lambda text: print(text, flush=True),
            dry=args.dry_run,
        )
    except DitFastError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.out / 'report.md'}: {sum(o.state == 'done' for o in outcomes)} of {len(outcomes)} stages done"
    )
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
