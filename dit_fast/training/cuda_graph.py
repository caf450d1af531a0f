"""A step captured once as a CUDA graph and replayed: one launch in place of thousands."""

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dit_fast.training.step import TrainStep

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Steps made eagerly before the capture: gradients, optimiser tables and compiled code must exist by then."""


class GraphBackend(Protocol):
    """What captures work on a device."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do `work` the way a capture will."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` without doing it; what is returned does it."""
        ...


class CudaGraphs:
    """Captures by `torch.cuda.CUDAGraph`."""

    def warm_up(self, work: Callable[[], None]) -> None:
        # Autograd remembers the stream of the first backward pass, and the default one cannot be captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


class GraphedStep:
    """`step` with its inputs in tensors of its own: eager at first, then captured, then replayed.

    Falls back to eager steps, with one warning that says why, where the capture fails; a batch of another shape than
    the captured one is an eager step too. `captures` counts captures.
    """

    def __init__(self, step: TrainStep, backend: GraphBackend):
        self.step = step
        self.backend = backend
        self.captures = 0
        self.refused: str | None = None
        self._warm = 0
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], None] | None = None
        step.keep_gradients = True

    def __call__(self, samples: Tensor, labels: Tensor) -> None:
        if self._inputs is None:
            self._inputs = torch.empty_like(samples), torch.empty_like(labels)
        if self.refused is not None or not self._fits(samples, labels):
            self.step(samples, labels)
            return
        for static, given in zip(self._inputs, (samples, labels), strict=True):
            static.copy_(given, non_blocking=True)
        if self._warm < WARM_UP:
            self._warm += 1
            self.backend.warm_up(self._work)
            return
        if self._replay is None and not self._capture():
            self._work()
            return
        assert self._replay is not None
        self._replay()

    def _work(self) -> None:
        assert self._inputs is not None
        self.step(*self._inputs)

    def _fits(self, samples: Tensor, labels: Tensor) -> bool:
        assert self._inputs is not None
        pairs = zip(self._inputs, (samples, labels), strict=True)
        return all(static.shape == given.shape and static.dtype == given.dtype for static, given in pairs)

    def _capture(self) -> bool:
        try:
            self._replay = self.backend.capture(self._work)
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0]
            self.step.keep_gradients = False
            logger.warning(
                "--cuda-graph: the step could not be captured (%s); going on without", self.refused
            )
            return False
        self.captures += 1
        return True
