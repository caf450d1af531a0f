"""Values of options and arguments: their types and ranges, checked where they are given.

One object serves the command line and the Python API. Called with a word of the command line it returns the value, as
a `type` of argparse; `check` takes a caller's argument, of Python's or NumPy's types. Nothing is allocated for a value
here, and no range reaches values at which arithmetic overflows.
"""

import argparse
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_fast.errors import ConfigError

MANY = 10**12
"""Upper bound of counts that have no other: steps, images, classes."""
LARGEST_FLOAT = 3e38
"""Upper bound of numbers that have no other: float32 holds it."""
_MOST_NAME_BYTES = 255
_MOST_PATH_BYTES = 4095
_MOST_SHOWN = 60
_INTEGER = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Value:
    """Base class of types and ranges. `str` of one completes the sentence "give ..."."""

    nargs: int | str | None = None
    """Number of words on the command line, as argparse takes it; None: one."""

    @property
    def item(self) -> "Value":
        """Range of one word."""
        return self

    def parse(self, text: str) -> Any:
        """Value of a word of the command line; ValueError for a word that has none."""
        return text

    def accept(self, value: Any) -> Any:
        """`value` in the type that the program uses; ValueError or TypeError where it is out of range."""
        raise NotImplementedError

    def __call__(self, text: str) -> Any:
        """Value of a word of the command line. Raises argparse.ArgumentTypeError."""
        try:
            return self.accept(self.parse(text))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"expected {self}, found {shown(text)}") from None

    def check(self, name: str, value: Any) -> Any:
        """Check the value of an argument.

        Args:
            name: name of the argument in the message.
            value: value that the caller gave.

        Returns:
            The value, in Python's own type.

        Raises:
            ConfigError: it has another type or is out of range.
        """
        try:
            return self.accept(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} {shown(value)}: give {self}") from None


@dataclass(frozen=True)
class Whole(Value):
    """A whole number from `least` to `most`, also one of `besides`."""

    least: int = 1
    most: int = MANY
    besides: tuple[int, ...] = ()

    def parse(self, text: str) -> int:
        # int() also reads "1_000" and other scripts' digits, and takes minutes for a million digits.
        if not _INTEGER.fullmatch(text) or len(text) > 40:
            raise ValueError
        return int(text)

    def accept(self, value: Any) -> int:
        if type(value).__name__ in ("bool", "bool_"):
            raise TypeError
        number = operator.index(value)
        if not (self.least <= number <= self.most or number in self.besides):
            raise ValueError
        return number

    def __str__(self) -> str:
        besides = "".join(f"{number} or " for number in self.besides)
        return f"{besides}a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Number(Value):
    """A finite number from `least` to `most`; `above` excludes `least`, `below` excludes `most`."""

    least: float = 0.0
    most: float = LARGEST_FLOAT
    above: bool = False
    below: bool = False

    def parse(self, text: str) -> float:
        if not _DECIMAL.fullmatch(text):
            raise ValueError
        return float(text)

    def accept(self, value: Any) -> float:
        if isinstance(value, str | bytes) or type(value).__name__ in ("bool", "bool_"):
            raise TypeError
        number = float(value)
        inside = self.least <= number <= self.most
        if not inside or (self.above and number == self.least) or (self.below and number == self.most):
            raise ValueError
        return number

    def __str__(self) -> str:
        start = f"{'above' if self.above else 'from'} {self.least:g}"
        if self.below:
            return f"a number {start}, below {self.most:g}"
        return f"a number {start}{', up' if self.above else ''} to {self.most:g}"


@dataclass(frozen=True)
class Text(Value):
    """Text that is not empty, can be encoded as UTF-8 and has no null bytes."""

    def accept(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if not value.strip() or "\0" in value:
            raise ValueError
        value.encode()
        return str(value)

    def __str__(self) -> str:
        return "text that is not empty, in UTF-8 and without null bytes"


@dataclass(frozen=True)
class Place(Value):
    """A path, or a name in place of one (of a data set, of a repository on the hub), as `kind`: str or Path."""

    kind: Callable[[Any], Any] = str

    def accept(self, value: Any) -> Any:
        path = os.fspath(value)
        if not isinstance(path, str):
            raise TypeError
        if not path.strip() or "\0" in path or len(os.fsencode(path)) > _MOST_PATH_BYTES:
            raise ValueError
        if any(len(os.fsencode(name)) > _MOST_NAME_BYTES for name in path.split("/")):
            raise ValueError
        return self.kind(path)

    def __str__(self) -> str:
        return (
            f"a path that is not empty, without null bytes, of names of at most {_MOST_NAME_BYTES} bytes each and "
            f"{_MOST_PATH_BYTES} in all"
        )


@dataclass(frozen=True)
class OneOf(Value):
    """One of `values`, in their type; `former` are pairs of an earlier spelling and its value."""

    values: tuple[Any, ...]
    former: tuple[tuple[str, Any], ...] = ()

    def accept(self, value: Any) -> Any:
        for known in (*self.values, *(spelling for spelling, _ in self.former)):
            if (isinstance(value, str) or type(value) is type(known)) and value == known:
                return dict(self.former).get(known, known)
        raise ValueError

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class Flag(Value):
    """True or False."""

    def accept(self, value: Any) -> bool:
        if type(value).__name__ not in ("bool", "bool_"):
            raise TypeError
        return bool(value)

    def __str__(self) -> str:
        return "True or False"


@dataclass(frozen=True)
class Pattern(Value):
    """Text that matches the regular expression `pattern`; `words` describe it in messages."""

    pattern: str
    words: str

    def accept(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(self.pattern, value, re.ASCII):
            raise ValueError
        return value

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Pair(Value):
    """One value for both, or two of them: (height, width)."""

    value: Value

    def parse(self, text: str) -> tuple[Any, ...]:
        return tuple(map(self.value.parse, text.split("x")))

    def accept(self, value: Any) -> tuple[Any, Any]:
        both = tuple(value) if isinstance(value, tuple | list) else (value,)
        first, *more = map(self.value.accept, both)
        if len(more) > 1:
            raise ValueError
        return first, (more or [first])[0]

    def __str__(self) -> str:
        return f"SIZE or HEIGHTxWIDTH, each {self.value}"


@dataclass(frozen=True)
class Several(Value):
    """A sequence of values, on the command line one or more."""

    value: Value
    nargs = "+"

    @property
    def item(self) -> Value:
        return self.value

    def accept(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | bytes):
            raise TypeError
        return tuple(map(self.value.accept, value))

    def __str__(self) -> str:
        return f"one or more, each {self.value}"


SEED = Whole(0, (1 << 63) - 1)
TEXT = Text()
SOURCE = Place(str)
PATH = Place(Path)
SIDE = Whole(1, 1 << 16)
FLAG = Flag()


def check_memory(needed: float, what: str) -> None:
    """Refuse sizes that exceed the memory of this machine before anything is allocated.

    Args:
        needed: bytes needed.
        what: the options that need them, for the message.

    Raises:
        ConfigError: the machine has less memory.
    """
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > has:
        raise ConfigError(
            f"{what} takes {needed / 2**30:.3g} GiB of memory, this machine has {has / 2**30:.3g}: give less"
        )


def shown(value: Any) -> str:
    """`value` for a message, on one line and cut to a few words."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print millions of digits.
        return f"of {value.bit_length()} bits"
    text = repr(value[:_MOST_SHOWN]) if isinstance(value, str) else " ".join(str(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
