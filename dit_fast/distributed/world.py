"""`World`: the processes of a run, their collectives for small values, and the error when one of them is lost.

torchrun starts them and sets RANK, LOCAL_RANK and WORLD_SIZE; a single process needs no process group.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dit_fast.errors import ConfigError, DitFastError, RankError

DeviceName = Literal["auto", "cpu", "cuda"]
START_TIMEOUT = 1800.0
"""Timeout of collectives until the first step is done, in seconds: some ranks read data or compile longer."""
AGENT_TIMEOUT = 30.0
"""Seconds within which torchrun's store must accept a connection: it listens before torchrun starts a rank."""
_ROLL_CALL = 0.7
_FAILED = "failed"
_LOST = "lost"
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """One process among `size`.

    Attributes:
        rank, size: Rank of this process, and number of ranks.
        local_rank, local_size: The same on this machine.
        device: Device of this rank.
        attempt: Number of restarts by `torchrun --max-restarts`.
        store: Key-value store of the ranks; None for a single process.
        control: Process group of all ranks for small objects on the CPU; None for a single process.
        background: Another such group, for a background thread; None for a single process.
        remedy: What a user should do when a rank is lost: the end of the error.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attempt: int = 0
    store: Any = None
    control: Any = None
    background: Any = None
    remedy: str = "continue with --resume from the last checkpoint"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The `value` of rank 0."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any, background: bool = False) -> list[Any]:
        """The values of all ranks, by rank, on each of them; `background`: from a thread beside the main one."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.background if background else self.control)
        return values

    def first(self, action: Callable[[], Result]) -> Result:
        """Call `action` on rank 0 only; its result, or its DitFastError, reaches every rank."""
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except DitFastError as raised:
                # Broadcast instead of raised here, or the other ranks would wait until they time out.
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return cast(Result, result)

    def maximum(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in place, elementwise."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all ranks, by rank, (size * n, ...)."""
        if self.size == 1:
            return rows
        everyone = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, rows.contiguous())
        return everyone

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def wait(self, meanwhile: Callable[[], object], seconds: float = 1.0) -> None:
        """A barrier that calls `meanwhile` about every `seconds` while it waits."""
        if self.size == 1:
            return
        arrival = dist.barrier(group=self.control, async_op=True)
        deadline = time.monotonic() + seconds
        while not arrival.is_completed():
            time.sleep(min(0.05, seconds))
            if time.monotonic() >= deadline:
                meanwhile()
                deadline = time.monotonic() + seconds
        arrival.wait()

    def set_timeout(self, seconds: float, groups: tuple[Any, ...] = ()) -> None:
        """Set the timeout after which a rank counts as lost, for the default groups and `groups`."""
        if self.size == 1:
            return
        for group in (dist.group.WORLD, self.control, *groups):
            for device in ("cpu", self.device.type):
                set_group_timeout(group, torch.device(device), seconds)

    @contextmanager
    def watch(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn the failure of a collective into a RankError that names `where()` and the missing ranks."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, RankError) or not is_lost_connection(error):
                raise
            raise RankError(self._lost(where())) from error

    def _lost(self, where: str) -> str:
        """The error for a lost rank. Running ranks set a key in the store; one without a key hangs or has died."""
        missing, reasons = list(range(self.size)), []
        try:
            self.store.set(f"{_LOST}/{self.rank}", where)
            deadline = time.monotonic() + _ROLL_CALL
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not self.store.check([f"{_LOST}/{rank}"])]
                time.sleep(0.05)
            for rank in list(missing):
                if self.store.check([f"{_FAILED}/{rank}"]):
                    missing.remove(rank)
                    reasons.append(f"rank {rank} failed: {self.store.get(f'{_FAILED}/{rank}').decode()}")
        except RuntimeError:
            return f"{where}: the connection to the other ranks is lost; {self.remedy}"
        if missing:
            ranks = ", ".join(map(str, missing))
            reasons.append(f"rank {ranks} does not answer: it hangs or is gone")
        return f"{where}: {'; '.join(reasons) or 'the ranks lost each other'}; {self.remedy}"


@contextmanager
def join_world(
    device: str = "auto",
    start_timeout: float = START_TIMEOUT,
    work: str = "outside of the steps",
    remedy: str = World.remedy,
) -> Iterator[World]:
    """Join the process group that torchrun describes, or be a single process; the group ends with the block.

    Args:
        device: "auto", "cpu" or "cuda"; CUDA devices are assigned by LOCAL_RANK.
        start_timeout: Timeout of collectives until `World.set_timeout`, in seconds.
        work: Beginning of the error for a lost rank.
        remedy: End of that error.

    Raises:
        ConfigError: The environment is inconsistent, or there is no such device.
        RankError: A rank is lost.
    """
    rank, size = ranks()
    local_size = _number("LOCAL_WORLD_SIZE", 1)
    chosen = choose_device(device, local_rank())
    warn_of_slurm()
    if size == 1:
        yield World(device=chosen, remedy=remedy)
        return
    attempt = _number("TORCHELASTIC_RESTART_COUNT", 0)
    limit = timedelta(seconds=start_timeout)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # torchrun's agent keeps one store over restarts: without a prefix, a restarted rank would find the addresses of
    # dead ones in it (pytorch, torch/distributed/rendezvous.py). If the agent was killed meanwhile, PyTorch would try
    # to connect for the whole of `limit`.
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    connect = min(limit, timedelta(seconds=AGENT_TIMEOUT)) if of_agent else limit
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=connect))
        store.set_timeout(limit)
        store = dist.PrefixStore(f"attempt_{attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=chosen if chosen.type == "cuda" else None,
        )
        control, background = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RankError(
            f"rank {rank} did not reach the other ranks at the start ({reason}); {remedy}"
        ) from error
    world = World(rank, local_rank(), size, local_size, chosen, attempt, store, control, background, remedy)
    lost = False
    try:
        with world.watch(lambda: work):
            yield world
    except RankError:
        lost = True
        raise
    except BaseException as error:
        # For the other ranks, which only see this one disconnect; the store may have died with rank 0.
        reason = str(error) if isinstance(error, DitFastError) else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):
            store.set(f"{_FAILED}/{rank}", reason.partition("\n")[0])
        raise
    finally:
        # NCCL would wait for the lost rank here.
        if not (lost and chosen.type == "cuda"):
            dist.destroy_process_group()


def ranks() -> tuple[int, int]:
    """(rank, number of ranks) from torchrun's environment; (0, 1) without it. Raises ConfigError."""
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank >= size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}: torchrun counts ranks from 0")
    return rank, size


def local_rank() -> int:
    """The rank on this machine from torchrun's environment; 0 without it. Raises ConfigError."""
    return _number("LOCAL_RANK", 0)


def choose_device(name: str, index: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda", of local rank `index`. Raises ConfigError without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch sees no CUDA device; give --device cpu or auto")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if index >= devices:
        raise ConfigError(
            f"LOCAL_RANK is {index}, and this machine shows {devices} CUDA devices; "
            f"give torchrun --nproc-per-node {devices}"
        )
    return torch.device("cuda", index)


def warn_of_slurm() -> None:
    """Warn where Slurm's SIGUSR1 would kill torchrun: `#SBATCH --signal=USR1@...` announces the end of a job by it.

    The trainer handles it; torchrun needs `--signals-to-handle`, or it dies and leaves its workers.
    """
    if os.environ.get("SLURM_JOB_ID") is None or os.environ.get("LOCAL_RANK") != "0":
        return
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            launcher = file.read().decode(errors="replace").split("\0")
    except OSError:
        return
    if any("torch" in part for part in launcher) and not any("SIGUSR1" in part for part in launcher):
        logger.warning(
            "Slurm announces the end of a job by SIGUSR1 where #SBATCH --signal=USR1@... asks it to, and torchrun "
            "does not pass it on: start it with --signals-to-handle SIGTERM,SIGINT,SIGUSR1"
        )


def set_group_timeout(group: Any, device: torch.device, seconds: float) -> None:
    """Set the timeout of a group's collectives on `device`; nothing for a group without a backend for it."""
    try:
        backend = group._get_backend(device)
    except RuntimeError:
        return
    backend._set_default_timeout(timedelta(seconds=seconds))


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "nccl", "connection reset", "connection closed", "timed out")
    )


def _number(variable: str, otherwise: int) -> int:
    value = {
        "RANK": os.environ.get("RANK"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK"),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE"),
        "TORCHELASTIC_RESTART_COUNT": os.environ.get("TORCHELASTIC_RESTART_COUNT"),
    }[variable]
    if value is None:
        return otherwise
    if not value.isdecimal():
        raise ConfigError(f"{variable} is {value!r}: torchrun sets a number there")
    return int(value)
