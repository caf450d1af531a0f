"""Where a run's numbers and pictures can go besides its own folder: TensorBoard, Weights & Biases."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dit_fast.errors import DataError, MissingExtraError
from dit_fast.files import read_text, write_atomically
from dit_fast.training.best_effort import BestEffort
from dit_fast.training.config import TrainConfig


class Tracker(Protocol):
    """Takes what a run reports at its log lines. `name`: for warnings."""

    name: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `run`/tensorboard. Raises MissingExtraError without tensorboard."""

    name = "TensorBoard"

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "--tensorboard: tensorboard is not installed; pip install 'dit-fast[track]'"
            ) from error
        self.writer: Any = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        with Image.open(path) as picture:
            self.writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run named as the folder, which remembers its id: continued, it goes on there.

    Raises MissingExtraError without wandb.
    """

    name = "Weights & Biases"

    def __init__(self, config: TrainConfig, run: Path):
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "--wandb: wandb is not installed; pip install 'dit-fast[track]'"
            ) from error
        self.wandb: Any = wandb
        remembered = run / "wandb_id"
        held = read_text(remembered, DataError, 1 << 10).strip() if remembered.exists() else None
        self.session = wandb.init(
            project="dit-fast", name=run.name, id=held, resume="allow", dir=str(run),
            config=dataclasses.asdict(config),
        )  # fmt: skip
        write_atomically(remembered, lambda temporary: temporary.write_text(self.session.id))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.session.log(values, step=step)

    def image(self, step: int, path: Path) -> None:
        self.session.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.session.finish()


def open_trackers(config: TrainConfig, run: Path, best_effort: BestEffort) -> list[Tracker]:
    """The trackers that the configuration asks for, without those that cannot be opened.

    Raises MissingExtraError: a package that is not installed is better known before the first step.
    """
    trackers: list[Tracker] = []
    missing: list[MissingExtraError] = []

    def add(make: Callable[[], Tracker]) -> None:
        try:
            trackers.append(make())
        except MissingExtraError as error:
            missing.append(error)

    if config.tensorboard:
        best_effort(TensorBoard.name, lambda: add(lambda: TensorBoard(run)))
    if config.wandb:
        best_effort(WeightsAndBiases.name, lambda: add(lambda: WeightsAndBiases(config, run)))
    if missing:
        raise missing[0]
    return trackers
