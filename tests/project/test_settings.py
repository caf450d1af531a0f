"""The table of the suite under settings of the CPU: what it counts, and what it leaves behind."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.settings import SETTINGS, Setting, busy, main

TESTS = """
import os, pytest
def test_one(): assert os.environ["OMP_NUM_THREADS"] == "3"
def test_two(): assert "A_SETTING" in os.environ
@pytest.mark.skip(reason="no need")
def test_three(): pass
"""
OPTIONS = "--options=-p no:cacheprovider -p no:xdist"


def test_outcomes_are_counted_and_failures_fail(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "test_it.py", tmp_path / "table.md"
    file.write_text(TESTS)
    good, bad = Setting({"OMP_NUM_THREADS": "3", "A_SETTING": "1"}), Setting({"OMP_NUM_THREADS": "3"})
    unknown = Setting({"OMP_NUM_THREADS": "3", "PYTEST_ADDOPTS": "--no-such-option"})
    arguments = [OPTIONS, "--out", str(out), str(file)]
    assert main(arguments, [good, bad, unknown]) == 1
    rows = [re.sub(r"\d+ \|$", "T |", line) for line in out.read_text().splitlines()]
    assert rows[2:] == [
        "| `OMP_NUM_THREADS=3 A_SETTING=1` | 2 | 0 | 1 | T |",
        "| `OMP_NUM_THREADS=3` | 1 | 1 | 1 | T |",
        "| `OMP_NUM_THREADS=3 PYTEST_ADDOPTS=--no-such-option` | 0 | 1 | 0 | T |",
    ]
    assert capfd.readouterr().out.endswith(out.read_text())
    assert main(arguments, [good]) == 0
    assert main([*arguments, "--only", "no such setting"], [good]) == 1


def test_a_setting_that_the_cpu_lacks_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.settings.CAPABILITIES", ("DEFAULT", "AVX2", "AVX512", "AVX9"))
    out = tmp_path / "table.md"
    setting = Setting({"ATEN_CPU_CAPABILITY": "avx9"})
    assert main([OPTIONS, "--out", str(out), "no_such_file.py"], [setting]) == 0
    assert "| `ATEN_CPU_CAPABILITY=avx9` | not run: this CPU has " in out.read_text()


def test_busy_processes_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    plain = subprocess.Popen

    def starting(*arguments, **options):
        started.append(plain(*arguments, **options))
        return started[-1]

    monkeypatch.setattr("tests.settings.subprocess.Popen", starting)
    with busy(2):
        assert [process.poll() for process in started] == [None, None]
    assert [process.poll() for process in started] == [-9, -9]


def test_settings_have_names_of_their_own() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    assert {setting.busy for setting in SETTINGS} == {0, 4}
