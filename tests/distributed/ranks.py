"""Starts processes that train together, on gloo, with a time limit."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.faulty import rank_main
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


def start(command: Sequence[str], size: int, **extra: str) -> list[subprocess.Popen]:
    """`size` processes with the environment that torchrun gives its workers; stdout and stderr together."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **extra,
            ),
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: Sequence[subprocess.Popen], limit: float = PATIENCE) -> Ended:
    """Wait for all of them; none outlives the limit."""
    deadline = time.monotonic() + limit
    outputs: list[str] = []
    try:
        outputs.extend(
            process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes
        )
    except subprocess.TimeoutExpired:
        for process in processes:
            stop(process, signal.SIGKILL)
        outputs = [process.communicate()[0] for process in processes[len(outputs) :]]
        raise AssertionError(f"not over after {limit} s:\n" + "\n".join(outputs)) from None
    return Ended([process.returncode for process in processes], outputs)


def stop(process: subprocess.Popen, number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def launch(command: Sequence[str], size: int, limit: float = PATIENCE, **extra: str) -> Ended:
    return finish(start(command, size, **extra), limit)


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
PRELOADED += ["dit_fast.cli.train", "dit_fast.training.checkpoint_writer"]


class Ranks:
    """`size` processes of `dit-fast train ARGUMENTS`, forked from a server that has imported everything.

    A launch takes a second in place of ten. `with Ranks(...) as ranks:` leaves no process behind.
    """

    def __init__(self, folder: Path, size: int, arguments: Sequence[str | Path], fault: str = "none"):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        port, plain = free_port(), [str(argument) for argument in arguments]
        self.processes = [
            context.Process(target=rank_main, args=(rank, size, port, fault, plain, str(output)))
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

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


def train(folder: Path, size: int, arguments: Sequence[str | Path], fault: str = "none") -> Ended:
    """Run `dit-fast train` on `size` ranks to its end."""
    with Ranks(folder, size, arguments, fault) as ranks:
        return ranks.wait()
