"""Where a trajectory is evaluated: the nodes of a noise schedule, from noise to data.

Every schedule here is a Gaussian path x = alpha x_0 + sigma noise (Kingma et al. 2021, section 3.1), and every model's
answer gives x_0 (`dit_fast.diffusion.paths`), so that solvers need not know what a model was trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_fast.diffusion import FlowMatching, GaussianDiffusion, SpacedDiffusion, create_diffusion
from dit_fast.diffusion.gaussian_diffusion import ModelVarType
from dit_fast.diffusion.paths import PATHS, Point, determinant, shares
from dit_fast.errors import ConfigError
from dit_fast.utils.values import Number, Whole

Array = NDArray[np.float64]

STEPS = 250
"""Sampling steps unless others are asked for, as in the reference and in SiT."""

STEPS_OF_FLOW = Whole(1, 1 << 20)
_START_TIME = Number(0, 1, below=True)
SHIFT = Number(0, 1e6, above=True)

LAST_STEP = 0.04
"""Length in t of an SDE's last step, as in SiT."""

# Where alpha is 0, noise and score do not tell x_0; SiT's sampling begins this much later.
_START = 1e-3
# Those of `create_diffusion` that say how to sample, not how to train.
_DIFFUSION_OPTIONS = (
    "noise_schedule", "sigma_small", "predict_xstart", "diffusion_steps", "prediction", "learned_range",
)  # fmt: skip

_VARIANCES = {
    ModelVarType.LEARNED_RANGE: "learned",
    ModelVarType.LEARNED: "learned-log",
    ModelVarType.FIXED_SMALL: "small",
    ModelVarType.FIXED_LARGE: "large",
}


@dataclass(frozen=True, eq=False)
class Nodes:
    """The points of a trajectory, the noisiest first; compared and hashed by identity.

    times       float64 (N,): what the model reads at each evaluation
    levels      float64 (N,): noise level of each evaluation, 1 pure noise, 0 data; guidance intervals mean these
    alphas      float64 (N + 1,): share of x_0, the last where the trajectory ends, usually 1
    sigmas      float64 (N + 1,): share of the noise, the last usually 0
    prediction  one of `dit_fast.diffusion.paths.PREDICTIONS`
    variance    of an ancestral step: "learned" (between its bounds), "learned-log" (by its logarithm), "small" (the
                posterior's) or "large" (beta)
    rates       of a path in continuous time, which `times` then are, ending at 1: derivatives of alpha and of sigma at
                each evaluation, float64 (N,) each; None for discrete timesteps

    Raises ConfigError for arrays that do not fit each other or do not lead from noise to data.
    """

    times: Array
    levels: Array
    alphas: Array
    sigmas: Array
    prediction: str = "epsilon"
    variance: str = "large"
    rates: tuple[Array, Array] | None = None

    def __post_init__(self) -> None:
        n = len(self.times)
        if not n or not len(self.levels) == n == len(self.alphas) - 1 == len(self.sigmas) - 1:
            raise ConfigError(
                f"{n} times, {len(self.levels)} levels, {len(self.alphas)} alphas and {len(self.sigmas)} sigmas: "
                "N, N, N + 1 and N + 1 are wanted, N at least 1"
            )
        if (self.sigmas[:-1] <= 0).any() or (np.diff(self.sigmas / (self.alphas + self.sigmas)) >= 0).any():
            raise ConfigError("sigma / (alpha + sigma) must fall from node to node and be 0 only at the end")
        self.data_coefficients()

    def __len__(self) -> int:
        return len(self.times)

    def data_coefficients(self) -> tuple[Array, Array]:
        """(a, b), each (N,), with x_0 = a x + b answer for the model's answer at each node."""
        arrays = (self.alphas[:-1], self.sigmas[:-1], *(self.rates or ()))
        point = Point(*map(torch.from_numpy, arrays))
        scale = determinant(self.prediction, point)
        if (scale == 0).any():
            raise ConfigError(
                f"a node without signal (alpha 0) cannot be sampled by a model of the {self.prediction}"
            )
        _, of_noise = shares(self.prediction, point)
        return (of_noise / scale).numpy(), (-point.sigma / scale).numpy()


def diffusion_nodes(diffusion: GaussianDiffusion) -> Nodes:
    """The nodes of a diffusion process, respaced or not, from its last step to its first.

    Raises ConfigError for a respaced process whose variance is learned by its logarithm.
    """
    steps = diffusion.num_timesteps
    if isinstance(diffusion, SpacedDiffusion):
        kept, steps = np.array(diffusion.timestep_map, dtype=np.float64), diffusion.original_num_steps
    else:
        kept = np.arange(steps, dtype=np.float64)
    if diffusion.model_var_type is ModelVarType.LEARNED and len(kept) < steps:
        raise ConfigError(
            f"a variance learned by its logarithm (learned_range=False) holds for all {steps} steps, not for "
            f"{len(kept)} longer ones: keep all with ddpm, or take another solver"
        )
    times = kept[::-1].copy()
    return Nodes(
        times=times,
        levels=(times + 1) / steps,
        alphas=np.append(np.sqrt(diffusion.alphas_cumprod[::-1]), 1.0),
        sigmas=np.append(np.sqrt(1.0 - diffusion.alphas_cumprod[::-1]), 0.0),
        prediction=diffusion.prediction,
        variance=_VARIANCES[diffusion.model_var_type],
    )


def flow_nodes(
    steps: int,
    shift: float = 1.0,
    *,
    path: str = "linear",
    prediction: str = "velocity",
    start: float | None = None,
    last_step: float | None = None,
) -> Nodes:
    """Nodes of flow matching on a path of `dit_fast.diffusion.paths`; the model reads t, from 0 (noise) to 1 (data).

    That is the convention of SiT (Ma et al. 2024).

    shift       above 1 spends more steps on noise: with s = 1 - t, s' = shift s / (1 + (shift - 1) s)
                (Esser et al. 2024, equation 23)
    start       time of the first node; None: 0, or 0.001 where the equations for x_0 are singular at 0
    last_step   length in t of the last step, as SDEs want one; None: all steps are alike but for `shift` and, on the
                path "vp", quadratically finer towards data

    Raises ConfigError for values out of range.
    """
    FlowMatching(path, prediction)
    steps, shift = STEPS_OF_FLOW.check("steps", steps), SHIFT.check("shift", shift)
    if start is not None:
        start = _START_TIME.check("start", start)
    else:
        start = _START if path != "vp" and prediction in ("epsilon", "score") else 0.0
    if last_step is None:
        # On this path sigma falls like the root of 1 - t: equal steps would leave a long way to the last one.
        power = 2 if path == "vp" else 1
        left = np.linspace((1.0 - start) ** (1 / power), 0.0, steps + 1) ** power
    elif 0 < last_step < 1 - start:
        left = np.append(np.linspace(1.0 - start, last_step, steps), 0.0)
    else:
        raise ConfigError(f"last step {last_step}: choose a length in t above 0 and below {1 - start:g}")
    left = shift * left / (1 + (shift - 1) * left)
    times = 1 - left
    point = [part.numpy() for part in PATHS[path](torch.from_numpy(times[:-1])) if part is not None]
    return Nodes(
        times[:-1],
        left[:-1],
        alphas=np.append(point[0], 1.0),
        sigmas=np.append(point[1], 0.0),
        prediction=prediction,
        rates=(point[2], point[3]),
    )


def default_solver(objective: Mapping[str, Any]) -> str:
    """Of a model trained with these arguments of `create_objective`, where no other is asked for."""
    if objective.get("objective") == "flow":
        return "euler"
    return "ddpm" if objective.get("learned_range", True) else "ddim"


def sampling_nodes(
    objective: Mapping[str, Any],
    steps: str | int | None,
    solver: str,
    *,
    learn_sigma: bool,
    shift: float = 1.0,
) -> Nodes:
    """The nodes of a model trained with `objective`, arguments of `create_objective` as a checkpoint keeps them.

    steps: a number, or for diffusion a respacing; None: 250, or all if fewer. shift: as of `flow_nodes`. Raises
    ConfigError.
    """
    options = dict(objective)
    if options.pop("objective", "diffusion") == "diffusion":
        if shift != 1:
            raise ConfigError(f"shift {shift:g} is of flow matching; respacings are of diffusion")
        kept = {name: options[name] for name in _DIFFUSION_OPTIONS if name in options}
        steps = steps or min(STEPS, kept.get("diffusion_steps", STEPS))
        # Only ancestral steps read a variance.
        learned = learn_sigma and solver == "ddpm"
        return diffusion_nodes(create_diffusion(str(steps), learn_sigma=learned, **kept))
    if not str(steps or STEPS).isdecimal():
        raise ConfigError(f"steps {steps}: flow matching takes a number; respacings are of diffusion")
    last_step = LAST_STEP if solver.startswith("sde") else None
    start = _START if solver == "sde-sbdm" else None
    trained = {name: options[name] for name in ("path", "prediction") if name in options}
    return flow_nodes(int(steps or STEPS), shift, start=start, last_step=last_step, **trained)
