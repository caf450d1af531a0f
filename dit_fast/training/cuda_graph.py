"""A step captured once as a CUDA graph and replayed: one launch in place of thousands."""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_fast.training.step import TrainStep

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Eager steps per shape before its capture: optimizer tables and compiled code must exist then."""


class GraphBackend(Protocol):
    """What captures work on a device."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do `work` the way a capture will."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` without doing it; what is returned does it."""
        ...


class CudaGraphs:
    """Captures by `torch.cuda.CUDAGraph`, all into one pool of memory: a step leaves nothing there that is read after
    it, so that the graphs may be replayed in any order.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def warm_up(self, work: Callable[[], None]) -> None:
        # Autograd remembers the stream of the first backward pass, and the default one cannot be captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = graph.pool()
        return graph.replay


@dataclass
class _Shape:
    """Batches of one shape: the tensors that their graph reads, eager steps so far, and the graph once there is one."""

    samples: Tensor
    labels: Tensor
    warmed: int = 0
    replay: Callable[[], None] | None = None


class GraphedStep:
    """`step` with its inputs in tensors of its own: eager at first, then captured, then replayed, for each shape of
    batches by itself.

    Gradients are written by the backward pass of each step, not zeroed and added to: at XL/2 that saves 11 GB of memory
    traffic per step. Where such a step cannot be captured, gradients stay in place and are zeroed; where that cannot be
    captured either, steps are eager, with one warning that says why. `captures` counts captures.
    """

    def __init__(self, step: TrainStep, backend: GraphBackend):
        self.step = step
        self.backend = backend
        self.captures = 0
        self.refused: str | None = None
        self._shapes: dict[Hashable, _Shape] = {}

    def __call__(self, samples: Tensor, labels: Tensor) -> None:
        if self.refused is not None:
            self.step(samples, labels)
            return
        key = (samples.shape, samples.dtype, labels.shape, labels.dtype)
        if key not in self._shapes:
            self._shapes[key] = _Shape(torch.empty_like(samples), torch.empty_like(labels))
        shape = self._shapes[key]
        shape.samples.copy_(samples, non_blocking=True)
        shape.labels.copy_(labels, non_blocking=True)

        def work() -> None:
            self.step(shape.samples, shape.labels)

        if shape.warmed < WARM_UP:
            shape.warmed += 1
            self.backend.warm_up(work)
            return
        if shape.replay is None:
            shape.replay = self._captured(work)
        (shape.replay or work)()

    def _captured(self, work: Callable[[], None]) -> Callable[[], None] | None:
        try:
            replay = self.backend.capture(work)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            # The failed capture may have left gradients in its own memory.
            self.step.optimizer.zero_grad(set_to_none=True)
            self.step.keep_gradients = not self.step.keep_gradients
            if self.step.keep_gradients:
                logger.info("--cuda-graph: captured with gradients that stay in place (%s)", reason)
                self._shapes.clear()
            else:
                self.refused = reason
                logger.warning("--cuda-graph: the step could not be captured (%s); steps are eager", reason)
            return None
        self.captures += 1
        return replay
