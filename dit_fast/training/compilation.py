"""What torch.compile makes of the step besides the blocks: the draws, and the loss before and after the model."""

import logging
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from dit_fast.diffusion.objectives import Objective
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
