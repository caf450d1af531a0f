"""The GPU suite without a GPU: its budget, what a failing or hanging stage leaves, and going on where it stopped."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Outcome, Stage, main, run_stage, run_suite, stages
from benchmarks.ladder.__main__ import parser as ladder_parser
from benchmarks.rows import Recorder, Row
from dit_fast.kernels.registry import REGISTRY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")


def python(code: str, **options: object) -> Stage:
    return Stage("stage", (sys.executable, "-c", code), **{"most": 30.0, **options})  # type: ignore[arg-type]


def silent(text: str) -> None:
    pass


def test_every_operation_is_timed() -> None:
    names = [stage.name for stage in stages(dry=False)]
    assert names[:3] == ["environment", "correctness", "ladder: training"]
    asked = " ".join(stage.command[-1] for stage in stages(dry=False) if stage.name.startswith("kernels: "))
    cases = re.findall(r"[a-z_-]+-32x256x1152-bf16", asked)
    assert sorted(cases) == sorted(f"{name}-32x256x1152-bf16" for name in REGISTRY)
    assert len(names) == len(set(names))
    assert [stage.name for stage in stages(dry=True)] == [n for n in names if not n.startswith("sanitizer")]


def test_options_of_the_stages_are_those_of_the_commands() -> None:
    """The ladder's and the roofline's with the sizes of a GPU; the others' are the same in the dry run."""
    for stage in stages(dry=False):
        options = list(stage.command[3:])
        if "benchmarks.ladder" in stage.command:
            ladder_parser().parse_args(options)
        assert stage.most <= 400


def test_stage_that_is_done(tmp_path: Path) -> None:
    stage = python("print('one'); print('== 3 passed in 1 s =='); open(r'{out}/x.json', 'w').write('[1]')")
    outcome = run_stage(tmp_path, stage, 30)
    assert (outcome.state, outcome.summary, outcome.said[0]) == ("done", "3 passed in 1 s", "one")
    assert (tmp_path / "x.json").read_text() == "[1]"


def test_stage_that_fails(tmp_path: Path) -> None:
    outcome = run_stage(tmp_path, python("raise SystemExit('no such thing')"), 30)
    assert (outcome.state, outcome.summary) == ("failed", "no such thing")


def test_stage_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    """What it wrote before is kept; the child that it started is gone."""
    code = (
        "import subprocess, sys, time; open(r'{out}/x.json', 'w').write('[2]');"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open(r'{tmp_path}/pid', 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    outcome = run_stage(tmp_path, python(code), 5)
    assert (outcome.state, outcome.summary) == ("cut off", "begun")
    assert (tmp_path / "x.json").read_text() == "[2]"
    stat, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_command_that_is_not_there(tmp_path: Path) -> None:
    outcome = run_stage(tmp_path, Stage("x", ("no-such-program",), most=5), 5)
    assert (outcome.state, outcome.summary) == ("failed", "no-such-program: No such file or directory")


class SlowDevice:
    """A device on which each stage takes `takes` seconds, and the clock that goes with it."""

    def __init__(self, takes: float):
        self.takes, self.time, self.ran = takes, 0.0, []

    def clock(self) -> float:
        return self.time

    def run(self, stage: Stage, limit: float) -> Outcome:
        self.ran.append(stage.name)
        self.time += min(self.takes, limit)
        return Outcome(stage.name, "done" if self.takes <= limit else "cut off", self.takes)


def test_budget_goes_to_the_first_stages_and_a_second_call_goes_on(tmp_path: Path) -> None:
    plan = [Stage(name, (), most=100, least=20) for name in "abcd"]
    device = SlowDevice(takes=50)
    found = run_suite(plan, tmp_path, 130, silent, device.run, device.clock)
    assert [outcome.state for outcome in found] == ["done", "done", "cut off", "not begun"]
    device = SlowDevice(takes=50)
    found = run_suite(plan, tmp_path, 130, silent, device.run, device.clock)
    assert device.ran == ["c", "d"]
    assert [outcome.state for outcome in found] == ["done"] * 4
    assert len(list(tmp_path.iterdir())) <= 8


def test_results_are_whole_after_each_stage(tmp_path: Path) -> None:
    """Rows of a stage that is cut off are in the report, as they are in its file."""
    seen = []

    def run(stage: Stage, limit: float) -> Outcome:
        if stage.name != "a":
            seen.append([s["name"] for s in json.loads((tmp_path / "stages.json").read_text())["stages"]])
        row = Row.timed("train", "DiT-S/8", (1, 64), "fp32", f"ours {stage.name}", "step", [0.25])
        Recorder(tmp_path).add(row)
        return Outcome(stage.name, "failed" if stage.name == "c" else "cut off", said=["why"])

    run_suite([Stage(name, (), most=10, least=1) for name in "abc"], tmp_path, 60, silent, run)
    assert seen == [["a"], ["a", "b"]]
    text = (tmp_path / "report.md").read_text()
    assert "## c: failed\n\n```\nwhy\n```" in text
    assert [f"| ours {name} | fp32 | 250 +- 0 |" in text for name in "abc"] == [True] * 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".json", ".md", ".png"]


OTHER = '{"format": "dit_fast gpu suite 1", "identity": {}, "stages": []}'


@pytest.mark.parametrize("text", ["{", "[]", "{}", OTHER])
def test_foreign_results_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(SystemExit, match=r"stages.json is no result of this suite; give another --out"):
        run_suite([], tmp_path, 60, silent)
    assert (tmp_path / "stages.json").read_text() == text


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """The stages go on; the report says which file it is."""
    recorder = Recorder(tmp_path)
    recorder.path.write_text("{")
    plan = [Stage("a", (), most=10, least=1)]
    run_suite(plan, tmp_path, 60, silent, lambda stage, limit: Outcome("a", "done"))
    assert f"{recorder.path} is no result file" in (tmp_path / "report.md").read_text()


def test_results_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Stage("a", (), most=10, least=1)]
    run_suite(plan, tmp_path, 60, silent, lambda stage, limit: Outcome("a", "done"))
    monkeypatch.setattr(gpu_suite, "commit", lambda: "0123abc")
    with pytest.raises(SystemExit, match="made with another commit"):
        run_suite(plan, tmp_path, 60, silent)


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--dry-run", "--out", str(tmp_path / "file")]) == 1
    assert "gpu_suite: cannot write to" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage as a command of its own, with tiny shapes, and at most eight files."""
    # pytest-benchmark times nothing in a worker of pytest-xdist, which it knows by this.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "stages.json").read_text())
    assert {stage["state"] for stage in data["stages"]} == {"done"}
    text = (tmp_path / "report.md").read_text()
    assert "nothing here is a GPU figure" in text
    assert text.count("| plain fp32 | fp32 |") == 4
    assert all(f"| `{name}` |" in text for name in (*REGISTRY, "adamw_ema"))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8
