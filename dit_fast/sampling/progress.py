"""Progress of sampling: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time

from tqdm import tqdm

from dit_fast.sampling.sampler import Step
from dit_fast.utils.terminal import say

_LOG_SECONDS = 10.0


class Progress:
    """Progress display.

    Args:
        images: Number of samples.
        steps: Steps per sample.
        there: Samples that an earlier run has drawn.
        show: False shows nothing.
    """

    def __init__(self, images: int, steps: int, there: int = 0, show: bool = True) -> None:
        self.images, self.steps, self.there, self.show = images, steps, there, show
        self.finished = there
        self.started = self.logged = time.monotonic()
        terminal = show and sys.stderr.isatty()
        self.bar = tqdm(
            total=images * steps, initial=there * steps, desc="sampling", unit="step", disable=not terminal
        )

    def finish(self, images: int) -> None:
        """Report that `images` samples are complete, on all ranks together."""
        self.finished = images
        self._show(images * self.steps, "")

    def step(self, step: Step) -> None:
        """Report the progress of a batch."""
        self._show(
            self.finished * self.steps + step.images * step.done, f"step {step.done} of {step.total}, "
        )

    def _show(self, done: int, detail: str) -> None:
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if not self.show or not self.bar.disable or now - self.logged <= _LOG_SECONDS:
            return
        self.logged = now
        drawn = done - self.there * self.steps
        left = (now - self.started) * (self.images * self.steps - done) / max(drawn, 1)
        say(
            f"sampling: {self.finished} of {self.images} images done, {detail}{left:.0f} s left",
            error=True,
        )

    def close(self) -> None:
        self.bar.close()
