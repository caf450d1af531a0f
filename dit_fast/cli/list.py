"""`dit-fast list`: models, presets, solvers, or the runs in a folder."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_fast.checkpoint.folder import read_manifest, step_folders
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.model.cost import table
from dit_fast.model.presets import SIZES
from dit_fast.sampling.runge_kutta import TABLEAUS
from dit_fast.sampling.solvers import DETERMINISTIC, SOLVERS
from dit_fast.training.log import read_lines
from dit_fast.training.presets import PRESETS
from dit_fast.utils.files import read_object
from dit_fast.utils.options import REQUIRED, Options, add_options, flag_of, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import SOURCE

EPILOG = "Example: dit-fast list runs results"
DEPTH = 3
"""Levels below a folder on which runs are looked for."""
Row = dict[str, Any]


@dataclass(frozen=True)
class ListOptions(Options):
    what: Literal["models", "presets", "solvers", "runs"] = option(REQUIRED, "What to list", positional=True)
    folder: str | None = option(
        None,
        "Folder of the runs",
        SOURCE,
        metavar="FOLDER",
        positional=True,
        default_text="the working directory",
    )
    json: bool = option(False, "Print JSON instead of text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, ListOptions)


def run(args: argparse.Namespace) -> int:
    """Print one line for each."""
    options = read_options(ListOptions, args)
    if options.folder is not None and options.what != "runs":
        raise ConfigError(f"{options.folder}: {options.what} are not in a folder; remove it")
    rows = {"models": _models, "presets": _presets, "solvers": _solvers}
    found = list(_runs(Path(options.folder or "."))) if options.what == "runs" else rows[options.what]()
    if options.json:
        say(*json.dumps(found, indent=2).splitlines())
    elif found:
        say(*_aligned(found))
    else:
        say(f"no runs in {options.folder or 'the working directory'}, {DEPTH} levels deep")
    return 0


def _models() -> list[Row]:
    return [
        {"model": name, "parameters": f"{counts.parameters / 1e6:.1f} M", "GMACs": f"{counts.macs / 1e9:.2f}"}
        for name, conditioning, counts in table()
        if conditioning == "adaln_zero"
    ]


def _presets() -> list[Row]:
    return [
        {"preset": name, "options": " ".join(f"{flag_of(key)} {value}" for key, value in options.items())}
        for name, options in PRESETS.items()
    ]


def _solvers() -> list[Row]:
    kinds = {
        "ddpm": "diffusion, random",
        "ddim": "diffusion and flow matching, --eta for random",
        "dopri5": "flow matching, adaptive steps",
        **dict.fromkeys(DETERMINISTIC, "diffusion and flow matching"),
        **dict.fromkeys(TABLEAUS, "flow matching"),
    }
    return [{"solver": name, "of": kinds.get(name, "flow matching, random")} for name in SOLVERS]


def _runs(root: Path) -> Iterator[Row]:
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    level = [root]
    for _ in range(DEPTH + 1):
        runs = [folder for folder in level if (folder / "checkpoints").is_dir()]
        yield from map(_run_row, sorted(runs))
        level = [
            Path(entry.path)
            for folder in level
            if folder not in runs
            for entry in _entries(folder)
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # not ours to read
        return []


def _run_row(folder: Path) -> Row:
    row: Row = {"run": str(folder), "model": "", "step": "", "loss": "", "age": ""}
    for path in reversed(step_folders(folder)):
        try:
            manifest = read_manifest(path)
            model = read_object(path / "config.json", CheckpointError)
        except CheckpointError:
            continue
        config = manifest.get("train_config", {})
        total = "" if config.get("steps") is None else f"/{config['steps']}"
        named = (f"DiT-{name}" for name, sizes in SIZES.items() if sizes.items() <= model.items())
        size = next(named, f"{model.get('depth')} x {model.get('hidden_size')}")
        row["model"] = f"{size}/{model.get('patch_size')}"
        row |= {"step": f"{manifest['step']}{total}"}
        row["age"] = _age(time.time() - path.stat().st_mtime)
        break
    else:
        row["step"] = "no checkpoint"
    losses = [line["loss"] for line in read_lines(folder / "log.jsonl") if "loss" in line]
    row["loss"] = f"{losses[-1]:.4f}" if losses else ""
    return row


def _age(seconds: float) -> str:
    """In the largest unit of which it has at least one."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _aligned(rows: list[Row]) -> Iterator[str]:
    """The rows as columns under their names; the last column is not padded."""
    names = list(rows[0])
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
