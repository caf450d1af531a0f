"""Tests by several processes: `python -m benchmarks.gpu.parallel_tests --workers 8 --limit 60 --log FILE`.

Each worker is a pytest of its own (`benchmarks.gpu.tests_worker`) that takes one test after another of those that
all have to run. A test that takes longer than `--limit` seconds, or that ends its process, is named, and a new worker
continues with the rest; so it does after a failure that leaves the CUDA context of a worker unusable. What each test
came to is a line of `--log` as soon as it is known: a call that finds the file runs only what has not passed yet.

Without arguments it runs what needs a GPU: tests/kernels, and the tests marked gpu outside it, which come first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

KERNELS = "tests/kernels"
BROKEN = 77
"""Exit status of a worker whose CUDA context is unusable."""
GOOD = ("passed", "skipped")
BAD = ("failed", "timed out", "crashed")


def gpu_files(root: Path = ROOT) -> list[str]:
    """Test files outside tests/kernels that hold tests marked gpu; the others need not be importable."""
    files = sorted(path for path in (root / "tests").rglob("test_*.py") if path.parent.name != "kernels")
    # In two words: this line is no such mark.
    return [str(path.relative_to(root)) for path in files if "pytest.mark" + ".gpu" in path.read_text()]


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test by its id; a line that a kill has cut is left out."""
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                item = json.loads(line)
                found[item["test"]] = item
            except (ValueError, KeyError, TypeError):
                continue
    return found


def append(path: Path, **item: Any) -> None:
    """Add a line; several processes may at once."""
    with path.open("a") as file:
        file.write(json.dumps(item) + "\n")


@dataclass
class Worker:
    """A running pytest and where its output goes."""

    number: int
    process: subprocess.Popen[bytes]
    output: Path


@dataclass
class Crew:
    """Workers that share the tests of one call."""

    arguments: Sequence[str]
    log: Path
    claims: Path
    limit: float
    say: Callable[[str], None]
    started: int = 0
    troubles: list[str] = field(default_factory=list)

    def start(self) -> Worker:
        self.started += 1
        output = self.claims / f"output-{self.started}"
        command = [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "benchmarks.gpu.tests_worker",
            ),
            *(f"--claims={self.claims}", f"--log={self.log}", f"--test-limit={self.limit}"),
            *(f"--worker={self.started}", *self.arguments),
        ]
        # What pytest prints is kept for a worker that dies; what the plugin says of each test goes where ours does.
        with output.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file)
        return Worker(self.started, process, output)

    def run(self, workers: int) -> None:
        """Until every test has been run."""
        running = [self.start() for _ in range(workers)]
        while running:
            time.sleep(0.05)
            for worker in running[:]:
                if (status := worker.process.poll()) is None:
                    continue
                running.remove(worker)
                if self.bury(worker, status):
                    running.append(self.start())

    def bury(self, worker: Worker, status: int) -> bool:
        """Note what an ended worker left unfinished; whether another one has to go on in its place."""
        mine = [item for item in read_log(self.log).values() if item.get("worker") == worker.number]
        begun = [item for item in mine if item["outcome"] == "started"]
        for item in begun:
            seconds = time.time() - item["at"]
            outcome = "timed out" if seconds >= self.limit else "crashed"
            # Where the process was: faulthandler's lines, or what the runtime said last.
            said = worker.output.read_text(errors="replace").splitlines()[-30:]
            why = f"{self.limit:g} s" if outcome == "timed out" else f"exit status {status}"
            append(self.log, test=item["test"], outcome=outcome, seconds=round(seconds, 2), why=why)
            self.say(f"{outcome.upper()} {item['test']} ({why})\n" + "\n".join(said))
        # Claimed for later and not begun: another one takes them.
        known = read_log(self.log)
        for claim in self.claims.glob("claim-*"):
            number, _, test = claim.read_text().partition(" ")
            if number == str(worker.number) and test not in known:
                claim.unlink()
        if begun or status == BROKEN:
            return True
        if status not in (0, 1, 5):
            said = worker.output.read_text(errors="replace").splitlines()[-30:]
            self.troubles.append(f"worker {worker.number} ended with status {status}")
            self.say("\n".join([*said, self.troubles[-1]]))
        return False


def summary(found: Mapping[str, Mapping[str, Any]], seconds: float, workers: int) -> str:
    """One line: how many tests came to what."""
    counts = Counter(item["outcome"] for item in found.values())
    parts = [f"{counts[outcome]} {outcome}" for outcome in (*GOOD, *BAD) if counts[outcome]]
    return f"{', '.join(parts) or 'no test run'} in {seconds:.0f} s by {workers} workers"


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.parallel_tests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, default=8, help="(default: 8)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a test (default: 60)")
    parser.add_argument("--log", type=Path, required=True, help="what each test came to, a line of JSON each")
    args = parser.parse_args(words[:at])
    chosen = words[at + 1 :] or [*gpu_files(), KERNELS]
    start = time.monotonic()
    before = {test: item for test, item in read_log(args.log).items() if item["outcome"] in GOOD}
    args.log.parent.mkdir(parents=True, exist_ok=True)
    args.log.write_text("".join(json.dumps(item) + "\n" for item in before.values()))
    with tempfile.TemporaryDirectory(prefix="tests-") as folder:
        crew = Crew(
            chosen, args.log.resolve(), Path(folder), args.limit, lambda text: print(text, flush=True)
        )
        crew.run(max(1, args.workers))
    found = read_log(args.log)
    for item in found.values():
        if item["outcome"] in BAD:
            print(f"{item['outcome'].upper()} {item['test']}: {item.get('why', '')}")
    if before:
        print(f"{len(before)} of them before")
    print(summary(found, time.monotonic() - start, args.workers))
    bad = any(item["outcome"] not in GOOD for item in found.values())
    return int(bad or bool(crew.troubles) or not found)


if __name__ == "__main__":
    sys.exit(main())
