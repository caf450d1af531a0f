"""The GPU suite without a GPU: its budget, what a failing or hanging stage leaves, and going on where it stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Outcome, Stage, main, run_stage, run_suite, stages
from dit_fast.kernels.registry import REGISTRY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")


def python(code: str, **options: object) -> Stage:
    return Stage("stage", (sys.executable, "-c", code), **{"most": 30.0, **options})  # type: ignore[arg-type]


def silent(text: str) -> None:
    pass


def test_every_operation_is_timed() -> None:
    names = [stage.name for stage in stages(dry=False)]
    assert names[0] == "correctness"
    assert {name for name in names if name.startswith("kernels: ")} == {
        f"kernels: {name}" for name in REGISTRY
    }
    assert len(names) == len(set(names))
    assert {"ladder: train", "ladder: sample-cfg", "roofline"} < {stage.name for stage in stages(dry=True)}


def test_stage_keeps_what_it_leaves() -> None:
    stage = python(
        "print('one'); print('== 3 passed in 1 s =='); open(r'{out}/x.json', 'w').write('[1]')",
        leaves="x.json",
    )
    outcome = run_stage(stage, 30)
    assert (outcome.state, outcome.data, outcome.summary) == ("done", [1], "3 passed in 1 s")


@pytest.mark.parametrize(
    ("code", "summary"),
    [("raise SystemExit('no such thing')", "no such thing"), ("pass", "left no x.json")],
)
def test_stage_that_fails(code: str, summary: str) -> None:
    outcome = run_stage(python(code, leaves="x.json"), 30)
    assert (outcome.state, outcome.summary, outcome.data) == ("failed", summary, None)


def test_stage_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    """What it wrote before is kept; the child that it started is gone."""
    code = (
        "import subprocess, sys, time; open(r'{out}/x.json', 'w').write('[2]');"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open(r'{tmp_path}/pid', 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    outcome = run_stage(python(code, leaves="x.json"), 5)
    assert (outcome.state, outcome.data, outcome.summary) == ("cut off", [2], "begun")
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_command_that_is_not_there() -> None:
    outcome = run_stage(Stage("x", ("no-such-program",), most=5), 5)
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
    seen = []

    def run(stage: Stage, limit: float) -> Outcome:
        if stage.name != "a":
            seen.append([s["name"] for s in json.loads((tmp_path / "results.json").read_text())["stages"]])
        return Outcome(stage.name, "failed", said=["why"])

    run_suite([Stage(name, (), most=10, least=1) for name in "abc"], tmp_path, 60, silent, run)
    assert seen == [["a"], ["a", "b"]]
    assert "## c failed\n\n```\nwhy\n```" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"suite": 0}'])
def test_foreign_results_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit, match=r"results.json is no result of this suite; give another --out"):
        run_suite([], tmp_path, 60, silent)
    assert (tmp_path / "results.json").read_text() == text


def test_results_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Stage("a", (), most=10, least=1)]
    run_suite(plan, tmp_path, 60, silent, lambda stage, limit: Outcome("a", "done"))
    monkeypatch.setattr(gpu_suite, "commit", lambda: "0123abc")
    with pytest.raises(SystemExit, match="made with another commit"):
        run_suite(plan, tmp_path, 60, silent)


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage as a command of its own, with tiny shapes."""
    # pytest-benchmark times nothing in a worker of pytest-xdist, which it knows by this.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert main(["--dry-run", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert {stage["state"] for stage in data["stages"]} == {"done"}
    text = (tmp_path / "report.md").read_text()
    assert "nothing here is a GPU figure" in text
    assert text.count("| plain fp32 | fp32 |") == 2
    assert "| gelu | forward | eager |" in text
