"""`StopRequest`: signals that end a run after the current step.

Ctrl-C, SIGTERM, SIGHUP of a closed terminal or connection, and Slurm's SIGUSR1.
"""

import signal
import threading
from types import FrameType, TracebackType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Inside `with StopRequest() as stop:` the signals of `STOPPING` only set `stop.signal`.

    A signal that this process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in the background of a
    script. A second Ctrl-C interrupts at once, for a user who does not want to wait for the step; not so with several
    ranks (`alone` False), because a terminal sends it to torchrun too, which forwards it, so that each rank receives it
    twice. The other signals come from schedulers, also twice, and never interrupt a save. Outside the main thread,
    where Python delivers no signals, nothing is ever requested.
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
