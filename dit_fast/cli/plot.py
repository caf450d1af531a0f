"""`dit-fast plot`: the loss curves of several runs over each other."""

import argparse
from pathlib import Path

from dit_fast.errors import ConfigError, OutputError
from dit_fast.training.log import plot_losses, read_log
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=PATH, metavar="RUN", help="run folder, or its log.jsonl")
    parser.add_argument(
        "--out", type=PATH, default=Path("losses.png"), help="the picture (default: losses.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the picture and say where it is."""
    logs: dict[str, Path] = {}
    for given in args.runs:
        log = given if given.is_file() else given / "log.jsonl"
        if not log.is_file():
            raise ConfigError(f"{given}: no run folder with a log.jsonl, and no such file")
        if not read_log(log):
            raise ConfigError(f"{log} holds no log line yet")
        name = log.resolve().parent.name
        logs[name if name not in logs else str(given)] = log
    try:
        plot_losses(logs, args.out)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {args.out}: {error}") from error
    say(f"{args.out}: {len(logs)} run{'s' if len(logs) > 1 else ''}")
    return 0
