"""Objectives on data whose optimal model is known: Gaussian x_0, for which every path can be written down."""

import itertools
import math

import numpy as np
import pytest
import torch

from dit_fast.diffusion import FlowMatching, create_diffusion
from dit_fast.diffusion.likelihood import bits_per_dim, log_likelihood
from dit_fast.diffusion.paths import PATHS, PREDICTIONS, Point, data_and_noise, target
from dit_fast.errors import ConfigError
from dit_fast.sampling import flow_schedule, sampling_schedule, solvers
from dit_fast.sampling.solvers import Denoised
from tests.tolerance import FEW, assert_close

SHAPE = (1, 2, 1)
MEAN = torch.tensor([0.5, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.30, 0.12], [0.12, 0.20]], dtype=torch.float64)
FLOWS = [
    *(("linear", prediction) for prediction in ("velocity", "score", "epsilon", "x0")),
    *(("gvp", prediction) for prediction in ("velocity", "epsilon")),
    *(("vp", prediction) for prediction in ("velocity", "score")),
]


def expected(x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x_0 | x] and E[noise | x] of the Gaussian data, shaped like x."""
    spread = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    whitened = (x.double().flatten(1) - alpha * MEAN) @ torch.linalg.inv(spread)
    data = MEAN + alpha * whitened @ COVARIANCE
    return data.view(x.shape).to(x.dtype), (sigma * whitened).view(x.shape).to(x.dtype)


def optimal_model(flow: FlowMatching):
    """What a perfectly trained model answers: the conditional mean of its target."""

    def model(x, t):
        point = flow.at(t, x.dim())
        alpha, sigma = float(point.alpha.flatten()[0]), float(point.sigma.flatten()[0])
        return target(flow.prediction, *expected(x, alpha, sigma), point)

    return model


def samples(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T).view(count, *SHAPE)


@pytest.mark.parametrize("path", [*PATHS, "discrete"])
def test_predictions_turn_into_each_other_to_rounding(path):
    """There and back through any other prediction, in float32, and x = alpha x_0 + sigma noise holds on the way."""
    data, noise = torch.randn(2, 200, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    if path == "discrete":
        diffusion = create_diffusion("")
        point = diffusion.at(torch.linspace(100, 700, 200).long(), 4)
        kinds = [kind for kind in PREDICTIONS if kind != "velocity"]
    else:
        point = PATHS[path](torch.linspace(0.3, 0.8, 200).view(-1, 1, 1, 1))
        kinds = list(PREDICTIONS)
    x = point.alpha * data + point.sigma * noise
    for source, other in itertools.permutations(kinds, 2):
        answer = target(source, data, noise, point)
        assert_close(convert(answer, x, point, source, "x0"), data, what=source)
        assert_close(convert(answer, x, point, source, "epsilon"), noise, what=source)
        back = convert(convert(answer, x, point, source, other), x, point, other, source)
        assert_close(back, answer, what=(source, other))


def convert(output, x, point, source, to):
    return target(to, *data_and_noise(source, output, x, point), point)


def test_predictions_by_their_papers_formulas():
    alpha, sigma, alpha_rate, sigma_rate = map(torch.tensor, (0.6, 0.8, 1.5, -0.5))
    point = Point(alpha, sigma, alpha_rate, sigma_rate)
    data, noise = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    expected = {
        "epsilon": noise,
        "x0": data,
        "v": 0.6 * noise - 0.8 * data,
        "velocity": 1.5 * data - 0.5 * noise,
        "score": -noise / 0.8,
    }
    assert expected.keys() == set(PREDICTIONS)
    for kind, value in expected.items():
        assert_close(target(kind, data, noise, point), value)
    with pytest.raises(ConfigError, match="prediction 'noise': choose epsilon, x0, v, velocity, score"):
        target("noise", data, noise, point)
    with pytest.raises(ConfigError, match="these timesteps are discrete"):
        target("velocity", data, noise, Point(alpha, sigma))


@pytest.mark.parametrize("path", PATHS)
def test_rates_are_the_derivatives_of_the_path(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    point = PATHS[path](t)
    for share, rate in zip(point[:2], point[2:], strict=True):
        (slope,) = torch.autograd.grad(share.sum(), t, retain_graph=True)
        assert_close(rate, slope)
    ends = PATHS[path](torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends.sigma, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=3e-5, rtol=0)
    torch.testing.assert_close(
        ends.alpha, torch.tensor([0.0066 if path == "vp" else 0.0, 1.0]).double(), atol=1e-4, rtol=0
    )
    if path != "linear":
        assert_close(point.alpha**2 + point.sigma**2, torch.ones_like(t))


def test_times_keep_away_from_what_is_singular():
    """SiT's intervals of training; and noise levels rise from data to noise in both objectives."""
    assert FlowMatching("vp").interval == FlowMatching("vp", "score").interval == (0.0, 1 - 1e-5)
    assert FlowMatching().interval == FlowMatching("gvp").interval == (0.0, 1.0)
    for prediction in ("score", "epsilon", "x0"):
        assert FlowMatching("linear", prediction).interval == (1e-3, 1 - 1e-3)
    for objective in (FlowMatching(), create_diffusion("", learn_sigma=False)):
        t = objective.times_at(torch.tensor([0.1, 0.5, 0.9]))
        point, levels = objective.at(t, 1), objective.noise_level(t)
        assert torch.equal((point.sigma / point.alpha).argsort(), levels.argsort())
        assert_close(levels.sort().values, torch.tensor([0.1, 0.5, 0.9]))


@pytest.mark.parametrize(("path", "prediction"), FLOWS)
def test_a_perfect_model_has_no_loss_and_reads_t(path, prediction):
    flow = FlowMatching(path, prediction)
    data, noise = torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    t = flow.times_at(torch.linspace(0.05, 0.95, 6))

    def model(x, seen):
        assert seen is t
        return target(prediction, data, noise, flow.at(seen, 4))

    losses = flow.training_losses(model, data, t, noise=noise)
    assert losses["loss"].shape == (6,)
    assert losses["loss"].max() < 1e-10
    assert flow.training_losses(lambda x, t: model(x, t) + 1, data, t, noise=noise)["loss"].min() > 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["score", "epsilon", "x0"])
def test_weightings_are_those_of_sit(path, prediction):
    """ "velocity" makes any prediction's loss the velocity's, "likelihood" has SiT's weight of the noise's error."""
    data, noise, wrong = torch.randn(3, 5, 2, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
    point = FlowMatching(path).at(t, 4)
    x = point.alpha * data + point.sigma * noise
    answer = target(prediction, data, noise, point) + wrong

    def error(kind: str) -> torch.Tensor:
        return ((convert(answer, x, point, prediction, kind) - target(kind, data, noise, point)) ** 2).mean(
            dim=(1, 2, 3)
        )

    def loss(weighting: str) -> torch.Tensor:
        flow = FlowMatching(path, prediction, weighting)
        return flow.training_losses(lambda x, t: answer, data, t, noise=noise)["loss"]

    assert_close(loss("velocity"), error("velocity"))
    alpha, sigma, alpha_rate, sigma_rate = (part.flatten() for part in point)
    drift = alpha_rate / alpha * sigma**2 - sigma * sigma_rate
    assert_close(loss("likelihood"), drift / sigma**2 * error("epsilon"))
    assert_close(loss("none"), error("epsilon" if prediction == "score" else prediction))


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [
        ("x0", lambda snr: min(snr, 5)),
        ("epsilon", lambda snr: min(snr, 5) / snr),
        ("v", lambda snr: min(snr, 5) / (snr + 1)),
    ],
)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_min_snr_weights(prediction, weight, learn_sigma):
    """Hang et al. 2023, section 3; the bound of a learned variance keeps its own weight."""
    options = {"prediction": prediction, "learn_sigma": learn_sigma}
    plain, weighted = create_diffusion("", **options), create_diffusion("", min_snr_gamma=5.0, **options)
    t = torch.tensor([0, 50, 200, 500, 999])
    data, noise, answer = torch.randn(3, 5, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    output = torch.cat([answer, 0 * answer], dim=1) if learn_sigma else answer
    losses = [
        process.training_losses(lambda x, t: output, data, t, noise=noise) for process in (plain, weighted)
    ]
    bars = plain.alphas_cumprod[t.numpy()]
    weights = torch.tensor([weight(snr) for snr in bars / (1 - bars)]).float()
    rest = losses[0]["loss"] - losses[0]["mse"]
    assert_close(losses[1]["loss"], weights * losses[0]["mse"] + rest)
    assert_close(losses[1]["mse"], losses[0]["mse"])


def test_the_direction_loss_is_the_angle_to_the_velocity():
    flow, x = FlowMatching("gvp", direction_loss=True), samples(200).float()
    noise, t = torch.randn(x.shape), torch.linspace(0, 1, 200)
    wanted = target("velocity", x, noise, flow.at(t, 4))
    half_turned = torch.stack([wanted[:, 0, 0], -wanted[:, 0, 1]], dim=1)[:, None]
    terms = flow.training_losses(lambda x, t: half_turned.view(x.shape), x, t, noise=noise)
    # One channel: the cosine is the sign, 1 where the place is kept and -1 where it is turned.
    assert_close(terms["direction"], 1.0)
    assert_close(terms["loss"], terms["mse"] + 1)
    # Over channels, of any length: the first place's answer is at 60 degrees, the second's right.
    data, noise = torch.zeros(1, 2, 1, 2), torch.tensor([[[[-1.0, -1.0]], [[0.0, 0.0]]]])
    answer = torch.tensor([[[[3 * 0.5, 7.0]], [[3 * 0.75**0.5, 0.0]]]])
    flow = FlowMatching(direction_loss=True)
    terms = flow.training_losses(lambda x, t: answer, data, torch.tensor([0.5]), noise=noise)
    assert_close(terms["direction"].item(), 0.25, FEW, scale=1.0)


def test_x0s_velocity_weight_is_bounded():
    flow = FlowMatching("linear", "x0", "velocity")
    t = torch.tensor([0.5, 0.95, 0.999])
    zeros = torch.zeros(3, 1, 1, 1)
    loss = flow.training_losses(lambda x, t: x * 0 + 1, zeros, t, noise=zeros)["loss"]
    assert_close(loss, torch.tensor([4.0, 400.0, 400.0]))


@pytest.mark.parametrize(("path", "prediction"), FLOWS)
def test_likelihood_is_that_of_the_data(path, prediction):
    """By the ODE with the exact trace, against the normal density: within 1 % for each sample, whatever the model."""
    flow = FlowMatching(path, prediction)
    x = samples(16)
    exact = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(x.flatten(1))
    found = log_likelihood(flow, optimal_model(flow), x, steps=200, probes=None)
    assert (found - exact).abs().max() < 0.01 * exact.abs().mean()
    assert abs(found.mean() / exact.mean() - 1) < 0.01
    bits = bits_per_dim(found, 2)
    assert_close(bits, -found / (2 * math.log(2)) - math.log2(2 / 255))


def test_hutchinson_s_estimate_has_the_mean_of_the_trace():
    flow = FlowMatching()
    x = samples(1).expand(512, *SHAPE)
    exact = log_likelihood(flow, optimal_model(flow), x[:1], steps=40, probes=None)
    estimate = log_likelihood(flow, optimal_model(flow), x, steps=40, probes=1, seed=5)
    error = estimate.std() / math.sqrt(512)
    assert error > 0.003, "one probe of a matrix that is not diagonal has variance"
    assert abs(estimate.mean() - exact) < 4 * error
    many = log_likelihood(flow, optimal_model(flow), x, steps=40, probes=16, seed=5)
    assert many.std() < 0.4 * estimate.std()
    assert abs(many.mean() - exact) < 4 * many.std() / math.sqrt(512)
    again = log_likelihood(flow, optimal_model(flow), x[:8], steps=40, probes=1, seed=5)
    assert_close(again, estimate[:8])
    with pytest.raises(ConfigError, match="steps 0, probes 1"):
        log_likelihood(flow, optimal_model(flow), x, steps=0)


def test_diffusion_bound_is_its_exact_value():
    """calc_bpd_loop of the optimal model against expectations in closed form (the first term by quadrature)."""
    variance, mean = 0.04, 0.1
    process = create_diffusion("", learn_sigma=False, sigma_small=True, diffusion_steps=100)
    bars = process.alphas_cumprod

    def model(x, t):
        bar = torch.from_numpy(bars)[t].float().view(-1, 1, 1, 1)
        total = bar * variance + 1 - bar
        data = mean + bar.sqrt() * variance / total * (x - bar.sqrt() * mean)
        return (x - bar.sqrt() * data) / (1 - bar).sqrt()

    x = mean + math.sqrt(variance) * torch.randn(64, 1, 24, 24, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    found = process.calc_bpd_loop(model, x, clip_denoised=False)

    # x_0 given x_t varies by this much; the divergence of equal variances is the squared distance of the means.
    residual = variance * (1 - bars) / (bars * variance + 1 - bars)
    divergence = (
        process.posterior_mean_coef1**2 * residual / (2 * np.maximum(process.posterior_variance, 1e-30))
    )
    terms = divergence / math.log(2)
    # At t = 0 the model's Gaussian has mean E[x_0 | x_1] and the clipped variance.
    scale = math.exp(0.5 * process.posterior_log_variance_clipped[0])
    offset = math.sqrt(residual[0]) * np.linspace(-8, 8, 4001)
    density = np.exp(-0.5 * np.linspace(-8, 8, 4001) ** 2)
    edges = [
        0.5 * (1 + torch.erf(torch.from_numpy((offset + s / 255) / scale / math.sqrt(2)))).numpy()
        for s in (1, -1)
    ]
    terms[0] = -(density * np.log(np.maximum(edges[0] - edges[1], 1e-12))).sum() / density.sum() / math.log(2)
    prior = (
        0.5 * ((bars[-1] * (variance + mean**2)) + (1 - bars[-1]) - 1 - math.log(1 - bars[-1])) / math.log(2)
    )
    assert found["total_bpd"].mean().item() == pytest.approx(terms.sum() + prior, rel=0.01)
    assert found["prior_bpd"].mean().item() == pytest.approx(prior, rel=0.05)
    # And it bounds the entropy of the discretised data from above.
    entropy = 0.5 * math.log2(2 * math.pi * math.e * variance) - math.log2(2 / 255)
    assert entropy < found["total_bpd"].mean().item() < 1.3 * entropy


def denoiser(schedule):
    """The optimal x_0 by way of the model's answer, at each node."""
    a, b = schedule.data_coefficients

    def denoise(x, i):
        alpha, sigma = schedule.alphas[i], schedule.sigmas[i]
        parts = (
            (alpha, sigma)
            if schedule.rates is None
            else (alpha, sigma, schedule.rates[0][i], schedule.rates[1][i])
        )
        point = Point(*(torch.tensor(part, dtype=torch.float64) for part in parts))
        answer = target(schedule.prediction, *expected(x, alpha, sigma), point)
        return Denoised(a[i] * x + b[i] * answer)

    return denoise


@pytest.mark.parametrize(("path", "prediction"), FLOWS)
@pytest.mark.parametrize(("solver", "order"), [(solvers.ddim, 1), (solvers.straight_heun, 2)])
def test_the_ode_s_error_falls_at_the_solver_s_order(solver, order, path, prediction):
    """From noise to data on the whole path, on which each sample keeps its place in units of the spread."""
    start = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    variances, axes = torch.linalg.eigh(COVARIANCE)

    def error(steps: int) -> float:
        schedule = flow_schedule(steps, path=path, prediction=prediction)
        alpha, sigma = schedule.alphas[0], schedule.sigmas[0]
        places = (start.flatten(1) - alpha * MEAN) @ axes / (alpha**2 * variances + sigma**2).sqrt()
        exact = MEAN + places * variances.sqrt() @ axes.T
        *_, x = solver(denoiser(schedule), start, schedule)
        return (x.flatten(1) - exact).abs().max().item()

    errors = [error(steps) for steps in (20, 40, 80, 160)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert abs(orders[-1] - order) < 0.25, (errors, orders)
    assert errors[-1] < (0.03 if order == 1 else 1e-3)


@pytest.mark.parametrize(
    ("path", "form", "last_step"),
    [
        *(("linear", form, "mean") for form in solvers.DIFFUSION_FORMS if form not in ("constant", "sbdm")),
        *(("linear", "sigma", last_step) for last_step in solvers.LAST_STEPS if last_step != "mean"),
        ("linear", "constant", "tweedie"),
        ("gvp", "sigma", "mean"),
        ("vp", "sbdm", "mean"),
    ],
)
def test_the_sde_has_the_mean_and_covariance_of_the_data(path, form, last_step):
    count = 10_000
    generator = torch.Generator().manual_seed(6)
    # An SDE that is still noisy at the end loses what a last step without noise would have added.
    length = {"none": 0.004, "mean": 0.01 if path == "vp" else 0.04}.get(last_step, 0.04)
    options = {"end": 1 - length} if last_step == "none" else {"last_step": length}
    schedule = flow_schedule(250, path=path, **options)
    x = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)

    def noise(i):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    *_, x = solvers.sde(denoiser(schedule), x, schedule, noise, form=form, last_step=last_step)
    flat = x.flatten(1)
    # Four standard errors, and the bias of a discretisation in 250 steps.
    assert (flat.mean(0) - MEAN).abs().max() < 4 * math.sqrt(0.3 / count) + 0.01
    assert (torch.cov(flat.T) - COVARIANCE).abs().max() < 4 * 0.3 * math.sqrt(2 / count) + 0.02


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", solvers.DIFFUSION_FORMS)
def test_steps_of_the_sde_are_by_its_equation(path, form):
    """With SiT's w and last steps, which moments do not tell: they are the same for every w."""
    start, *draws = torch.randn(5, 2, *SHAPE, generator=torch.Generator().manual_seed(7)).double()
    for last_step in solvers.LAST_STEPS:
        schedule = flow_schedule(4, path=path, start=0.1, last_step=0.04)
        ends = [*schedule.times, 1.0]
        assert ends[-2:] == pytest.approx([0.96, 1.0])
        if last_step == "none":
            schedule = flow_schedule(3, path=path, start=0.1, end=0.96)
        denoise = denoiser(flow_schedule(4, path=path, start=0.1, last_step=0.04))
        x = start
        for i, (t, end) in enumerate(itertools.pairwise(ends)):
            alpha, sigma, alpha_rate, sigma_rate = PATHS[path](torch.tensor(t, dtype=torch.float64))
            weight = {
                "constant": 1.0,
                "sbdm": float(alpha_rate / alpha * sigma**2 - sigma * sigma_rate),
                "sigma": float(sigma),
                "linear": 1 - t,
                "decreasing": 0.25 * (math.cos(math.pi * t) + 1) ** 2,
                "increasing-decreasing": math.sin(math.pi * t) ** 2,
            }[form]
            data = denoise(x, i).data
            noise = (x - alpha * data) / sigma
            velocity, score = alpha_rate * data + sigma_rate * noise, -noise / sigma
            drift = x + (end - t) * (velocity + weight * score)
            if i < 3:
                x = drift + math.sqrt(2 * weight * (end - t)) * draws[i]
            else:
                x = {
                    "mean": drift,
                    "euler": x + (end - t) * velocity,
                    "tweedie": (x + sigma**2 * score) / alpha,
                    "none": x,
                }[last_step]
        *_, found = solvers.sde(denoise, start, schedule, draws.__getitem__, form=form, last_step=last_step)
        torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_sampling_begins_and_ends_as_sit_s():
    def ends(solver: str, path: str = "linear", prediction: str = "velocity") -> list[float]:
        objective = {"objective": "flow", "path": path, "prediction": prediction}
        times = sampling_schedule(objective, 10, solver, learn_sigma=False).times
        return [times[0], times[-1]]

    assert ends("ddim") == ends("euler") == pytest.approx([0.0, 0.9])
    assert ends("sde-sigma") == pytest.approx([0.0, 0.96])
    assert ends("sde-sbdm") == pytest.approx([0.001, 0.96])
    for prediction in ("epsilon", "score"):
        assert ends("heun", "gvp", prediction) == pytest.approx([0.001, 0.001 + 0.9 * 0.998])
        assert ends("heun", "vp", prediction)[0] == 0
    # Esser et al. 2024, equation 23, of noise levels 1, 3/4, 1/2 and 1/4.
    assert flow_schedule(4, shift=3.0).levels.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5])


def test_what_cannot_be_is_refused():
    for options, line in (
        ({"path": "cubic"}, "path 'cubic' is not of flow matching: choose linear, gvp, vp"),
        ({"prediction": "v"}, "prediction 'v' is not of flow matching: choose velocity, score, epsilon, x0"),
        ({"loss_weighting": "min-snr"}, "loss weighting 'min-snr' is not of flow matching"),
        ({"loss_weighting": "likelihood"}, "a model of the velocity takes none"),
    ):
        with pytest.raises(ConfigError, match=line):
            FlowMatching(**options)
    for options, line in (
        ({"prediction": "velocity"}, "prediction 'velocity' does not apply to diffusion in discrete steps"),
        ({"min_snr_gamma": 0.0}, r"min-SNR gamma 0\.0: choose a number above 0"),
        ({"min_snr_gamma": 5.0, "use_kl": True}, "the bound has its own weights"),
    ):
        with pytest.raises(ConfigError, match=line):
            create_diffusion("", **options)
    flow, zeros = FlowMatching(), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ConfigError, match=r"the model returned \(2, 3, 2, 2\) for x \(2, 1, 2, 2\)"):
        flow.training_losses(lambda x, t: torch.cat([x, x, x], 1), zeros, torch.zeros(2))
    with pytest.raises(ConfigError, match="must be shaped like the data"):
        flow.training_losses(lambda x, t: x, zeros, torch.zeros(2), noise=zeros[:1])
    with pytest.raises(ConfigError, match="for diffusion call calc_bpd_loop"):
        log_likelihood(create_diffusion(""), lambda x, t: x, zeros)
    schedule = flow_schedule(4, last_step=0.1)
    with pytest.raises(ConfigError, match="diffusion form sbdm is infinite at alpha 0"):
        next(solvers.sde(denoiser(schedule), zeros, schedule, lambda i: zeros, form="sbdm"))
    with pytest.raises(ConfigError, match="choose constant, sbdm"):
        next(solvers.sde(denoiser(schedule), zeros, schedule, lambda i: zeros, form="cubic"))
    with pytest.raises(ConfigError, match=r"last step 1\.5: choose a length in t above 0 and below 1"):
        flow_schedule(4, last_step=1.5)
