"""`dit-fast plot`: the loss curves of several runs in one picture."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from dit_fast.errors import ConfigError, OutputError
from dit_fast.training.log import plot_losses, read_log
from dit_fast.utils.options import REQUIRED, Options, add_options, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, Several


@dataclass(frozen=True)
class PlotOptions(Options):
    runs: tuple[Path, ...] = option(
        REQUIRED, "Run folder, or its log.jsonl", Several(PATH), metavar="RUN", positional=True
    )
    out: Path = option(Path("losses.png"), "Picture to write, a PNG file", PATH)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, PlotOptions)


def run(args: argparse.Namespace) -> int:
    """Draw the picture and print its path."""
    options = read_options(PlotOptions, args)
    logs: dict[str, Path] = {}
    for given in options.runs:
        log = given if given.is_file() else given / "log.jsonl"
        if not log.is_file():
            raise ConfigError(f"{given}: neither a run folder with a log.jsonl nor a file")
        if not read_log(log):
            raise ConfigError(f"{log} holds no log line yet")
        name = log.resolve().parent.name
        logs[name if name not in logs else str(given)] = log
    try:
        plot_losses(logs, options.out)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {options.out}: {error}") from error
    say(f"{options.out}: {len(logs)} run{'s' if len(logs) > 1 else ''}")
    return 0
