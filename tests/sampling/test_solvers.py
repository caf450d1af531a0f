"""Solvers on data whose exact score is known: Gaussian x_0, for which every path can be written down.

x_0 ~ N(MEAN, SPREAD^2) gives x ~ N(alpha MEAN, alpha^2 SPREAD^2 + sigma^2), the exact x_0 prediction is linear in x,
and the probability flow keeps z = (x - alpha MEAN) / std(x).
"""

import itertools

import numpy as np
import pytest
import torch

from dit_fast.diffusion import create_diffusion
from dit_fast.errors import ConfigError
from dit_fast.sampling import solvers
from dit_fast.sampling.schedule import (
    NoiseSchedule,
    default_solver,
    diffusion_schedule,
    flow_schedule,
    sampling_schedule,
)
from dit_fast.sampling.solvers import Denoised
from tests.tolerance import FEW, assert_close, rounding

MEAN, SPREAD = 0.7, 0.4
Z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)


def exact_denoiser(schedule: NoiseSchedule):
    """E[x_0 | x] at each step."""

    def denoise(x, i):
        alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return Denoised(MEAN + gain * (x - alpha * MEAN))

    return denoise


def exact_state(alpha: float, sigma: float) -> torch.Tensor:
    return alpha * MEAN + float(np.hypot(alpha * SPREAD, sigma)) * Z


def smooth_schedule(steps: int) -> NoiseSchedule:
    """A variance-preserving path, even in lambda = log(alpha / sigma), which ends before sigma is 0."""
    lam = np.linspace(-2.0, 2.5, steps + 1)
    alphas, sigmas = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
    return NoiseSchedule(np.arange(steps, 0, -1.0), sigmas[:-1], alphas, sigmas)


def uneven_schedule(steps: int) -> NoiseSchedule:
    """The same path with steps that shrink towards its end, so that weights of uneven steps count."""
    u = np.linspace(0.0, 1.0, steps + 1)
    lam = -2.0 + 4.5 * u * (1.5 - 0.5 * u)
    alphas, sigmas = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
    return NoiseSchedule(np.arange(steps, 0, -1.0), sigmas[:-1], alphas, sigmas)


def short_flow(steps: int) -> NoiseSchedule:
    alphas = np.linspace(0.05, 0.95, steps + 1)
    return NoiseSchedule(
        alphas[:-1], 1 - alphas[:-1], alphas, 1 - alphas, "velocity", path="linear", end=0.95
    )


def error(solver, schedule: NoiseSchedule, **options) -> float:
    x = exact_state(schedule.alphas[0], schedule.sigmas[0])
    *_, x = solver(exact_denoiser(schedule), x, schedule, **options)
    return (x - exact_state(schedule.alphas[-1], schedule.sigmas[-1])).abs().max().item()


@pytest.mark.parametrize("path", [smooth_schedule, uneven_schedule, short_flow])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (solvers.ddim, 1),
        (solvers.straight_heun, 2),
        (solvers.dpm_solver_pp_2m, 2),
        (solvers.unipc, 3),
    ],
)
def test_order_of_convergence(solver, order, path):
    """Halving the steps' length divides the error by 2^order."""
    errors = [error(solver, path(steps)) for steps in (40, 80, 160)]
    orders = [np.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert abs(orders[-1] - order) < 0.2, (errors, orders)
    assert errors[-1] < 1e-2


def test_inversion_is_the_same_path_upwards_and_of_first_order():
    errors = []
    for steps in (40, 80, 160):
        schedule = smooth_schedule(steps)
        x = exact_state(schedule.alphas[-2], schedule.sigmas[-2])
        *_, noise = solvers.ddim_inversion(exact_denoiser(schedule), x, schedule)
        errors.append((noise - exact_state(schedule.alphas[0], schedule.sigmas[0])).abs().max().item())
    assert abs(np.log2(errors[1] / errors[2]) - 1) < 0.2


def test_inversion_is_the_reference_s_reverse_step():
    diffusion = create_diffusion("20", learn_sigma=False)
    schedule = diffusion_schedule(diffusion)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def model(x, t):
        return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000)

    expected = x
    for i in range(19):
        t = torch.full((2,), i)
        expected = diffusion.ddim_reverse_sample(model, expected, t, clip_denoised=False)["sample"]
    *_, noise = solvers.ddim_inversion(denoiser_of(model, schedule), x, schedule)
    # The process keeps its schedule in float32.
    assert_close(noise, expected, dtype=torch.float32)


def denoiser_of(model, schedule, channels: int | None = None):
    """The denoiser of a model of the noise (and of the variance, from channel `channels` on)."""
    a, b = schedule.data_coefficients

    def denoise(x, i):
        out = model(x, torch.full((len(x),), schedule.times[i]))
        if channels is None:
            return Denoised(a[i] * x + b[i] * out)
        return Denoised(a[i] * x + b[i] * out[:, :channels], out[:, channels:])

    return denoise


def difference_from_the_loop(diffusion, schedule, model, channels: int | None) -> torch.Tensor:
    """Of the ancestral solver and the reference's loop with the same draws, over the largest value; both read tables
    in float32, of up to 40 steps.
    """
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.manual_seed(1)
    expected = diffusion.p_sample_loop(model, x.shape, x, clip_denoised=False, device="cpu")
    torch.manual_seed(1)
    draws = [torch.randn_like(x) for _ in range(len(schedule))]
    *_, drawn = solvers.ddpm(denoiser_of(model, schedule, channels), x, schedule, draws.__getitem__)
    return (drawn - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({"learn_sigma": True}, 3),
        ({"learn_sigma": False}, None),
        ({"learn_sigma": False, "sigma_small": True}, None),
    ],
)
@pytest.mark.parametrize("respacing", ["", "7", "ddim10", "3,2,5", "1"])
def test_ddpm_is_the_reference_s_loop(options, channels, respacing):
    """Every kind of variance and respacing, with the same draws: the same numbers but for rounding."""
    diffusion = create_diffusion(respacing, diffusion_steps=40, **options)
    schedule = diffusion_schedule(diffusion)
    weight = torch.randn(3 if channels is None else 6, 3, dtype=torch.float64) * 0.3

    def model(x, t):
        return torch.einsum("oc,nchw->nohw", weight, torch.tanh(x)) * (1 + t.view(-1, 1, 1, 1) / 40)

    assert difference_from_the_loop(diffusion, schedule, model, channels) <= rounding(40 * FEW)


def test_a_variance_learned_by_its_logarithm_is_that_of_all_steps():
    """Against the reference's loop; fewer steps are longer ones, of which the model knows no variance."""
    options = {"diffusion_steps": 40, "learned_range": False}
    diffusion = create_diffusion("", **options)
    schedule = diffusion_schedule(diffusion)

    def model(x, t):
        return torch.cat([torch.tanh(x), -4 + 0.5 * torch.tanh(x)], dim=1) * (1 + t.view(-1, 1, 1, 1) / 40)

    assert difference_from_the_loop(diffusion, schedule, model, 3) <= rounding(40 * FEW)
    with pytest.raises(
        ConfigError, match="is valid for all 40 steps, not for 20 longer ones: keep all steps with ddpm"
    ):
        diffusion_schedule(create_diffusion("20", **options))
    assert default_solver(options) == "ddim"
    assert len(sampling_schedule(options, 20, "ddim", learn_sigma=True)) == 20
    with pytest.raises(ConfigError, match="or choose another solver"):
        sampling_schedule(options, 20, "ddpm", learn_sigma=True)


@pytest.mark.parametrize(
    ("eta", "prediction"), [(0.0, "epsilon"), (0.4, "epsilon"), (1.0, "epsilon"), (0.4, "x0"), (0.4, "v")]
)
def test_ddim_is_the_reference_s_loop(eta, prediction):
    diffusion = create_diffusion("ddim10", learn_sigma=False, prediction=prediction)
    schedule = sampling_schedule({"prediction": prediction}, "ddim10", "ddim", learn_sigma=False)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def model(x, t):
        return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000)

    torch.manual_seed(1)
    expected = diffusion.ddim_sample_loop(model, x.shape, x, clip_denoised=False, device="cpu", eta=eta)
    torch.manual_seed(1)
    draws = [torch.randn_like(x) for _ in range(len(schedule))]
    *_, drawn = solvers.ddim(denoiser_of(model, schedule), x, schedule, draws.__getitem__, eta=eta)
    assert_close(drawn, expected, dtype=torch.float32)


def test_ddpm_has_the_moments_of_the_data():
    """With the exact denoiser and the posterior's variance, many samples have the data's mean and spread."""
    schedule = diffusion_schedule(create_diffusion("", learn_sigma=False, sigma_small=True))
    x = torch.randn(20000, 1, 1, 1, dtype=torch.float64)
    *_, drawn = solvers.ddpm(exact_denoiser(schedule), x, schedule, lambda i: torch.randn_like(x))
    assert abs(drawn.mean().item() - MEAN) < 0.02
    assert abs(drawn.std().item() - SPREAD) < 0.02


@pytest.mark.parametrize("solver", [solvers.dpm_solver_pp_2m, solvers.unipc])
def test_multistep_solvers_are_those_of_diffusers(solver):
    diffusers = pytest.importorskip("diffusers")
    betas = create_diffusion("").betas
    common = {"trained_betas": betas, "solver_order": 2, "timestep_spacing": "trailing"}
    if solver is solvers.unipc:
        scheduler = diffusers.UniPCMultistepScheduler(**common, solver_type="bh2", final_sigmas_type="zero")
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **common, algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True
        )
    scheduler.set_timesteps(12)
    steps = scheduler.timesteps.numpy().astype(int)
    bars = np.cumprod(1 - betas)[steps]
    schedule = NoiseSchedule(
        steps.astype(float), steps / 1000, np.append(np.sqrt(bars), 1.0), np.append(np.sqrt(1 - bars), 0.0)
    )
    start = torch.randn(2, 3, 4, 4)

    def model(x, t):
        return torch.tanh(x) * 0.5 + 0.3 * x

    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    *_, drawn = solver(denoiser_of(model, schedule), start.double(), schedule)
    assert_close(drawn, x, terms=4096)


@pytest.mark.parametrize("name", ["ddim", "straight_heun", "dpm_solver_pp_2m", "unipc"])
def test_flow_from_pure_noise_ends_at_data(name):
    """The whole flow, from alpha 0 to sigma 0, where lambda is infinite at both ends."""
    schedule = flow_schedule(100, shift=1.5)
    *_, x = getattr(solvers, name)(exact_denoiser(schedule), Z.clone(), schedule)
    assert (x - (MEAN + SPREAD * Z)).abs().max() < 0.02


def test_bad_schedules_and_options_are_refused():
    schedule = smooth_schedule(4)
    with pytest.raises(ConfigError, match=r"eta 2\.0: choose a number from 0"):
        next(solvers.ddim(exact_denoiser(schedule), Z, schedule, eta=2.0))
    with pytest.raises(ConfigError, match=r"eta 0\.5 draws noise at every step"):
        next(solvers.ddim(exact_denoiser(schedule), Z, schedule, eta=0.5))
    learned = diffusion_schedule(create_diffusion("4"))
    with pytest.raises(ConfigError, match="learned variance and the model predicts none"):
        next(solvers.ddpm(exact_denoiser(learned), Z, learned, lambda i: Z))
    with pytest.raises(ConfigError, match="4 times, 4 levels, 4 alphas and 5 sigmas"):
        NoiseSchedule(schedule.times, schedule.levels, schedule.alphas[1:], schedule.sigmas)
    with pytest.raises(ConfigError, match="must decrease at every step"):
        NoiseSchedule(schedule.times, schedule.levels, schedule.alphas[::-1], schedule.sigmas[::-1])
    with pytest.raises(ConfigError, match="prediction 'noise': choose epsilon, x0, v, velocity, score"):
        NoiseSchedule(schedule.times, schedule.levels, schedule.alphas, schedule.sigmas, prediction="noise")
    with pytest.raises(ConfigError, match="the velocity is a derivative by time"):
        NoiseSchedule(
            schedule.times, schedule.levels, schedule.alphas, schedule.sigmas, prediction="velocity"
        )
    with pytest.raises(ConfigError, match="steps 0: give a whole number from 1"):
        flow_schedule(0)
    with pytest.raises(ConfigError, match=r"shift 0\.0: give a number above 0"):
        flow_schedule(4, shift=0.0)
