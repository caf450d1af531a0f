"""A training run: started or resumed in its folder, the loop over its steps, its checkpoints, and how it ends.

A step is a function of (seed, step) and the state before it: order, flips, timesteps, noise and dropped labels are
keyed by them (`dit_fast.utils.keyed`), so that a resumed run is bitwise identical to an uninterrupted one, and any
number of ranks sees the same samples, noise and timesteps.
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

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
from dit_fast.distributed.world import World
from dit_fast.errors import (
    CheckpointError,
    DataError,
    DitFastError,
    OutputError,
)
from dit_fast.interop.adapter import ADAPTER, write_run_adapter
from dit_fast.training.callbacks import PICTURES, Watch
from dit_fast.training.config import (
    TrainConfig,
    apply_to_process,
    open_set,
    recipe_changes,
    relocated,
    resumed_config,
)
from dit_fast.training.initial import read_initial
from dit_fast.training.log import plot_loss
from dit_fast.training.lora import Base
from dit_fast.training.summary import announce
from dit_fast.training.trainer import Trainer
from dit_fast.utils.files import TEMPORARY, prepare_folder, require_space
from dit_fast.utils.locks import FolderLock
from dit_fast.utils.nvtx import mark_launches
from dit_fast.utils.options import flag_of
from dit_fast.utils.terminal import say

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Attributes:
        run: Folder of the run.
        step, total_steps: Finished steps, and steps of the whole run.
        checkpoint: The last checkpoint written.
        stopped_by: The signal that ended the run early, or None.
        curve: Plot of the loss; None where it could not be drawn.
        unreadable: Files that were skipped because they could not be read, with the reason.
        was_finished: Whether the run had reached its last step before it was resumed.
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

    Writes checkpoints/step-N, log.jsonl and loss.png there.

    Args:
        config: Configuration of the run.
        run: Folder of the run.
        world: The ranks; None: one process.

    Raises:
        DitFastError: Before the first step wherever possible: for data, configuration, an output folder that holds a
            run, is in use by another process or not writable, and for a full disk.
    """
    run = Path(run)
    everyone = world or World()
    lock = FolderLock(run, "train")

    def refuse_a_run() -> None:
        # Without a checkpoint, nothing of a killed first attempt is worth keeping: torchrun's restart begins again.
        begun_by_us = everyone.attempt > 0 and not step_folders(run)
        if not begun_by_us and (step_folders(run) or (run / "log.jsonl").exists()):
            raise OutputError(
                f"{run} already holds a run; continue it with --resume {run} or give another --out"
            )

    def claim() -> None:
        # No other process trains in a folder that does not exist, and an error below must not leave one behind.
        if run.is_dir():
            lock.acquire()
        refuse_a_run()

    def begin() -> None:
        prepare_folder(checkpoints_folder(run))
        lock.acquire()
        # Another run may have started, and ended, while the data were read.
        refuse_a_run()

    with lock.releasing():
        everyone.first(claim)
        data = open_set(config)
        trainer = Trainer(config, data, world=world, initial=read_initial(config, data))
        everyone.first(lambda: say(*(trainer.origin or {}).get("lines", ()), *trainer.partly))
        watch = Watch(trainer, run)
        everyone.first(begin)
        everyone.first(lambda: trainer.save_base(run))
        return _run(trainer, run, watch)


def resume(run: str | Path, asked: dict[str, Any], world: World | None = None) -> TrainResult:
    """Resume the run in the folder `run` from its newest checkpoint.

    A run that has reached its last step stays as it is. Paths that were given relative to a working directory are found
    from any other, and beside a run that was moved with its data (`relocated`).

    Args:
        run: Folder of the run.
        asked: Options that were given again, by name; they replace the run's own where that is possible.
        world: The ranks; None: one process.

    Raises:
        CheckpointError: Options or data that contradict what the run was trained with.
        OutputError: Another process trains in this folder.
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
    saved = manifest["train_config"]
    config = resumed_config(saved, asked, str(path), int(manifest["step"]))
    changes = recipe_changes(saved, config)
    config = relocated(config, asked, manifest, run)
    try:
        data = open_set(config)
    except DataError as error:
        if os.path.lexists(config.data):
            raise
        begun = manifest.get("working_directory") or "another folder"
        raise DataError(f"{error}; the run was trained in {begun}: give --data") from error
    base = Base(run, manifest["adapter"]) if config.lora is not None else None
    trainer = Trainer(config, data, world=world, initial=base)
    trainer.restore(path, manifest)
    if trainer.step >= trainer.total_steps:
        return TrainResult(run, trainer.step, trainer.total_steps, path, None, was_finished=True)
    watch = Watch(trainer, run, manifest.get("log"), changes)
    if trainer.world.is_first:
        say(
            *(
                f"after step {trainer.step}: {flag_of(n)} {old} is now {new}"
                for n, (old, new) in changes.items()
            )
        )
    trainer.world.first(lambda: prepare_folder(checkpoints_folder(run)))
    return _run(trainer, run, watch)


def train_or_resume(config: TrainConfig, run: str | Path, world: World) -> TrainResult:
    """`train`; or, where torchrun has restarted the ranks (`--max-restarts`), `resume` from their last checkpoint."""
    if world.attempt and world.first(lambda: bool(step_folders(run))):
        return resume(run, {}, world)
    return train(config, run, world)


def device_of(run: str | Path) -> str:
    """The --device of the run in a folder; "auto" where no checkpoint can be read."""
    for folder in reversed(step_folders(run)):
        try:
            return str(read_manifest(folder)["train_config"].get("device", "auto"))
        except CheckpointError:
            continue
    return "auto"


class Readable:
    """The batches of `source` up to the first that cannot be read, which is known one batch ahead.

    A run then ends with the step before, saves, and raises `error`: an unreadable image costs no steps.

    Attributes:
        error: The exception from reading the source, or None.
    """

    def __init__(self, source: Iterator[Batch]):
        self.error: Exception | None = None
        self._source = source
        self._ready: deque[Batch] = deque()

    def __iter__(self) -> Iterator[Batch]:
        while self.count(1):
            batch = self._ready.popleft()
            self.count(1)
            yield batch

    def count(self, most: int) -> int:
        """Read ahead up to `most` batches; returns how many are ready."""
        while len(self._ready) < most and self.error is None:
            try:
                self._ready.append(next(self._source))
            except StopIteration:
                break
            except Exception as error:  # raised again, once the run is saved
                self.error = error
        return len(self._ready)

    @property
    def at_end(self) -> bool:
        """Whether the batch after the one yielded last cannot be read."""
        return self.error is not None and not self._ready


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, each copied one step ahead; on a CPU, the batches themselves.

    On CUDA the copy is from pinned memory on a side stream, so that it overlaps the step and the host does not wait.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    waiting: Batch | None = None
    for batch in chain(batches, [None]):
        arrived = waiting
        if batch is not None:
            with torch.cuda.stream(side):
                images, labels = (tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
            waiting = images, labels
        if arrived is None:
            continue
        present = torch.cuda.current_stream(device)
        present.wait_stream(side)
        for tensor in arrived:
            # The side stream allocated its memory, and must not reuse it before the step has finished.
            tensor.record_stream(present)
        yield arrived


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
        trainer.agreement.stop_request,
        trainer.writer(run) as writer,
    ):
        if world.is_first:
            watch.best_effort("the summary of the run", lambda: announce(trainer, run))
        batches = Readable(trainer.stream.read(trainer.step, trainer.total_steps, trainer.rows))
        checkpoint, stopped_by = _steps(trainer, watch, writer, batches)
    if trainer.adapters is not None:
        world.first(lambda: write_run_adapter(checkpoint, run / ADAPTER))
    log, curve = run / "log.jsonl", run / "loss.png"
    drawn = world.is_first and watch.best_effort("the loss curve", lambda: plot_loss(log, curve))
    left_out = trainer.data.unreadable.known
    return TrainResult(
        run, trainer.step, trainer.total_steps, checkpoint, stopped_by, curve if drawn else None, left_out
    )


def _steps(
    trainer: Trainer, watch: Watch, writer: CheckpointWriter, batches: Readable
) -> tuple[Path, signal.Signals | None]:
    """Train to the end or to a stop request; returns the last checkpoint and the signal that ended the run.

    A line is logged before the checkpoint of its step, which then includes it; pictures and scores come after the
    checkpoint, which matters more. Where a batch cannot be read, the run ends with the step before, saves, and raises
    the reason as a DataError on every rank.
    """
    config, total = trainer.config, trainer.total_steps
    end = _readable_steps(trainer, batches)
    stopped_by = None
    watch.catch_up()
    for samples, labels in watch.waiting(prefetch(iter(batches), trainer.device)):
        if trainer.step == end:
            break
        agreed = trainer.train_step(samples, labels, save_failed=writer.failed, data_ends=batches.at_end)
        stopped_by = agreed.stop
        if agreed.data_ends:
            end = trainer.step
        last = trainer.step == end or stopped_by is not None
        watch.after_step(last)
        if agreed.save_failed:
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
    return path, stopped_by


def _check_unreadable(trainer: Trainer, writer: CheckpointWriter) -> None:
    """Raise DataError where the last save found that all ranks together skipped more files than allowed."""
    register = trainer.data.unreadable
    if register.exceeded:
        writer.wait()
        listed = "; ".join(f"{name} ({reason})" for name, reason in list(register.known.items())[:5])
        raise DataError(
            f"step {trainer.step}: {len(register.known)} files cannot be read, --skip-unreadable is "
            f"{register.allowed}: {listed}; step {trainer.step} is saved: mend them and continue with --resume "
            f"{writer.run}"
        )


def _readable_steps(trainer: Trainer, batches: Readable) -> int:
    """The last step that can be reached as far as is known before the first one, the same on all ranks.

    On CUDA a rank's report is read one step later, so that two batches are checked here.
    """
    count = batches.count(2)
    known = trainer.total_steps if batches.error is None else trainer.step + count
    return min(trainer.world.gather(known))


def _raise_data_error(trainer: Trainer, batches: Readable, run: Path) -> NoReturn:
    """Raise on every rank why the next batch could not be read; errors that are not ours are raised unchanged."""
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
    """Log a failed save: older checkpoints are complete, and the next save may succeed.

    Raises OutputError on every rank with --stop-on-save-failure.
    """
    try:
        writer.wait()
    except OutputError as error:
        if trainer.config.stop_on_save_failure:
            raise OutputError(
                f"step {trainer.step}: {error}; --stop-on-save-failure ends the run, --resume continues it"
            ) from error
        if trainer.world.is_first:
            logger.warning("step %d: %s; training continues", trainer.step, error)
