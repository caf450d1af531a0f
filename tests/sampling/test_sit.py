"""SiT's samplers, against implementations written from the paper (Ma et al. 2024, section 2), in float64."""

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from dit_fast.diffusion import FlowMatching
from dit_fast.diffusion.likelihood import log_likelihood
from dit_fast.errors import ConfigError, MissingExtraError
from dit_fast.model.dit import DiT
from dit_fast.sampling import Guidance, Sampler, SamplerConfig
from dit_fast.sampling.schedule import sampling_schedule
from dit_fast.sampling.solvers import DIFFUSION_FORMS, LAST_STEPS
from dit_fast.sampling.trajectory import KeyedNoise
from tests.small_models import small_model

PATHS, PREDICTIONS = ("linear", "gvp", "vp"), ("velocity", "epsilon", "score")
FIXED = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "heun3": "heun3", "rk4": "rk4"}
LABELS = torch.tensor([1, 4])
EPS = 1e-3
SHAPE = (4, 4, 4)


def latin(*choices: Iterable[str], every: int = 3) -> list[object]:
    """All combinations; those outside a Latin square, in which every choice still occurs, are `nightly`."""
    return [
        pytest.param(*values, marks=() if sum(places) % every == 0 else pytest.mark.nightly)
        for places, values in (
            zip(*combination, strict=True)
            for combination in itertools.product(*(list(enumerate(choice)) for choice in choices))
        )
    ]


@pytest.fixture(scope="module")
def model() -> DiT:
    return small_model(input_size=4, learn_sigma=False).double()


class Transport:
    """The probability flow and the score of a model, by SiT's equations."""

    def __init__(self, model: DiT, path: str, prediction: str) -> None:
        self.model, self.path, self.prediction = model, path, prediction

    def coefficients(self, t: Tensor) -> tuple[Tensor, ...]:
        """alpha, sigma and their derivatives."""
        if self.path == "linear":
            return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
        if self.path == "gvp":
            turn = math.pi / 2
            return (turn * t).sin(), (turn * t).cos(), turn * (turn * t).cos(), -turn * (turn * t).sin()
        beta = 0.1 + (1 - t) * 19.9
        alpha = (-((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.1 / 2).exp()
        sigma = (1 - alpha**2).sqrt()
        return alpha, sigma, beta * alpha / 2, -beta * alpha**2 / (2 * sigma)

    def by_score(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g) of velocity = f x + g score."""
        alpha, sigma, alpha_rate, sigma_rate = self.coefficients(t)
        if self.path == "vp":
            beta = 0.1 + (1 - t) * 19.9
            return beta / 2, beta / 2
        return alpha_rate / alpha, alpha_rate / alpha * sigma**2 - sigma * sigma_rate

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t.expand(len(x)), LABELS[: len(x)])

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.output(x, t)
        if self.prediction == "velocity":
            return output
        f, g = self.by_score(t)
        return f * x + g * (output if self.prediction == "score" else -output / self.coefficients(t)[1])

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        output, (alpha, sigma, alpha_rate, sigma_rate) = self.output(x, t), self.coefficients(t)
        if self.prediction == "score":
            return output
        if self.prediction == "epsilon":
            return -output / sigma
        ratio = alpha / alpha_rate
        return (ratio * output - x) / (sigma**2 - ratio * sigma_rate * sigma)

    def ends(self) -> tuple[float, float]:
        if self.path == "vp":
            return 0.0, 1 - EPS
        return (0.0, 1.0) if self.prediction == "velocity" else (EPS, 1 - EPS)

    def encoding(self) -> tuple[float, float]:
        """SiT's 1 - t of both ends; a score is finite at the end of "vp", where the noise would be divided by 0."""
        first, last = self.ends()
        if self.path == "vp" and self.prediction != "velocity":
            return (last if self.prediction == "epsilon" else 1 - 1e-12), EPS
        return 1 - first, 1 - last

    def weight(self, form: str, norm: float, t: Tensor) -> Tensor:
        return {
            "constant": torch.full_like(t, norm),
            "sbdm": norm * self.by_score(t)[1],
            "sigma": norm * self.coefficients(t)[1],
            "linear": norm * (1 - t),
            "decreasing": 0.25 * (norm * (math.pi * t).cos() + 1) ** 2,
            "increasing-decreasing": norm * (math.pi * t).sin() ** 2,
        }[form]

    def sde(
        self, x: Tensor, steps: int, form: str, norm: float, method: str, last: str, size: float
    ) -> Tensor:
        first, end = self.ends()
        if form == "sbdm" and self.path != "vp":
            first = EPS
        end = end if last == "none" else 1 - size
        noise = KeyedNoise(3, torch.arange(len(x)), SHAPE)
        times = torch.linspace(first, end, steps, dtype=torch.float64)
        dt = times[1] - times[0]

        def drift(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(x, t) + self.weight(form, norm, t) * self.score(x, t)

        for i, t in enumerate(times[:-1]):
            spread = (2 * self.weight(form, norm, t) * dt).sqrt() * noise.step(i).double()
            if method == "euler":
                x = x + dt * drift(x, t) + spread
            else:
                x = x + spread
                slope = drift(x, t)
                x = x + dt / 2 * (slope + drift(x + dt * slope, t + dt))
        t = times[-1]
        alpha, sigma, *_ = self.coefficients(t)
        if last == "mean":
            return x + size * drift(x, t)
        if last == "euler":
            return x + size * self.velocity(x, t)
        return (x + sigma**2 * self.score(x, t)) / alpha if last == "tweedie" else x


def sampler(model: DiT, path: str, prediction: str, solver: str, steps: int | None, **options) -> Sampler:
    of_schedule = {
        name: options.pop(name) for name in ("last_step_size", "sample_eps", "reverse") if name in options
    }
    schedule = sampling_schedule(
        {"objective": "flow", "path": path, "prediction": prediction},
        steps,
        solver,
        learn_sigma=False,
        last_step=options.get("last_step", "mean"),
        **of_schedule,
    )
    return Sampler(model, schedule, SamplerConfig(solver=solver, guidance=Guidance(1.0), **options))


def start() -> Tensor:
    return KeyedNoise(3, torch.arange(2), SHAPE).start().double()


def converged(transport: Transport, x: Tensor, first: float, last: float) -> Tensor:
    times = torch.tensor([first, last], dtype=torch.float64)
    options = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8, "options": {"step_t": times[1:]}}
    return odeint(lambda t, x: transport.velocity(x, t), x, times, **options)[-1]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("path", "prediction", "solver"), latin(PATHS, PREDICTIONS, FIXED))
def test_fixed_steps_of_the_ode_are_sit_s(model: DiT, path: str, prediction: str, solver: str) -> None:
    transport = Transport(model, path, prediction)
    times = torch.linspace(*transport.ends(), 8, dtype=torch.float64)
    expected = odeint(lambda t, x: transport.velocity(x, t), start(), times, method=FIXED[solver])[-1]
    found = sampler(model, path, prediction, solver, 7)(LABELS, seed=3)
    assert relative(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("path", "prediction"), latin(PATHS, PREDICTIONS))
def test_dopri5_is_the_ode_within_its_tolerance(model: DiT, path: str, prediction: str) -> None:
    transport = Transport(model, path, prediction)
    exact = converged(transport, start(), *transport.ends())
    drawn = sampler(model, path, prediction, "dopri5", None, rtol=1e-4, atol=1e-7)
    assert relative(drawn(LABELS, seed=3), exact) < 1e-3
    assert drawn.eager_reason == "dopri5 chooses its steps while it runs"


@torch.no_grad()
@pytest.mark.parametrize(
    ("path", "prediction", "method", "last_step"),
    latin(PATHS, PREDICTIONS, ("euler", "heun"), LAST_STEPS, every=4),
)
def test_the_sde_is_sit_s(model: DiT, path: str, prediction: str, method: str, last_step: str) -> None:
    options = {"last_step": last_step, "sde_method": method, "diffusion_norm": 0.7, "last_step_size": 0.1}
    if (path, prediction, method, last_step) in (
        ("linear", "velocity", "heun", "none"),
        ("gvp", "velocity", "heun", "none"),
    ):
        # SiT divides by sigma = 0 here.
        with pytest.raises(ConfigError, match="evaluates the score at the end of the last step"):
            sampler(model, path, prediction, "sde-sigma", 6, **options)(LABELS)
        return
    transport = Transport(model, path, prediction)
    expected = transport.sde(start(), 6, "sigma", 0.7, method, last_step, 0.1)
    assert (
        relative(sampler(model, path, prediction, "sde-sigma", 6, **options)(LABELS, seed=3), expected) < 1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize(("path", "form"), latin(PATHS, DIFFUSION_FORMS))
def test_the_diffusion_forms_are_sit_s(model: DiT, path: str, form: str) -> None:
    expected = Transport(model, path, "velocity").sde(start(), 20, form, 1.3, "euler", "mean", 0.04)
    found = sampler(model, path, "velocity", f"sde-{form}", 20, diffusion_norm=1.3)(LABELS, seed=3)
    assert relative(found, expected) < 1e-5


@torch.no_grad()
def test_sample_eps_moves_the_ends(model: DiT) -> None:
    def ends(path: str, prediction: str, solver: str, **options: object) -> list[float]:
        schedule = sampler(model, path, prediction, solver, 3, sample_eps=0.01, **options).schedule
        return [float(schedule.times[0]), schedule.end]

    assert ends("linear", "velocity", "heun") == [0, 1]
    assert ends("linear", "score", "heun") == pytest.approx([0.01, 0.99])
    assert ends("vp", "velocity", "heun") == pytest.approx([0, 0.99])
    assert ends("linear", "velocity", "sde-sbdm") == pytest.approx([0.01, 1])
    assert ends("linear", "velocity", "sde-sigma", last_step="none") == pytest.approx([0, 0.99])


@torch.no_grad()
@pytest.mark.parametrize(("path", "prediction"), latin(PATHS, PREDICTIONS))
def test_encoding_is_the_ode_from_data_to_noise(model: DiT, path: str, prediction: str) -> None:
    transport, data = Transport(model, path, prediction), start()
    times = torch.linspace(*transport.encoding(), 8, dtype=torch.float64)
    expected = odeint(lambda t, x: transport.velocity(x, t), data, times, method="rk4")[-1]
    noise = sampler(model, path, prediction, "rk4", 7, reverse=True)(LABELS, start=data)
    assert relative(noise, expected) < 1e-5
    adaptive = sampler(model, path, prediction, "dopri5", None, reverse=True, rtol=1e-4, atol=1e-7)
    exact = converged(transport, data, *transport.encoding())
    assert relative(adaptive(LABELS, start=data), exact) < 1e-3


@torch.no_grad()
def test_what_is_encoded_is_drawn_again(model: DiT) -> None:
    data = start()
    noise = sampler(model, "gvp", "velocity", "rk4", 40, reverse=True)(LABELS, start=data)
    assert relative(noise, data) > 0.1
    assert relative(sampler(model, "gvp", "velocity", "rk4", 40)(LABELS, start=noise), data) < 1e-5


@pytest.mark.parametrize(("path", "prediction"), latin(PATHS, PREDICTIONS))
def test_the_likelihood_is_sit_s_within_a_thousandth_of_a_nat(model: DiT, path: str, prediction: str) -> None:
    """With the exact trace, where SiT has a random estimate of it."""
    model = small_model(
        input_size=2, patch_size=1, in_channels=1, hidden_size=16, depth=1, learn_sigma=False
    ).double()
    transport = Transport(model, path, prediction)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        jacobian = torch.autograd.functional.jacobian(lambda x: transport.velocity(x, t).sum(0), state[0])
        return transport.velocity(state[0], t).detach(), torch.einsum("abcnabc->n", jacobian)

    times = torch.linspace(*transport.encoding(), 2, dtype=torch.float64)
    state = (x, torch.zeros(2, dtype=torch.float64))
    ends, change = odeint(slope, state, times, method="dopri5", rtol=1e-6, atol=1e-6)
    prior = -0.5 * (ends[-1] ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
    found = log_likelihood(
        FlowMatching(path, prediction),
        model,
        x,
        method="dopri5",
        rtol=1e-6,
        probes=None,
        model_kwargs={"y": LABELS},
    )
    assert (found - (prior + change[-1])).abs().max() < 1e-3


def test_options_that_do_not_apply_are_refused(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    for solver, options, line in [
        (
            "heun",
            {"atol": 1e-5},
            "atol 1e-05 applies only to dopri5, whose steps adapt, and the solver is heun",
        ),
        ("heun", {"sde_method": "heun"}, "sde_method heun applies only to the sde solvers"),
        (
            "heun",
            {"clip": True},
            "clip True applies only to solvers that predict the image, for example ddim",
        ),
        ("heun", {"last_step_size": 0.1}, r"last_step_size 0\.1 applies only to the sde solvers"),
        ("sde-sigma", {"last_step_size": 1.0}, r"last step 1\.0: choose a length in t above 0 and below 1"),
        ("sde-sigma", {"reverse": True}, r"reverse True applies only to the solvers in t \(euler, midpoint"),
        (
            "ddim",
            {"sample_eps": 0.1},
            r"sample_eps 0\.1 applies only to the sde solvers and the solvers in t",
        ),
        ("dopri5", {}, "steps 3 applies only to solvers with fixed steps"),
    ]:
        with pytest.raises(ConfigError, match=line):
            sampler(model, "linear", "velocity", solver, 3, **options)
    with pytest.raises(ConfigError, match="give the images to encode as start"):
        sampler(model, "linear", "velocity", "heun", 3, reverse=True)(LABELS)
    with pytest.raises(ConfigError, match=r"start is \(1, 4, 4, 4\), expected \(2, 4, 4, 4\)"):
        sampler(model, "linear", "velocity", "heun", 3, reverse=True)(LABELS, start=start()[:1])
    with pytest.raises(
        ConfigError, match="solver heun applies only to flow matching: for a diffusion model use ddim"
    ):
        sampling_schedule({}, 3, "heun", learn_sigma=False)
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[ode\]', or choose heun instead of dopri5"):
        sampler(model, "linear", "velocity", "dopri5", None)
