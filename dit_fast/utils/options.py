"""Options of a program, each described once: as a field of a dataclass.

A field made by `option` holds the default, the help text, the range and the flags. From these fields come the command
line (`add_options`, `read_options`), the checks of values (`check_options`), the docstring (`documented`) and
docs/options.md. A field's annotation says the rest: `Literal` types are choices, `bool` is a pair of flags.
"""

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_origin

from dit_fast.utils.values import FLAG, Flag, OneOf, Several, Value

REQUIRED: Any = MISSING
"""Default of an option that has none."""
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """Description of an option besides its name, type and default.

    Args:
        help: one sentence without a period.
        value: range of the value; None where the annotation has it.
        group: heading under which the help text lists it.
        default_text: default in words, where the field's own value does not say it.
        metavar: placeholder of the value in the help text.
        aliases: other flags with the same meaning.
        constants: flags without a value, and the value that each stands for.
        bare: value of the flag without a value; None: it needs one.
        positional: given without a flag.
        changeable: a resumed run may have another value.
    """

    help: str
    value: Value | None = None
    group: str = "options"
    default_text: str | None = None
    metavar: str | tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    bare: Any = None
    positional: bool = False
    changeable: bool = False


def option(default: T, help: str, value: Value | None = None, **described: Any) -> T:
    """Field of a dataclass that is an option.

    Args:
        default: the default, or REQUIRED.
        help, value, described: as `Option` takes them.
    """
    made: Any = field(default=default, metadata={"option": Option(help, value, **described)})
    return made


def same_option(source: type, name: str, **changes: Any) -> Any:
    """Field of a dataclass that is the option `name` of another one, with `changes` to its description or default."""
    (found,) = (each for each in fields(source) if each.name == name)
    default = changes.pop("default", found.default)
    about = replace(described(found), **{"value": value_of(found), **changes})
    return field(default=default, metadata={"option": about})


def described(field: "Field[Any]") -> Option:
    """Description of a field that `option` made."""
    made: Option = field.metadata["option"]
    return made


def options_of(cls: type, groups: Collection[str] | None = None) -> "list[Field[Any]]":
    """Fields of `cls` that are options; those of `groups`, in the order of these, where they are given."""
    made = [each for each in fields(cls) if "option" in each.metadata]
    return made if groups is None else [each for g in groups for each in made if described(each).group == g]


def value_of(field: "Field[Any]") -> Value:
    """Range of an option: its description's, else the choices of its annotation."""
    if (value := described(field).value) is not None:
        return value
    for part in (field.type, *get_args(field.type)):
        if part is bool:
            return FLAG
        if get_origin(part) is Literal:
            return OneOf(get_args(part))
    raise TypeError(f"{field.name}: {field.type} has no range; give value=")


def flag_of(name: str) -> str:
    """The flag of a field: "--batch-size" for "batch_size"."""
    return f"--{name.replace('_', '-')}"


def check_options(config: Any, name: Callable[[str], str] = flag_of) -> None:
    """Check the options of a frozen dataclass, and keep each value as `Value.check` returns it.

    Args:
        config: the object; None is accepted where it is the default or the annotation allows it.
        name: what the message calls a field.

    Raises:
        ConfigError: for the first field that has another type or is out of range.
    """
    for each in options_of(type(config)):
        given = getattr(config, each.name)
        if given is not None or not (each.default is None or "None" in str(each.type)):
            object.__setattr__(config, each.name, value_of(each).check(name(each.name), given))


class Options:
    """Base class of dataclasses whose fields were made by `option`: checks them when one is built."""

    def __post_init__(self) -> None:
        check_options(self)


def default_of(field: "Field[Any]") -> str:
    """Default of an option in words; "" where there is none to show."""
    text, default = described(field).default_text, field.default
    if text is not None:
        return text
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None or default is MISSING else shown_default(default)


def sentence(field: "Field[Any]") -> str:
    """Help text of an option, with its default."""
    default = default_of(field)
    return described(field).help + (default and f" (default: {default})")


def shown_default(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(shown_default, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    groups: Collection[str] | None = None,
    *,
    required: bool = True,
) -> None:
    """Add the options of a dataclass to a parser. One with a flag that is not given leaves no trace.

    Args:
        parser: what they are added to, under the headings of their groups.
        cls: dataclass whose fields were made by `option`.
        groups: only the options of these, in this order; None: all.
        required: whether the parser asks for options without a default.
    """
    headings = {str(group.title): group for group in parser._action_groups}
    for each in options_of(cls, groups):
        about, value = described(each), value_of(each)
        if about.group not in headings:
            headings[about.group] = parser.add_argument_group(about.group)
        heading = headings[about.group]
        text = sentence(each).replace("%", "%%")
        keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(value, Flag):
            heading.add_argument(
                flag_of(each.name), *about.aliases, dest=each.name, action=argparse.BooleanOptionalAction, **keywords
            )  # fmt: skip
            continue
        item = value.item
        choices = f"{{{','.join(map(str, item.values))}}}" if isinstance(item, OneOf) else None
        keywords.update(type=item, metavar=about.metavar or choices or each.name.rpartition("_")[2].upper())
        if value.nargs is not None or about.bare is not None or (about.positional and each.default is None):
            keywords["nargs"] = value.nargs or "?"
        if isinstance(value, Several):
            # A flag that is given twice adds to its values, instead of replacing them.
            keywords["action"] = "extend"
        if about.bare is not None:
            keywords["const"] = about.bare
        if about.positional:
            # argparse parses the default of a positional argument: SUPPRESS would not be among the choices.
            heading.add_argument(each.name, **{**keywords, "default": None})
            continue
        needed = required and each.default is MISSING
        heading.add_argument(flag_of(each.name), *about.aliases, dest=each.name, required=needed, **keywords)
        for flag, constant in about.constants.items():
            heading.add_argument(
                flag, dest=each.name, action="store_const", const=constant, default=argparse.SUPPRESS,
                help=f"The same as {flag_of(each.name)} {constant}",
            )  # fmt: skip


def given_options(
    cls: type, args: argparse.Namespace, groups: Collection[str] | None = None
) -> dict[str, Any]:
    """Values of the options of `cls` (or of these groups of it) that were given on the command line, by field."""
    known = {each.name for each in options_of(cls, groups)}
    return {name: value for name, value in vars(args).items() if name in known}


def read_options(cls: type[T], args: argparse.Namespace) -> T:
    """The dataclass `cls` of a parsed command line; its defaults stand for what was not given."""
    return cls(**given_options(cls, args))


def documented(cls: type[T]) -> type[T]:
    """Class decorator: the docstring lists the options of the dataclass."""
    lines = (f"        {each.name}: {sentence(each)}." for each in options_of(cls))
    cls.__doc__ = "\n".join((f"{(cls.__doc__ or '').rstrip()}\n\n    Attributes:", *lines))
    return cls
