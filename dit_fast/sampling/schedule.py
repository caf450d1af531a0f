"""Noise schedules: the timesteps of a sampling trajectory, from noise to data, with alpha and sigma at each.

Every schedule is a Gaussian path x = alpha x_0 + sigma noise (Kingma et al. 2021, section 3.1), and every model output
gives a prediction of x_0 (`dit_fast.diffusion.paths`). Solvers therefore do not depend on the training objective.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dit_fast.diffusion import FlowMatching, GaussianDiffusion, SpacedDiffusion, create_diffusion
from dit_fast.diffusion.gaussian_diffusion import ModelVarType
from dit_fast.diffusion.paths import PATHS, Point, coefficients, determinant
from dit_fast.errors import ConfigError
from dit_fast.utils.values import Number, Whole

Array = NDArray[np.float64]

STEPS = 250
"""Default number of sampling steps, as in DiT and SiT."""

SHIFT = Number(0, 1e6, above=True)
_FLOW_STEPS = Whole(1, 1 << 20)
_START_TIME = Number(0, 1, below=True)

# Length in t of the last step of an SDE, as in SiT.
_SDE_LAST_STEP = 0.04
# At alpha = 0 neither the noise nor the score determines x_0. Sampling starts at this time instead, as in SiT.
_FIRST_TIME = 1e-3

# The arguments of `create_diffusion` that affect sampling; the others affect only the loss.
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
class NoiseSchedule:
    """Noise schedule of a sampling trajectory with N steps, the noisiest first; compared and hashed by identity.

    Args:
        times: Timesteps that the model receives, float64 (N,).
        levels: Noise level of each step for guidance intervals, from 1 (noise) to 0 (data), float64 (N,).
        alphas: Coefficients of x_0, float64 (N + 1,); the last one belongs to the end of the trajectory, usually 1.
        sigmas: Coefficients of the noise, float64 (N + 1,); the last one is usually 0.
        prediction: Output of the model, one of `dit_fast.diffusion.paths.PREDICTIONS`.
        variance: Variance of an ancestral step: "learned" (interpolated between its bounds), "learned-log" (its
            logarithm is predicted), "small" (of the posterior) or "large" (beta).
        rates: Derivatives of alpha and sigma by time at each step, float64 (N,) each, for a path in continuous time
            that ends at t = 1; None for discrete timesteps.

    Raises:
        ConfigError: The arrays have inconsistent lengths, or do not lead from noise to data.
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
                "expected N, N, N + 1 and N + 1 with N at least 1"
            )
        if (self.sigmas[:-1] <= 0).any() or (np.diff(self.sigmas / (self.alphas + self.sigmas)) >= 0).any():
            raise ConfigError(
                "sigma / (alpha + sigma) must decrease at every step and may be 0 only at the end"
            )
        # Computed here, so that a schedule that no model can be sampled with fails when it is built.
        _ = self.data_coefficients

    def __len__(self) -> int:
        return len(self.times)

    @functools.cached_property
    def device_tables(self) -> dict[Any, torch.Tensor]:
        """Coefficient tables of solvers on devices, by solver, device and dtype."""
        return {}

    @functools.cached_property
    def data_coefficients(self) -> tuple[Array, Array]:
        """Coefficients (a, b) of x_0 = a x + b output at each step, float64 (N,) each."""
        arrays = (self.alphas[:-1], self.sigmas[:-1], *(self.rates or ()))
        point = Point(*map(torch.from_numpy, arrays))
        scale = determinant(self.prediction, point)
        if (scale == 0).any():
            raise ConfigError(
                f"a step without signal (alpha 0) cannot be sampled with a model that predicts {self.prediction}"
            )
        _, of_noise = coefficients(self.prediction, point)
        return (of_noise / scale).numpy(), (-point.sigma / scale).numpy()


def diffusion_schedule(diffusion: GaussianDiffusion) -> NoiseSchedule:
    """Noise schedule of a diffusion process, respaced or not, from its last timestep to its first.

    Raises:
        ConfigError: The process is respaced and its variance is learned by its logarithm.
    """
    steps = diffusion.num_timesteps
    if isinstance(diffusion, SpacedDiffusion):
        kept, steps = np.array(diffusion.timestep_map, dtype=np.float64), diffusion.original_num_steps
    else:
        kept = np.arange(steps, dtype=np.float64)
    if diffusion.model_var_type is ModelVarType.LEARNED and len(kept) < steps:
        raise ConfigError(
            f"a variance learned by its logarithm (learned_range=False) is valid for all {steps} steps, not for "
            f"{len(kept)} longer ones: keep all steps with ddpm, or choose another solver"
        )
    times = kept[::-1].copy()
    return NoiseSchedule(
        times=times,
        # The last timestep has level 1, and timestep 0 still has noise.
        levels=(times + 1) / steps,
        alphas=np.append(np.sqrt(diffusion.alphas_cumprod[::-1]), 1.0),
        sigmas=np.append(np.sqrt(1.0 - diffusion.alphas_cumprod[::-1]), 0.0),
        prediction=diffusion.prediction,
        variance=_VARIANCES[diffusion.model_var_type],
    )


def flow_schedule(
    steps: int,
    shift: float = 1.0,
    *,
    path: str = "linear",
    prediction: str = "velocity",
    start: float | None = None,
    last_step: float | None = None,
) -> NoiseSchedule:
    """Noise schedule of flow matching; t runs from 0 (noise) to 1 (data), as in SiT (Ma et al. 2024).

    Args:
        steps: Number of steps.
        shift: Values above 1 spend more steps on noise: with s = 1 - t, s' = shift s / (1 + (shift - 1) s)
            (Esser et al. 2024, equation 23).
        path: One of `dit_fast.diffusion.paths.PATHS`.
        prediction: One of `dit_fast.diffusion.paths.PREDICTIONS`.
        start: First time; None selects 0, or 0.001 where the equations for x_0 are singular at 0.
        last_step: Length in t of the last step, for SDEs. None: all steps have the same length before `shift`,
            except on the path "vp", where they become quadratically shorter towards the data.

    Returns:
        The noise schedule, with `rates`.

    Raises:
        ConfigError: A value is out of range.
    """
    FlowMatching(path, prediction)
    steps, shift = _FLOW_STEPS.check("steps", steps), SHIFT.check("shift", shift)
    if start is not None:
        start = _START_TIME.check("start", start)
    else:
        start = _FIRST_TIME if path != "vp" and prediction in ("epsilon", "score") else 0.0
    if last_step is None:
        # On the path "vp" sigma decreases as sqrt(1 - t): equal steps would leave most of it to the last one.
        power = 2 if path == "vp" else 1
        left = np.linspace((1.0 - start) ** (1 / power), 0.0, steps + 1) ** power
    elif 0 < last_step < 1 - start:
        left = np.append(np.linspace(1.0 - start, last_step, steps), 0.0)
    else:
        raise ConfigError(f"last step {last_step}: choose a length in t above 0 and below {1 - start:g}")
    # `left` is the time that remains: 1 - t, the noise level on the linear path.
    left = shift * left / (1 + (shift - 1) * left)
    times = 1 - left
    point = [part.numpy() for part in PATHS[path](torch.from_numpy(times[:-1])) if part is not None]
    return NoiseSchedule(
        times[:-1],
        left[:-1],
        # The end is clean data, where some paths have no finite derivatives.
        alphas=np.append(point[0], 1.0),
        sigmas=np.append(point[1], 0.0),
        prediction=prediction,
        rates=(point[2], point[3]),
    )


def default_solver(objective: Mapping[str, Any]) -> Literal["ddpm", "ddim", "euler"]:
    """Default solver of a model trained with these arguments of `create_objective`."""
    if objective.get("objective") == "flow":
        return "euler"
    # A variance learned by its logarithm is valid only for the steps of training, not for longer ones.
    return "ddpm" if objective.get("learned_range", True) else "ddim"


def sampling_schedule(
    objective: Mapping[str, Any],
    steps: str | int | None,
    solver: str,
    *,
    learn_sigma: bool,
    shift: float = 1.0,
) -> NoiseSchedule:
    """Noise schedule for a model that was trained with `objective`.

    Args:
        objective: Arguments of `create_objective`, as checkpoints store them.
        steps: Number of steps or, for diffusion, a respacing such as "ddim50". None selects 250, or all steps of the
            process where it has fewer.
        solver: One of `SOLVERS`; SDEs need a last step of their own.
        learn_sigma: Whether the model predicts a variance.
        shift: As in `flow_schedule`.

    Returns:
        The noise schedule.

    Raises:
        ConfigError: The arguments do not fit the objective.
    """
    options = dict(objective)
    if options.pop("objective", "diffusion") == "diffusion":
        if shift != 1:
            raise ConfigError(f"shift {shift:g} applies only to flow matching; diffusion uses respacings")
        kept = {name: options[name] for name in _DIFFUSION_OPTIONS if name in options}
        steps = steps or min(STEPS, kept.get("diffusion_steps", STEPS))
        # Only ancestral steps read a variance.
        learned = learn_sigma and solver == "ddpm"
        return diffusion_schedule(create_diffusion(str(steps), learn_sigma=learned, **kept))
    if not str(steps or STEPS).isdecimal():
        raise ConfigError(f"steps {steps}: flow matching takes a number; respacings apply only to diffusion")
    last_step = _SDE_LAST_STEP if solver.startswith("sde") else None
    # The diffusion coefficient of "sbdm" is infinite at alpha = 0.
    start = _FIRST_TIME if solver == "sde-sbdm" else None
    trained = {name: options[name] for name in ("path", "prediction") if name in options}
    return flow_schedule(int(steps or STEPS), shift, start=start, last_step=last_step, **trained)
