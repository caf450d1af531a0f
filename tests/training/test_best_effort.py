"""What a run prints, logs, draws and scores besides training: its failures are warnings, one for each kind."""

import sys
import types
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from dit_fast.cli import main
from dit_fast.errors import MissingExtraError, OutputError, RankError
from dit_fast.training import TrainConfig, load_checkpoint, train
from dit_fast.training import run as training_run
from dit_fast.training.callbacks import SampleGrids
from dit_fast.training.log import BestEffort, LineFile, Progress, plot_losses
from tests.training.test_step import TINY, image_set


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "steps": 6, "log_every": 1, **changes})


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())


def fails(problem: BaseException) -> Any:
    def call(*args: Any, **options: Any) -> None:
        raise problem

    return call


def test_a_failure_is_one_warning_and_a_lost_rank_is_raised(caplog):
    best_effort = BestEffort()
    assert best_effort("a thing", lambda: None)
    for _ in range(3):
        assert not best_effort("a thing", fails(KeyError("why\nnot")))
    assert not best_effort("another", fails(ValueError()))
    assert [each.getMessage() for each in caplog.records] == [
        "a thing: 'why\\nnot'; training continues without it",
        "another: ValueError; training continues without it",
    ]
    for lost in (
        RankError("rank 1 is gone"),
        RuntimeError("Gloo: connection reset by peer"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(lost)):
            best_effort("a thing", fails(lost))


@pytest.mark.parametrize(
    ("owner", "name", "problem", "warning"),
    [
        (LineFile, "append", OSError(28, "No space left on device"), "No space left on device"),
        (LineFile, "reduce", PermissionError(13, "Permission denied"), "log.jsonl: [Errno 13]"),
        (Progress, "report", BrokenPipeError(32, "Broken pipe"), "the progress: [Errno 32] Broken pipe"),
        (Progress, "advance", OSError(5, "Input/output error"), "the progress bar: [Errno 5]"),
        (Progress, "__init__", AttributeError("no isatty"), "the progress bar: no isatty"),
        (SampleGrids, "draw", MemoryError(), "the grid of samples: MemoryError"),
        (SampleGrids, "draw", OSError(122, "Disk quota exceeded"), "the grid of samples: [Errno 122]"),
        (matplotlib.figure.Figure, "savefig", RuntimeError("no font"), "the loss curve: cannot draw"),
        (matplotlib.figure.Figure, "__init__", AttributeError("rcParams"), "the loss curve: cannot draw"),
    ],
    ids=str,
)
def test_nothing_besides_the_training_ends_it(owner, name, problem, warning, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(owner, name, fails(problem))
    result = train(tiny(sample_every=2, sample_steps=2), tmp_path / "run")
    assert load_checkpoint(result.checkpoint).step == 6
    warned = [each.getMessage() for each in caplog.records]
    assert len([each for each in warned if warning in each]) == 1, warned
    assert (result.curve is None) == (owner is matplotlib.figure.Figure)
    if owner is not matplotlib.figure.Figure:
        assert result.curve is not None
        assert result.curve.exists()


class Session:
    """What is used of wandb's run; each of its methods can fail."""

    id = "abc"

    def __init__(self, broken: str):
        self.broken, self.calls = broken, 0

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1
        if self.broken == "log":
            raise ConnectionError("offline")

    def finish(self) -> None:
        if self.broken == "finish":
            raise ConnectionError("offline")


@pytest.mark.parametrize("broken", ["init", "log", "finish", "nothing"])
def test_a_tracker_that_fails_gets_no_more_and_costs_nothing(broken, tmp_path, monkeypatch, caplog):
    session = Session(broken)

    def init(**options: Any) -> Session:
        if broken == "init":
            raise ConnectionError("offline")
        return session

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert train(tiny(wandb=True), tmp_path / "run").step == 6
    assert caplog.text.count("Weights & Biases: offline; training continues without it") == (
        broken != "nothing"
    )
    assert session.calls == {"init": 0, "log": 1}.get(broken, 6)


@pytest.mark.parametrize("name", ["lr$x^$", "$\\frac{", "_hidden", "a\udcffb", "%s {} \\n", "-rf"])
def test_a_run_s_name_is_no_formula(name, tmp_path, caplog):
    result = train(tiny(steps=2), tmp_path / name)
    assert result.curve == tmp_path / name / "loss.png"
    assert result.curve.read_bytes().startswith(b"\x89PNG")
    assert caplog.text == ""


def test_a_picture_that_fails_is_no_half_of_one_and_one_line(tmp_path, monkeypatch, capsys):
    """By `dit-fast plot`; the one that was there stays."""
    train(tiny(steps=2), tmp_path / "run")
    target = tmp_path / "losses.png"
    target.write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", fails(RuntimeError("two\nlines")))
        with pytest.raises(OutputError, match=r"cannot draw .*losses.png \(two lines\)"):
            plot_losses({"run": tmp_path / "run" / "log.jsonl"}, target)
        capsys.readouterr()
        assert main(["plot", str(tmp_path / "run"), "--out", str(target)]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("dit-fast: error: ")
    assert target.read_bytes() == b"before"
    assert [path.name for path in Path(tmp_path).iterdir() if path.name.startswith(".")] == []
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingExtraError, match="matplotlib is not installed"):
        plot_losses({"run": tmp_path / "run" / "log.jsonl"}, target)
