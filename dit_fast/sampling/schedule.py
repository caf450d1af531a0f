"""Noise schedules: the timesteps of a sampling trajectory, from noise to data, with alpha and sigma at each.

Every schedule is a Gaussian path x = alpha x_0 + sigma noise (Kingma et al. 2021, section 3.1), and every model output
gives a prediction of x_0 (`dit_fast.diffusion.paths`). Solvers therefore do not depend on the training objective.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_fast.diffusion import FlowMatching, GaussianDiffusion, SpacedDiffusion, create_diffusion
from dit_fast.diffusion.gaussian_diffusion import ModelVarType
from dit_fast.diffusion.paths import PATHS, Point, coefficients, determinant, velocity_coefficients
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
VELOCITY_SOLVERS = ("euler", "midpoint", "heun", "heun3", "rk4", "dopri5")
"""Solvers in t of the velocity, see `dit_fast.sampling.runge_kutta`."""
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
        path: Path in continuous time, one of `dit_fast.diffusion.paths.PATHS`; None for discrete timesteps.
        end: With `path`, the time at the end of the trajectory; before the first one, the trajectory leads from data
            to noise.

    Raises:
        ConfigError: The arrays have inconsistent lengths, or do not lead from noise to data.
    """

    times: Array
    levels: Array
    alphas: Array
    sigmas: Array
    prediction: str = "epsilon"
    variance: str = "large"
    path: str | None = None
    end: float = 1.0

    def __post_init__(self) -> None:
        n = len(self.times)
        if not n or not len(self.levels) == n == len(self.alphas) - 1 == len(self.sigmas) - 1:
            raise ConfigError(
                f"{n} times, {len(self.levels)} levels, {len(self.alphas)} alphas and {len(self.sigmas)} sigmas: "
                "expected N, N, N + 1 and N + 1 with N at least 1"
            )
        if self.reverse:
            return
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

    @property
    def reverse(self) -> bool:
        """Whether the trajectory leads from data to noise."""
        return self.path is not None and self.end < self.times[0]

    @functools.cached_property
    def rates(self) -> tuple[Array, Array] | None:
        """Derivatives of alpha and sigma by time at each step, float64 (N,) each; None for discrete timesteps."""
        if self.path is None:
            return None
        alpha_rate, sigma_rate = PATHS[self.path](torch.from_numpy(self.times)).rates()
        return alpha_rate.numpy(), sigma_rate.numpy()

    def extended(self) -> "NoiseSchedule":
        """This schedule in continuous time with one more evaluation, at its end; ConfigError where that is data."""
        if not self.sigmas[-1]:
            raise ConfigError(
                "Heun's method of an SDE evaluates the score at the end of the last step, where sigma is 0: give "
                "another last step, or sample_eps above 0"
            )
        return dataclasses.replace(
            self,
            times=np.append(self.times, self.end),
            levels=np.append(self.levels, 1 - self.end),
            alphas=np.append(self.alphas, 1.0),
            sigmas=np.append(self.sigmas, 0.0),
        )

    def continuous_path(self) -> Callable[[Tensor], Point]:
        """The path, at any time; ConfigError where the timesteps are discrete."""
        if self.path is None:
            raise ConfigError(
                "a solver in t needs continuous time, and these timesteps are discrete: use ddim"
            )
        return PATHS[self.path]

    def velocity_coefficients(self, times: Array) -> tuple[Array, Array]:
        """Coefficients (a, b) of velocity = a x + b output at `times`, float64 like `times` each.

        Raises:
            ConfigError: The timesteps are discrete, or the prediction does not determine the velocity at a time.
        """
        point = self.continuous_path()(torch.from_numpy(times))
        of_x, of_output = velocity_coefficients(self.prediction, point)
        broken = ~(of_x.isfinite() & of_output.isfinite()).numpy()
        if broken.any():
            raise ConfigError(
                f"at t = {times[broken][0]:g} a model that predicts {self.prediction} does not determine the "
                f"velocity: start and end the trajectory further from 0 and 1, as sampling_schedule does"
            )
        return of_x.numpy(), of_output.numpy()

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
    end: float | None = None,
    last_step: float | None = None,
    reverse: bool = False,
) -> NoiseSchedule:
    """Noise schedule of flow matching; t runs from 0 (noise) to 1 (data), as in SiT (Ma et al. 2024).

    Args:
        steps: Number of steps.
        shift: Values above 1 spend more steps on noise: with s = 1 - t, s' = shift s / (1 + (shift - 1) s)
            (Esser et al. 2024, equation 23).
        path: One of `dit_fast.diffusion.paths.PATHS`.
        prediction: One of `dit_fast.diffusion.paths.PREDICTIONS`.
        start: First time; None selects 0, or 0.001 where the equations for x_0 are singular at 0.
        end: Last time, to which all steps have the same length before `shift`. None: clean data, to which the steps
            on the path "vp" become quadratically shorter.
        last_step: Length in t of a last step to clean data, for SDEs.
        reverse: From `end` to `start`, for `dit_fast.sampling.runge_kutta`.

    Returns:
        The noise schedule, with `path`.

    Raises:
        ConfigError: A value is out of range.
    """
    FlowMatching(path, prediction)
    steps, shift = _FLOW_STEPS.check("steps", steps), SHIFT.check("shift", shift)
    if start is not None:
        start = _START_TIME.check("start", start)
    else:
        start = _FIRST_TIME if path != "vp" and prediction in ("epsilon", "score") else 0.0
    if end is not None and not start < end <= 1:
        raise ConfigError(f"start {start:g}, end {end:g}: choose 0 <= start < end <= 1")
    if last_step is not None:
        if not 0 < last_step < 1 - start:
            raise ConfigError(f"last step {last_step}: choose a length in t above 0 and below {1 - start:g}")
        left = np.append(np.linspace(1.0 - start, last_step, steps), 0.0)
    else:
        # On the path "vp" sigma decreases as sqrt(1 - t): equal steps would leave most of it to the last one.
        power = 2 if path == "vp" and end is None else 1
        rest = 0.0 if end is None else 1.0 - end
        left = np.linspace((1.0 - start) ** (1 / power), rest, steps + 1) ** power
    # `left` is the time that remains: 1 - t, the noise level on the linear path.
    left = shift * left / (1 + (shift - 1) * left)
    return _in_time(1 - (left[::-1] if reverse else left), path, prediction)


def _in_time(times: Array, path: str, prediction: str) -> NoiseSchedule:
    """Noise schedule through `times` (N + 1,) of a path."""
    point = PATHS[path](torch.from_numpy(times.copy()))
    # Clean data at t = 1, where "vp" has no finite derivatives.
    alphas = np.where(times == 1, 1.0, point.alpha.numpy())
    sigmas = np.where(times == 1, 0.0, point.sigma.numpy())
    return NoiseSchedule(
        times[:-1].copy(), 1 - times[:-1], alphas, sigmas, prediction, path=path, end=float(times[-1])
    )


def default_solver(objective: Mapping[str, Any]) -> Literal["ddpm", "ddim", "euler"]:
    """Default solver of a model trained with these arguments of `create_objective`.

    For flow matching "euler", which is SiT's: on no path is its error above that of "ddim", which is Euler's method on
    the straight path (docs/objectives.md).
    """
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
    last_step: str = "mean",
    last_step_size: float | None = None,
    sample_eps: float | None = None,
    reverse: bool = False,
) -> NoiseSchedule:
    """Noise schedule for a model that was trained with `objective`.

    Args:
        objective: Arguments of `create_objective`, as checkpoints store them.
        steps: Number of steps or, for diffusion, a respacing such as "ddim50". None selects 250, or all steps of the
            process where it has fewer.
        solver: One of `SOLVERS`. SDEs need a last step of their own; dopri5 chooses its steps itself.
        learn_sigma: Whether the model predicts a variance.
        shift: As in `flow_schedule`.
        last_step: Last step of an SDE. With "none" it ends before data, as the ODE does, after `steps` - 1 steps.
        last_step_size: Length in t of the last step of an SDE; None: 0.04.
        sample_eps: As in `FlowMatching.sampling_interval`, for SDEs and solvers in t.
        reverse: From data to noise, for the solvers in t.

    Returns:
        The noise schedule.

    Raises:
        ConfigError: The arguments do not fit the objective or the solver.
    """
    options = dict(objective)
    flow = options.pop("objective", "diffusion") != "diffusion"
    in_time, sde = solver in VELOCITY_SOLVERS, solver.startswith("sde")
    for name, value, allowed, where in (
        ("reverse", reverse or None, in_time, f"the solvers in t ({', '.join(VELOCITY_SOLVERS)})"),
        ("last_step_size", last_step_size, sde, "the sde solvers"),
        ("sample_eps", sample_eps, in_time or sde, "the sde solvers and the solvers in t"),
        ("steps", steps, solver != "dopri5", "solvers with fixed steps; dopri5 follows atol and rtol"),
    ):
        if value is not None and not allowed:
            raise ConfigError(
                f"{name} {value} applies only to {where}, and the solver is {solver}: remove it"
            )
    if not flow:
        if in_time:
            raise ConfigError(
                f"solver {solver} applies only to flow matching: for a diffusion model use ddim or straight-heun"
            )
        if shift != 1:
            raise ConfigError(f"shift {shift:g} applies only to flow matching; diffusion uses respacings")
        kept = {name: options[name] for name in _DIFFUSION_OPTIONS if name in options}
        steps = steps or min(STEPS, kept.get("diffusion_steps", STEPS))
        # Only ancestral steps read a variance.
        learned = learn_sigma and solver == "ddpm"
        return diffusion_schedule(create_diffusion(str(steps), learn_sigma=learned, **kept))
    if not str(steps or STEPS).isdecimal():
        raise ConfigError(f"steps {steps}: flow matching takes a number; respacings apply only to diffusion")
    path, prediction = options.get("path", "linear"), options.get("prediction", "velocity")
    count = 1 if solver == "dopri5" else int(steps or STEPS)
    common = {"path": path, "prediction": prediction}
    if not in_time and not sde:
        return flow_schedule(count, shift, **common)
    matching = FlowMatching(path, prediction)
    first, last = matching.sampling_interval(sample_eps)
    if in_time:
        if reverse:
            last, first = matching.encoding_interval(sample_eps)
        return flow_schedule(count, shift, start=first, end=last, reverse=reverse, **common)
    if path != "vp" and prediction == "velocity":
        last -= sample_eps or 0.0
        # The diffusion coefficient of "sbdm" is infinite at alpha = 0, where SiT's default starts.
        first = (sample_eps or _FIRST_TIME) if solver == "sde-sbdm" else 0.0
    if last_step != "none":
        size = _SDE_LAST_STEP if last_step_size is None else last_step_size
        return flow_schedule(count, shift, start=first, last_step=size, **common)
    if count < 2:
        raise ConfigError(f"steps {count}: with last step none the last of them is left out, give 2 or more")
    return flow_schedule(count - 1, shift, start=first, end=last, **common)
