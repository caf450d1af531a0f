"""`Agreement`: one all-reduce per step that shares stop requests, failed saves, ends of data and non-finite flags.

Every rank must stop, save and skip updates at the same step, whichever rank has the reason to.
"""

import time
from signal import Signals
from typing import NamedTuple

import torch
from torch import Tensor

from dit_fast.distributed.signals import StopRequest
from dit_fast.distributed.world import World

_POLL = 2e-4


class Agreed(NamedTuple):
    """Reports of all ranks in a step, combined; the same on each of them.

    Attributes:
        stop: The signal to stop for, or None.
        save_failed: Whether the last checkpoint could not be written.
        data_ends: Whether the batch after the next one cannot be read.
    """

    stop: Signals | None = None
    save_failed: bool = False
    data_ends: bool = False


class Agreement:
    """The ranks' exchange within each step: `report` before it, `exchange` within it, `read` after it.

    On CUDA with several ranks, `read` returns the values of the step before, so that the host can run one step ahead;
    all ranks still act at the same step.

    Attributes:
        bad_rank: A rank whose loss was not finite in this step or an earlier one; None as long as all were, and for
            one process.
    """

    def __init__(self, world: World, stop_request: StopRequest | None = None):
        self.world = world
        self.stop_request = stop_request or StopRequest()
        self.bad_rank: int | None = None
        self._save_failed = self._data_ends = False
        on_device = world.device.type == "cuda"
        # Two of each, used in turn: on CUDA a step's copies are still in flight while the next step is prepared.
        self._sent = [torch.zeros(5, pin_memory=on_device) for _ in range(2)]
        self._received = [torch.zeros(5, pin_memory=on_device) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._flags = torch.zeros(5, device=world.device)

    def report(self, save_failed: bool = False, data_ends: bool = False) -> None:
        """Set what this rank reports in the next step besides its stop request, which is read as late as possible."""
        self._save_failed, self._data_ends = save_failed, data_ends

    @torch.no_grad()
    def exchange(self, bad_loss: Tensor, bad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether any rank's loss and gradient norm are not finite, () bool each on the device, without waiting.

        bad_loss, bad_norm: () bool on the device, the same of this rank.
        """
        if self.world.size == 1:
            return bad_loss, bad_norm
        sent = self._sent[self._turn]
        sent[2] = float(self.stop_request.signal or 0)
        sent[3] = float(self._save_failed)
        sent[4] = float(self._data_ends)
        flags = self._flags.copy_(sent, non_blocking=True)
        # The maximum of rank + 1 names one of the ranks where it is true.
        flags[0] = bad_loss.to(flags.dtype) * (self.world.rank + 1)
        flags[1] = bad_norm
        self.world.maximum(flags)
        self._received[self._turn].copy_(flags, non_blocking=True)
        if flags.is_cuda:
            event = self._events[self._turn] = torch.cuda.Event()
            event.record()
        return flags[0] > 0, flags[1] > 0

    def read(self, timeout: float) -> Agreed:
        """The ranks' reports: of this step, or of the step before on CUDA with several ranks.

        Raises RuntimeError when the device has not finished that step after `timeout` seconds.
        """
        if self.world.size == 1:
            return Agreed(self.stop_request.signal, self._save_failed, self._data_ends)
        if self.world.device.type == "cuda":
            self._turn = 1 - self._turn
        event = self._events[self._turn]
        deadline = time.monotonic() + timeout
        while event is not None and not event.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"NCCL: a collective is not over after {timeout:g} s: timed out")
            time.sleep(_POLL)
        bad, _, stop, save_failed, data_ends = self._received[self._turn].tolist()
        self.bad_rank = int(bad) - 1 if bad else self.bad_rank
        return Agreed(Signals(int(stop)) if stop else None, bool(save_failed), bool(data_ends))
