"""How long a test waits for another process: until that is broken, however slow and busy the machine is."""

import subprocess
import time
from collections.abc import Callable

PATIENCE = 900.0
"""Seconds. Nothing that works takes a tenth of it; a test that reaches it fails."""


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen, what: str = "it") -> None:
    """Wait for `condition`, while `processes` run.

    Raises:
        AssertionError: One of them ended before, or patience did.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = [process for process in processes if process.poll() is not None]
        # Asked after the processes: the last thing that one did before its end counts.
        if condition():
            return
        assert not ended, f"ended before {what}: {[process.communicate() for process in ended]}"
        assert time.monotonic() < deadline, f"no sign of {what} after {PATIENCE:.0f} s"
        time.sleep(0.02)
