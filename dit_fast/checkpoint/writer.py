"""Background checkpoints: the state is copied to the CPU, and a thread of each rank writes the copy."""

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dit_fast.checkpoint.folder import Retention, checkpoint_bytes, write_checkpoint
from dit_fast.checkpoint.tensors import Piece, own_pieces
from dit_fast.distributed.world import World, is_lost_connection
from dit_fast.errors import OutputError

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time, while the training continues.

    `save` returns when this rank's part of the state is copied to the CPU; a thread then calls `write_checkpoint`, a
    collective operation over the background group of `world`. Every rank makes the same calls. `wait` raises the error
    of a failed save. As a context manager, it waits for the last save.

    Args:
        run: Run folder.
        retention: Which checkpoints are kept.
        world: The ranks; None for a single process.
        background: False writes within `save`.
    """

    def __init__(
        self,
        run: str | Path,
        retention: Retention = Retention(),  # noqa: B008 (frozen)
        world: World | None = None,
        background: bool = True,
    ):
        self.run = Path(run)
        self.retention = retention
        self.world = world or World()
        self.background = background
        self._outcome: Future[Path] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(
        self,
        config: dict[str, Any],
        state: Mapping[str, Mapping[str, Tensor]],
        manifest: dict[str, Any],
        snapshots: Path | None = None,
    ) -> None:
        """Start writing the checkpoint of step manifest["step"], after waiting for the previous save.

        Args:
            config: Configuration of the model.
            state: Tensors by part and name; they may be DTensors.
            manifest: Content of manifest.json, without the files.
            snapshots: Folder to write to instead of the run; all checkpoints in it are kept.

        Raises:
            OutputError: The previous save failed.
        """
        self.wait()
        pieces = self._copy(state)
        needed = checkpoint_bytes(*state.values())
        outcome: Future[Path] = Future()
        place = (self.run, self.retention) if snapshots is None else (snapshots, Retention())

        def write() -> None:
            try:
                run, retention = place
                final = write_checkpoint(run, config, pieces, needed, manifest, retention, self.world)
                outcome.set_result(final)
            except BaseException as error:
                outcome.set_exception(error)

        self._outcome = outcome
        if self.background:
            # A daemon: after the loss of a rank the other threads block, and must not keep the process alive.
            threading.Thread(target=write, name="checkpoint", daemon=True).start()
        else:
            write()

    @property
    def failed(self) -> bool:
        """Whether the last save has failed; `wait` raises its error."""
        outcome = self._outcome
        return outcome is not None and outcome.done() and outcome.exception() is not None

    def wait(self) -> Path | None:
        """Wait for the last save and return its folder, None without a save; OutputError, once, where it failed."""
        outcome, self._outcome = self._outcome, None
        return None if outcome is None else outcome.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif not (isinstance(error, RuntimeError) and is_lost_connection(error)):
            # A save completes after any other error. After the loss of a rank it cannot, and is not waited for.
            try:
                self.wait()
            except OutputError as failure:
                logger.warning("%s", failure)

    def _copy(self, state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Piece]]:
        """This rank's pieces on the CPU, in buffers that are reused, and pinned for copies from a GPU."""
        copied: dict[str, dict[str, Piece]] = {}
        waits = False
        for part, tensors in state.items():
            copied[part] = {}
            for name, piece in own_pieces(tensors, self.world.rank, self.world.size).items():
                source = piece.tensor
                copy = self._copies.get((part, name))
                if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                    self._copies[part, name] = copy
                copy.copy_(source, non_blocking=source.is_cuda)
                waits |= source.is_cuda
                copied[part][name] = Piece(copy, piece.offset)
        if waits:
            torch.cuda.current_stream().synchronize()
        return copied
