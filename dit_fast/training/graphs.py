"""A step captured once as a CUDA graph and replayed: one launch in place of thousands."""

import logging
import os
import shutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_fast.diffusion.objective import Objective
from dit_fast.training.step import TrainStep

logger = logging.getLogger(__name__)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler it needs; says so in one line where it does not."""
    if device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        logger.warning("--compile: no C++ compiler (%s) found; training without torch.compile", compiler)
        return False
    return True


def compile_step(step: TrainStep, out_channels: int) -> None:
    """Compile a step's draws, a hundred integer operations for each stream of random numbers, and its loss."""
    step.draw = torch.compile(step.draw, dynamic=False, fullgraph=True)  # type: ignore[method-assign]
    step.losses = CompiledLosses(step.objective, out_channels)


class CompiledLosses:
    """`objective.training_losses` as two graphs, one before and one after the model, which keeps its own.

    Each is the whole of it around a model that stands in: before, one that notes what it is asked and answers nothing
    of use, so that the compiler drops the loss; after, one that gives the answer that was made in between.
    `out_channels`: of the model's answer.
    """

    def __init__(self, objective: Objective, out_channels: int):
        def asked(x_start: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            questions = []

            def ask(x: Tensor, times: Tensor) -> Tensor:
                questions.append((x, times))
                return x.new_zeros(len(x), out_channels, *x.shape[2:])

            objective.training_losses(ask, x_start, t, noise=noise)
            return questions[0]

        def judged(answer: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
            return objective.training_losses(lambda x, times: answer, x_start, t, noise=noise)

        self._asked = torch.compile(asked, dynamic=False, fullgraph=True)
        self._judged = torch.compile(judged, dynamic=False, fullgraph=True)

    def __call__(
        self, model: Any, x_start: Tensor, t: Tensor, model_kwargs: dict[str, Tensor], noise: Tensor
    ) -> dict[str, Tensor]:
        answer = model(*self._asked(x_start, t, noise), **model_kwargs)
        return self._judged(answer, x_start, t, noise)


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
