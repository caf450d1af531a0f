"""Tuned tables: what a GPU measured as the best launch configuration or provider, over the heuristics' guess.

`tuned/<architecture>.json` is written by `python -m benchmarks.ops.tune` on a GPU and read at the first launch
on such a GPU. Nothing is ever searched while a program runs. A table that does not fit the installed PyTorch or
Triton, or the device code as it is now, is ignored with one warning that names the file and the reason.

A tuned tile may add the terms of a sum in another order than the heuristic's: results are repeatable to the bit on
one architecture, and may differ in the last bits between architectures. Into how many parts a sum over tokens is split
stays a function of the shape alone.
"""

import ast
import functools
import hashlib
import inspect
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

FOLDER = Path(__file__).with_name("tuned")
SCHEMA = 1

C = TypeVar("C")
P = ParamSpec("P")

_kept: list[Callable[[], None]] = []
"""What drops the answers that `per_launch` keeps."""

_plans: list[dict[Any, Any]] = []
"""The caches that `plan_cache` returned."""


@dataclass(frozen=True)
class Table:
    """One architecture's table: `sections` is {"launches" | "choices": {name: {"source", "entries": {key: entry}}}}."""

    path: Path
    sections: Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Request:
    """One question that an operation asked: which configuration of kernel `name`, or which of `options`, for `key`."""

    section: str
    name: str
    key: str
    default: Any
    options: tuple[Any, ...]
    source: str


@dataclass
class Search:
    """Answers given by hand instead of the tables', by (section, name), and the questions asked meanwhile."""

    answers: Mapping[tuple[str, str], Any]
    asked: list[Request] = field(default_factory=list)


_search: Search | None = None
_on = True


@contextmanager
def search(answers: Mapping[tuple[str, str], Any]) -> Iterator[list[Request]]:
    """Let `answers` stand for the tables and yield what is asked: {("launches", kernel) | ("choices", name): value}."""
    global _search
    previous, _search = _search, Search(answers)
    drop_plans()
    try:
        yield _search.asked
    finally:
        _search = previous
        drop_plans()


def plan_cache() -> dict[Any, Any]:
    """A new dictionary for what follows from launch configurations; emptied when these may have changed."""
    _plans.append({})
    return _plans[-1]


def drop_plans() -> None:
    """Empty all plan caches."""
    for plans in _plans:
        plans.clear()


def per_launch(choose: Callable[P, C]) -> Callable[P, C]:
    """Keep what `choose` returns by its arguments, all hashable, so that a launch costs one lookup.

    For functions that build a key of text and ask `config` or `choice`. `forget` drops what is kept; a search is
    always asked.
    """
    kept: Any = functools.cache(choose)
    _kept.append(kept.cache_clear)

    @functools.wraps(choose)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> C:
        return (kept if _search is None else choose)(*args, **kwargs)

    return chosen


def config(kernel: Any, key: str, default: C, capability: int) -> C:
    """The launch configuration of `kernel` for `key` on sm_<capability>: the table's, or `default`.

    `default` is the heuristic's, a frozen dataclass that refuses what is out of range with ValueError. An entry of
    the table replaces the fields named in its class attribute `tunable`; its method `candidates` yields what the
    search tries. Without them nothing is searched and no entry fits.
    """
    if _search is not None:
        name = kernel.fn.__name__
        options = tuple(default.candidates()) if hasattr(default, "candidates") else ()
        _search.asked.append(Request("launches", name, key, default, options, source_hash(kernel)))
        return _search.answers.get(("launches", name), default)
    return _config(kernel, key, default, capability)


@functools.cache
def _config(kernel: Any, key: str, default: Any, capability: int) -> Any:
    entry = _entry("launches", kernel.fn.__name__, key, capability, (kernel,))
    if entry is None:
        return default
    fields, where = entry.get("config"), f"{_path(capability)}: {kernel.fn.__name__} [{key}]"
    tunable = getattr(default, "tunable", ())
    if not isinstance(fields, dict) or any(
        name not in tunable or type(value) is not int for name, value in fields.items()
    ):
        return _ignored(
            f"{where}: config is {fields!r}, expected whole numbers for {', '.join(tunable)}", default
        )
    try:
        return replace(default, **fields)
    except ValueError as error:
        return _ignored(f"{where}: {error}", default)


@per_launch
def config_for(
    kernel: Any, sizes: tuple[tuple[str, int], ...], dtype: torch.dtype, default: C, capability: int
) -> C:
    """`config` for a key made of named sizes and a dtype, kept for the next launch with the same values."""
    key = " ".join(f"{name}={size}" for name, size in sizes)
    return config(kernel, f"{key} {str(dtype).removeprefix('torch.')}", default, capability)


def choice(
    name: str,
    key: str,
    default: str,
    *,
    options: tuple[str, ...] = (),
    kernels: tuple[Any, ...] = (),
    capability: int | None = None,
) -> str:
    """How to execute operation `name` for `key`: the table's word, or `default`.

    `options` are the words that are known here (empty: any), which the search compares; `kernels` those whose change
    makes the measurement stale. `capability` None is that of the current CUDA device, 0 without one.
    """
    if capability is None:
        capability = current_capability()
    if _search is not None:
        _search.asked.append(Request("choices", name, key, default, options, source_hash(*kernels)))
        return _search.answers.get(("choices", name), default)
    return _choice(name, key, default, options, kernels, capability)


@functools.cache
def _choice(
    name: str, key: str, default: str, options: tuple[str, ...], kernels: tuple[Any, ...], capability: int
) -> str:
    entry = _entry("choices", name, key, capability, kernels)
    if entry is None:
        return default
    word = entry.get("choice")
    if not isinstance(word, str) or (options and word not in options):
        known = ", ".join(map(repr, options)) or "a word"
        return _ignored(f"{_path(capability)}: {name} [{key}]: choice is {word!r}, expected {known}", default)
    return word


def _entry(
    section: str, name: str, key: str, capability: int, kernels: tuple[Any, ...]
) -> Mapping[str, Any] | None:
    """The table's entry, None where there is none or the device code has changed since it was measured."""
    found = table(capability)
    part = found.sections[section].get(name) if found is not None else None
    if part is None or not _fresh(section, name, capability, kernels):
        return None
    return part["entries"].get(key)


@functools.cache
def _fresh(section: str, name: str, capability: int, kernels: tuple[Any, ...]) -> bool:
    found = table(capability)
    if found is None or found.sections[section][name]["source"] == source_hash(*kernels):
        return True
    return _ignored(f"{found.path}: {name}: its code has changed since it was measured; {_AGAIN}", False)


_AGAIN = "measure again with python -m benchmarks.ops.tune"


@functools.cache
def table(capability: int) -> Table | None:
    """The table of sm_<capability>, read once; None where there is none, none that fits (with a warning), or where
    tables are off (`use_tables`).
    """
    path = _path(capability)
    if not _on or not path.is_file():
        return None
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        return _ignored(f"{path}: {error}", None)


def read_table(path: Path) -> Table:
    """Read and check a table; ValueError with the reason where it does not fit this installation."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"schema is {found!r}, expected {SCHEMA}")
    if data.get("architecture") != path.stem:
        raise ValueError(f"architecture is {data.get('architecture')!r}, expected {path.stem!r}")
    for package, version in versions().items():
        if data.get(package) != version:
            raise ValueError(f"measured with {package} {data.get(package)}, here is {version}; {_AGAIN}")
    sections = {}
    for section in ("launches", "choices"):
        parts = data.get(section, {})
        if not isinstance(parts, dict) or not all(_is_part(part) for part in parts.values()):
            raise ValueError(f"{section!r} is not {{name: {{source, entries: {{key: entry}}}}}}")
        sections[section] = parts
    return Table(path, sections)


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("source"), str):
        return False
    entries = part.get("entries")
    return isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())


def versions() -> dict[str, str]:
    """The versions that a measurement holds for, without build tags such as +cu130."""
    return {"torch": torch.__version__.split("+")[0], "triton": triton.__version__.split("+")[0]}


def current_capability() -> int:
    """Compute capability of the current CUDA device (80, 90, 100, ...), 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def use_tables(on: bool) -> None:
    """Whether launches follow the tables, as they do from the start, or the heuristics alone.

    What `torch.compile` has traced keeps the provider of attention that it was traced with.
    """
    global _on
    if _on != on:
        _on = on
        forget()


def require(installed: bool, what: str) -> bool:
    """`installed`; ImportError where it is not and a search asks for it, so that nothing else is timed in its name."""
    if not installed and _search is not None:
        raise ImportError(f"{what} is not installed")
    return installed


def forget() -> None:
    """Drop what was read, so that tables are read again at the next launch."""
    for clear in (table.cache_clear, _config.cache_clear, _choice.cache_clear, _fresh.cache_clear, *_kept):
        clear()
    drop_plans()


def _path(capability: int) -> Path:
    return FOLDER / f"sm{capability}.json"


def _ignored(message: str, instead: Any) -> Any:
    warnings.warn(f"tuned table ignored: {message}", RuntimeWarning, stacklevel=2)
    return instead


@functools.cache
def source_hash(*kernels: Any) -> str:
    """SHA-256 of the device code of `kernels` and all it calls; comments, docstrings and layout do not count."""
    texts: dict[str, str] = {}
    for kernel in kernels:
        _collect(kernel, texts)
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def _collect(kernel: Any, texts: dict[str, str]) -> None:
    function = kernel.fn
    name = f"{function.__module__}.{function.__qualname__}"
    if name in texts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    texts[name] = ast.unparse(definition)
    for word in {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}:
        value = function.__globals__.get(word)
        if isinstance(value, tl.constexpr):
            texts[f"{name}.{word}"] = repr(value.value)
        elif inspect.isfunction(getattr(value, "fn", None)):
            _collect(value, texts)
