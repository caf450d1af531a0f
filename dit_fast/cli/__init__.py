"""The command line: `dit-fast COMMAND ...`."""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence

from dit_fast import __version__
from dit_fast.errors import DitFastError

# name: what it does. The module dit_fast.cli.<name> has add_arguments(parser) and run(args) -> status; it
# is imported only when its command is called, so that `dit-fast --help` does not wait for PyTorch.
COMMANDS = {
    "doctor": "what this machine has, and which path each part takes on it",
    "info": "parameters, multiply-adds and memory of a model",
    "train": "train a Diffusion Transformer on images",
    "scaling": "train models of several sizes, and fit their losses to compute",
    "plot": "draw the loss curves of runs over each other",
    "profile": "trace training or sampling steps and print which kernels take their time",
    "sample": "draw images from a trained model",
    "export": "write a run's weights for other programs",
    "encode": "turn a folder of images into latents to train on",
    "explain": "pictures of how a model samples: film strip, sweeps, attention",
    "evaluate": "FID, sFID, Inception score, precision and recall of samples against real images",
    "likelihood": "bits per dimension that a model needs for real images",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status is 0, 1 after an error that the user can mend, 130 if interrupted.

    Usage errors leave through argparse with status 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read once, when PyTorch's OpenMP is loaded. Threads that wait by spinning for long make a step ten times slower as
    # soon as another program wants a core, threads that sleep at once twice as slow where none does: spin for tens of
    # microseconds. What the user has set stays.
    if os.environ.get("OMP_WAIT_POLICY") is None:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = argparse.ArgumentParser(
        prog="dit-fast", description="Train and sample Diffusion Transformers.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = arguments[0] if arguments else ""
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        if name == called:
            module = importlib.import_module(f"dit_fast.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = _nearest(unknown, commands.choices[called])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    try:
        return options.run(options)
    except DitFastError as error:
        print(f"dit-fast: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dit-fast: interrupted; complete checkpoints, shards and parts are kept", file=sys.stderr)
        return 130


def _nearest(unknown: Sequence[str], command: argparse.ArgumentParser) -> str:
    """What to try instead of options that a command does not have."""
    known = re.findall(r"--[\w-]+", command.format_usage())
    names = (argument.partition("=")[0] for argument in unknown if argument.startswith("--"))
    near = [match for name in names for match in difflib.get_close_matches(name, known, 1)]
    return f" (did you mean {', '.join(near)}?)" if near else ""
