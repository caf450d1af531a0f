"""`dit-fast completion`: a script that completes commands and options in a shell."""

import argparse
from dataclasses import dataclass
from typing import Literal

from dit_fast.cli import COMMANDS, build_parser
from dit_fast.errors import MissingExtraError
from dit_fast.utils.options import REQUIRED, Options, add_options, option, read_options
from dit_fast.utils.terminal import say
from dit_fast.utils.values import PATH, SOURCE, OneOf

EPILOG = """Bash:  dit-fast completion bash > ~/.local/share/bash-completion/completions/dit-fast
Zsh:   dit-fast completion zsh > "${fpath[1]}/_dit-fast"
New shells complete then."""


@dataclass(frozen=True)
class CompletionOptions(Options):
    shell: Literal["bash", "zsh", "tcsh"] = option(REQUIRED, "The shell", positional=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, CompletionOptions)


def run(args: argparse.Namespace) -> int:
    """Print the script, made from the parsers of all commands."""
    shell = read_options(CompletionOptions, args).shell
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("shtab is not installed; pip install 'dit-fast[completion]'") from error
    parser, commands = build_parser(COMMANDS)
    for command in commands.values():
        for action in command._actions:
            # The options check their values themselves; here a shell is told what these are.
            if isinstance(action.type, OneOf):
                action.choices = [str(value) for value in action.type.values]
            elif action.type in (PATH, SOURCE):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    say(*shtab.complete(parser, shell).splitlines())
    return 0
