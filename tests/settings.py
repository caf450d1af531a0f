"""The suite under settings that change how a CPU adds: `python -m tests.settings [--out TABLE] [FILES OF TESTS]`.

Each setting runs the tests as `make test` does, with one thread unless it says otherwise: the suite, and the kernels'
own where the setting can change a result. One table in Markdown comes of it, written anew after each setting.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "tests/kernels"
BURN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""What ATen's capability may be, least first."""


@dataclass(frozen=True)
class Setting:
    """Variables of the environment, busy processes per core beside the tests, and whether the kernels' tests run."""

    variables: Mapping[str, str] = field(default_factory=dict)
    busy: int = 0
    kernels: bool = True

    @property
    def name(self) -> str:
        words = [f"`{' '.join(f'{name}={value}' for name, value in self.variables.items())}`"]
        return ", ".join(words + [f"{self.busy} busy processes per core"] * (self.busy > 0))


def isa(capability: str, onednn: str, **more: str) -> Setting:
    return Setting({"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn, **more})


SETTINGS = (
    Setting({"OMP_NUM_THREADS": "1"}),
    Setting({"OMP_NUM_THREADS": "2"}),
    isa("default", "SSE41", MKL_CBWR="COMPATIBLE"),
    isa("avx2", "AVX2", MKL_CBWR="AVX2"),
    isa("avx512", "AVX512_CORE_BF16"),
    # What a kernel computes does not depend on the time that it takes.
    Setting({"OMP_NUM_THREADS": "1"}, busy=4, kernels=False),
)


def missing(setting: Setting) -> str | None:
    """Why this CPU cannot run the setting; None if it can."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    clean = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    wanted = setting.variables.get("ATEN_CPU_CAPABILITY", "default").upper()
    if CAPABILITIES.index(wanted) > CAPABILITIES.index(done.stdout.strip()):
        return f"this CPU has {done.stdout.strip()}"
    return None


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time; they end with the block, or with this process."""
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def run(setting: Setting, files: Sequence[str], options: Sequence[str]) -> tuple[int, int, int]:
    """Passed, failed and skipped tests; a pytest that ends without a report is one failure."""
    kernels = [file for file in files if file.startswith(KERNELS)]
    others = [file for file in files if file not in kernels]
    calls: list[tuple[dict[str, str], list[str]]] = []
    if others or not files:
        calls.append(({}, others or [f"--ignore={KERNELS}"]))
    if setting.kernels and (kernels or not files):
        # Triton reads it when it is imported.
        calls.append(({"TRITON_INTERPRET": "1"}, kernels or [KERNELS]))
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory() as folder, busy(setting.busy * (os.cpu_count() or 1)):
        for number, (variables, arguments) in enumerate(calls):
            report = Path(folder, f"{number}.xml")
            command = [sys.executable, "-m", "pytest", "-q", *options, f"--junitxml={report}", *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **setting.variables, **variables}
            status = subprocess.run(command, cwd=ROOT, env=environment).returncode
            if not report.exists():
                failed += 1
                continue
            suite = xml.etree.ElementTree.parse(report).getroot()[0]
            bad, left = (
                int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
                int(suite.get("skipped", 0)),
            )
            passed += int(suite.get("tests", 0)) - bad - left
            failed += bad or int(status not in (0, 5))
            skipped += left
    return passed, failed, skipped


def main(arguments: Sequence[str] | None = None, settings: Sequence[Setting] = SETTINGS) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file for the table; it is printed in any case")
    parser.add_argument("--only", default="", help="the settings whose name holds this")
    parser.add_argument("--options", default="-n 2", help="of pytest, in one word (default: %(default)s)")
    parser.add_argument("files", nargs="*", help="files of tests (default: all)")
    words = parser.parse_args(arguments)
    table = ["| setting | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    good = True
    for setting in (setting for setting in settings if words.only in setting.name):
        print(f"== {setting.name}", flush=True)
        if reason := missing(setting):
            table.append(f"| {setting.name} | not run: {reason} | | | |")
        else:
            began = time.monotonic()
            passed, failed, skipped = run(setting, words.files, words.options.split())
            seconds = time.monotonic() - began
            good = good and failed == 0
            table.append(f"| {setting.name} | {passed} | {failed} | {skipped} | {seconds:.0f} |")
        if words.out is not None:
            words.out.write_text("\n".join(table) + "\n")
    print("\n".join(table))
    return 0 if good and len(table) > 2 else 1


if __name__ == "__main__":
    sys.exit(main())
