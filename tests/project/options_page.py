"""Writes docs/options.md from the options of the commands: python -m tests.project.options_page."""

import argparse
import importlib
from pathlib import Path

from dit_fast.cli import COMMANDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"
HEAD = """# Options of the commands

Written by `python -m tests.project.options_page`; `dit-fast COMMAND --help` prints the same. The flag `--batch-size` of
`dit-fast train` is the field `batch_size` of `TrainConfig`; those of `dit-fast encode` are fields of `EncodeConfig`. A
value outside its range or choices is refused in one line before anything is computed.
"""
INCLUDES = {"profile": "train", "scaling": "train", "explain": "sample"}
"""Commands that take the options of another one, which are listed there alone."""


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"dit_fast.cli.{command}").add_arguments(parser)
    return parser


def written(action: argparse.Action) -> str:
    """An option as it is given: flags, then its value."""
    value = action.metavar
    words = " ".join(value) if isinstance(value, tuple) else str(value or "")
    if action.nargs == "+":
        words += " ..."
    if action.nargs == "?" and action.option_strings:
        words = f"[{words}]"
    flags = ", ".join(action.option_strings)
    return f"`{' '.join(filter(None, (flags, words if action.nargs != 0 else '')))}`"


def page() -> str:
    """The text of docs/options.md."""
    lines = [HEAD]
    for command, purpose in COMMANDS.items():
        lines += [f"## dit-fast {command}", "", f"{purpose[:1].upper()}{purpose[1:]}.", ""]
        parser, other = parser_of(command), INCLUDES.get(command)
        elsewhere = {action.dest for action in parser_of(other)._actions} if other else set()
        if other:
            lines += [f"Takes the options of [dit-fast {other}](#dit-fast-{other}) too.", ""]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.dest not in elsewhere]
            if actions:
                title = str(group.title)
                lines += [f"| {title} | |", "|---|---|"]
                lines += [f"| {written(action)} | {action.help} |".replace("%%", "%") for action in actions]
                lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
