"""Solvers: plain generators over a denoiser, one state for each step from noise to data.

`denoise(x, i) -> Denoised` answers for the state x (N, C, H, W) at node i of `nodes`. Coefficients are computed in
float64 before the loop and lie on the state's device, so that no step waits for the host and a whole trajectory can be
captured as one CUDA graph (after a first run, which makes the device's copy). States are float32 or float64.

Each solver is written on the predicted x_0. With lambda = log(alpha / sigma), the probability flow's exact solution
from node s to node t is x_t = (sigma_t / sigma_s) x_s + sigma_t int exp(lambda) x_0(lambda) d lambda
(Lu et al. 2022, DPM-Solver++, arXiv:2211.01095, equation 8); solvers differ in what they take x_0(lambda) for.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_fast.diffusion.gaussian_diffusion import DeviceTable
from dit_fast.errors import ConfigError
from dit_fast.sampling.schedule import Array, Nodes


class Denoised(NamedTuple):
    """A model's prediction of x_0 and, where it learned one, what it says of the variance: as `Nodes.variance` has it,
    the place between its bounds, in [-1, 1], or its logarithm.
    """

    data: Tensor
    variance: Tensor | None = None


Denoiser = Callable[[Tensor, int], Denoised]
# noise(i) -> standard normal values (N, C, H, W) of step i.
Noise = Callable[[int], Tensor]
# score(x, i) -> gradient of log p(y | x) with respect to x.
Score = Callable[[Tensor, int], Tensor]
Trajectory = Iterator[Tensor]

# w of an SDE from t, sigma and the w of score-based diffusion (SiT's choices).
DIFFUSION_FORMS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "constant": lambda t, sigma, sbdm: np.ones_like(t),
    "sbdm": lambda t, sigma, sbdm: sbdm,
    "sigma": lambda t, sigma, sbdm: sigma.copy(),
    "linear": lambda t, sigma, sbdm: 1 - t,
    "decreasing": lambda t, sigma, sbdm: (np.cos(np.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t, sigma, sbdm: np.sin(np.pi * t) ** 2,
}
LAST_STEPS = ("mean", "euler", "tweedie", "none")


def ddpm(
    denoise: Denoiser, x: Tensor, nodes: Nodes, noise: Noise, *, score: Score | None = None
) -> Trajectory:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the variance that `nodes.variance` names.

    A learned variance is interpolated between the logarithms of its bounds (Nichol & Dhariwal 2021, equation 15).
    `score`: of a classifier, which moves the mean by variance * score (Dhariwal & Nichol 2021, algorithm 1).
    """
    table = _rows(ddpm_table(nodes), x)
    for i in range(len(nodes)):
        of_x, of_data, log_small, log_large = table[i]
        data, learned = denoise(x, i)
        mean = torch.addcmul(of_x * x, of_data, data)
        if not nodes.variance.startswith("learned"):
            log_variance = log_small if nodes.variance == "small" else log_large
        elif learned is None:
            raise ConfigError("these nodes have a learned variance and the model predicts none")
        elif nodes.variance == "learned":
            log_variance = torch.lerp(log_small, log_large, (learned + 1) / 2)
        else:
            log_variance = learned
        if score is not None:
            mean = mean + log_variance.exp() * score(x, i)
        x = mean if i + 1 == len(nodes) else torch.addcmul(mean, (0.5 * log_variance).exp(), noise(i))
        yield x


@functools.lru_cache(maxsize=32)
def ddpm_table(nodes: Nodes) -> DeviceTable:
    """(N, 4): what the posterior's mean takes of x and of x_0, and the logarithms of both bounds of its variance."""
    (alpha, next_alpha), (sigma, next_sigma) = _pairs(nodes.alphas), _pairs(nodes.sigmas)
    ratio = alpha / next_alpha
    beta = sigma**2 - ratio**2 * next_sigma**2
    posterior = beta * next_sigma**2 / sigma**2
    # The last posterior has no variance; where its logarithm is read, it is the one before's (or of beta, if alone).
    small = np.where(posterior > 0, posterior, posterior[-2] if len(nodes) > 1 else beta)
    large = np.append(beta[:-1], small[-1:]) if nodes.variance == "large" else beta
    return _table(
        ratio * next_sigma**2 / sigma**2, next_alpha * beta / sigma**2, np.log(small), np.log(large)
    )


def ddim(
    denoise: Denoiser, x: Tensor, nodes: Nodes, noise: Noise | None = None, *, eta: float = 0.0
) -> Trajectory:
    """DDIM (Song et al. 2020, equation 12): `eta` 0 is deterministic, 1 has the small variance of DDPM.

    At eta 0 this is also DPM-Solver++ of order one. Raises ConfigError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta {eta}: choose a number from 0 (deterministic) to 1")
    if eta and noise is None:
        raise ConfigError(f"eta {eta} draws noise at every step: give noise")
    table = _rows(ddim_table(nodes, eta), x)
    for i in range(len(nodes)):
        of_x, of_data, of_noise = table[i]
        x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        if eta and noise is not None and i + 1 < len(nodes):
            x = torch.addcmul(x, of_noise, noise(i))
        yield x


@functools.lru_cache(maxsize=32)
def ddim_table(nodes: Nodes, eta: float = 0.0) -> DeviceTable:
    """(N, 3): what the next state takes of x, of x_0 and of fresh noise."""
    (alpha, next_alpha), (sigma, next_sigma) = _pairs(nodes.alphas), _pairs(nodes.sigmas)
    fresh = (
        eta * next_sigma / sigma * np.sqrt(np.maximum(sigma**2 - (alpha / next_alpha * next_sigma) ** 2, 0))
    )
    of_x = np.sqrt(np.maximum(next_sigma**2 - fresh**2, 0)) / sigma
    return _table(of_x, next_alpha - of_x * alpha, fresh)


def ddim_inversion(denoise: Denoiser, x: Tensor, nodes: Nodes) -> Trajectory:
    """The deterministic DDIM path from data to noise (Song et al. 2020, section 4.3).

    x is taken for the state at the last, least noisy node; N - 1 steps lead to the first node.
    """
    table = _rows(inversion_table(nodes), x)
    for i in range(len(nodes) - 1, 0, -1):
        of_x, of_data = table[i]
        x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        yield x


@functools.lru_cache(maxsize=32)
def inversion_table(nodes: Nodes) -> DeviceTable:
    """(N, 2): what the state at node i - 1 takes of x and x_0 at node i; the first row is not used."""
    alpha, sigma = nodes.alphas[:-1], nodes.sigmas[:-1]
    back = np.roll(sigma, 1) / sigma
    return _table(back, np.roll(alpha, 1) - back * alpha)


def dpm_solver_pp_2m(denoise: Denoiser, x: Tensor, nodes: Nodes) -> Trajectory:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order, one evaluation a step.

    The first step is of order one, and so is a last step to sigma 0, where lambda is infinite.
    """
    table = _rows(dpm_table(nodes), x)
    previous: Tensor | None = None
    for i in range(len(nodes)):
        of_x, of_data, of_previous = table[i]
        data = denoise(x, i).data
        x = torch.addcmul(of_x * x, of_data, data)
        if previous is not None:
            x = torch.addcmul(x, of_previous, previous)
        previous = data
        yield x


@functools.lru_cache(maxsize=32)
def dpm_table(nodes: Nodes) -> DeviceTable:
    """(N, 3): what the next state takes of x, of x_0 here and of x_0 at the node before."""
    of_x, total, step = _first_order(nodes)
    extra = np.zeros(len(nodes))
    for i in range(1, len(nodes)):
        if np.isfinite(step[i]) and np.isfinite(step[i - 1]):
            extra[i] = total[i] * step[i] / (2 * step[i - 1])
    return _table(of_x, total + extra, -extra)


def unipc(denoise: Denoiser, x: Tensor, nodes: Nodes) -> Trajectory:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithm 1): third order at one evaluation.

    Each evaluation first corrects the state that it was made at (UniC-2), then predicts the next one (UniP-2, which
    for this B is DPM-Solver++(2M)).
    """
    predictor, corrector = _rows(dpm_table(nodes), x), _rows(unipc_table(nodes), x)
    before: Tensor | None = None  # the corrected state at node i - 1
    history: list[Tensor] = []  # x_0 at nodes i - 1 and i - 2
    for i in range(len(nodes)):
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
        history = [data, *history[:1]]
        yield x


@functools.lru_cache(maxsize=32)
def unipc_table(nodes: Nodes) -> DeviceTable:
    """(N, 4): what the corrected state at node i takes of the state before, and of x_0 here, before, and before that.

    The first row is not used. With one x_0 before, the difference weighs 1/2 (UniC-1); with two, both differences are
    weighed so that the parabola through the three x_0 is integrated exactly (UniC-2).
    """
    of_x, total, step = _first_order(nodes)
    rows = np.zeros((len(nodes), 4))
    for i in range(1, len(nodes)):
        h = step[i - 1]
        here, older = 0.0, 0.0
        if np.isfinite(h):
            here = 0.5
        if i > 1 and np.isfinite(h) and np.isfinite(step[i - 2]):
            # int_0^1 exp((u - 1) h) u^k du over that for k = 0, at k = 1 and 2; u is (lambda - lambda_s) / h.
            first = -1 / np.expm1(-h) - 1 / h
            second = -1 / np.expm1(-h) - 2 / h * first
            place = -step[i - 2] / h
            here, older = np.linalg.solve([[1.0, place], [1.0, place**2]], [first, second])
        scaled = total[i - 1] * np.array([here, 1 - here - older, older])
        rows[i] = of_x[i - 1], *scaled
    return DeviceTable(torch.from_numpy(rows))


def euler(denoise: Denoiser, x: Tensor, nodes: Nodes) -> Trajectory:
    """Euler's method for flow matching (Liu et al. 2022, Rectified Flow, section 2.1).

    With s = alpha + sigma, x / s moves on the straight path with velocity x_0 - noise in the time alpha / s, whatever
    the schedule: one step of constant velocity is one step of DDIM, which is what is computed.
    """
    return ddim(denoise, x, nodes)


def heun(denoise: Denoiser, x: Tensor, nodes: Nodes) -> Trajectory:
    """Heun's second-order method (Karras et al. 2022, EDM, algorithm 1, without noise) on the path of `euler`.

    Two evaluations a step, but one for the last, which ends where no model was trained.
    """
    predictor, corrector = _rows(ddim_table(nodes), x), _rows(heun_table(nodes), x)
    for i in range(len(nodes)):
        of_x, of_data, _ = predictor[i]
        guess = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        if i + 1 < len(nodes):
            of_x, of_guess, of_data = corrector[i]
            guess = torch.addcmul(of_x * x + of_guess * guess, of_data, denoise(guess, i + 1).data)
        x = guess
        yield x


@functools.lru_cache(maxsize=32)
def heun_table(nodes: Nodes) -> DeviceTable:
    """(N, 3): what the next state takes of x, of Euler's guess and of x_0 at the guess; the last row is not used."""
    total = nodes.alphas + nodes.sigmas
    time = nodes.alphas / total
    gain = np.diff(time)[:-1] / (1 - time[1:-1])
    rows = np.zeros((len(nodes), 3))
    rows[:-1, 0] = total[1:-1] / (2 * total[:-2])
    rows[:-1, 1] = (1 - gain) / 2
    rows[:-1, 2] = gain * total[1:-1] / 2
    return DeviceTable(torch.from_numpy(rows))


def sde(
    denoise: Denoiser,
    x: Tensor,
    nodes: Nodes,
    noise: Noise,
    *,
    form: str = "sigma",
    last_step: str = "mean",
) -> Trajectory:
    """Euler and Maruyama's method for dx = (velocity + w score) dt + sqrt(2 w) dW, from noise to data.

    For every w(t) that is not negative its states have the same distributions as the flow's (Ma et al. 2024, SiT,
    arXiv:2401.08740, section 2); `form` names one of DIFFUSION_FORMS. `last_step`: one of LAST_STEPS, "mean" and
    "euler" without noise, the latter along the flow alone; "tweedie" to the predicted x_0; "none" ends before it.
    Raises ConfigError for another name, for discrete timesteps, or where w is infinite.
    """
    table = _rows(sde_table(nodes, form, last_step), x)
    steps = len(nodes)
    for i in range(steps - (last_step == "none")):
        of_x, of_data, of_noise = table[i]
        x = torch.addcmul(of_x * x, of_data, denoise(x, i).data)
        if i + 1 < steps:
            x = torch.addcmul(x, of_noise, noise(i))
        yield x
    if last_step == "none":
        yield x


@functools.lru_cache(maxsize=32)
def sde_table(nodes: Nodes, form: str, last_step: str) -> DeviceTable:
    """(N, 3): what the next state takes of x, of x_0 and of fresh noise."""
    if form not in DIFFUSION_FORMS or last_step not in LAST_STEPS:
        raise ConfigError(
            f"diffusion form {form!r}, last step {last_step!r}: choose {', '.join(DIFFUSION_FORMS)}; "
            f"{', '.join(LAST_STEPS)}"
        )
    if nodes.rates is None:
        raise ConfigError("an SDE runs in continuous time, and these timesteps are discrete: use ddpm")
    alpha, sigma, (alpha_rate, sigma_rate) = nodes.alphas[:-1], nodes.sigmas[:-1], nodes.rates
    step = np.diff(nodes.times, append=1.0)
    with np.errstate(divide="ignore"):
        weight = DIFFUSION_FORMS[form](nodes.times, sigma, sigma * (alpha_rate * sigma / alpha - sigma_rate))
    if not np.isfinite(weight).all():
        raise ConfigError(f"diffusion form {form} is infinite at alpha 0: start later, or choose another")
    if last_step == "euler":
        weight[-1] = 0.0
    # velocity = alpha' x_0 + sigma' noise and score = -noise / sigma, with noise = (x - alpha x_0) / sigma.
    of_noise = sigma_rate - weight / sigma
    of_x = 1 + step * of_noise / sigma
    of_data = step * (alpha_rate - of_noise * alpha / sigma)
    if last_step == "tweedie":
        of_x[-1], of_data[-1] = 0.0, 1.0
    return _table(of_x, of_data, np.sqrt(2 * weight * step))


def _pairs(values: Array) -> tuple[Array, Array]:
    """Each node's value and the next one's."""
    return values[:-1], values[1:]


def _first_order(nodes: Nodes) -> tuple[Array, Array, Array]:
    """sigma_t / sigma_s; alpha_t (1 - exp(-h)), what x_t takes of a constant x_0; and h = lambda_t - lambda_s."""
    (alpha, next_alpha), (sigma, next_sigma) = _pairs(nodes.alphas), _pairs(nodes.sigmas)
    of_x = next_sigma / sigma
    with np.errstate(divide="ignore"):
        step = np.log(next_alpha / next_sigma) - np.log(alpha / sigma)
    return of_x, next_alpha - of_x * alpha, step


def _table(*columns: Array) -> DeviceTable:
    return DeviceTable(torch.from_numpy(np.stack(columns, axis=1)))


def _rows(table: DeviceTable, x: Tensor) -> Tensor:
    """The table on the device of x, each entry rounded once to its dtype; a row's entries are views."""
    return table.on(x.device).to(x.dtype)


DETERMINISTIC: dict[str, Callable[[Denoiser, Tensor, Nodes], Trajectory]] = {
    "dpm++2m": dpm_solver_pp_2m,
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
}
SDE = "sde-"
"""Prefix of the solver name of an SDE; the diffusion form follows it."""
SOLVERS = ("ddpm", "ddim", *DETERMINISTIC, *(SDE + form for form in DIFFUSION_FORMS))
"""Values of `SamplerConfig.solver`."""
