"""log.jsonl and spikes.jsonl over kills, stops and odd lines: the lines of an uninterrupted run, none of them twice."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dit_fast.errors import DataError
from dit_fast.training import TrainConfig, Trainer, resume, train
from dit_fast.training import log as metrics
from dit_fast.training import run as training_run
from dit_fast.training.log import LineFile, plot_loss, read_lines, read_log, read_scores
from tests.training.test_step import TINY, image_set

TIMES = ("images_per_second", "data_wait", "peak_memory", "seconds")


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "keep_checkpoints": 0, "async_checkpoint": False, **changes})


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())
    # Most of the time of a short run.
    monkeypatch.setattr(training_run, "plot_loss", lambda log, target: None)


class Killed(BaseException):
    """Ends a run as SIGKILL does as far as its files are concerned: nothing handles it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Trainer.train_step

    def train_step(self: Trainer, *batch: Any, **flags: Any) -> Any:
        if self.step + 1 == step:
            raise Killed
        return made(self, *batch, **flags)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def lines_of(run: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """Every line as it stands there, without what is a time."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize(
    ("log_every", "ckpt_every"), [(1, 1), (1, 4), (4, 1), (3, 2), (2, 3), (5, 3), (7, 4), (100, 5)]
)
def test_lines_and_spikes_are_those_of_an_uninterrupted_run(log_every, ckpt_every, tmp_path, monkeypatch):
    """Killed twice, ended before its time and continued twice: to the bit, for any two intervals."""
    monkeypatch.setattr(metrics.SpikeDetector, "judge", lambda self, value: "every one")
    options = {"log_every": log_every, "ckpt_every": ckpt_every}
    train(tiny(steps=14, **options), tmp_path / "whole")
    run = tmp_path / "run"
    for step in (7, 9):
        with monkeypatch.context() as patch:
            killed_at(step, patch)
            with pytest.raises(Killed):
                resume(run, {}) if run.exists() else train(tiny(steps=14, **options), run)
    resume(run, {"steps": 11})
    assert [line["step"] for line in lines_of(run)][-1] == 11
    resume(run, {"steps": 14})
    for name in ("log.jsonl", "spikes.jsonl"):
        assert lines_of(run, name) == lines_of(tmp_path / "whole", name)
    assert [line["step"] for line in lines_of(run, "spikes.jsonl")] == list(range(1, 15))


def test_a_long_interval_takes_no_memory_for_its_steps(tmp_path, monkeypatch):
    """The values of more steps than are remembered are read in between, and none is missed."""
    monkeypatch.setattr("dit_fast.training.trainer.MOST_REMEMBERED", 3)
    each = train(tiny(steps=11, log_every=10**9), tmp_path / "few")
    monkeypatch.undo()
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())
    train(tiny(steps=11, log_every=11), tmp_path / "all")
    assert each.step == 11
    assert lines_of(tmp_path / "few") == lines_of(tmp_path / "all")
    assert len(Trainer(tiny(log_every=10**9), image_set()).state.history) == 1000


def test_a_checkpoint_without_the_state_of_the_log_is_resumed(tmp_path, monkeypatch, caplog):
    """Of a version before this one, and one of a version with other statistics."""
    manifest = Trainer.manifest
    for name, log in (("older", None), ("other", {"line_step": 3})):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "manifest", lambda self, _, log=log: manifest(self, log))
            train(tiny(steps=3, log_every=2), tmp_path / name)
        assert resume(tmp_path / name, {"steps": 6}).step == 6
        assert [line["step"] for line in lines_of(tmp_path / name)] == [2, 3, 4, 6]
    assert caplog.text.count("the log's state in the checkpoint") == 1


ODD = [
    b"\xff\xfe\n", b"5\n", b'{"loss": 1}\n', b'{"step": null}\n', b'{"step": "3", "loss": 1}\n', b"\0\0\0\0\n",
    b'{"step": true, "loss": 1}\n', b'{"step": -1, "loss": 1}\n', b'{"step": 4, "loss": 0.', b"[]\n", b"[" * 9999,
    b'{"step": 1e400}\n', b"\r\n\x1b[2J\n",
]  # fmt: skip


@pytest.mark.parametrize("garbage", ODD, ids=repr)
def test_an_odd_line_is_left_out_with_a_warning(garbage, tmp_path, caplog):
    """At the end and between lines, by a continuation and by readers."""
    run = tmp_path / "run"
    train(tiny(steps=3, log_every=1), run)
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + garbage.removesuffix(b"\n") + b"\n" + b"".join(lines[1:]) + garbage)
    (run / "spikes.jsonl").write_bytes(garbage)
    assert [line["step"] for line in read_log(log)] == [1, 2, 3]
    assert read_scores(log) == []
    caplog.clear()
    resume(run, {"steps": 5})
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5]
    assert lines_of(run, "spikes.jsonl") == []
    warned = [
        each.getMessage() for each in caplog.records if "skipped what is not a record" in each.getMessage()
    ]
    assert len(warned) == 2
    assert warned[0].startswith(f"{log}: skipped what is not a record of a step: line ")
    assert "\x1b" not in caplog.text


def test_a_step_that_stands_twice_is_written_once(tmp_path):
    """As versions before this one left it; a score of the same step is another line."""
    path = tmp_path / "log.jsonl"
    lines = [
        {"step": 1, "loss": 5.0},
        {"step": 1, "loss": 1.0},
        {"step": 1, "extractor": "x"},
        {"step": 2, "loss": 2.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    LineFile(path, lambda line: True).reduce()
    assert read_lines(path) == lines[1:]


def test_a_log_that_is_no_file_is_refused_by_readers_and_does_not_stop_a_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(training_run, "plot_loss", plot_loss)
    log = tmp_path / "run" / "log.jsonl"
    train(tiny(steps=2), tmp_path / "run")
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(DataError, match=r"a pipe, expected a log of a run"):
        read_log(log)
    assert resume(tmp_path / "run", {"steps": 4}).step == 4
    warned = [each.getMessage().partition(":")[0] for each in caplog.records]
    assert warned == [str(log), "the loss curve"]
    assert log.is_fifo()


def test_lines_wait_for_a_disk_that_is_full(tmp_path, monkeypatch):
    """What was written of a line is taken back, and the next line that can be written brings those before it."""
    path = tmp_path / "log.jsonl"
    file = LineFile(path, lambda line: True)
    file.append({"step": 1})
    room = [0]

    class Disk:
        """A file on a disk with `room` bytes left."""

        def __init__(self, file: Any):
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Disk":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self.file.write(content[: room[0]])
            room[0] -= written
            return written

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **options: Disk(opened(self, *args, **options)))
    for step, left in ((2, 0), (3, 7)):
        room[0] = left
        with pytest.raises(OSError, match="No space left"):
            file.append({"step": step})
        assert path.read_bytes() == b'{"step": 1}\n'
    room[0] = 10_000
    file.append({"step": 4})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4]


def test_pictures_and_scores_of_the_resumed_step_are_made_up_for(tmp_path, monkeypatch):
    """Killed between the checkpoint and the grid of a step: the grid comes with the continuation, the same."""
    options = {"sample_every": 2, "sample_steps": 2, "ckpt_every": 4}
    train(tiny(steps=6, **options), tmp_path / "whole")
    run = tmp_path / "run"
    sample = training_run.Watch._sample

    def killed(self: Any, grids: Any) -> None:
        if self.trainer.step == 4:
            raise Killed
        sample(self, grids)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.Watch, "_sample", killed)
        with pytest.raises(Killed):
            train(tiny(steps=6, **options), run)
    assert [path.name for path in (run / "samples").iterdir()] == ["step-0000002.png"]
    resume(run, {})
    for path in (tmp_path / "whole" / "samples").iterdir():
        assert (run / "samples" / path.name).read_bytes() == path.read_bytes()
