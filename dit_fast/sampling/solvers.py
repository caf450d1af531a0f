"""Solvers: generators over a denoiser that yield the state after each step, from noise to data.

`denoise(x, i) -> Denoised` predicts x_0 for the state x (N, C, H, W) at step i of `schedule`. Coefficients are computed
in float64 before the loop and stored on the device of the state, so that no step synchronizes with the host and a whole
trajectory can be captured as one CUDA graph. States are float32 or float64.

Each solver is written in terms of the predicted x_0. With lambda = log(alpha / sigma), the exact solution of the
probability-flow ODE from step s to step t is

    x_t = (sigma_t / sigma_s) x_s + sigma_t int exp(lambda) x_0(lambda) d lambda

(Lu et al. 2022, DPM-Solver++, arXiv:2211.01095, equation 8); solvers differ in how they approximate x_0(lambda).
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dit_fast.diffusion.paths import PATHS
from dit_fast.errors import ConfigError
from dit_fast.sampling.schedule import Array, NoiseSchedule


class Denoised(NamedTuple):
    """Prediction of x_0, (N, C, H, W), and of a learned variance.

    `variance` follows `NoiseSchedule.variance`: for "learned" the position between the bounds, in [-1, 1]; for
    "learned-log" the logarithm; None where the model does not learn one.
    """

    data: Tensor
    variance: Tensor | None = None


Denoiser = Callable[[Tensor, int], Denoised]
"""denoise(x, i): prediction of x_0 for the state x (N, C, H, W) at step i."""
Noise = Callable[[int], Tensor]
"""noise(i): standard normal values (N, C, H, W) for step i."""
Score = Callable[[Tensor, int], Tensor]
"""score(x, i): gradient of log p(y | x) with respect to x at step i."""
States = Iterator[Tensor]
"""The state (N, C, H, W) after each step."""

DIFFUSION_FORMS: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    "constant": lambda t, sigma, sbdm, norm: norm * np.ones_like(t),
    "sbdm": lambda t, sigma, sbdm, norm: norm * sbdm,
    "sigma": lambda t, sigma, sbdm, norm: norm * sigma,
    "linear": lambda t, sigma, sbdm, norm: norm * (1 - t),
    "decreasing": lambda t, sigma, sbdm, norm: (norm * np.cos(np.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t, sigma, sbdm, norm: norm * np.sin(np.pi * t) ** 2,
}
"""Diffusion coefficient w of an SDE, from t, sigma, the w of score-based diffusion and a norm; the choices of SiT."""
LastStep = Literal["mean", "euler", "tweedie", "none"]
LAST_STEPS = get_args(LastStep)
"""Last step: without noise ("mean"), along the ODE ("euler"), to the predicted x_0 ("tweedie"), or omitted ("none"), in
which case the schedule ends before data."""
SdeMethod = Literal["euler", "heun"]


def ddpm(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, noise: Noise, *, score: Score | None = None
) -> States:
    """DDPM: ancestral sampling (Ho et al. 2020, algorithm 2).

    A learned variance is interpolated between the logarithms of its bounds (Nichol & Dhariwal 2021, equation 15).

    Args:
        denoise: Predicts x_0.
        x: Initial noise (N, C, H, W).
        schedule: Noise schedule; its `variance` selects the variance of a step.
        noise: Noise of each step.
        score: Score of a classifier, which shifts the mean by variance * score (Dhariwal & Nichol 2021, algorithm 1).

    Yields:
        The state after each step (N, C, H, W).

    Raises:
        ConfigError: The schedule has a learned variance and the model does not predict one.
    """
    table = on_device(ddpm_table, schedule, x)
    for i in range(len(schedule)):
        of_x, of_data, log_small, log_large = table[i]
        data, learned = denoise(x, i)
        mean = torch.addcmul(of_x * x, of_data, data)
        if not schedule.variance.startswith("learned"):
            log_variance = log_small if schedule.variance == "small" else log_large
        elif learned is None:
            raise ConfigError("the noise schedule has a learned variance and the model predicts none")
        elif schedule.variance == "learned":
            log_variance = torch.lerp(log_small, log_large, (learned + 1) / 2)
        else:
            log_variance = learned
        if score is not None:
            mean = mean + log_variance.exp() * score(x, i)
        # No noise after the last step.
        x = mean if i + 1 == len(schedule) else torch.addcmul(mean, (0.5 * log_variance).exp(), noise(i))
        yield x


def ddpm_table(schedule: NoiseSchedule) -> Array:
    """Coefficients (N, 4) of x and of x_0 in the posterior mean, and the log of the lower and upper variance bound."""
    (alpha, next_alpha), (sigma, next_sigma) = _pairs(schedule.alphas), _pairs(schedule.sigmas)
    # Between neighboring steps of a respaced process: ratio = sqrt(1 - beta), with beta from the cumulated products.
    ratio = alpha / next_alpha
    beta = sigma**2 - ratio**2 * next_sigma**2
    posterior = beta * next_sigma**2 / sigma**2
    # The variance of the last posterior is 0; its logarithm is that of the step before, as in Ho et al.'s code.
    small = np.where(posterior > 0, posterior, posterior[-2] if len(schedule) > 1 else beta)
    # With the large variance, the last step has the small one: a better likelihood of the data (as in Ho et al.).
    large = np.append(beta[:-1], small[-1:]) if schedule.variance == "large" else beta
    return _table(
        ratio * next_sigma**2 / sigma**2, next_alpha * beta / sigma**2, np.log(small), np.log(large)
    )


def ddim(
    denoise: Denoiser, x: Tensor, schedule: NoiseSchedule, noise: Noise | None = None, *, eta: float = 0.0
) -> States:
    """DDIM (Song et al. 2020, equation 12).

    Args:
        denoise: Predicts x_0.
        x: Initial noise (N, C, H, W).
        schedule: Noise schedule.
        noise: Noise of each step; needed for eta above 0.
        eta: 0 is deterministic, and equals first-order DPM-Solver++; 1 has the small variance of DDPM.

    Yields:
        The state after each step (N, C, H, W).

    Raises:
        ConfigError: `eta` is outside [0, 1], or above 0 without `noise`.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta {eta}: choose a number from 0 (deterministic) to 1")
    if eta and noise is None:
        raise ConfigError(f"eta {eta} draws noise at every step: give noise")
    table = on_device(ddim_table, schedule, x, eta)
    for i in range(len(schedule)):
        of_x, of_data, of_noise = table[i]
        x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        if eta and noise is not None and i + 1 < len(schedule):
            x = torch.addcmul(x, of_noise, noise(i))
        yield x


def ddim_table(schedule: NoiseSchedule, eta: float) -> Array:
    """Coefficients (N, 3) of x, x_0 and new noise in the next state."""
    (alpha, next_alpha), (sigma, next_sigma) = _pairs(schedule.alphas), _pairs(schedule.sigmas)
    fresh = (
        eta * next_sigma / sigma * np.sqrt(np.maximum(sigma**2 - (alpha / next_alpha * next_sigma) ** 2, 0))
    )
    of_x = np.sqrt(np.maximum(next_sigma**2 - fresh**2, 0)) / sigma
    return _table(of_x, next_alpha - of_x * alpha, fresh)


def ddim_inversion(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule) -> States:
    """DDIM inversion: the deterministic path from data to noise (Song et al. 2020, section 4.3).

    Args:
        denoise: Predicts x_0.
        x: State (N, C, H, W) at the last, least noisy step of `schedule`.
        schedule: Noise schedule of n steps.

    Yields:
        The state after each of n - 1 steps; the last one is the state at the first, noisiest step.
    """
    table = on_device(inversion_table, schedule, x)
    for i in range(len(schedule) - 1, 0, -1):
        of_x, of_data = table[i]
        x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        yield x


def inversion_table(schedule: NoiseSchedule) -> Array:
    """Coefficients (N, 2) of x and x_0 at step i in the state at step i - 1; the first row is not used."""
    alpha, sigma = schedule.alphas[:-1], schedule.sigmas[:-1]
    # np.roll moves the value at step i - 1 to row i.
    back = np.roll(sigma, 1) / sigma
    return _table(back, np.roll(alpha, 1) - back * alpha)


def dpm_solver_pp_2m(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule) -> States:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order, one evaluation per step.

    The first step is first-order, and so is a last step to sigma = 0, where lambda is infinite.
    """
    table = on_device(dpm_table, schedule, x)
    previous: Tensor | None = None
    for i in range(len(schedule)):
        of_x, of_data, of_previous = table[i]
        data = denoise(x, i).data
        x = torch.addcmul(of_x * x, of_data, data)
        if previous is not None:
            x = torch.addcmul(x, of_previous, previous)
        previous = data
        yield x


def dpm_table(schedule: NoiseSchedule) -> Array:
    """Coefficients (N, 3) of x, x_0 and the previous x_0 in the next state."""
    of_x, total, step = _first_order(schedule)
    # Second-order correction: total * h_i / (2 h_(i-1)) of the difference of two predictions.
    extra = np.zeros(len(schedule))
    for i in range(1, len(schedule)):
        if np.isfinite(step[i]) and np.isfinite(step[i - 1]):
            extra[i] = total[i] * step[i] / (2 * step[i - 1])
    return _table(of_x, total + extra, -extra)


def unipc(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule) -> States:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithm 1): third order.

    Each step evaluates the model once, corrects the state at which it did (UniC-2), and predicts the next one (UniP-2,
    which for this B is DPM-Solver++(2M)).
    """
    predictor, corrector = on_device(dpm_table, schedule, x), on_device(unipc_table, schedule, x)
    before: Tensor | None = None  # the corrected state at step i - 1
    history: list[Tensor] = []  # x_0 at steps i - 1 and i - 2
    for i in range(len(schedule)):
        data = denoise(x, i).data
        if before is not None:
            of_before, of_here, of_last, of_older = corrector[i]
            x = torch.addcmul(of_before * before, of_here, data)
            x = torch.addcmul(x, of_last, history[0])
            if len(history) > 1:
                x = torch.addcmul(x, of_older, history[1])
        before = x
        of_x, of_data, of_previous = predictor[i]
        x = torch.addcmul(of_x * x, of_data, data)
        if history:
            x = torch.addcmul(x, of_previous, history[0])
        # The newest prediction first; UniC-2 needs two.
        history = [data, *history[:1]]
        yield x


def unipc_table(schedule: NoiseSchedule) -> Array:
    """Coefficients (N, 4) of the state at i - 1 and of x_0 at i, i - 1 and i - 2 in the corrected state at step i.

    The first row is not used. With one earlier x_0, the difference has weight 1/2 (UniC-1); with two, the weights
    integrate the parabola through the three x_0 exactly (UniC-2).
    """
    of_x, total, step = _first_order(schedule)
    rows = np.zeros((len(schedule), 4))
    for i in range(1, len(schedule)):
        h = step[i - 1]
        here, older = 0.0, 0.0
        if np.isfinite(h):
            here = 0.5
        if i > 1 and np.isfinite(h) and np.isfinite(step[i - 2]):
            # With u = (lambda - lambda_s) / h: the moments int_0^1 exp((u - 1) h) u^k du for k = 1 and 2, divided by
            # that for k = 0.
            first = -1 / np.expm1(-h) - 1 / h
            second = -1 / np.expm1(-h) - 2 / h * first
            place = -step[i - 2] / h
            here, older = np.linalg.solve([[1.0, place], [1.0, place**2]], [first, second])
        # The weights sum to 1, so that a constant x_0 is integrated exactly.
        scaled = total[i - 1] * np.array([here, 1 - here - older, older])
        rows[i] = of_x[i - 1], *scaled
    return rows


def straight_heun(denoise: Denoiser, x: Tensor, schedule: NoiseSchedule) -> States:
    """Heun's second-order method (Karras et al. 2022, EDM, algorithm 1, without noise) on the straight path.

    With s = alpha + sigma, x / s follows the straight path with velocity x_0 - noise in the time alpha / s for every
    schedule (Liu et al. 2022, Rectified Flow, section 2.1). Euler's method on it is `ddim`. Two evaluations per step,
    except for the last step, which ends at sigma = 0, where no model was trained.
    """
    predictor, corrector = on_device(ddim_table, schedule, x, 0.0), on_device(heun_table, schedule, x)
    for i in range(len(schedule)):
        of_x, of_data, _ = predictor[i]
        guess = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        if i + 1 < len(schedule):
            of_x, of_guess, of_data = corrector[i]
            guess = torch.addcmul(of_x * x + of_guess * guess, of_data, denoise(guess, i + 1).data)
        x = guess
        yield x


def heun_table(schedule: NoiseSchedule) -> Array:
    """Coefficients (N, 3) of x, the Euler guess and x_0 at the guess in the next state; the last row is not used."""
    # x / total moves in the time alpha / total, and its velocity at x is (x_0 - x / total) / (1 - time).
    total = schedule.alphas + schedule.sigmas
    time = schedule.alphas / total
    gain = np.diff(time)[:-1] / (1 - time[1:-1])
    rows = np.zeros((len(schedule), 3))
    rows[:-1, 0] = total[1:-1] / (2 * total[:-2])
    rows[:-1, 1] = (1 - gain) / 2
    rows[:-1, 2] = gain * total[1:-1] / 2
    return rows


def sde(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    *,
    form: str = "sigma",
    last_step: str = "mean",
    norm: float = 1.0,
    method: str = "euler",
) -> States:
    """Euler-Maruyama or Heun's method for dx = (velocity + w score) dt + sqrt(2 w) dW, from noise to data.

    For every w(t) >= 0 the states have the same distributions as those of the ODE (Ma et al. 2024, SiT,
    arXiv:2401.08740, section 2).

    Args:
        denoise: Predicts x_0.
        x: Initial noise (N, C, H, W).
        schedule: Noise schedule in continuous time, with `rates`.
        noise: Noise of each step.
        form: Diffusion coefficient w, one of `DIFFUSION_FORMS`.
        last_step: One of `LAST_STEPS`.
        norm: Factor of w; for "decreasing" of its cosine, as in SiT.
        method: "euler"; or "heun", SiT's: the noise of a step is added before it, both evaluations follow.

    Yields:
        The state after each step (N, C, H, W).

    Raises:
        ConfigError: A name is unknown, the timesteps are discrete, or w is infinite.
    """
    table = on_device(sde_table, schedule, x, form, last_step, norm, method)
    steps = len(schedule) - (last_step != "none")
    for i in range(len(schedule)):
        of_x, of_data, of_noise, next_of_x, next_of_data = table[i]
        if i == steps:
            x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        elif method == "euler":
            x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
            x = torch.addcmul(x, of_noise, noise(i))
        else:
            x = torch.addcmul(x, of_noise, noise(i))
            guess = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
            ahead = torch.addcmul(next_of_x * guess, next_of_data, denoise(guess, i + 1).data)
            # x + step / 2 (first slope + second slope), where guess = x + step * first slope.
            x = (x + guess + ahead) / 2
        yield x


def sde_table(schedule: NoiseSchedule, form: str, last_step: str, norm: float, method: str) -> Array:
    """Coefficients (N, 5) of x, x_0 and new noise in the next state, and of x and x_0 in step * drift at its end."""
    if form not in DIFFUSION_FORMS or last_step not in LAST_STEPS:
        raise ConfigError(
            f"diffusion form {form!r}, last step {last_step!r}: choose {', '.join(DIFFUSION_FORMS)}; "
            f"{', '.join(LAST_STEPS)}"
        )
    if schedule.path is None:
        raise ConfigError("an SDE needs continuous time, and these timesteps are discrete: use ddpm")
    if schedule.reverse:
        raise ConfigError(
            "an SDE leads from noise to data; encode images with a solver in t, for example heun"
        )
    # Heun's method evaluates the model at the end too where the last step is left out.
    ends = np.append(schedule.times, schedule.end)
    step = np.diff(ends)
    point = PATHS[schedule.path](torch.from_numpy(ends))
    alpha, sigma, alpha_rate, sigma_rate = (
        part.numpy() for part in (point.alpha, point.sigma, *point.rates())
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = DIFFUSION_FORMS[form](ends, sigma, sigma * (alpha_rate * sigma / alpha - sigma_rate), norm)
        # velocity = alpha' x_0 + sigma' noise and score = -noise / sigma, with noise = (x - alpha x_0) / sigma.
        of_noise = sigma_rate - weight / sigma
        of_x, of_data = of_noise / sigma, alpha_rate - of_noise * alpha / sigma
    if not np.isfinite(weight[:-1]).all():
        raise ConfigError(
            f"diffusion form {form} is infinite at alpha 0: choose a later start or another form"
        )
    rows = _table(
        1 + step * of_x[:-1],
        step * of_data[:-1],
        np.sqrt(2 * weight[:-1] * step),
        step * of_x[1:],
        step * of_data[1:],
    )
    if last_step == "tweedie":
        rows[-1, :2] = 0.0, 1.0
    elif last_step == "euler":
        # Along the velocity alone, without w * score.
        slope = sigma_rate[-2] / sigma[-2]
        rows[-1, :2] = 1 + step[-1] * slope, step[-1] * (alpha_rate[-2] - slope * alpha[-2])
    return rows


def _pairs(values: Array) -> tuple[Array, Array]:
    """The value at each step and at the next one."""
    return values[:-1], values[1:]


def _first_order(schedule: NoiseSchedule) -> tuple[Array, Array, Array]:
    """sigma_t / sigma_s; alpha_t (1 - exp(-h)), the coefficient of a constant x_0; and h = lambda_t - lambda_s."""
    (alpha, next_alpha), (sigma, next_sigma) = _pairs(schedule.alphas), _pairs(schedule.sigmas)
    of_x = next_sigma / sigma
    # lambda is infinite at sigma = 0 (the end) and at alpha = 0; callers treat such steps as first-order.
    with np.errstate(divide="ignore"):
        step = np.log(next_alpha / next_sigma) - np.log(alpha / sigma)
    return of_x, next_alpha - of_x * alpha, step


def _table(*columns: Array) -> Array:
    return np.stack(columns, axis=1)


def on_device(table: Callable[..., Array], schedule: NoiseSchedule, x: Tensor, *options: Any) -> Tensor:
    """`table(schedule, *options)` on the device of x, each entry rounded once to its dtype.

    Copied once and kept by the schedule: while a CUDA graph is captured, nothing may be copied from the host, and its
    replays read the table for as long as the schedule is in use.
    """
    key = (table, x.device, x.dtype, *options)
    if key not in schedule.device_tables:
        schedule.device_tables[key] = torch.from_numpy(table(schedule, *options)).to(x.dtype).to(x.device)
    return schedule.device_tables[key]


DETERMINISTIC: dict[str, Callable[[Denoiser, Tensor, NoiseSchedule], States]] = {
    "dpm++2m": dpm_solver_pp_2m,
    "unipc": unipc,
    "straight-heun": straight_heun,
}
SDE = "sde-"
"""Prefix of the solver name of an SDE; the diffusion form follows it."""
Solver = Literal[
    "ddpm",
    "ddim",
    "dpm++2m",
    "unipc",
    "straight-heun",
    "euler",
    "midpoint",
    "heun",
    "heun3",
    "rk4",
    "dopri5",
    "sde-constant",
    "sde-sbdm",
    "sde-sigma",
    "sde-linear",
    "sde-decreasing",
    "sde-increasing-decreasing",
]
SOLVERS = get_args(Solver)
"""Values of `SamplerConfig.solver`."""
