"""The training loop: one process, on the CPU or one CUDA device.

A step is a function of (seed, step) and the state before it: order, flips, timesteps, noise and dropped
labels are keyed by them (`dit_fast.keyed`), so a resumed run is bit for bit the uninterrupted one.
"""

import logging
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_fast.data import ImageSet, LatentSet, open_data
from dit_fast.errors import CheckpointError, ConfigError, MissingExtraError, OutputError
from dit_fast.training.checkpoint import (
    checkpoint_bytes,
    checkpoints_folder,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
    remove_leftovers,
    require_space,
)
from dit_fast.training.config import TrainConfig, resumed_config
from dit_fast.training.prefetch import prefetch
from dit_fast.training.progress import plot_loss
from dit_fast.training.signals import StopRequest
from dit_fast.training.trainer import Trainer
from dit_fast.training.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. `stopped_by`: the signal that ended it early; `checkpoint`: the last one written."""

    run: Path
    step: int
    total_steps: int
    checkpoint: Path
    stopped_by: signal.Signals | None


def train(config: TrainConfig, run: str | Path) -> TrainResult:
    """Start a run in the folder `run`, which must not hold one yet.

    Leaves checkpoints/step-N, log.jsonl and loss.png there. Raises the errors of `dit_fast.errors` before the
    first step wherever it can: for data, configuration, an output folder that is taken or not writable, and
    for a full disk.
    """
    run = Path(run)
    if checkpoints_folder(run).exists() or (run / "log.jsonl").exists():
        raise OutputError(f"{run} already holds a run; continue it with --resume {run} or give another --out")
    trainer = Trainer(config, _open(config))
    prepare_folder(run)
    return _run(trainer, run)


def resume(run: str | Path, asked: dict[str, Any]) -> TrainResult:
    """Continue the run in the folder `run` from its newest checkpoint, with the options `asked` for anew.

    Raises CheckpointError where they, or the data, contradict what the run was trained with.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"--resume {run}: no such run folder")
    path = latest_checkpoint(run)
    config = resumed_config(read_manifest(path)["train_config"], asked, str(path))
    trainer = Trainer(config, _open(config))
    trainer.restore(load_checkpoint(path))
    if trainer.step >= trainer.total_steps:
        raise ConfigError(
            f"{run} is already at step {trainer.step} of {trainer.total_steps}; give more --steps"
        )
    prepare_folder(run)
    return _run(trainer, run)


def prepare_folder(run: Path) -> None:
    """Make the run folder and see that it takes files. Raises OutputError."""
    try:
        checkpoints_folder(run).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {run}: {error.strerror}; give another --out") from error


def _open(config: TrainConfig) -> ImageSet | LatentSet:
    return open_data(
        config.data,
        config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        flip=config.flip,
        holdout=config.holdout,
        num_workers=config.num_workers,
    )


def _run(trainer: Trainer, run: Path) -> TrainResult:
    config = trainer.config
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    remove_leftovers(run)
    saves = -(-(trainer.total_steps - trainer.step) // config.ckpt_every)
    room = min(saves, config.keep_checkpoints + 1) if config.keep_checkpoints else saves
    size = checkpoint_bytes(trainer.model.state_dict(), trainer.ema_state(), trainer.optimizer_state())
    require_space(run, room * size)
    with Watch(trainer, run) as watch, StopRequest() as stop:
        checkpoint = _steps(trainer, run, watch, stop)
    try:
        plot_loss(run / "log.jsonl", run / "loss.png")
    except MissingExtraError as error:
        logger.warning("%s", error)
    return TrainResult(run, trainer.step, trainer.total_steps, checkpoint, stop.signal)


def _steps(trainer: Trainer, run: Path, watch: Watch, stop: StopRequest) -> Path:
    """Train to the end or to a stop request; returns the checkpoint written last."""
    config, total = trainer.config, trainer.total_steps
    batches = prefetch(trainer.stream.read(trainer.step, total), trainer.device)
    for samples, labels in watch.waiting(batches):
        trainer.train_step(samples, labels)
        last = trainer.step == total or stop.signal is not None
        watch.after_step(last)
        if last:
            break
        if trainer.step % config.ckpt_every == 0:
            with watch.paused():
                try:
                    trainer.save(run)
                except OutputError as error:
                    # The older checkpoints are whole and the run is not lost: try again at the next one.
                    logger.warning("step %d: %s; training goes on", trainer.step, error)
    return trainer.save(run)
