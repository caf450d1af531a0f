"""Tests by several workers: what hangs, dies or fails is named, the rest runs, and a later call runs what is left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import parallel_tests, tests_worker
from benchmarks.gpu.parallel_tests import gpu_files, main, read_log, summary
from benchmarks.gpu.tests_worker import Turn, context_is_broken
from tests.conftest import SETTINGS

KERNELS = """
import os, time, pytest
from pathlib import Path

@pytest.fixture(scope="module")
def module():
    yield 1

def ran(name):
    with open({folder!r} + "/ran", "a") as file:
        file.write(name + "\\n")

@pytest.mark.parametrize("number", range(4))
def test_passes(number, module):
    ran(f"passes {{number}}")

def test_hangs():
    ran("hangs")
    time.sleep({hangs})

def test_dies(module):
    ran("dies")
    {dies}

def test_fails():
    ran("fails")
    assert 1 == {one}

@pytest.mark.skip(reason="no need")
def test_is_skipped():
    pass

def test_is_last(module):
    ran("last")
"""
OTHERS = """
import pytest

@pytest.mark.gpu
def test_of_a_gpu():
    pass

def test_of_anything():
    raise SystemExit(3)
"""


def lay(folder: Path, hangs: float = 0.0, dies: str = "pass", one: int = 1) -> list[str]:
    """A tree of tests, and the arguments that run it."""
    (folder / "tests/kernels").mkdir(parents=True, exist_ok=True)
    text = KERNELS.format(folder=str(folder), hangs=hangs, dies=dies, one=one)
    (folder / "tests/kernels/test_kernels.py").write_text(text)
    (folder / "tests/test_others.py").write_text(OTHERS)
    return [f"--rootdir={folder}", str(folder / "tests/test_others.py"), str(folder / "tests/kernels")]


def outcomes(log: Path) -> dict[str, str]:
    return {test.rpartition("::")[2]: item["outcome"] for test, item in read_log(log).items()}


@pytest.mark.slow
def test_what_hangs_dies_or_fails_is_named_and_the_rest_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    arguments = lay(tmp_path, hangs=600, dies="os._exit(9)", one=2)
    options = ["--workers", "1", "--limit", "5", "--log", str(log), "--"]
    assert main([*options, *arguments]) == 1
    good = {f"test_passes[{number}]": "passed" for number in range(4)}
    good |= {"test_is_last": "passed", "test_of_a_gpu": "passed", "test_is_skipped": "skipped"}
    assert outcomes(log) == good | {"test_hangs": "timed out", "test_dies": "crashed", "test_fails": "failed"}
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert lines[-1].startswith("6 passed, 1 skipped, 1 failed, 1 timed out, 1 crashed in ")
    assert any(line.endswith("test_kernels.py::test_hangs: 5 s") for line in lines)
    assert any(line.endswith("test_kernels.py::test_dies: exit status 9") for line in lines)
    assert any(line.endswith("test_kernels.py::test_fails: assert 1 == 2") for line in lines)
    # Where it hung, by the watchdog; every test by its name; the story of the failure.
    assert "in test_hangs" in said.err
    assert "PASSED tests/kernels/test_kernels.py::test_passes[3] (" in said.err
    assert "E       assert 1 == 2" in said.err

    lay(tmp_path)
    (tmp_path / "ran").unlink()
    assert main([*options, *arguments]) == 0
    assert sorted((tmp_path / "ran").read_text().split()) == ["dies", "fails", "hangs"]
    assert outcomes(log) == good | dict.fromkeys(("test_hangs", "test_dies", "test_fails"), "passed")
    assert "7 of them before" in capfd.readouterr().out


def test_settings_of_a_shell_do_not_reach_the_children_of_tests(tmp_path: Path) -> None:
    """The children's output was read as if their pytest had no options, and their help as if it had 80 columns."""
    (tmp_path / "test_it.py").write_text(
        f"import os\ndef test(): assert not set({SETTINGS!r}) & os.environ.keys(), 'kept'\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        f"--rootdir={tmp_path}",
        str(tmp_path),
    ]
    environment = {
        **os.environ,
        "COLUMNS": "40",
        "PYTEST_ADDOPTS": "--tb=short -v",
        "PYTHONWARNINGS": "default",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.slow
def test_what_cannot_be_collected_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = lay(tmp_path)
    (tmp_path / "tests/kernels/test_broken.py").write_text("import no_such_module")
    assert main(["--workers", "1", "--log", str(tmp_path / "log.jsonl"), "--", *arguments]) == 1
    said = capfd.readouterr().out
    assert "No module named 'no_such_module'" in said
    assert "worker 1 ended with status 2" in said


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert read_log(log) == {}
    lines = [
        {"test": "a", "outcome": "started"},
        {"test": "a", "outcome": "passed"},
        {"test": "b", "outcome": "failed"},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "b", "out')
    assert {test: item["outcome"] for test, item in read_log(log).items()} == {"a": "passed", "b": "failed"}


def test_summary() -> None:
    assert summary({}, 1, 2) == "no test run in 1 s by 2 workers"
    found = {"a": {"outcome": "passed"}, "b": {"outcome": "timed out"}}
    assert summary(found, 1, 2) == "1 passed, 1 timed out in 1 s by 2 workers"


def test_files_with_marked_tests_are_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("@pytest.mark" + ".gpu\ndef test(): pass\n")
    (tmp_path / "tests/test_b.py").write_text("import no_such_module\n")
    assert gpu_files(tmp_path) == ["tests/test_a.py"]


def test_a_failure_that_breaks_the_context_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests behind it would fail for its reason; a failure that leaves the context whole ends nothing."""
    ended: list[int] = []
    monkeypatch.setattr(tests_worker, "context_is_broken", lambda: True)
    monkeypatch.setattr(tests_worker.os, "_exit", ended.append)
    options = {"--claims": tmp_path, "--log": tmp_path / "log", "--test-limit": 600.0, "--worker": 1}
    turn = Turn(SimpleNamespace(getoption=options.get))  # type: ignore[arg-type]
    failing = SimpleNamespace(failed=True, skipped=False, longrepr="CUDA error: illegal memory access")
    for reports in ([], [failing]):
        hook = SimpleNamespace(pytest_runtest_protocol=lambda item, nextitem: turn.reports.extend(reports))  # noqa: B023
        turn.run(SimpleNamespace(nodeid="a", config=SimpleNamespace(hook=hook)), None)  # type: ignore[arg-type]
    assert ended == [parallel_tests.BROKEN]
    assert read_log(tmp_path / "log")["a"]["why"] == "CUDA error: illegal memory access"


def test_the_context_is_asked_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert context_is_broken()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not context_is_broken()
