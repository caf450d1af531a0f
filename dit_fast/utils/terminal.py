"""Output for users: one-line texts that a terminal cannot misinterpret, and streams whose failure ends no program."""

import contextlib
import errno
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any


def printable(text: object) -> str:
    """Escape every character of `text` that a terminal would interpret instead of showing it.

    These are control characters (ESC starts colors and commands, newlines forge lines), controls of the writing
    direction, invisible characters, and bytes of file names that are not UTF-8.

    Args:
        text: Any object; `str(text)` is shown.

    Returns:
        One line, for example `"name\\\\x1b[31m"` for a name that would turn the terminal red.
    """
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else _escaped(char)
        for char in str(text)
    )


def listed(names: Sequence[object], most: int = 8) -> str:
    """The first `most` names on one line, each shortened to 80 printable characters, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(str(name)[:80]) for name in names[:most]) + more


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its class where the message is empty."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return (text or type(error).__name__).splitlines()[0].strip()[:200]


def say(*lines: object, error: bool = False) -> None:
    """Print each argument as one line, `printable`, at once.

    Args:
        lines: Lines to print; pass the `splitlines` of a text of several lines.
        error: Print to stderr instead of stdout.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        # A terminal with an encoding other than UTF-8 cannot show every character.
        print(printable(line).encode(encoding, "backslashreplace").decode(encoding), file=stream)
    if stream is not None:
        stream.flush()


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class LastingStream:
    """Wrapper of stdout or stderr that drops output after an error instead of raising it.

    A reader that exits (`| head`), a closed terminal and a full disk end the output, not the program. Characters that
    the encoding of the stream lacks are escaped. `problem` is the first error, or None.

    Args:
        stream: The stream.
        name: "stdout" or "stderr".
    """

    def __init__(self, stream: Any, name: str):
        self._stream = stream
        self._name = name
        self.problem: Exception | None = None

    def write(self, text: str) -> int:
        """Write `text`, unless an earlier write has failed."""
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
        """Whether output was lost that someone still reads; False where the reader closed a pipe or a terminal."""
        reader_left = isinstance(self.problem, OSError) and self.problem.errno in (errno.EPIPE, errno.EIO)
        return self.problem is not None and not reader_left

    def _give_up(self, error: Exception) -> None:
        if self.problem is not None:
            return
        self.problem = error
        # Redirected to /dev/null, so that data buffered here, in libraries and in child processes raises no error.
        with contextlib.suppress(OSError, ValueError):
            descriptor, nothing = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)
        if self.lost and self._name == "stdout":
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            say(f"dit-fast: warning: stdout: {reason}; what is printed is lost from now on", error=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Context manager that replaces sys.stdout and sys.stderr by `LastingStream`s and returns the first.

    A standard descriptor that is closed is opened to /dev/null: otherwise the next file to be opened would get its
    number and receive what libraries print.
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
