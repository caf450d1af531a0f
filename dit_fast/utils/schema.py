"""Schemas for JSON values from untrusted files: functions that nest as the file does.

require(content, fields({"step": integer(), "files": table(fields({"bytes": integer()}))}), path, CheckpointError)
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from dit_fast.errors import DitFastError

Check = Callable[[Any, str], Iterable[str]]
"""check(value, where): yields the problems of a value; `where` is its path in the file."""

_LISTED = 5
_MAX_TEXT = 1 << 16


def require(content: Any, check: Check, source: object, raises: type[DitFastError]) -> None:
    """Check a value.

    Args:
        content: The value.
        check: Its schema.
        source: Name of the file, for the message.
        raises: Class of the error.

    Raises:
        raises: The value does not match; the message lists the first problems on one line.
    """
    if problems := list(islice(check(content, ""), _LISTED + 1)):
        more = "; ..." if len(problems) > _LISTED else ""
        raise raises(f"{source}: {'; '.join(problems[:_LISTED])}{more}")


def integer(least: int = 0, most: int = 2**53) -> Check:
    """A whole number, which true and false are not."""

    def check(value: Any, where: str) -> Iterator[str]:
        # `type`, not isinstance: bool is a subclass of int.
        if type(value) is not int or not least <= value <= most:
            yield _wrong(where, value, f"a whole number from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """A finite number."""

    def check(value: Any, where: str) -> Iterator[str]:
        # JSON integers have any size; a comparison with 1e308 is safe for them, and is False for NaN.
        if type(value) not in (int, float) or not abs(value) <= 1e308 or not least <= value <= most:
            bounds = "" if math.isinf(least) and math.isinf(most) else f" from {least:g} to {most:g}"
            yield _wrong(where, value, f"a finite number{bounds}")

    return check


def text(pattern: str | None = None) -> Check:
    """A string, which matches the whole of `pattern` where it is given."""

    def check(value: Any, where: str) -> Iterator[str]:
        if (
            not isinstance(value, str)
            or len(value) > _MAX_TEXT
            or (pattern and not re.fullmatch(pattern, value))
        ):
            yield _wrong(where, value, "a string" + (f" like {pattern}" if pattern else ""))

    return check


def flag(value: Any, where: str) -> Iterator[str]:
    """true or false."""
    if not isinstance(value, bool):
        yield _wrong(where, value, "true or false")


def anything(value: Any, where: str) -> Iterator[str]:
    """Any value; it is checked elsewhere."""
    yield from ()


def one_of(*values: Any) -> Check:
    """One of `values`, of the same type."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not any(type(value) is type(known) and value == known for known in values):
            yield _wrong(where, value, f"one of {', '.join(map(repr, values))}")

    return check


def maybe(check: Check) -> Check:
    """null, or a value that matches `check`."""
    return lambda value, where: () if value is None else check(value, where)


def array(item: Check, length: int | None = None) -> Check:
    """A list whose items match `item`, with `length` items where it is given."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, list) or length not in (None, len(value)):
            yield _wrong(where, value, "a list" + ("" if length is None else f" of {length}"))
            return
        for place, inner in enumerate(value):
            yield from item(inner, f"{where}[{place}]")

    return check


def table(item: Check, key: str | None = None) -> Check:
    """An object whose values match `item` and whose keys match the pattern `key`, where it is given."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _wrong(where, value, "an object")
            return
        for name, inner in value.items():
            if key is not None and not re.fullmatch(key, name):
                yield f"{_place(where)}has the key {brief(name)}, expected names like {key}"
            yield from item(inner, _below(where, name))

    return check


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with all fields of `required` and any of `optional`; other fields are ignored."""

    def check(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield _wrong(where, value, "an object")
            return
        for name, inner in required.items():
            if name not in value:
                yield f"{_below(where, name)} is missing"
            else:
                yield from inner(value[name], _below(where, name))
        for name, inner in (optional or {}).items():
            if name in value:
                yield from inner(value[name], _below(where, name))

    return check


def _below(where: str, name: str) -> str:
    plain = name if name.isprintable() and len(name) <= 60 else brief(name)
    return f"{where}.{plain}" if where else plain


def _place(where: str) -> str:
    return f"{where} " if where else ""


def _wrong(where: str, value: Any, expected: str) -> str:
    return f"{_place(where)}is {brief(value)}, expected {expected}"


def brief(value: Any) -> str:
    """A value from a file on one line, at most 100 characters long."""
    return " ".join(reprlib.repr(value).split())[:100]
