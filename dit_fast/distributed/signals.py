"""Signals as a request to stop after the current step, on all ranks at the same one.

Ctrl-C, SIGTERM, SIGHUP of a terminal or connection that closes, and Slurm's SIGUSR1.
"""

import signal
import threading
import time
from types import FrameType, TracebackType

import torch
from torch import Tensor

from dit_fast.distributed.world import World

_POLL = 2e-4
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Inside `with StopRequest() as stop:` the signals of `STOPPING` only set `stop.signal`.

    A signal that this process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in the background of a
    script.
    A second Ctrl-C acts as it would have without us, for a user who does not want to wait for the step; not so with
    several ranks, where `alone` is False: a terminal sends it to torchrun too, which sends it on, so that each rank
    gets it twice. The other signals come from schedulers, twice as well, and never stop a save. Outside the main
    thread, where Python takes no signals, nothing is ever requested.
    """

    def __init__(self, alone: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self._alone = alone
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if self._alone:
            self._restore(signal.SIGINT)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]


class StepAgreement:
    """One reduction a step in which the ranks tell each other what all of them must act on.

    Within a step, `exchange(bad_loss, bad_norm, stop, save_failed, data_ends)`: the first two are () tensors on the
    device, whether this rank's loss or gradient norm is not finite; it returns whether any rank's are, on the device,
    without waiting for it. After `read`, `stop`, `save_failed` and `data_ends` are what any rank said, and `bad_rank`
    is a rank whose loss was not finite in this step or an earlier one. On CUDA, `read` gives the values of the step
    before, so that the host can run ahead by one step: all ranks still act at the same one.
    """

    def __init__(self, world: World):
        self.world = world
        self.stop: signal.Signals | None = None
        self.save_failed = False
        self.data_ends = False
        self.bad_rank: int | None = None
        on_device = world.device.type == "cuda"
        # Two of each in turn: on CUDA the copies of a step are under way while the next one is prepared.
        self._said = [torch.zeros(5, pin_memory=on_device) for _ in range(2)]
        self._heard = [torch.zeros(5, pin_memory=on_device) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._flags = torch.zeros(5, device=world.device)

    @torch.no_grad()
    def exchange(
        self,
        bad_loss: Tensor,
        bad_norm: Tensor,
        stop: signal.Signals | None,
        save_failed: bool,
        data_ends: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Whether `bad_loss` and `bad_norm` are true on any rank, () bool each on the device."""
        said = self._said[self._turn]
        said[2] = float(stop or 0)
        said[3] = float(save_failed)
        said[4] = float(data_ends)
        flags = self._flags.copy_(said, non_blocking=True)
        # The largest of rank + 1 names one of the ranks where it is true.
        flags[0] = bad_loss.to(flags.dtype) * (self.world.rank + 1)
        flags[1] = bad_norm
        self.world.maximum(flags)
        heard = self._heard[self._turn]
        heard.copy_(flags, non_blocking=True)
        if flags.is_cuda:
            event = self._events[self._turn] = torch.cuda.Event()
            event.record()
        return flags[0] > 0, flags[1] > 0

    def read(self, timeout: float) -> None:
        """Take in what was said: in this step on the CPU, in the one before on CUDA.

        Raises RuntimeError when the device is not done with that step after `timeout` seconds.
        """
        if self.world.device.type == "cuda":
            self._turn = 1 - self._turn
        event = self._events[self._turn]
        deadline = time.monotonic() + timeout
        while event is not None and not event.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL: a collective is not over after {timeout:g} s: timed out")
            time.sleep(_POLL)
        bad, _, stop, save_failed, data_ends = self._heard[self._turn].tolist()
        self.bad_rank = int(bad) - 1 if bad else self.bad_rank
        self.stop = signal.Signals(int(stop)) if stop else None
        self.save_failed = bool(save_failed)
        self.data_ends = bool(data_ends)
