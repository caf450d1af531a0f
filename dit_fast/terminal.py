"""Lines for a person: what files hold is shown, never obeyed by the terminal."""

import sys
import unicodedata


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
