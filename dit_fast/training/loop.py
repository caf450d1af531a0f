"""The training loop: one process or many, on CPUs or CUDA devices.

A step is a function of (seed, step) and the state before it: order, flips, timesteps, noise and dropped
labels are keyed by them (`dit_fast.utils.keyed`), so a resumed run is bit for bit the uninterrupted one, and any number
of ranks sees the same samples, noise and timesteps.
"""

import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dit_fast.checkpoint.folder import (
    checkpoint_bytes,
    checkpoints_folder,
    latest_checkpoint,
    read_manifest,
    remove_leftovers,
    step_folders,
)
from dit_fast.checkpoint.power_ema import SNAPSHOTS
from dit_fast.checkpoint.writer import CheckpointWriter
from dit_fast.distributed.signals import StopRequest
from dit_fast.distributed.world import World
from dit_fast.errors import (
    CheckpointError,
    DataError,
    DitFastError,
    OutputError,
)
from dit_fast.training.callbacks import PICTURES, Watch
from dit_fast.training.config import TrainConfig, apply_to_process, open_set, relocated, resumed_config
from dit_fast.training.log import plot_loss
from dit_fast.training.prefetch import Readable, prefetch
from dit_fast.training.trainer import Trainer
from dit_fast.utils.files import TEMPORARY, prepare_folder, require_space
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.nvtx import mark_launches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    `stopped_by`: the signal that ended it early; `checkpoint`: the last one written; `curve`: the picture of its loss,
    None where it could not be drawn; `unreadable`: the files that were left out because they could not be read, and
    why.
    """

    run: Path
    step: int
    total_steps: int
    checkpoint: Path
    stopped_by: signal.Signals | None
    curve: Path | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)
    was_finished: bool = False


def train(config: TrainConfig, run: str | Path, world: World | None = None) -> TrainResult:
    """Start a run in the folder `run`, which must not hold one yet; every rank of `world` calls it.

    Leaves checkpoints/step-N, log.jsonl and loss.png there. Raises the errors of `dit_fast.errors` before the
    first step wherever it can: for data, configuration, an output folder that is taken, in use by another process or
    not writable, and for a full disk.
    """
    run = Path(run)
    everyone = world or World()
    lock = FolderLock(run, "train")

    def refuse_a_run() -> None:
        # What a killed first attempt left before its first checkpoint is nothing to keep.
        begun_by_us = everyone.attempt > 0 and not step_folders(run)
        if not begun_by_us and (step_folders(run) or (run / "log.jsonl").exists()):
            raise OutputError(
                f"{run} already holds a run; continue it with --resume {run} or give another --out"
            )

    def claim() -> None:
        # Nobody trains in a folder that is not there yet, and what is refused below must not leave one.
        if run.is_dir():
            lock.acquire()
        refuse_a_run()

    def begin() -> None:
        prepare_folder(checkpoints_folder(run))
        lock.acquire()
        # Another run may have begun, and ended, while the data were read.
        refuse_a_run()

    with lock.releasing():
        everyone.first(claim)
        trainer = Trainer(config, open_set(config), world=world)
        watch = Watch(trainer, run)
        everyone.first(begin)
        return _run(trainer, run, watch)


def resume(run: str | Path, asked: dict[str, Any], world: World | None = None) -> TrainResult:
    """Continue the run in the folder `run` from its newest checkpoint, with the options `asked` for anew.

    A run that is at its last step stays as it is. Paths that the run was given relative to a working directory are
    found from any other, and beside a run that was moved with its data (`relocated`).

    Raises CheckpointError where they, or the data, contradict what the run was trained with, and OutputError where
    another process trains it.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"--resume {run}: no such run folder")
    lock = FolderLock(run, "train")
    with lock.releasing():
        (world or World()).first(lock.acquire)
        return _resume(run, asked, world)


def _resume(run: Path, asked: dict[str, Any], world: World | None) -> TrainResult:
    path = latest_checkpoint(run, world)
    manifest = read_manifest(path)
    config = relocated(resumed_config(manifest["train_config"], asked, str(path)), asked, manifest, run)
    try:
        data = open_set(config)
    except DataError as error:
        if os.path.lexists(config.data):
            raise
        begun = manifest.get("working_directory") or "another folder"
        raise DataError(f"{error}; the run was trained in {begun}: give --data") from error
    trainer = Trainer(config, data, world=world)
    trainer.restore(path, manifest)
    if trainer.step >= trainer.total_steps:
        return TrainResult(run, trainer.step, trainer.total_steps, path, None, was_finished=True)
    watch = Watch(trainer, run, manifest.get("log"))
    trainer.world.first(lambda: prepare_folder(checkpoints_folder(run)))
    return _run(trainer, run, watch)


def train_or_resume(config: TrainConfig, run: str | Path, world: World) -> TrainResult:
    """`train`; or, where torchrun has started the ranks again (`--max-restarts`), go on with what they had saved."""
    if world.attempt and world.first(lambda: bool(step_folders(run))):
        return resume(run, {}, world)
    return train(config, run, world)


def device_of(run: str | Path) -> str:
    """The device that the run in a folder was told to use; "auto" where no checkpoint says."""
    for folder in reversed(step_folders(run)):
        try:
            return str(read_manifest(folder)["train_config"].get("device", "auto"))
        except CheckpointError:
            continue
    return "auto"


def _run(trainer: Trainer, run: Path, watch: Watch) -> TrainResult:
    config = trainer.config
    apply_to_process(config)
    world = trainer.world
    saves = -(-(trainer.total_steps - trainer.step) // config.ckpt_every)
    room = min(saves, config.keep_checkpoints + 1) if config.keep_checkpoints else saves
    size = room * checkpoint_bytes(*trainer.tensors().values())
    if config.ema_snapshot_every:
        snapshots = (trainer.total_steps - trainer.step) // config.ema_snapshot_every
        size += snapshots * checkpoint_bytes(*trainer.snapshot().values())

    def make_room() -> None:
        remove_leftovers(run)
        remove_leftovers(run / SNAPSHOTS)
        for path in (*run.glob(f"{TEMPORARY}*"), *run.glob(f"{PICTURES}/{TEMPORARY}*")):
            if path.is_file():
                path.unlink(missing_ok=True)
        require_space(run, size)

    world.first(make_room)
    with (
        trainer.ranges("run"),
        mark_launches(trainer.ranges),
        world.watch(lambda: f"step {trainer.step + 1}"),
        watch,
        StopRequest(alone=world.size == 1) as stop,
        trainer.writer(run) as writer,
    ):
        batches = Readable(trainer.stream.read(trainer.step, trainer.total_steps, trainer.rows))
        trainer.says = lambda: (stop.signal, writer.failed, batches.at_end)
        checkpoint = _steps(trainer, watch, writer, batches)
    log, curve = run / "log.jsonl", run / "loss.png"
    drawn = world.is_first and watch.best_effort("the loss curve", lambda: plot_loss(log, curve))
    left_out = trainer.data.unreadable.known
    return TrainResult(
        run, trainer.step, trainer.total_steps, checkpoint, trainer.stop, curve if drawn else None, left_out
    )


def _steps(trainer: Trainer, watch: Watch, writer: CheckpointWriter, batches: Readable) -> Path:
    """Train to the end or to a stop request; returns the checkpoint written last.

    A line is logged before the checkpoint of its step, which is then sure to have it; pictures and scores come after
    the checkpoint, which is worth more than they are. Where a batch cannot be read, the run ends, saved, with the step
    before, and DataError says why on every rank.
    """
    config, total = trainer.config, trainer.total_steps
    end = _readable_steps(trainer, batches)
    watch.catch_up()
    for samples, labels in watch.waiting(prefetch(iter(batches), trainer.device)):
        if trainer.step == end:
            break
        trainer.train_step(samples, labels)
        if trainer.data_ends:
            end = trainer.step
        last = trainer.step == end or trainer.stop is not None
        watch.after_step(last)
        if trainer.save_failed:
            _report(trainer, writer)
        if last:
            break
        if config.ema_snapshot_every and trainer.step % config.ema_snapshot_every == 0:
            with watch.paused():
                _report(trainer, writer)
                trainer.save_snapshot(writer)
        if trainer.step % config.ckpt_every == 0:
            with watch.paused():
                _report(trainer, writer)
                trainer.save(writer, watch.state())
                _check_unreadable(trainer, writer)
        watch.draw()
    _report(trainer, writer)
    trainer.save(writer, watch.state())
    path = writer.wait()
    assert path is not None
    watch.draw(last=True)
    if end < total:
        _raise_data_error(trainer, batches, writer.run)
    return path


def _check_unreadable(trainer: Trainer, writer: CheckpointWriter) -> None:
    """Raise DataError where all ranks together have left out more files than allowed, as a save found."""
    register = trainer.data.unreadable
    if register.exceeded:
        writer.wait()
        said = "; ".join(f"{name} ({reason})" for name, reason in list(register.known.items())[:5])
        raise DataError(
            f"step {trainer.step}: {len(register.known)} files cannot be read, --skip-unreadable is "
            f"{register.allowed}: {said}; step {trainer.step} is saved: mend them and continue with --resume "
            f"{writer.run}"
        )


def _readable_steps(trainer: Trainer, batches: Readable) -> int:
    """The step that the run can reach as far as is known now, the same on all ranks.

    What a rank says in a step is heard in the next one on CUDA, so that two batches are spoken of before the first.
    """
    count = batches.count(2)
    known = trainer.total_steps if batches.error is None else trainer.step + count
    return min(trainer.world.gather(known))


def _raise_data_error(trainer: Trainer, batches: Readable, run: Path) -> NoReturn:
    """Raise why the next batch could not be read, on every rank; a fault that is none of the data as it was."""
    error = batches.error
    if error is not None and not isinstance(error, DitFastError):
        raise error
    reasons = trainer.world.gather(None if error is None else str(error))
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
    who = "" if trainer.world.size == 1 else f"rank {rank}: "
    raise DataError(
        f"step {trainer.step + 1}: {who}{reason}; step {trainer.step} is saved: mend it and continue with "
        f"--resume {run}"
    ) from error


def _report(trainer: Trainer, writer: CheckpointWriter) -> None:
    """Say so if the last save failed. The older checkpoints are whole and the run is not lost: another will follow.

    Raises OutputError, on each rank, where the run was told to end then.
    """
    try:
        writer.wait()
    except OutputError as error:
        if trainer.config.stop_on_save_failure:
            raise OutputError(
                f"step {trainer.step}: {error}; --stop-on-save-failure ends the run, --resume goes on with it"
            ) from error
        if trainer.world.is_first:
            logger.warning("step %d: %s; training goes on", trainer.step, error)
