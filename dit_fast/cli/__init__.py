"""The command line: `dit-fast COMMAND ...`."""

import argparse
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Collection, Sequence
from types import FrameType, TracebackType
from typing import NoReturn

from dit_fast import __version__
from dit_fast.errors import ConfigError, DitFastError
from dit_fast.utils.terminal import lasting_streams, printable, say

# Name and purpose. The module dit_fast.cli.<name> has add_arguments(parser), run(args) -> status and, if the help text
# has a tail, EPILOG. It is imported only when its command is called: `dit-fast --help` does not wait for PyTorch.
COMMANDS = {
    "doctor": "what this machine has, and which path each part takes on it",
    "info": "parameters, multiply-adds and memory of a model",
    "data": "what is in a folder of images, and what deserves a look before training on it",
    "train": "train a Diffusion Transformer on images",
    "scaling": "train models of several sizes, and fit their losses to compute",
    "plot": "draw the loss curves of runs over each other",
    "profile": "trace training or sampling steps and print which kernels take their time",
    "sample": "draw images from a trained model",
    "export": "write a run's weights for other programs",
    "encode": "turn a folder of images into latents to train on",
    "explain": "pictures of how a model samples: film strip, sweeps, attention",
    "evaluate": "FID, sFID, Inception score, precision and recall of samples against real images",
    "list": "models, presets, solvers, or the runs in a folder",
    "completion": "a script that completes commands and options in a shell",
    "likelihood": "bits per dimension that a model needs for real images",
}

# What is printed by these is not their result.
_RUNS = {"train", "scaling"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `dit-fast`; None: those that the process was started with.

    Returns:
        0; 1 after an error that the user can mend, printed as one line; 130 if interrupted.

    Raises:
        SystemExit: with status 2 for a usage error, printed as one line, and 0 for `--help` and `--version`.
    """
    # Read once, when PyTorch's OpenMP is loaded. Threads that wait by spinning for long make a step ten times slower as
    # soon as another program wants a core, threads that sleep at once twice as slow where none does: spin for tens of
    # microseconds. What the user has set stays.
    if os.environ.get("OMP_WAIT_POLICY") is None:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine())
    # Not list(...): the command of that name is a module of this package once it is imported.
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    with lasting_streams() as stdout:
        with _Interrupts() as interrupts:
            status = _run(arguments, interrupts)
            if argv is None:
                # The work is done: Ctrl-C while the interpreter ends would only print a traceback.
                interrupts.ignore()
        stdout.flush()
        # A run is for its checkpoints, and printed what it could; of the other commands the lines are a result.
        return 1 if status == 0 and stdout.lost and not {*arguments[:1]} & _RUNS else status


def _run(arguments: list[str], interrupts: "_Interrupts") -> int:
    try:
        _check_working_directory()
        options = _parse(arguments)
        interrupts.loading = False
        return options.run(options)
    except KeyboardInterrupt:
        return interrupts.conclude()
    except Exception as error:
        # An import or a library that is interrupted may raise another exception than the one it was given.
        if interrupts.heard:
            return interrupts.conclude()
        message = _message(error)
        if message is None:
            raise
        say(f"dit-fast: error: {message}", error=True)
        return 1


def _check_working_directory() -> None:
    """Raise ConfigError where it is gone: loading MKL would end the process with words about a library."""
    try:
        os.getcwd()
    except OSError:
        raise ConfigError("the working directory was removed; change to one that is there") from None


def build_parser(loaded: Collection[str]) -> tuple["Parser", dict[str, "Parser"]]:
    """The parser of `dit-fast` and those of its commands, which have options where the name is in `loaded`."""
    parser = Parser(
        prog="dit-fast", description="Train and sample Diffusion Transformers.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dit-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose, allow_abbrev=False)
        if name in loaded:
            module = importlib.import_module(f"dit_fast.cli.{name}")
            module.add_arguments(command)
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            command.epilog = getattr(module, "EPILOG", None)
            words = [str(action.metavar) for action in command._get_positional_actions()]
            command.usage = " ".join([command.prog, "[options]", *words])
            command.set_defaults(run=module.run)
    return parser, commands.choices


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command, its module imported: `run` among them is its function."""
    parser, commands = build_parser([name for name in arguments if name in COMMANDS][:1])
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = commands[options.command]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(unknown, command)}")
    return options


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and where help is, and exit with status 2."""
        say(
            f"dit-fast: error: {message.removeprefix('argument ')}; see {self.prog} --help",
            error=True,
        )
        self.exit(2)


def _nearest(unknown: Sequence[str], command: argparse.ArgumentParser) -> str:
    """What to try instead of options that a command does not have."""
    known = [*command._option_string_actions]
    names = (argument.partition("=")[0] for argument in unknown if argument.startswith("--"))
    near = [match for name in names for match in difflib.get_close_matches(name, known, 1)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _message(error: Exception) -> str | None:
    """The line for an error that the user can mend; None for one that is a fault of the program."""
    if isinstance(error, DitFastError):
        return str(error)
    if isinstance(error, OSError):
        # A path that is too long, not permitted, of a disk that is gone: the system's words, and the file.
        where = "".join(f": {name}" for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror or type(error).__name__}{where}" if error.strerror or where else str(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "alloc_cpu" in str(error):
        first = str(error).partition("\n")[0]
        return f"not enough memory{first and f' ({first})'}; give a smaller model, batch or image size"
    return None


class _OneLine(logging.Formatter):
    """The message of a record alone, as a line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


class _Interrupts:
    """Ctrl-C as one line and status 130, at any moment inside `with _Interrupts()`.

    loading: nothing has begun yet but imports, which may swallow an exception or turn it into another one: the process
    ends at once. After that the first Ctrl-C is a KeyboardInterrupt, a second one ends the process. Left alone where
    the signal is ignored, as in the background of a shell, and outside the main thread.
    """

    def __init__(self) -> None:
        self.loading = True
        self.heard = False
        self._said = False

    def __enter__(self) -> "_Interrupts":
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def ignore(self) -> None:
        """From now on Ctrl-C does nothing."""
        if signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def conclude(self) -> int:
        """Say so, once; the exit status."""
        if not self._said:
            self._said = True
            say("dit-fast: interrupted; complete checkpoints, shards and parts are kept", error=True)
        return 128 + signal.SIGINT

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.loading or self.heard:
            os._exit(self.conclude())
        self.heard = True
        raise KeyboardInterrupt
