"""A step that is compiled, or captured as a CUDA graph and replayed: one launch in place of thousands."""

import logging
import os
import shutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_fast.training.step import TrainStep

logger = logging.getLogger(__name__)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler that it needs; logs one line where it does not."""
    if device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        logger.warning("--compile: no C++ compiler (%s) found; training without torch.compile", compiler)
        return False
    return True


def compile_step(step: TrainStep) -> None:
    """Compile a step's draws (a hundred integer operations per random stream), its noise and its loss, in place."""
    for name in ("draw", "add_noise", "loss"):
        setattr(step, name, torch.compile(getattr(step, name), dynamic=False, fullgraph=True))


WARM_UP = 3
"""Eager steps per shape before its capture, which needs the optimizer's tables and compiled code to exist."""


class GraphBackend(Protocol):
    """Captures work on a device."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run `work` on the stream setup of a capture."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` without running it; returns the function that runs it."""
        ...


class CudaGraphs:
    """Captures by `torch.cuda.CUDAGraph`, all into one memory pool.

    Sharing is safe in any order of replays: no tensor in the pool is read after its step.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def warm_up(self, work: Callable[[], None]) -> None:
        # Autograd keeps the stream of the first backward pass, and the default stream cannot be captured.
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
    """Batches of one shape: the tensors that its graph reads, eager steps so far, and the graph once captured."""

    samples: Tensor
    labels: Tensor
    warmed: int = 0
    replay: Callable[[], None] | None = None


class GraphedStep:
    """`step` with static inputs: eager at first, then captured, then replayed, separately for each shape of batches.

    The backward pass of each step writes gradients instead of adding to zeroed ones: at XL/2 that saves 11 GB of
    memory traffic per step. Where such a step cannot be captured, gradients stay in place and are zeroed; where that
    cannot be captured either, steps are eager, and one warning gives the reason. `captures` counts captures.
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
        # A graph reads the addresses that it was captured with.
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
