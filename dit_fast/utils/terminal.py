"""Lines for a person: what files hold is shown, never obeyed by the terminal, and no line ends the program."""

import contextlib
import errno
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any


def printable(text: object) -> str:
    """`text` in one line, with an escape for every character that a terminal acts on instead of showing it.

    These are control characters (ESC begins colors and commands, newlines forge lines), controls of the writing
    direction, invisible characters, and the bytes of file names that are not UTF-8.

    Args:
        text: any object; `str` of it is shown.

    Returns:
        The line, as `"name\\\\x1b[31m"` for a name that would turn the terminal red.
    """
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else _escaped(char)
        for char in str(text)
    )


def say(*lines: object, error: bool = False) -> None:
    """Print each argument as one line, `printable`, at once.

    Args:
        lines: what to print; a text of several lines is given as its `splitlines`.
        error: print to stderr instead of stdout.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        # A terminal of another encoding than UTF-8 does not have every character.
        print(printable(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)
    if stream is not None:
        stream.flush()


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class LastingStream:
    """A text stream, stdout or stderr, whose failure is no exception: what is written after it is dropped.

    A reader that leaves (`| head`), a terminal that is closed and a full disk end what is shown, not the program.
    `problem`: the error, once there was one. A character that the stream's encoding does not have is escaped.
    """

    def __init__(self, stream: Any, name: str):
        self._stream = stream
        self._name = name
        self.problem: Exception | None = None

    def write(self, text: str) -> int:
        """Write `text`, if that is still possible."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        try:
            return self.problem is None and bool(self._stream.isatty())
        except (OSError, ValueError):
            return False

    @property
    def lost(self) -> bool:
        """Whether lines were lost that somebody wanted: whoever closed a pipe or a terminal did not."""
        reader_left = isinstance(self.problem, OSError) and self.problem.errno in (errno.EPIPE, errno.EIO)
        return self.problem is not None and not reader_left

    def _give_up(self, error: Exception) -> None:
        if self.problem is not None:
            return
        self.problem = error
        # What is buffered here, in libraries and in child processes has a place to go.
        with contextlib.suppress(OSError, ValueError):
            descriptor, nothing = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
        if self.lost and self._name == "stdout":
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            say(f"dit-fast: warning: stdout: {reason}; what is printed is lost from here on", error=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Inside, sys.stdout, which is given, and sys.stderr are `LastingStream`s.

    Where the process was started without one of the standard descriptors, it is opened to nowhere: the next file to be
    opened would get its number, and with it what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    stdout, stderr = (
        LastingStream(open(os.devnull, "w") if stream is None else stream, name)  # noqa: SIM115
        for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    )
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield stdout
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout, sys.stderr = before
