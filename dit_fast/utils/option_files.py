"""Options in YAML files: one `name: value` a line, with the names of the flags.

A value is read as its flag reads a word of the command line, so that `1e-4` is a number here, though not in YAML 1.1.
"""

import argparse
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from dit_fast.errors import ConfigError
from dit_fast.utils.files import MOST_JSON_BYTES, read_text
from dit_fast.utils.options import described, flag_of, options_of, value_of
from dit_fast.utils.terminal import one_line
from dit_fast.utils.values import Flag, Pair, Several

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_option_files(paths: Iterable[Path], cls: type) -> dict[str, Any]:
    """Options of several files together. Raises ConfigError, also for an option that is in two of them."""
    options: dict[str, Any] = {}
    where: dict[str, str] = {}
    for path in paths:
        for name, place, value in _read(path, cls):
            if name in where:
                raise ConfigError(f"{place}: {name} is set already in {where[name]}: remove one")
            where[name], options[name] = place, value
    return options


def read_option_file(path: Path, cls: type) -> dict[str, Any]:
    """Options of the dataclass `cls` in a YAML file.

    Args:
        path: the file, a mapping of names, with underscores or dashes, to values. The other flags of an option are
            names, too.
        cls: dataclass whose fields were made by `dit_fast.utils.options.option`.

    Returns:
        The value of each option that is in the file, by field.

    Raises:
        ConfigError: the file cannot be read, is not such a mapping, or has an unknown name or a value out of range.
            The message has the line.
    """
    return read_option_files([path], cls)


def _read(path: Path, cls: type) -> Iterator[tuple[str, str, Any]]:
    """Field, place in the file and value of each entry."""
    text = read_text(path, ConfigError, MOST_JSON_BYTES, "a YAML file of options")
    try:
        # Composed, not constructed: nodes know their lines, and nothing is built from tags.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or one_line(error)
        raise ConfigError(f"{path}{line}: not YAML: {problem}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines such as batch_size: 64, found a {root.id}")
    names = {
        _name(flag): each
        for each in options_of(cls)
        for flag in (flag_of(each.name), *described(each).aliases)
    }
    for key, node in root.value:
        place = f"{path}, line {key.start_mark.line + 1}"
        name = _name(str(key.value))
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{place}: no option {key.value}{hint}")
        yield names[name].name, place, _value(place, names[name], node)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _value(place: str, field: "Field[Any]", node: yaml.Node) -> Any:
    value, name = value_of(field), field.name
    if node.tag == "tag:yaml.org,2002:null":
        if field.default is None or "None" in str(field.type):
            return None
        raise ConfigError(f"{place}: {name} has no value")
    words = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(word, yaml.ScalarNode) for word in words):
        raise ConfigError(f"{place}: {name} is one value, found a mapping")
    texts = [word.value for word in words]
    several = isinstance(value, Several)
    if not several and isinstance(node, yaml.SequenceNode):
        if not isinstance(value, Pair):
            raise ConfigError(f"{place}: {name} is one value, found a list of {len(texts)}")
        texts = ["x".join(texts)]
    if isinstance(value, Flag):
        if texts[0].lower() not in _SWITCH:
            raise ConfigError(f"{place}: {name}: expected true or false, found {texts[0]}")
        return _SWITCH[texts[0].lower()]
    try:
        items = [value.item(text) for text in texts]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{place}: {name}: {error}") from None
    return tuple(items) if several else items[0]


def as_yaml(config: Any) -> str:
    """The options of a dataclass as a file that `read_option_file` reads, under comments with their groups."""
    cls = type(config)
    lines, group = [], None
    for each in options_of(cls, dict.fromkeys(described(each).group for each in options_of(cls))):
        if described(each).group != group:
            group = described(each).group
            lines += ["", f"# {group}"]
        value = getattr(config, each.name)
        plain = [*map(_plain, value)] if isinstance(value, tuple) else _plain(value)
        # After a scalar alone, YAML writes an end of the document.
        text = yaml.safe_dump(plain, default_flow_style=True, width=1 << 20).removesuffix("...\n").strip()
        lines.append(f"{each.name}: {text}")
    return "\n".join(lines[1:]) + "\n"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
