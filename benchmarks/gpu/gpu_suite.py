"""Everything there is to show on one GPU, in a slot of 15 minutes: `make gpu`, then `make gpu PART=2`.

Or `python -m benchmarks.gpu.gpu_suite [--part N] [--minutes M] [--out DIR]`. The stages (`benchmarks.gpu.gpu_plan`) are
commands of their own, the most telling first. Each is given its share of the time that is left; one that fails, hangs
or is cut off costs the others nothing and keeps the rows that it has finished. What the stages leave lies in --work:
rows (`benchmarks.ops.rows`) in <device>, the output of stages in logs, tuned tables in tuned, stages.json, report.md.
After each stage all of it is packed, to at most 16 MiB, into gpu-results.tar.gz in --out. A later call runs what is not
done; on another machine of the same kind it continues from the archive in --out. A stage that the machine cannot run is
left out, with the reason in a line. Needs torch, triton, numpy, pillow, safetensors, tqdm and pytest; what else is
missing is a row with its reason. `--dry-run` runs the same stages with tiny sizes on any machine.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, commit, environment
from benchmarks.gpu.gpu_plan import MINUTES, Machine, Stage, stages, this_machine
from benchmarks.ops.rows import device_of, slug
from benchmarks.report import draw, full, load, plots
from dit_fast.errors import DitFastError
from dit_fast.kernels import tuned
from dit_fast.utils.files import TEMPORARY, prepare_folder, write_atomically

FORMAT = "dit_fast gpu suite 3"
ARCHIVE = "gpu-results.tar.gz"
ARCHIVE_BYTES = 16 * 2**20
UNPACKED_BYTES = 2**30
LOG_BYTES = 2**20
"""Of a stage's output in the archive, its end."""
RESERVED = 5.0
"""Seconds of a call that belong to no stage: starting, packing."""
LAST_LINES = 40
NEEDED = ("stages.json", "report.md")


@dataclass
class Outcome:
    """state: "done", "failed", "cut off", "left out" or "not begun"; said: its last lines."""

    name: str
    state: str
    seconds: float = 0.0
    summary: str = ""
    said: list[str] = field(default_factory=list)


def steps_of(plan: Sequence[Stage]) -> Iterator[list[Stage]]:
    """The plan cut into what runs at the same time."""
    step: list[Stage] = []
    for stage in plan:
        if step and not stage.beside:
            yield step
            step = []
        step.append(stage)
    if step:
        yield step


def share(left: float, mine: float, later: float, least: float) -> float:
    """Seconds for a step of which `mine` are planned, before steps of `later`, with `left` to go; 0: not begun.

    What earlier steps left over or took too much is spread over all that follow, by their sizes; a step gets `least`
    at least while that much is there.
    """
    if left < least:
        return 0.0
    return min(left, max(least, left * mine / (mine + later)))


def run_step(out: Path, machine: Machine, step: Sequence[Stage], limit: float) -> list[Outcome]:
    """Run commands at the same time; what is not over after `limit` seconds is killed with all that it started."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    outcomes: dict[str, Outcome] = {}
    try:
        for stage in step:
            command = [part.replace("{out}", str(out.resolve())) for part in machine.command(stage)]
            variables = {**os.environ, "TRITON_INTERPRET": "1"} if stage.interpreted else dict(os.environ)
            with log_of(out, stage.name).open("wb") as log:
                try:
                    running[stage.name] = subprocess.Popen(
                        command, cwd=ROOT, env=variables, start_new_session=True,
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    )  # fmt: skip
                except OSError as error:
                    log.write(f"{command[0]}: {error.strerror}\n".encode())
                    outcomes[stage.name] = Outcome(stage.name, "failed")
        while running:
            time.sleep(0.02)
            over = time.monotonic() - start >= limit
            for name, process in list(running.items()):
                if process.poll() is None and not over:
                    continue
                state = "cut off" if process.poll() is None else "failed" if process.returncode else "done"
                end(running.pop(name))
                outcomes[name] = Outcome(name, state, round(time.monotonic() - start, 1))
    finally:
        for process in running.values():
            end(process)
    for stage in step:
        text = log_of(out, stage.name).read_text(errors="replace")
        lines = [line.replace(str(out.resolve()), "").replace(str(ROOT), "") for line in text.splitlines()]
        outcome = outcomes[stage.name]
        outcome.summary, outcome.said = summary_of(lines), lines[-LAST_LINES:]
    return [outcomes[stage.name] for stage in step]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, its group, and what it has started in groups of their own."""
    # Of one that has ended, the number may be another's by now.
    for pid in (*descendants(process.pid), process.pid) if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that they have."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name, in parentheses, may hold anything.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def log_of(out: Path, name: str) -> Path:
    return out / "logs" / f"{slug(name)}.log"


def summary_of(lines: Sequence[str]) -> str:
    """The last line with counts of tests, else the last one that says anything."""
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    spoken = [line for line in lines if line.strip()]
    return counts[-1] if counts else spoken[-1].strip() if spoken else ""


def run_suite(
    plan: Sequence[Stage],
    out: Path,
    budget: float,
    say: Callable[[str], None],
    run: Callable[[Sequence[Stage], float], list[Outcome]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    dry: bool = False,
    machine: Machine | None = None,
    pack: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Run what `out` does not hold yet, within `budget` seconds; the outcomes of `plan`.

    Results are on disk, and packed, after each step.
    """
    machine = machine or Machine()
    run = run or partial(run_step, out, machine)
    deadline = clock() + budget
    outcomes = {outcome.name: outcome for outcome in earlier(out, dry)}

    def tell(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        say(f"{outcome.name}: {outcome.state}, {outcome.seconds:.1f} s, {outcome.summary}")

    pending = []
    for step in steps_of(plan):
        able = []
        for stage in step:
            before = outcomes.get(stage.name)
            if before is not None and before.state == "done":
                say(f"{stage.name}: done before")
            elif (why := machine.lacks(stage)) is not None:
                tell(Outcome(stage.name, "left out", summary=why))
            else:
                able.append(stage)
        pending += [able] if able else []
    sizes = [max(stage.seconds for stage in step) for step in pending]
    for number, step in enumerate(pending):
        least = min(stage.least for stage in step)
        limit = share(deadline - clock(), sizes[number], sum(sizes[number + 1 :]), least)
        if limit == 0:
            for stage in step:
                tell(Outcome(stage.name, "not begun", summary=f"fewer than {least:g} s left"))
        else:
            say(f"{', '.join(stage.name for stage in step)}: at most {limit:.0f} s")
            for outcome in run(step, limit):
                tell(outcome)
        keep_tables(out, dry)
        write(out, list(outcomes.values()), dry)
        pack()
    write(out, list(outcomes.values()), dry)
    pack()
    return [outcomes[stage.name] for stage in plan]


def keep_tables(out: Path, dry: bool) -> None:
    """Copy the tuned tables of the package to the results; and back, where a table of the results has none."""
    if dry:
        return
    for here, there in ((tuned.FOLDER, out / "tuned"), (out / "tuned", tuned.FOLDER)):
        for table in sorted(here.glob("sm*.json")):
            if here == tuned.FOLDER or not (there / table.name).exists():
                there.mkdir(parents=True, exist_ok=True)
                text = table.read_text()
                write_atomically(there / table.name, partial(_write_text, text))


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


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
        raise SystemExit(f"gpu_suite: {path} is no result of this suite; give another --work") from None
    if changed:
        raise SystemExit(f"gpu_suite: {path} was made with another {', '.join(changed)}; give another --work")
    return outcomes


def identity(dry: bool) -> dict[str, Any]:
    """What must be the same for results to stand in one folder."""
    found = environment()
    return {key: found.get(key) for key in ("gpu", "cpu", "torch", "triton", "dit_fast")} | {
        "commit": commit(),
        "dry_run": dry,
    }


def table_of(outcomes: Sequence[Outcome]) -> list[str]:
    """A table of what the stages came to."""
    lines = ["| stage | state | seconds | |", "|---|---|---|---|"]
    return lines + [
        f"| {o.name} | {o.state} | {o.seconds:.1f} | {o.summary[:120].replace('|', '/')} |" for o in outcomes
    ]


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
        *table_of(outcomes),
        "",
        *results_in(out),
    ]
    for outcome in outcomes:
        shown = outcome.name.startswith(("environment", "profile", "roofline"))
        if shown or outcome.state in ("failed", "cut off"):
            lines += [f"## {outcome.name}: {outcome.state}", "", "```", *outcome.said, "```", ""]
    texts = {"stages.json": json.dumps(data, indent=1), "report.md": "\n".join(lines)}
    for name, text in texts.items():
        write_atomically(out / name, partial(_write_text, text + "\n"))


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


def write_archive(work: Path, path: Path, most: int = ARCHIVE_BYTES) -> list[str]:
    """Pack `work` into `path`, at most `most` bytes; returns the names that were left out, the largest files first.

    Tables, rows and reports are packed always; of a log, its end.
    """
    files = {
        str(file.relative_to(work)): file
        for file in sorted(work.rglob("*"))
        if file.is_file() and file != path and not file.name.startswith(TEMPORARY)
    }

    def content(name: str) -> bytes:
        data = files[name].read_bytes()
        return data[-LOG_BYTES:] if name.startswith("logs/") else data

    def packed() -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name in files:
                data = content(name)
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), int(files[name].stat().st_mtime)
                archive.addfile(entry, io.BytesIO(data))
        return buffer.getvalue()

    left_out: list[str] = []
    data = packed()
    while len(data) > most:
        spare = [
            name for name in files if name not in NEEDED and not re.fullmatch(r"[^/]+/[^/]+\.json", name)
        ]
        if not spare:
            raise DitFastError(f"{path.name}: rows and reports alone take {len(data)} bytes, at most {most}")
        largest = max(spare, key=lambda name: len(content(name)))
        left_out.append(largest)
        del files[largest]
        data = packed()
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return left_out


def unpack(path: Path, work: Path) -> None:
    """Lay the results of an archive into `work`. SystemExit for anything but an archive of this suite."""
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            if (size := sum(member.size for member in members)) > UNPACKED_BYTES:
                raise tarfile.TarError(f"{size} bytes unpacked, at most {UNPACKED_BYTES}")
            # stages.json says that the rest is there.
            for member in sorted(members, key=lambda member: member.name == "stages.json"):
                archive.extract(member, work, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise SystemExit(f"gpu_suite: {path} is no archive of this suite ({error}); move it away") from None


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    minutes = MINUTES[args.part] if args.minutes is None else args.minutes
    if not minutes > 0:
        parser().error(f"--minutes {minutes:g}: give a positive number")
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_suite: no CUDA device here; --dry-run walks the stages without one", file=sys.stderr)
        return 1
    archive = args.out / ARCHIVE
    machine = this_machine()
    if args.dry_run:
        machine = Machine(versions=machine.versions, tools=machine.tools)
    say = partial(print, flush=True)
    # Stages run in sessions of their own: leave none behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for folder in (args.work, args.out):
            prepare_folder(folder)
        if not (args.work / "stages.json").exists() and archive.is_file():
            unpack(archive, args.work)
            say(f"continues from {archive}")
        plan = stages(args.part, args.dry_run, os.cpu_count() or 1)
        for note in machine.notes() if machine.capability else ():
            say(note)
        earlier(args.work, args.dry_run)
        keep_tables(args.work, args.dry_run)
        outcomes = run_suite(
            plan,
            args.work,
            60 * minutes - RESERVED,
            say,
            dry=args.dry_run,
            machine=machine,
            pack=lambda: write_archive(args.work, archive),
        )
    except DitFastError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 1
    print("\n".join(table_of(outcomes)))
    complete = all(outcome.state in ("done", "left out") for outcome in outcomes)
    size = archive.stat().st_size / 2**20
    print(f"{archive}: {size:.1f} MiB{'' if complete else '; the same command again runs what is not done'}")
    return 0 if complete else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--part", type=int, choices=tuple(MINUTES), default=1, help="(default: 1)")
    times = ", ".join(f"{minutes:g}" for minutes in MINUTES.values())
    made.add_argument("--minutes", type=float, help=f"time for this call (default: {times} by part)")
    made.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help=f"folder of {ARCHIVE} (default: gpu-results)"
    )
    made.add_argument(
        "--work",
        type=Path,
        default=Path("gpu-results"),
        help="what a later call goes on from (default: gpu-results)",
    )
    made.add_argument("--dry-run", action="store_true", help="tiny sizes on any machine; no GPU figure")
    return made


if __name__ == "__main__":
    sys.exit(main())
