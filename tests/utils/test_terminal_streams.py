"""A reader that leaves, a disk that is full, a stream that is missing: what is printed ends, the program does not."""

import errno
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dit_fast import cli
from dit_fast.cli import main
from dit_fast.utils.terminal import lasting_streams, say

ROOT = Path(__file__).parents[2]
# Prints more than a pipe or a buffer holds, then writes a file: without PyTorch, which takes seconds to import.
WORK = """
import logging, sys, warnings
from pathlib import Path
from tqdm import tqdm
from dit_fast.utils.terminal import lasting_streams, say
with lasting_streams() as stdout:
    for number in range(20_000):
        say(f"line {number}")
    tqdm.write("above the bar")
    for _ in tqdm(range(3), disable=None):
        pass
    logging.warning("a warning")
    warnings.warn("another")
    say("an error", error=True)
    print("caf" + chr(233) + chr(0xDCFF))
    Path(sys.argv[1]).write_text("written")
sys.exit(3 if stdout.lost else 0)
"""


def work(folder: Path, redirect: str, **environment: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of WORK under a shell; its file must be written in full."""
    script, file = folder / "work.py", folder / "file"
    script.write_text(WORK)
    command = f"exec {shlex.join([sys.executable, str(script), str(file)])} {redirect}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        text=True,
        errors="replace",
        capture_output=True,
    )
    assert file.read_text() == "written", done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "redirect", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "> /dev/null", "<&-"]
)
def test_streams_that_are_missing_or_full(redirect, tmp_path):
    assert work(tmp_path, redirect)[0] == 0


def test_a_full_disk_loses_what_is_printed_and_is_said_once(tmp_path):
    status, _, err = work(tmp_path, "> /dev/full")
    assert status == 3
    assert err.count("dit-fast: warning: stdout: No space left on device; what is printed is lost") == 1


def test_another_encoding_than_utf_8(tmp_path):
    for encoding in ("ascii", "latin-1", "utf-8"):
        assert work(tmp_path, "", PYTHONIOENCODING=encoding)[0] == 0


def test_a_reader_that_leaves(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "work.py"), str(tmp_path / "file")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode()
    assert process.wait() == 0, err
    assert (tmp_path / "file").read_text() == "written"
    assert "rror" not in err.replace("an error", "")


class Broken(io.StringIO):
    """A stream that takes nothing."""

    encoding = "utf-8"

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "command", "status"),
    [
        (errno.EPIPE, "doctor", 0),
        (errno.EIO, "doctor", 0),
        (errno.ENOSPC, "doctor", 1),
        (errno.ENOSPC, "train", 0),
        (errno.EPIPE, "train", 0),
    ],
)
def test_the_status_of_a_command_whose_lines_are_lost(number, command, status, monkeypatch, capsys):
    """Lines are the result of a command but of a run; a reader that left wanted no more of them."""

    def run(arguments: list[str], interrupts: Any) -> int:
        say("a line", "another")
        return 0

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.setattr(sys, "stdout", Broken(number))
    assert main([command]) == status
    lost = [line for line in capsys.readouterr().err.splitlines() if "what is printed is lost" in line]
    assert len(lost) == (number == errno.ENOSPC)


def test_a_closed_stream_and_a_stream_without_a_number(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    with lasting_streams() as stdout:
        say("a line")
        assert not stdout.isatty()
        assert isinstance(stdout.problem, ValueError)
    assert sys.stdout is closed
