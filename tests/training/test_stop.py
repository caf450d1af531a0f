"""What ends a run before its last step: nothing that is drawn comes before its checkpoint."""

from typing import Any

import pytest

from dit_fast.checkpoint.folder import step_folders
from dit_fast.training import TrainConfig, train
from dit_fast.training import run as training_run
from dit_fast.training.callbacks import Watch
from tests.training.test_step import TINY, image_set


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, **changes})


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "open_set", lambda config: image_set())


def test_the_checkpoint_comes_before_pictures_and_scores(tmp_path, monkeypatch):
    """At the end and at every checkpoint between."""
    seen: list[tuple[int, bool, bool]] = []

    def draw(self: Watch, last: bool = False) -> None:
        step = self.trainer.step
        seen.append((step, last, step in [int(path.name[5:]) for path in step_folders(self.run)]))

    monkeypatch.setattr(Watch, "draw", draw)
    train(tiny(steps=5, ckpt_every=2, async_checkpoint=False), tmp_path / "run")
    assert seen == [(1, False, False), (2, False, True), (3, False, False), (4, False, True), (5, True, True)]
