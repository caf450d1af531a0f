"""Runge-Kutta methods in t for the probability flow dx/dt = velocity, as SiT solves it (Ma et al. 2024).

The fixed steps have the tableaus of torchdiffeq, whose names they carry: "heun" is its heun2, "rk4" its 3/8 rule. Each
step evaluates the model at times known beforehand, so a trajectory can be captured as one CUDA graph. `dopri5` chooses
its steps while it runs: `dit_fast.diffusion.adaptive`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_fast.sampling.schedule import Array, NoiseSchedule
from dit_fast.sampling.solvers import States, on_device


class Tableau(NamedTuple):
    """Butcher tableau of an explicit method (Hairer, Norsett & Wanner 1993, section II.1).

    Attributes:
        fractions: Distinct times of evaluation below the end of a step, as fractions of it.
        stages: For each stage its position among `fractions` (the length of which means the end of the step), and the
            weights of the slopes before it.
        weights: Weight of each slope in the step.
    """

    fractions: tuple[float, ...]
    stages: tuple[tuple[int, tuple[float, ...]], ...]
    weights: tuple[float, ...]


_THIRDS = (0.0, 1 / 3, 2 / 3)
TABLEAUS = {
    "euler": Tableau((0.0,), ((0, ()),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((0, ()), (1, (0.5,))), (0.0, 1.0)),
    "heun": Tableau((0.0,), ((0, ()), (1, (1.0,))), (0.5, 0.5)),
    "heun3": Tableau(_THIRDS, ((0, ()), (1, (1 / 3,)), (2, (0.0, 2 / 3))), (0.25, 0.0, 0.75)),
    # Kutta's 3/8 rule, which torchdiffeq calls rk4.
    "rk4": Tableau(
        _THIRDS,
        ((0, ()), (1, (1 / 3,)), (2, (-1 / 3, 1.0)), (3, (1.0, -1.0, 1.0))),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


def runge_kutta(
    velocity: Callable[[Tensor, int], Tensor], x: Tensor, schedule: NoiseSchedule, method: str
) -> States:
    """A method of `TABLEAUS` along the times of a schedule.

    Args:
        velocity: velocity(x, j) at node j of `schedule.nodes(fractions)`.
        x: Initial state (N, C, H, W).
        schedule: Noise schedule in continuous time.
        method: Name of the method.

    Yields:
        The state after each step (N, C, H, W).
    """
    tableau, widths = TABLEAUS[method], on_device(_widths, schedule, x)
    for i in range(len(schedule)):
        slopes: list[Tensor] = []
        for place, weights in tableau.stages:
            guess = _advance(x, widths[i], weights, slopes)
            slopes.append(velocity(guess, i * len(tableau.fractions) + place))
        x = _advance(x, widths[i], tableau.weights, slopes)
        yield x


def evaluation_times(schedule: NoiseSchedule, solver: str) -> Array:
    """Times at which `solver` of `TABLEAUS` may evaluate the model: those within each step, then the end."""
    inner = schedule.times[:, None] + _widths(schedule)[:, None] * np.array(TABLEAUS[solver].fractions)
    return np.append(inner.ravel(), schedule.end)


def evaluates_end(solver: str) -> bool:
    """Whether a method of `TABLEAUS` evaluates the model at the end of a step."""
    tableau = TABLEAUS[solver]
    return tableau.stages[-1][0] == len(tableau.fractions)


def _widths(schedule: NoiseSchedule) -> Array:
    schedule.continuous_path()  # raises for discrete timesteps
    return np.diff(schedule.times, append=schedule.end)


def _advance(x: Tensor, width: Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = torch.addcmul(x, weight * width, slope)
    return x
