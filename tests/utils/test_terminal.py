"""What files hold is shown on a terminal, never obeyed; errors and Ctrl-C are one line."""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dit_fast.cli import COMMANDS, main
from dit_fast.errors import DataError
from dit_fast.utils.terminal import printable, say
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
ESC = "\x1b[31mred\x1b]0;title\x07"
FORGED = "cat\nwrote /etc/passwd"
TURNED = "\u202egnp.exe"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESC, r"\x1b[31mred\x1b]0;title\x07"),
        (FORGED, r"cat\nwrote /etc/passwd"),
        (TURNED, r"\u202egnp.exe"),
        ("\u2066iso\u2069 zero\u200bwidth", r"\u2066iso\u2069 zero\u200bwidth"),
        ("\x9b2J \x85 \u2028", r"\x9b2J \x85 \u2028"),
        ("back\b\rspace\x7f\x00", r"back\x08\rspace\x7f\x00"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("h\u00f4tel \u732b \U0001f600 a\\b", "h\u00f4tel \u732b \U0001f600 a\\b"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(DataError(text)) == shown


def test_each_argument_is_one_line_of_the_stream(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    say("h\u00f4tel", FORGED, 3, "\u732b")
    assert stream.buffer.getvalue() == b"h\xf4tel\ncat\\nwrote /etc/passwd\n3\n\\u732b\n"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody reads this")


def fail(monkeypatch, error: BaseException) -> None:
    import dit_fast.cli.plot as command

    def run(options):
        raise error

    monkeypatch.setattr(command, "run", run)


@pytest.mark.parametrize("text", [ESC, FORGED, TURNED])
def test_errors_that_quote_a_file_are_one_harmless_line(text, monkeypatch, capsys):
    fail(monkeypatch, DataError(f"class {text}: no images"))
    assert main(["plot", "x"]) == 1
    assert capsys.readouterr().err == f"dit-fast: error: class {printable(text)}: no images\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(36, "File name too long", "x" * 300), "File name too long: " + "x" * 300),
        (PermissionError(13, "Permission denied", "a\x1bb"), r"Permission denied: a\x1bb"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "Invalid cross-device link: a: b"),
        (MemoryError(), "not enough memory; give a smaller model, batch or image size"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] can't allocate memory\nmore"),
            "not enough memory ([enforce fail at alloc_cpu.cpp:1] can't allocate memory); give a smaller model, batch "
            "or image size",
        ),
    ],
)
def test_the_systems_errors_are_one_line(error, line, monkeypatch, capsys):
    fail(monkeypatch, error)
    assert main(["plot", "x"]) == 1
    assert capsys.readouterr().err == f"dit-fast: error: {line}\n"


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    fail(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["plot", "x"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: COMMAND; see dit-fast --help"),
        (["plot"], "the following arguments are required: RUN; see dit-fast plot --help"),
        (["plot", "x", "--out"], "--out: expected one argument; see dit-fast plot --help"),
        (["plot", "x", "--outt=y"], "unrecognized arguments: --outt=y (did you mean --out?); see dit-fast plot --help"),
        (["--q", "plot", "x", "-y"], "unrecognized arguments: --q -y; see dit-fast plot --help"),
        (["plot", "x", "--a\x1bb"], r"unrecognized arguments: --a\x1bb; see dit-fast plot --help"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"dit-fast: error: {line}\n"


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["smaple"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(command in line for command in COMMANDS)


def test_warnings_of_a_command_are_escaped():
    main(["plot", "/does/not/exist"])
    record = logging.LogRecord("dit_fast", logging.WARNING, "", 1, "step %d: %s", (3, ESC), None)
    assert logging.lastResort.format(record) == "step 3: " + printable(ESC)


def test_an_interrupt_is_one_line_whatever_it_becomes(monkeypatch, capsys):
    import dit_fast.cli.plot as command

    def run(options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("a module that cannot be loaded") from None

    monkeypatch.setattr(command, "run", run)
    assert main(["plot", "x"]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dit-fast: interrupted; ")


# Sends this process SIGINT when a module is about to be imported, or from a thread while the command runs.
_INTERRUPTED = """
import os, signal, sys
from dit_fast.cli import main

class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("swallowed") from None

sys.meta_path.insert(0, AtImport())
sys.exit(main({arguments!r}))
"""


@pytest.mark.parametrize("module", ["dit_fast.cli.info", "numpy.linalg", "triton"])
def test_ctrl_c_during_imports_is_one_line(module):
    code = _INTERRUPTED.format(module=module, arguments=["info", "DiT-S/2"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 130
    assert done.stderr == "dit-fast: interrupted; complete checkpoints, shards and parts are kept\n"
    assert done.stdout == ""


def test_an_ignored_ctrl_c_stays_ignored():
    """A shell starts what it puts in the background with SIGINT ignored."""
    before = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code = before + _INTERRUPTED.format(module="dit_fast.cli.plot", arguments=["plot", "x"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert done.stderr == "dit-fast: error: x: neither a run folder with a log.jsonl nor a file\n"


def test_lines_are_printed_in_one_place():
    """A bare print would let a terminal obey what a file holds."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "dit_fast").rglob("*.py")
        if path.name != "terminal.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "print(" in line.replace("fingerprint(", "")
    ]
    assert found == []
