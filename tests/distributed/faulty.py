"""One rank of `dit-fast train`, with a fault that comes at a given step; what the tests of faults start.

A fault is "kind:rank:step[:where]"; "none" for none. Kinds: open (no data), kill, hang (the timeout counts from that
step on), fail (DataError), nan (in the batch), term (a SIGTERM to this rank alone), save (SIGKILL within the save of
that step, `where` a stage of it), fsize (no file may grow in the save of that step), slow (that save waits for the
file `where`), record (write down what is drawn, in every step).
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.patience import wait_until

STAGES = ("write", "written", "publish", "published")


@dataclass(frozen=True)
class Fault:
    kind: str = "none"
    rank: int = -1
    step: int = -1
    where: str = ""

    @classmethod
    def parse(cls, text: str) -> "Fault":
        kind, *rest = text.split(":")
        return cls(kind, *(int(number) for number in rest[:2]), *rest[2:])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install(fault: Fault, rank: int) -> None:
    """Make this process behave as the fault says."""
    # Imported here: the fork server has them already, and the parent needs none.
    from dit_fast.checkpoint import folder as checkpoint
    from dit_fast.checkpoint import writer as checkpoint_writer
    from dit_fast.data.stream import BatchStream
    from dit_fast.errors import DataError
    from dit_fast.training import run as training_run
    from dit_fast.training.step import TrainStep
    from dit_fast.training.trainer import Trainer

    if fault.kind == "record":
        record(TrainStep, Path(fault.where), rank)
    if fault.kind == "hang":
        keep_timeout_until(fault.step)
    if rank != fault.rank:
        return
    if fault.kind == "open":

        def unreadable(config):
            raise DataError("--data digits: cannot be opened")

        training_run.open_set = unreadable
    train_step = Trainer.train_step

    def faulty_step(self, samples, labels, **flags):
        if self.step + 1 == fault.step:
            if fault.kind == "kill":
                die()
            elif fault.kind == "hang":
                time.sleep(1000)
            elif fault.kind == "nan":
                samples = samples * float("nan")
            elif fault.kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, samples, labels, **flags)

    Trainer.train_step = faulty_step
    if fault.kind == "fail":
        batch = BatchStream.batch

        def faulty_batch(self, step, rows=slice(None)):
            if step + 1 == fault.step:
                raise DataError("shard 7, image 3: cannot be read")
            return batch(self, step, rows)

        BatchStream.batch = faulty_batch
    if fault.kind in ("save", "fsize", "slow"):
        faulty_save(checkpoint, checkpoint_writer, fault)


def keep_timeout_until(step: int) -> None:
    """Let a timeout count from this step on, however short: before it, ranks of a busy machine may be slow."""
    from dit_fast.distributed.world import World
    from dit_fast.training.trainer import Trainer

    kept: list[tuple] = []
    train_step, set_timeout = Trainer.train_step, World.set_timeout

    def set_kept_timeout(self, samples, labels, **flags):
        if self.step + 1 == step:
            for each in kept:
                set_timeout(*each)
        return train_step(self, samples, labels, **flags)

    Trainer.train_step = set_kept_timeout
    World.set_timeout = lambda *arguments: kept.append(arguments)


def faulty_save(checkpoint, checkpoint_writer, fault: Fault) -> None:
    write_checkpoint, together, write_pieces = (
        checkpoint_writer.write_checkpoint,
        checkpoint._together,
        checkpoint.write_pieces,
    )
    calls = []

    def write(run, config, pieces, needed, manifest, *rest):
        if manifest["step"] != fault.step:
            return write_checkpoint(run, config, pieces, needed, manifest, *rest)
        checkpoint._together, checkpoint.write_pieces = staged, partly
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if fault.kind == "fsize":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            return write_checkpoint(run, config, pieces, needed, manifest, *rest)
        finally:
            checkpoint._together, checkpoint.write_pieces = together, write_pieces
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def partly(path, pieces):
        if fault.kind == "slow":
            wait_until(Path(fault.where).exists, what=fault.where)
        write_pieces(path, pieces)
        if fault.where == "write":
            os.truncate(path, path.stat().st_size // 2)
            die()

    def staged(action, world):
        calls.append(action)
        stage = len(calls)

        def work():
            result = action() if not (fault.where == "publish" and stage == 3) else die()
            if fault.where == "written" and stage == 2:
                die()
            return result

        results = together(work, world)
        if fault.where == "published" and stage == 3:
            die()
        return results

    checkpoint_writer.write_checkpoint = write


def record(TrainStep, folder: Path, rank: int) -> None:
    """Append to a file, for each sample of each step, its number and a digest of all that is drawn for it."""
    draw = TrainStep.draw

    def recording(self, samples, labels):
        drawn = draw(self, samples, labels)
        numbers = (self.state.step * self.options.batch_size + self.positions).tolist()
        with (folder / f"{rank}.jsonl").open("a") as file:
            tensors = [tensor for tensor in drawn if tensor is not None]
            for number, *values in zip(numbers, *tensors, strict=True):
                content = b"".join(value.contiguous().numpy().tobytes() for value in values)
                file.write(json.dumps([number, hashlib.sha256(content).hexdigest()]) + "\n")
        return drawn

    TrainStep.draw = recording


def rank_main(
    rank: int, size: int, port: int, output: str, body: Callable[..., None], arguments: tuple
) -> None:
    """A forked rank, with its output in a file: body(*arguments)."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for _ in range(2))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    body(*arguments)


def run(fault: str, arguments: list[str], rank: int) -> None:
    import torch

    from dit_fast.cli import main

    torch.set_num_threads(1)
    install(Fault.parse(fault), rank)
    sys.exit(main(["train", *arguments]))


if __name__ == "__main__":
    # Under torchrun: a fault for each attempt, "kill:1:6,kill:0:8"; none for those after them.
    faults = dict(enumerate(sys.argv[1].split(",")))
    # In one piece: torchrun's workers share the pipe and do not buffer.
    sys.stdout.write(f"pid {os.getpid()}\n")
    sys.stdout.flush()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run(faults.get(attempt, "none"), sys.argv[2:], int(os.environ.get("RANK", "0")))
