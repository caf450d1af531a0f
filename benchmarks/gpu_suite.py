"""Everything there is to show on one GPU, within minutes: `make gpu`, or `python -m benchmarks.gpu_suite --out DIR`.

Stages run one after the other as commands of their own, the most telling first: correctness of every kernel, each
kernel beside its peers, the ladder of training steps, the roofline, a profile, the sanitizer. Each has a share of the
time; one that fails, hangs or is cut off costs the others nothing. `results.json` is written anew after each stage and
is whole at any moment; a second call with the same folder goes on with what is missing. Needs torch, triton, numpy,
pytest and pytest-benchmark. `--dry-run` walks all stages with tiny shapes on any machine.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.ladder.table import tables
from benchmarks.rows import Row
from dit_fast.kernels.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
LAST_LINES = 40
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Stage:
    """A command and the file, or a pattern of it (in a folder made for it, "{out}"), that it leaves. most: seconds at
    which it is cut off; least: with fewer seconds left it is not begun.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float = 15.0
    leaves: str = ""
    interpreted: bool = False


@dataclass
class Outcome:
    """state: "done", "failed" (with what it said last), "cut off" or "not begun"."""

    name: str
    state: str
    seconds: float = 0.0
    summary: str = ""
    said: list[str] = field(default_factory=list)
    data: Any = None


def stages(dry: bool) -> list[Stage]:
    """What is run, in order of priority."""
    micro = "2x64x384-fp32" if dry else "32x256x1152-bf16"
    found = [
        Stage(
            "correctness",
            (*PYTEST, "tests/kernels", "-k", "test_runs_agree and unpatchify" if dry else "not any_size"),
            most=240,
            interpreted=dry,
        )
    ]
    for name in ("gelu", "unpatchify") if dry else REGISTRY:
        case = f"test_op and {name}-{micro}" + (" and eager" if dry else "")
        command = (*PYTEST, "benchmarks/bench_ops.py", "-k", case, "--benchmark-json={out}/bench.json")
        found.append(Stage(f"kernels: {name}", command, most=60, leaves="bench.json"))
    climb = (sys.executable, "-m", "benchmarks.ladder", "--out", "{out}", "--kinds")
    tiny = (
        "--models",
        "DiT-S/8",
        "--batch",
        "1",
        "--images",
        "1",
        "--repeats",
        "1",
        "--only",
        "plain fp32",
        "ours, eager",
    )
    small = tiny if dry else ("--images", "1", "8")
    for place, kind in enumerate(("train", "sample-cfg"), start=3):
        found.insert(place, Stage(f"ladder: {kind}", (*climb, kind, *small), most=200, leaves="*/*.json"))
    roofline = (
        sys.executable,
        "-m",
        "benchmarks.roofline",
        "--device",
        "here",
        "--measure",
        "--out",
        "{out}",
    )
    size = ("--model", "DiT-S/8", "--batch", "1") if dry else ("--batch", "128")
    found.append(Stage("roofline", (*roofline, *size), most=60, leaves="roofline.json"))
    train = ("--data", "digits", "--patch-size", "2", "--batch-size", "8", "--first", "2", "--count", "1")
    profile = (sys.executable, "-m", "dit_fast.cli", "profile", *train, "--trace", "{out}/trace.json")
    found.append(Stage("profile of a small training step", profile, most=60))
    if not dry and shutil.which("compute-sanitizer"):
        checked = (*PYTEST, "tests/kernels/test_ops.py", "-k", "test_as_accurate", "-x")
        for tool in ("memcheck", "racecheck"):
            sanitize = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *checked)
            found.append(Stage(f"sanitizer: {tool}", sanitize, most=90, least=30))
    return found


def run_stage(stage: Stage, limit: float) -> Outcome:
    """Run one command; killed with its children after `limit` seconds."""
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        command = [part.replace("{out}", folder) for part in stage.command]
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
        lines = [line.replace(folder, "").replace(str(ROOT), "") for line in said.splitlines()]
        outcome = Outcome(stage.name, state, round(time.monotonic() - start, 1), said=lines[-LAST_LINES:])
        left = next(Path(folder).glob(stage.leaves), None) if stage.leaves else None
        if left is not None:
            outcome.data = read(left)
        elif stage.leaves and state == "done":
            outcome.state, outcome.summary = "failed", f"left no {stage.leaves}"
        outcome.summary = outcome.summary or summary_of(lines)
        return outcome


def read(path: Path) -> Any:
    """The JSON of a file; None for one that is cut."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


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
    run: Callable[[Stage, float], Outcome] = run_stage,
    clock: Callable[[], float] = time.monotonic,
    dry: bool = False,
) -> list[Outcome]:
    """Run what `out` does not hold yet, within `budget` seconds. Results are on disk after each stage."""
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
    path = out / "results.json"
    if not path.is_file():
        return []
    data = read(path)
    if not isinstance(data, dict) or data.get("suite") != SCHEMA:
        raise SystemExit(f"gpu_suite: {path} is no result of this suite; give another --out")
    present = identity(dry)
    changed = [key for key, value in present.items() if data["identity"].get(key) != value]
    if changed:
        raise SystemExit(f"gpu_suite: {path} was made with another {', '.join(changed)}; give another --out")
    return [Outcome(**item) for item in data["stages"]]


def identity(dry: bool) -> dict[str, Any]:
    """What must be the same for results to stand in one file."""
    found = environment()
    return {key: found.get(key) for key in ("gpu", "cpu", "torch", "triton", "dit_fast")} | {
        "commit": commit(),
        "dry_run": dry,
    }


def commit() -> str:
    """The commit of the checkout, with "+" where files differ from it; "" outside a repository."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changes.strip() else "")


def write(out: Path, outcomes: Sequence[Outcome], dry: bool) -> None:
    """results.json and report.md, each replaced whole."""
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "suite": SCHEMA,
        "date": time.strftime("%Y-%m-%d"),
        "identity": identity(dry),
        "environment": environment(),
        "clocks": clocks(),
        "stages": [asdict(outcome) for outcome in outcomes],
    }
    for name, text in (("results.json", json.dumps(data, indent=1)), ("report.md", report(data))):
        temporary = out / f"{name}.tmp"
        temporary.write_text(text + "\n")
        temporary.replace(out / name)


def clocks() -> str:
    """What nvidia-smi says of clocks, driver and temperature; "" without it."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def report(data: dict[str, Any]) -> str:
    """Results as Markdown."""
    present = data["environment"]
    device = present.get("gpu") or f"{present['cpu']} (CPU; nothing here is a GPU figure)"
    lines = [
        f"# {'Dry run of the GPU suite' if data['identity']['dry_run'] else 'GPU suite'}: {device}",
        "",
        f"{data['date']}, commit {data['identity']['commit'] or 'unknown'}, torch {present['torch']}, "
        f"triton {present['triton']}. {data['clocks']}",
        "",
        "| stage | state | seconds | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {stage['name']} | {stage['state']} | {stage['seconds']} | {stage['summary'][:120]} |"
        for stage in data["stages"]
    ]
    for stage in data["stages"]:
        if stage["name"].startswith("ladder: ") and stage["data"]:
            rows = [Row(**{**row, "shape": tuple(row["shape"])}) for row in stage["data"]["rows"]]
            lines += ["", f"## {stage['name'].capitalize()}", "", tables(rows)]
    kernels = [s for s in data["stages"] if s["name"].startswith("kernels: ") and s["data"]]
    if kernels:
        lines += ["", "## Kernels", "", *kernel_table(kernels)]
    for stage in data["stages"]:
        if stage["state"] == "failed":
            lines += ["", f"## {stage['name']} failed", "", "```", *stage["said"][-15:], "```"]
    return "\n".join(lines)


def kernel_table(found: Sequence[dict[str, Any]]) -> list[str]:
    """One row for each case, fastest first within a pass."""
    rows = [
        "| operation | pass | provider | us | GB/s | TFLOP/s | share of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [case for stage in found for case in stage["data"]["benchmarks"] if "GB/s" in case["extra_info"]]
    order = {name: place for place, name in enumerate(REGISTRY)}
    cases.sort(
        key=lambda c: (
            order.get(c["extra_info"]["op"], 99),
            c["extra_info"]["direction"],
            c["stats"]["median"],
        )
    )
    for case in cases:
        info, median = case["extra_info"], case["stats"]["median"]
        rows.append(
            f"| {info['op']} | {info['direction']} | {info['provider']} | {1e6 * median:.1f} | {info['GB/s']:.0f} | "
            f"{info['TFLOP/s']:.1f} | {info['share of the ceiling']:.0%} |"
        )
    return rows


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
    plan = stages(args.dry_run)
    outcomes = run_suite(
        plan, args.out, 60 * args.minutes, lambda text: print(text, flush=True), dry=args.dry_run
    )
    print(
        f"{args.out / 'report.md'}: {sum(o.state == 'done' for o in outcomes)} of {len(outcomes)} stages done"
    )
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
