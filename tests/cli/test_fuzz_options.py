"""A fuzz of every option of every command: each value outside its type or range is refused at once, in one line.

Nonsense is a value outside the type or the range that the option's `type` (a `utils.values.Value`, whose `str` is in
the message) or its `choices` document. It is accepted where the command ends with status 0. The options are read from
the parsers, so that a new one is covered without being named here.
"""

import argparse
import importlib
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dit_fast.cli import COMMANDS, main
from dit_fast.utils.values import Number, OneOf, Place, Text, Value, Whole
from tests import latent_sets
from tests.patience import PATIENCE

BAD_VALUES = 8
TINY = [
    *("--data", "digits", "--hidden-size", "16", "--depth", "1", "--num-heads", "2", "--patch-size", "4"),
    *("--batch-size", "4", "--threads", "1", "--device", "cpu", "--diffusion-steps", "30"),
]  # fmt: skip


def options_of(command: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"dit_fast.cli.{command}").add_arguments(parser)
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def bad_words(action: argparse.Action) -> list[str]:
    """Eight words that are no value of an option."""
    value: Any = action.type
    if action.nargs == 0:
        words = ["", "nan", "-1", "true", "\0", "x" * 300, "0", "no"]
    elif action.choices is not None or isinstance(value, OneOf):
        known = next(iter(action.choices or value.values))
        words = ["", "nan", "x" * 300, f"{known}x", f"{known} ", "\0", "-1", "\x1b[31m"]
    elif isinstance(value, Whole):
        below = value.least - 2 if value.least - 1 in value.besides else value.least - 1
        words = ["", "nan", "1e400", "1.5", str(below), str(value.most + 1), "1" + "0" * 30, "\u0663"]
    elif isinstance(value, Number):
        below = value.least if value.above else value.least - 1 - abs(value.least)
        above = value.most if value.below else 2 * value.most
        words = ["", "nan", "inf", "1e400", repr(float(below)), repr(float(above)), "1_0", "one"]
    elif isinstance(value, Place):
        long = "a/" * 2100
        words = ["", " ", "\0", "a\0b", "x" * 256, "\u00e9" * 128, long, f"d/{'y' * 300}/z"]
    elif isinstance(value, Text):
        words = ["", " ", "\t", "\n", "\0", "a\0b", "\udcff", "a\ud800"]
    else:
        words = ["", "nan", "-1", "1e400", "1" + "0" * 30, "\0", "x" * 300, "\u0663"]
    assert len(set(words)) == BAD_VALUES
    return words


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def ended(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], list[str]]]:
    """A call of each command that ends with status 0, with a new --out each time."""
    folder = tmp_path_factory.mktemp("base")
    images, vae = latent_sets.write_images(folder / "images"), latent_sets.write_vae(folder / "vae")
    run = folder / "run"
    assert main(["train", *TINY, "--steps", "2", "--out", str(run)]) == 0
    sampled = ["--ckpt", str(run), "--device", "cpu", "--num", "4", "--steps", "2", "--batch-size", "4"]
    assert main(["sample", *sampled, "--npz", "--out", str(folder / "samples")]) == 0
    count = iter(range(10**6))

    def new(suffix: str = "") -> str:
        return str(folder / f"out{next(count)}{suffix}")

    return {
        "doctor": lambda: [],
        "info": lambda: ["DiT-S/8", "--input-size", "8"],
        "data": lambda: ["digits", "--preview", new(".png")],
        "list": lambda: ["models"],
        "completion": lambda: ["bash"],
        "train": lambda: [*TINY, "--steps", "1", "--out", new()],
        "scaling": lambda: [
            *("--data", "digits", "--patch-size", "4", "--batch-size", "4", "--threads", "1", "--device", "cpu"),
            *("--sizes", "32x1", "64x1", "--steps", "1", "--diffusion-steps", "30", "--out", new()),
        ],
        "plot": lambda: [str(run), "--out", new(".png")],
        "profile": lambda: [*TINY, "--first", "0", "--count", "1", "--trace", new(".json")],
        "sample": lambda: [*sampled, "--out", new()],
        "export": lambda: ["--ckpt", str(run), "--out", new()],
        "encode": lambda: [
            *("--data", str(images), "--vae", str(vae), "--size", "16", "--batch-size", "2", "--num-workers", "1"),
            *("--device", "cpu", "--out", new()),
        ],
        "explain": lambda: [
            *("--ckpt", str(run), "--device", "cpu", "--classes", "1", "--steps", "2", "--frames", "2"),
            *("--scales", "1", "2", "--out", new()),
        ],
        "evaluate": lambda: [
            *(str(folder / "samples" / "samples.npz"), "--against", "digits", "--features", "classifier"),
            *("--splits", "2", "--device", "cpu", "--num-workers", "1", "--metrics", "fid"),
        ],
        "likelihood": lambda: ["--ckpt", str(run), "--device", "cpu", "--num", "1", "--batch-size", "1"],
    }  # fmt: skip


@pytest.fixture
def autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    latent_sets.install(monkeypatch)


def fuzz(command: str, calls: Callable[[], list[str]], capsys: Any) -> tuple[Counter[str], list[str]]:
    """Give each bad word to each option of a command; what came of them, and those that went wrong."""
    came, wrong = Counter[str](), []
    for action in options_of(command):
        for word in bad_words(action):
            name = action.option_strings[0] if action.option_strings else action.dest
            arguments = [command, *calls()]
            if not action.option_strings:
                arguments[1] = word
            elif isinstance(action.nargs, int) and action.nargs > 1:
                arguments += [name, word, *["0.5"] * (action.nargs - 1)]
            else:
                arguments.append(f"{name}={word}")
            capsys.readouterr()
            try:
                with time_limit(int(PATIENCE)):
                    status = ended(arguments)
                printed = capsys.readouterr()
                lines = printed.err.splitlines()
                outcome = "accepted" if status == 0 else "refused"
                if status and (len(lines) != 1 or not lines[0].isprintable() or printed.out):
                    outcome = "not one line"
            except TimeoutError:
                outcome = "hang"
            except Exception as error:
                outcome = f"traceback {type(error).__name__}: {error}"
            came[outcome] += 1
            if outcome != "refused":
                wrong.append(f"{command} {name} {word[:40]!r}: {outcome}")
    return came, wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_options_say_what_their_values_are(command: str) -> None:
    loose = [
        action.dest
        for action in options_of(command)
        if action.nargs != 0 and action.choices is None and not isinstance(action.type, Value)
    ]
    assert loose == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_all_nonsense_is_refused_and_what_makes_sense_is_not(
    command: str, base: Any, autoencoder: None, capsys: Any
) -> None:
    assert ended([command, *base[command]()]) == 0, capsys.readouterr().err
    came, wrong = fuzz(command, base[command], capsys)
    with capsys.disabled():
        print(f"\n{command:<10} {len(options_of(command)):>3} options, {dict(came)}")
    assert wrong == []
    assert came["refused"] == BAD_VALUES * len(options_of(command))


class ReachedError(Exception):
    """The command has set up its work, and begins it."""


BEGINNINGS = {
    "train": "dit_fast.training.run._steps",
    "scaling": "dit_fast.cli.scaling.Ladder.train",
    "profile": "dit_fast.cli.profile.trace_steps",
    "sample": "dit_fast.cli.sample._draw",
    "explain": "dit_fast.cli.explain.film_strip",
    "evaluate": "dit_fast.cli.evaluate._collect",
    "likelihood": "dit_fast.cli.likelihood._bits",
}
ROOM = 1 << 30
"""Memory that a command may take before it begins: tiny models and a thousand images of 8 x 8 pixels."""


@contextmanager
def memory_limit(room: int) -> Iterator[None]:
    """Address space beyond what the process has now: an allocation beyond that fails at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    previous = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, previous)


LONG = {"depth", "diffusion_steps"}
"""What takes seconds to build at its largest: profile has both; the other commands, of the same values, nightly."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "long"),
    [
        *((command, False) for command in (*BEGINNINGS, "info", "encode")),
        ("profile", True),
        *(pytest.param(command, True, marks=pytest.mark.nightly) for command in ("train", "scaling", "info")),
    ],
)
def test_no_option_takes_memory_in_proportion_to_its_value(
    command: str, long: bool, base: Any, autoencoder: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest value of every option either is refused in one line, or takes no more memory than usual."""
    actions = [action for action in options_of(command) if (action.dest in LONG) is long]
    assert actions

    def reached(*arguments: Any, **named: Any) -> None:
        raise ReachedError

    if command in BEGINNINGS:
        monkeypatch.setattr(BEGINNINGS[command], reached)
    wrong = []
    for action in actions:
        if not isinstance(action.type, Whole | Number):
            continue
        count = action.nargs if isinstance(action.nargs, int) else 1
        words = [repr(action.type.most)] * count
        capsys.readouterr()
        try:
            with time_limit(int(PATIENCE)), memory_limit(ROOM):
                status = ended([command, *base[command](), action.option_strings[0], *words])
            lines = capsys.readouterr().err.splitlines()
            outcome = "" if status == 0 or len(lines) == 1 else f"{lines}"
            if any("not enough memory" in line for line in lines):
                outcome = lines[0]
        except ReachedError:
            continue
        except (Exception, KeyboardInterrupt) as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome:
            wrong.append(f"{command} {action.option_strings[0]} {words[0]}: {outcome}")
    assert wrong == []
