"""The GPU suite without a GPU: its budget, what a failing or hanging stage leaves, and going on where it stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import gpu_plan, gpu_suite
from benchmarks.gpu.gpu_plan import FIRST, MINUTES, OPTIONS, Machine, Stage, stages
from benchmarks.gpu.gpu_suite import (
    ARCHIVE,
    Outcome,
    keep_tables,
    main,
    run_step,
    run_suite,
    share,
    steps_of,
    table_of,
    unpack,
    write_archive,
)
from benchmarks.gpu.parallel_tests import gpu_files
from benchmarks.models.ladder.__main__ import parser as ladder_parser
from benchmarks.models.ladder.rungs import RUNGS
from benchmarks.ops.operations import parser as operations_parser
from benchmarks.ops.registry import REGISTRY
from benchmarks.ops.rows import Recorder, Row
from dit_fast.kernels import tuned
from tests.patience import PATIENCE, wait_until

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes for a CPU")
H200 = Machine(90, 139.8, {"torch": "2.11.0+cu130", "triton": "3.6.0"}, {"ncu": "/usr/bin/ncu"})


def python(code: str, **options: Any) -> Stage:
    return Stage("stage", (sys.executable, "-c", code), 30, **options)


def run_stage(out: Path, stage: Stage, limit: float) -> Outcome:
    (outcome,) = run_step(out, Machine(), [stage], limit)
    return outcome


def silent(text: str) -> None:
    pass


def option(stage: Stage, name: str) -> list[str]:
    """The words that follow an option of a stage's command."""
    words = stage.command[stage.command.index(name) + 1 :]
    end = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[:end])


def test_what_matters_most_comes_first() -> None:
    plan = {part: stages(part, dry=False, cores=16) for part in MINUTES}
    assert [[stage.name for stage in step] for step in steps_of(plan[1])] == [
        ["correctness", "environment", "compile: training", "compile: sampling", "compile: operations"],
        ["ladder: training"],
        ["tune: attention, mlp"],
        ["ladder: tuned, options"],
        ["operations"],
        ["ladder: baselines"],
    ]
    assert [stage.name for stage in plan[2]] == ["ladder: sampling", "tune: row kernels", "racecheck", "ncu"]
    by_name = {stage.name: stage for stage in plan[1] + plan[2]}
    assert option(by_name["ladder: training"], "--only") == list(FIRST)
    assert option(by_name["ladder: tuned, options"], "--only") == list(OPTIONS)
    assert {rung.name for rung in RUNGS} >= {*FIRST, *OPTIONS, *gpu_plan.BASELINES}
    assert option(by_name["operations"], "--ops")[:3] == ["attention", "gated_residual_adaln", "mlp"]
    assert sorted(option(by_name["operations"], "--ops")) == sorted(REGISTRY)
    assert option(by_name["operations"], "--shape") == ["256", "256", "1152"]
    assert {"sdpa-cudnn", "sdpa-flash"} <= set(option(by_name["operations"], "--providers"))
    assert by_name["ncu"].wrapper[:3] == ("ncu", "--clock-control", "none")
    assert by_name["racecheck"].wrapper[:3] == ("compute-sanitizer", "--tool", "racecheck")


def test_gpu_tests_of_training_and_sampling_are_run() -> None:
    assert {"tests/training/test_gpu.py", "tests/sampling/test_graphs.py"} <= set(gpu_files())
    (correctness, *_) = stages(1, dry=False, cores=16)
    assert {*gpu_files(), "tests/kernels"} < set(correctness.command)
    assert option(correctness, "--workers") == ["8"]


@pytest.mark.parametrize("part", MINUTES)
def test_stages_fit_their_part_and_have_names_of_their_own(part: int) -> None:
    real, dry = (stages(part, dry=dry, cores=16) for dry in (False, True))
    assert [stage.name for stage in real] == [stage.name for stage in dry]
    assert len({gpu_suite.log_of(Path(), stage.name) for stage in real}) == len(real)
    planned = sum(max(stage.seconds for stage in step) for step in steps_of(real))
    assert planned <= 60 * MINUTES[part] - gpu_suite.RESERVED


@pytest.mark.parametrize("dry", [False, True])
def test_options_of_the_stages_are_those_of_the_commands(dry: bool) -> None:
    asked = [stage for part in MINUTES for stage in stages(part, dry, 16)]
    for stage in asked:
        for module, parser in (("ladder", ladder_parser), ("operations", operations_parser)):
            if f"benchmarks.{module}" in stage.command:
                parser().parse_args(stage.command[3:])
    assert sum("benchmarks.models.ladder" in stage.command for stage in asked) > 5


def test_what_is_compiled_ahead_is_what_is_timed() -> None:
    by_name = {stage.name: stage for part in (1, 2) for stage in stages(part, dry=False, cores=16)}
    for before, after in (
        ("compile: training", "ladder: training"),
        ("compile: sampling", "ladder: sampling"),
    ):
        one, two = (ladder_parser().parse_args(by_name[name].command[3:]) for name in (before, after))
        assert one.compile_only
        assert not two.compile_only
        for name in ("kinds", "models", "image_sizes", "batch"):
            assert getattr(one, name) == getattr(two, name)
        assert set(one.only) < set(two.only)
    one, two = (
        operations_parser().parse_args(by_name[n].command[3:]) for n in ("compile: operations", "operations")
    )
    assert (one.once, one.ops, one.shape, one.dtypes) == (True, two.ops, two.shape, two.dtypes)


@pytest.mark.parametrize(
    ("changes", "stage", "why"),
    [
        ({"capability": 75}, "ladder: training", "needs sm_80, this GPU is sm_75"),
        ({"gib": 23.6}, "ladder: training", "needs 70 GiB of GPU memory, this GPU has 24"),
        (
            {"versions": {"torch": "2.9.1", "triton": "3.6.0"}},
            "operations",
            "needs torch 2.10, here is 2.9.1",
        ),
        (
            {"versions": {"torch": "2.11.0", "triton": "3.5.0"}},
            "operations",
            "needs triton 3.6, here is 3.5.0",
        ),
        ({}, "racecheck", "compute-sanitizer is not installed"),
        ({"tools": {}}, "ncu", "ncu is not installed"),
        ({"capability": 75, "versions": {"torch": "2.9.1", "triton": "3.5.0"}}, "environment", None),
        ({}, "ladder: training", None),
        ({}, "ncu", None),
    ],
)
def test_what_a_machine_lacks_is_a_line(changes: dict[str, Any], stage: str, why: str | None) -> None:
    by_name = {stage.name: stage for part in (1, 2) for stage in stages(part, dry=False, cores=16)}
    assert replace(H200, **changes).lacks(by_name[stage]) == why


def test_a_stage_that_a_machine_cannot_run_is_left_out_and_the_others_run(tmp_path: Path) -> None:
    said: list[str] = []
    plan = [
        Stage("a", (), 10, gib=200),
        Stage("b", (), 10),
        Stage("c", (), 10, wrapper=("compute-sanitizer",)),
    ]
    found = run_suite(
        plan,
        tmp_path,
        60,
        said.append,
        lambda step, limit: [Outcome(s.name, "done") for s in step],
        machine=H200,
    )
    assert [outcome.state for outcome in found] == ["left out", "done", "left out"]
    assert said[:2] == [
        "a: left out, 0.0 s, needs 200 GiB of GPU memory, this GPU has 140",
        "c: left out, 0.0 s, compute-sanitizer is not installed",
    ]


def test_missing_tools_are_a_line_each() -> None:
    assert H200.notes() == [
        "nvcc is not installed: nothing here needs it: Triton brings its own assembler",
        "compute-sanitizer is not installed: the race check is left out",
    ]
    assert replace(H200, tools={name: name for name in gpu_plan.TOOLS}).notes() == []


def test_a_tool_runs_the_command_where_there_is_a_gpu() -> None:
    stage = Stage("ncu", ("python", "x"), 10, wrapper=("ncu", "--clock-control", "none"))
    assert H200.command(stage) == ("/usr/bin/ncu", "--clock-control", "none", "python", "x")
    assert Machine().command(stage) == ("python", "x")


@pytest.mark.parametrize(
    ("left", "mine", "later", "seconds"),
    [
        (415, 110, 305, 110),  # as planned
        (405, 85, 220, 405 * 85 / 305),  # an earlier stage was quick: all later ones gain
        (152.5, 85, 220, 42.5),  # half of the time: half of each
        (10, 20, 280, 5),  # hardly any: the least that has a sense
        (4.9, 20, 0, 0),  # not begun
        (30, 20, 0, 30),  # the last one has all
    ],
)
def test_shares_of_the_time_that_is_left(left: float, mine: float, later: float, seconds: float) -> None:
    assert share(left, mine, later, least=5) == pytest.approx(seconds)


def test_stage_that_is_done(tmp_path: Path) -> None:
    stage = python("print('one'); print('== 3 passed in 1 s =='); open(r'{out}/x.json', 'w').write('[1]')")
    outcome = run_stage(tmp_path, stage, 60)
    assert (outcome.state, outcome.summary, outcome.said[0]) == ("done", "3 passed in 1 s", "one")
    assert (tmp_path / "x.json").read_text() == "[1]"
    assert (tmp_path / "logs" / "stage.log").read_text().startswith("one")


def test_stage_that_fails(tmp_path: Path) -> None:
    outcome = run_stage(tmp_path, python("raise SystemExit('no such thing')"), 60)
    assert (outcome.state, outcome.summary) == ("failed", "no such thing")


def is_gone(pid: str) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return True


def over_once(monkeypatch: pytest.MonkeyPatch, condition: Callable[[], bool]) -> None:
    """The time of a step is over when `condition` is so: as long as a busy machine needs, and no longer."""
    clock = SimpleNamespace(
        sleep=time.sleep, monotonic=lambda: time.monotonic() + (PATIENCE if condition() else 0)
    )
    monkeypatch.setattr(gpu_suite, "time", clock)


@pytest.mark.parametrize("session", [False, True])
def test_stage_that_hangs_is_killed_with_its_children(
    session: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote before is kept; the child that it started is gone, in a session of its own too."""
    code = (
        "import subprocess, sys, time; open(r'{out}/x.json', 'w').write('[2]');"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session={session});"  # noqa: E501
        f"open(r'{tmp_path}/pid', 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(600)"
    )
    log = gpu_suite.log_of(tmp_path, "stage")
    over_once(monkeypatch, lambda: log.exists() and log.read_text() == "begun\n")
    outcome = run_stage(tmp_path, python(code), PATIENCE)
    assert (outcome.state, outcome.summary) == ("cut off", "begun")
    assert (tmp_path / "x.json").read_text() == "[2]"
    pid = (tmp_path / "pid").read_text()
    wait_until(lambda: is_gone(pid), what="its end")


def test_stages_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the file of the other; one that hangs does not keep the other from being done."""
    wait = "import time, pathlib\nwhile not pathlib.Path(r'{out}/%s').exists(): time.sleep(0.01)"
    code = "open(r'{out}/%s', 'w'); " + "exec(" + repr(wait) + ")"
    a = replace(python(code.replace("%s", "a", 1).replace("%s", "b")), name="a")
    b = replace(python(code.replace("%s", "b", 1).replace("%s", "a")), name="b", beside=True)
    found = run_step(tmp_path, Machine(), [a, b], PATIENCE)
    assert [(outcome.name, outcome.state) for outcome in found] == [("a", "done"), ("b", "done")]
    hangs = replace(python("import time; time.sleep(600)"), name="hangs")
    pid = tmp_path / "pid"
    quick = replace(python(f"import os; open(r'{pid}', 'w').write(str(os.getpid()))"), name="quick")
    over_once(monkeypatch, lambda: pid.exists() and pid.read_text() != "" and is_gone(pid.read_text()))
    found = run_step(tmp_path, Machine(), [hangs, quick], PATIENCE)
    assert [outcome.state for outcome in found] == ["cut off", "done"]


def test_command_that_is_not_there(tmp_path: Path) -> None:
    outcome = run_stage(tmp_path, Stage("x", ("no-such-program",), 5), 5)
    assert (outcome.state, outcome.summary) == ("failed", "no-such-program: No such file or directory")


class SlowDevice:
    """A device on which each stage takes `takes` seconds, and the clock that goes with it."""

    def __init__(self, takes: float, fails: str = ""):
        self.takes, self.fails, self.time, self.ran, self.limits = takes, fails, 0.0, [], []

    def clock(self) -> float:
        return self.time

    def run(self, step: list[Stage], limit: float) -> list[Outcome]:
        self.ran += [stage.name for stage in step]
        self.limits.append(limit)
        self.time += min(self.takes, limit)
        state = "done" if self.takes <= limit else "cut off"
        return [Outcome(s.name, "failed" if s.name == self.fails else state, self.takes) for s in step]


def test_a_second_call_runs_what_failed_was_cut_off_or_not_begun(tmp_path: Path) -> None:
    plan = [Stage(name, (), 100, least=20) for name in "abcd"]
    device = SlowDevice(takes=50, fails="b")
    found = run_suite(plan, tmp_path, 210, silent, device.run, device.clock)
    assert device.limits == [52.5, 160 / 3, 55, 60]
    assert [outcome.state for outcome in found] == ["done", "failed", "done", "done"]
    device = SlowDevice(takes=50)
    found = run_suite([*plan, Stage("e", (), 100)], tmp_path, 80, silent, device.run, device.clock)
    assert device.ran == ["b", "e"]
    assert [outcome.state for outcome in found] == ["done", "cut off", "done", "done", "cut off"]
    device = SlowDevice(takes=50)
    found = run_suite([*plan, Stage("e", (), 100)], tmp_path, 12, silent, device.run, device.clock)
    # Twelve seconds are not the least that "b" takes; "e" takes them.
    assert device.ran == ["e"]
    assert [outcome.state for outcome in found][1] == "not begun"
    device = SlowDevice(takes=5)
    found = run_suite([*plan, Stage("e", (), 100)], tmp_path, 100, silent, device.run, device.clock)
    assert [outcome.state for outcome in found] == ["done"] * 5
    assert device.limits[0] == 50


def test_the_other_part_keeps_what_the_first_one_did(tmp_path: Path) -> None:
    device = SlowDevice(takes=1)
    for names in ("ab", "cd"):
        run_suite([Stage(name, (), 10) for name in names], tmp_path, 60, silent, device.run, device.clock)
    data = json.loads((tmp_path / "stages.json").read_text())
    assert [stage["name"] for stage in data["stages"]] == ["a", "b", "c", "d"]


def test_results_are_whole_and_packed_after_each_step(tmp_path: Path) -> None:
    """Rows of a stage that is cut off are in the report, as they are in its file."""
    seen, packed = [], []

    def run(step: list[Stage], limit: float) -> list[Outcome]:
        (stage,) = step
        if stage.name != "a":
            seen.append([s["name"] for s in json.loads((tmp_path / "stages.json").read_text())["stages"]])
        row = Row.timed("train", "DiT-S/8", (1, 64), "fp32", f"ours {stage.name}", "step", [0.25])
        Recorder(tmp_path).add(row)
        return [Outcome(stage.name, "failed" if stage.name == "c" else "cut off", said=["why"])]

    plan = [Stage(name, (), 10, least=1) for name in "abc"]
    run_suite(plan, tmp_path, 60, silent, run, pack=lambda: packed.append(len(seen)))
    assert seen == [["a"], ["a", "b"]]
    assert packed == [0, 1, 2, 2]
    text = (tmp_path / "report.md").read_text()
    assert "## c: failed\n\n```\nwhy\n```" in text
    assert [f"| ours {name} | fp32 | 250 +- 0 |" in text for name in "abc"] == [True] * 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".json", ".md", ".png"]


def test_the_table_of_stages() -> None:
    assert table_of([Outcome("a", "done", 1.25, "x|y")]) == [
        "| stage | state | seconds | |",
        "|---|---|---|---|",
        "| a | done | 1.2 | x/y |",
    ]


def fill_folder(work: Path) -> None:
    (work / "logs").mkdir(parents=True)
    (work / "device").mkdir()
    (work / "stages.json").write_text("{}")
    (work / "report.md").write_text("report")
    (work / "device" / "rows.json").write_bytes(os.urandom(2000))
    (work / "logs" / "small.log").write_bytes(os.urandom(1000))
    (work / "logs" / "large.log").write_bytes(os.urandom(300_000))
    (work / "trace.json").write_bytes(os.urandom(200_000))


def test_the_archive_is_as_large_as_it_may_be(tmp_path: Path) -> None:
    """Over the limit the largest files stay behind, rows and reports never."""
    work, archive = tmp_path / "work", tmp_path / ARCHIVE
    fill_folder(work)
    assert write_archive(work, archive) == []
    assert archive.stat().st_size > 500_000
    assert write_archive(work, archive, most=100_000) == ["logs/large.log", "trace.json"]
    assert archive.stat().st_size <= 100_000
    unpack(archive, tmp_path / "again")
    found = {
        str(path.relative_to(tmp_path / "again"))
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }
    assert found == {"stages.json", "report.md", "device/rows.json", "logs/small.log"}
    assert (tmp_path / "again/device/rows.json").read_bytes() == (work / "device/rows.json").read_bytes()
    with pytest.raises(gpu_suite.DitFastError, match="rows and reports alone take"):
        write_archive(work, archive, most=1000)


def test_of_a_long_log_the_archive_has_the_end(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.log").write_bytes(b"x" * gpu_suite.LOG_BYTES + b"end")
    write_archive(tmp_path, tmp_path / ARCHIVE)
    with tarfile.open(tmp_path / ARCHIVE) as archive:
        # The archive itself lies in the same folder and is not in it.
        assert archive.getnames() == ["logs/a.log"]
        data = archive.extractfile("logs/a.log").read()  # type: ignore[union-attr]
    assert (len(data), data[-3:]) == (gpu_suite.LOG_BYTES, b"end")


def test_an_archive_that_is_none_or_reaches_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ARCHIVE
    path.write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=f"{path} is no archive of this suite"):
        unpack(path, tmp_path / "work")
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(SystemExit, match="is no archive of this suite"):
        unpack(path, tmp_path / "work")
    assert not (tmp_path / "outside").exists()


def test_tuned_tables_travel_with_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the package after tuning; into it where a later call is on a fresh machine; never those of a dry run."""
    package, work = tmp_path / "package", tmp_path / "work"
    monkeypatch.setattr(tuned, "FOLDER", package)
    package.mkdir()
    (package / "sm90.json").write_text("tuned")
    keep_tables(work, dry=True)
    assert not work.exists()
    keep_tables(work, dry=False)
    assert (work / "tuned/sm90.json").read_text() == "tuned"
    (package / "sm90.json").unlink()
    keep_tables(work, dry=False)
    assert (package / "sm90.json").read_text() == "tuned"


def test_a_call_continues_from_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that has the archive alone; what is done is not run again."""
    plan = [replace(python("print('ran')"), name=name, seconds=1) for name in "ab"]
    monkeypatch.setattr(gpu_suite, "stages", lambda part, dry, cores: plan)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--dry-run", "--work", str(first), "--out", str(tmp_path)]) == 0
    plan[1] = replace(python("raise SystemExit(3)"), name="c")
    assert main(["--dry-run", "--work", str(second), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"continues from {tmp_path / ARCHIVE}" in said
    assert "a: done before" in said
    assert "the same command again runs what is not done" in said
    with tarfile.open(tmp_path / ARCHIVE) as archive:
        assert {"stages.json", "report.md", "logs/a.log", "logs/c.log"} <= set(archive.getnames())


def test_a_suite_that_is_stopped_leaves_no_stage_behind(tmp_path: Path) -> None:
    code = f"""
import sys
from benchmarks.gpu import gpu_suite
from benchmarks.gpu.gpu_plan import Stage
sleep = "import os, time; open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(600)"
gpu_suite.stages = lambda part, dry, cores: [Stage("sleeps", (sys.executable, "-c", sleep), 600)]
gpu_suite.main(["--dry-run", "--work", r"{tmp_path}/work", "--out", r"{tmp_path}/work"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_suite.ROOT, stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text(), process, what="a stage")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    assert is_gone((tmp_path / "pid").read_text())


OTHER = '{"format": "dit_fast gpu suite 2", "identity": {}, "stages": []}'


@pytest.mark.parametrize("text", ["{", "[]", "{}", OTHER])
def test_foreign_results_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(SystemExit, match=r"stages.json is no result of this suite; give another --work"):
        run_suite([], tmp_path, 60, silent)
    assert (tmp_path / "stages.json").read_text() == text


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """The stages go on; the report says which file it is."""
    recorder = Recorder(tmp_path)
    recorder.path.write_text("{")
    plan = [Stage("a", (), 10, least=1)]
    run_suite(plan, tmp_path, 60, silent, lambda step, limit: [Outcome("a", "done")])
    assert f"{recorder.path} is no result file" in (tmp_path / "report.md").read_text()


def test_results_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Stage("a", (), 10, least=1)]
    run_suite(plan, tmp_path, 60, silent, lambda step, limit: [Outcome("a", "done")])
    monkeypatch.setattr(gpu_suite, "commit", lambda: "0123abc")
    with pytest.raises(SystemExit, match="made with another commit"):
        run_suite(plan, tmp_path, 60, silent)


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "--dry-run" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--dry-run", "--work", str(tmp_path), "--out", str(tmp_path / "file")]) == 1
    assert "gpu_suite: cannot write to" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_dry_run(tmp_path: Path) -> None:
    """Every stage of both parts as a command of its own, with tiny sizes."""
    for part in ("1", "2"):
        assert (
            main(
                [
                    "--dry-run",
                    "--part",
                    part,
                    "--minutes",
                    "60",
                    "--work",
                    str(tmp_path),
                    "--out",
                    str(tmp_path),
                ]
            )
            == 0
        )
    data = json.loads((tmp_path / "stages.json").read_text())
    assert {stage["state"] for stage in data["stages"]} == {"done"}
    text = (tmp_path / "report.md").read_text()
    assert "nothing here is a GPU figure" in text
    assert all(f"| `{name}` |" in text for name in ("attention", "mlp", "gelu"))
    assert re.search(r"\| ours \| fp32 \| \d", text)
    assert (tmp_path / ARCHIVE).stat().st_size < gpu_suite.ARCHIVE_BYTES
