"""Starts processes that train together, on gloo, with a time limit."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.distributed.faulty import rank_main, run
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a launch ended: exit statuses by rank (of torchrun: one) and what each printed."""

    codes: list[int]
    outputs: list[str]

    @property
    def text(self) -> str:
        return "\n".join(f"[{rank}] exit {self.codes[rank]}\n{out}" for rank, out in enumerate(self.outputs))


def environment(**extra: str) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT), **extra,
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def torchrun(
    arguments: Sequence[str], size: int, options: Sequence[str] = (), **extra: str
) -> subprocess.Popen:
    """A torchrun of `size` workers; the output of all of them is its own."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
            *options, *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env=environment(**extra),
    )  # fmt: skip


def alive(pids: Sequence[int]) -> list[int]:
    """Those processes that still run; zombies do not."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            running.append(pid)
    return running


PRELOADED = ["torch", "torch.distributed.fsdp", "sklearn.datasets", "matplotlib.figure"]
PRELOADED += ["dit_fast.cli.train", "dit_fast.checkpoint.writer"]


class Forked:
    """A rank for each of `calls`, of a function and its arguments, forked from a server that has imported everything.

    A launch takes a second in place of ten. `with Forked(...) as ranks:` leaves no process behind.
    """

    def __init__(self, folder: Path, calls: Sequence[tuple[Callable[..., None], tuple]]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder.mkdir(parents=True, exist_ok=True)
        size, port = len(calls), free_port()
        self.outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        self.processes = [
            context.Process(target=rank_main, args=(rank, size, port, str(self.outputs[rank]), *call))
            for rank, call in enumerate(calls)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def all_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, limit: float = PATIENCE, ranks: Sequence[int] | None = None) -> Ended:
        """How they, or some of them, ended."""
        deadline = time.monotonic() + limit
        chosen = range(len(self.processes)) if ranks is None else ranks
        for rank in chosen:
            self.processes[rank].join(max(0.1, deadline - time.monotonic()))
        texts = [output.read_text() if output.exists() else "" for output in self.outputs]
        late = [rank for rank in chosen if self.processes[rank].exitcode is None]
        assert not late, f"ranks {late} are not over after {limit} s:\n" + "\n".join(texts)
        return Ended(
            [self.processes[rank].exitcode or 0 for rank in chosen], [texts[rank] for rank in chosen]
        )


class Ranks(Forked):
    """`size` processes of `dit-fast train ARGUMENTS`."""

    def __init__(self, folder: Path, size: int, arguments: Sequence[str | Path], fault: str = "none"):
        plain = [str(argument) for argument in arguments]
        super().__init__(folder, [(run, (fault, plain, rank)) for rank in range(size)])


def train(folder: Path, size: int, arguments: Sequence[str | Path], fault: str = "none") -> Ended:
    """Run `dit-fast train` on `size` ranks to its end."""
    with Ranks(folder, size, arguments, fault) as ranks:
        return ranks.wait()
