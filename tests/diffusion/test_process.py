"""The forward and reverse processes and their losses against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_fast.diffusion import create_diffusion
from dit_fast.diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
    mean_flat,
)
from dit_fast.errors import ConfigError
from tests.tolerance import FEW, assert_close, largest, rounding

SHAPE = (5, 3, 4, 4)


def process(
    steps: int = 20,
    mean: ModelMeanType = ModelMeanType.EPSILON,
    variance: ModelVarType = ModelVarType.LEARNED_RANGE,
    loss: LossType = LossType.MSE,
) -> GaussianDiffusion:
    betas = get_named_beta_schedule("squaredcos_cap_v2", steps)
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=variance, loss_type=loss)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answering(output: Tensor):
    return lambda x, t, **kwargs: output


def spread(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


T_ALL = torch.tensor([0, 1, 7, 18, 19])

MEANS = FEW + 48
"""And the mean over a sample's 48 values."""
BITS = 8
"""The size of what cancels in a term of the bound: logarithms of variances, which reach 5.2 nats or 7.4 bits."""


def test_forward_moments_follow_the_product_of_alphas():
    diffusion, x, noise = process(), normal(0, *SHAPE), normal(1, *SHAPE)
    alpha_bar = np.array([np.prod(1 - diffusion.betas[: t + 1]) for t in T_ALL])
    mean, variance, log_variance = diffusion.q_mean_variance(x, T_ALL)
    assert_close(mean, spread(np.sqrt(alpha_bar)) * x.numpy(), FEW)
    assert variance.shape == log_variance.shape == x.shape
    assert_close(list(variance[:, 0, 0, 0]), list(1 - alpha_bar), FEW, dtype=torch.float32)
    assert_close(list(log_variance[:, 0, 0, 0]), list(np.log(1 - alpha_bar)), FEW, dtype=torch.float32)
    expected = spread(np.sqrt(alpha_bar)) * x.numpy() + spread(np.sqrt(1 - alpha_bar)) * noise.numpy()
    assert_close(diffusion.q_sample(x, T_ALL, noise), expected, FEW)


def test_posterior_is_bayes_rule():
    """N(x_{t-1}; sqrt(abar) x_0, 1 - abar) times N(x_t; sqrt(1 - beta) x_{t-1}, beta), normalised."""
    diffusion = process()
    t = torch.arange(1, 20)
    x_start, x_t = normal(0, 19, 1), normal(1, 19, 1)
    beta, alpha_bar = diffusion.betas[1:, None], diffusion.alphas_cumprod[:-1, None]
    precision = 1 / (1 - alpha_bar) + (1 - beta) / beta
    mean = (
        np.sqrt(alpha_bar) * x_start.numpy() / (1 - alpha_bar) + np.sqrt(1 - beta) * x_t.numpy() / beta
    ) / precision
    got_mean, got_variance, got_log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    assert_close(got_mean, mean, FEW)
    # Each by itself: the smallest is a thousandth of the largest.
    assert_close(list(got_variance), list(1 / precision), FEW, dtype=torch.float32)
    assert_close(list(got_log_variance), list(-np.log(precision)), FEW, dtype=torch.float32)


def test_first_posterior_is_the_data_with_the_second_variance_in_the_logarithm():
    diffusion, x = process(), normal(0, *SHAPE)
    t = torch.zeros(5, dtype=torch.int64)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x, normal(1, *SHAPE), t)
    assert_close(mean, x, FEW)
    assert variance.abs().max() == 0
    assert_close(log_variance, float(np.log(diffusion.posterior_variance[1])), FEW)


def test_x_start_and_noise_predict_each_other():
    diffusion, x, noise = process(), normal(0, *SHAPE), normal(1, *SHAPE)
    t = torch.tensor([0, 1, 7, 12, 15])
    x_t = diffusion.q_sample(x, t, noise)
    # Solving for the data or the noise divides the error of x_t by its coefficient there.
    bars = diffusion.alphas_cumprod[t].min(), 1 - diffusion.alphas_cumprod[t].max()
    found = diffusion._predict_xstart_from_eps(x_t, t, noise), diffusion._predict_eps_from_xstart(x_t, t, x)
    for one, expected, bar in zip(found, (x, noise), bars, strict=True):
        assert_close(one, expected, FEW, scale=largest(x_t) / bar**0.5)


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
def test_a_perfect_model_of_each_kind_gives_the_true_posterior(mean_type):
    diffusion = process(mean=mean_type, variance=ModelVarType.FIXED_SMALL)
    x, noise, t = normal(0, *SHAPE), normal(1, *SHAPE), torch.tensor([0, 1, 7, 12, 15])
    x_t = diffusion.q_sample(x, t, noise)
    expected, _, log_variance = diffusion.q_posterior_mean_variance(x, x_t, t)
    bars = torch.from_numpy(diffusion.alphas_cumprod).float()[t].view(-1, 1, 1, 1)
    target = {
        ModelMeanType.EPSILON: noise,
        ModelMeanType.START_X: x,
        ModelMeanType.PREVIOUS_X: expected,
        ModelMeanType.V: bars.sqrt() * noise - (1 - bars).sqrt() * x,
    }[mean_type]
    out = diffusion.p_mean_variance(answering(target), x_t, t, clip_denoised=False)
    # What the data is solved for from divides its error by the coefficient: of the data, or in the posterior's mean.
    least = {
        ModelMeanType.EPSILON: bars.min().sqrt(),
        ModelMeanType.PREVIOUS_X: diffusion.posterior_mean_coef1[t].min(),
    }.get(mean_type, 1.0)
    size = max(largest(x_t), largest(expected)) / float(least)
    assert_close(out["pred_xstart"], x, FEW, scale=size)
    assert_close(out["mean"], expected, FEW, scale=size)
    assert_close(out["log_variance"], log_variance, FEW)
    losses = diffusion.training_losses(answering(target), x, t, noise=noise)
    assert set(losses) == {"mse", "loss"}
    # The square of what rounding leaves.
    assert losses["loss"].max() <= (rounding(FEW) * size) ** 2


def test_learned_range_interpolates_between_the_bounds():
    diffusion, x = process(), normal(0, *SHAPE)
    upper = np.log(diffusion.betas[T_ALL])
    lower = diffusion.posterior_log_variance_clipped[T_ALL]
    for value, fraction in ((-1.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.5, 0.75), (3.0, 2.0)):
        output = torch.cat([x, torch.full_like(x, value)], dim=1)
        out = diffusion.p_mean_variance(answering(output), x, T_ALL)
        expected = fraction * upper + (1 - fraction) * lower
        assert_close(out["log_variance"][:, 1, 2, 3], expected, FEW)
        # Relative to a variance, the error of its logarithm.
        error = out["variance"][:, 1, 2, 3].double().numpy() / np.exp(expected) - 1
        assert largest(error) <= rounding(FEW) * largest(expected)


def test_other_variances():
    x = normal(0, *SHAPE)
    large = process(variance=ModelVarType.FIXED_LARGE).p_mean_variance(answering(x), x, T_ALL)
    diffusion = process(variance=ModelVarType.FIXED_SMALL)
    small = diffusion.p_mean_variance(answering(x), x, T_ALL)
    expected = diffusion.betas[T_ALL].copy()
    expected[0] = diffusion.posterior_variance[1]
    for out in (large, small):
        assert out["variance"].shape == out["log_variance"].shape == x.shape
    assert_close(large["variance"][:, 0, 0, 0], expected, FEW)
    assert_close(large["log_variance"][:, 0, 0, 0], np.log(expected), FEW)
    assert_close(small["variance"][:, 0, 0, 0], diffusion.posterior_variance[T_ALL], FEW)
    learned = process(variance=ModelVarType.LEARNED).p_mean_variance(
        answering(torch.cat([x, x - 2], dim=1)), x, T_ALL
    )
    assert_close(learned["log_variance"], x - 2, FEW)
    assert_close(learned["variance"], torch.exp(x - 2), FEW)


def test_denoised_fn_comes_before_clipping_and_extra_is_handed_on():
    diffusion, x = process(mean=ModelMeanType.START_X, variance=ModelVarType.FIXED_SMALL), normal(0, *SHAPE)
    out = diffusion.p_mean_variance(
        lambda x, t, scale: (scale * x, "attention maps"),
        x,
        T_ALL,
        denoised_fn=lambda x_start: x_start + 10,
        model_kwargs={"scale": 0.1},
    )
    assert out["extra"] == "attention maps"
    assert (out["pred_xstart"] == 1).all()
    unclipped = diffusion.p_mean_variance(answering(3 * x), x, T_ALL, clip_denoised=False)
    assert_close(unclipped["pred_xstart"], 3 * x, FEW)
    assert unclipped["extra"] is None


def bound_in_float64(
    diffusion: GaussianDiffusion, x_start: np.ndarray, x_t: np.ndarray, t: int, eps: np.ndarray, v: np.ndarray
) -> tuple[float, np.ndarray]:
    """One sample's term of the variational bound, from the betas and the papers' equations alone."""
    betas = diffusion.betas
    alpha_bar = np.cumprod(1 - betas)
    previous = alpha_bar[t - 1] if t else 1.0
    beta = betas[t]

    def variance_at(i: int) -> float:
        return betas[i] * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i])

    def posterior_mean(x_0: np.ndarray) -> np.ndarray:
        return (np.sqrt(previous) * beta * x_0 + np.sqrt(1 - beta) * (1 - previous) * x_t) / (
            1 - alpha_bar[t]
        )

    true_log_variance = np.log(variance_at(max(t, 1)))
    pred_xstart = (x_t - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])
    mean = posterior_mean(pred_xstart)
    log_variance = (v + 1) / 2 * np.log(beta) + (1 - v) / 2 * true_log_variance
    if t:
        variance, true_variance = np.exp(log_variance), np.exp(true_log_variance)
        nats = 0.5 * (
            log_variance
            - true_log_variance
            + (true_variance + (posterior_mean(x_start) - mean) ** 2) / variance
            - 1
        )
        return nats.mean() / np.log(2), pred_xstart

    def distribution(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    sigma = np.exp(0.5 * log_variance)
    upper = np.where(x_start > 0.999, 1.0, distribution((x_start - mean + 1 / 255) / sigma))
    lower = np.where(x_start < -0.999, 0.0, distribution((x_start - mean - 1 / 255) / sigma))
    return -np.log(np.maximum(upper - lower, 1e-12)).mean() / np.log(2), pred_xstart


def test_training_losses_against_float64():
    diffusion = process()
    x_start = (normal(0, *SHAPE) * 0.5).clamp(-1, 1)
    noise, eps, v = normal(1, *SHAPE), normal(2, *SHAPE) * 0.1, normal(3, *SHAPE).tanh()
    eps = noise + eps
    terms = diffusion.training_losses(answering(torch.cat([eps, v], dim=1)), x_start, T_ALL, noise=noise)
    x_t = diffusion.q_sample(x_start, T_ALL, noise)
    expected = [
        bound_in_float64(
            diffusion,
            *(a[i].double().numpy() for a in (x_start, x_t)),
            int(t),
            *(a[i].double().numpy() for a in (eps, v)),
        )[0]
        for i, t in enumerate(T_ALL)
    ]
    assert_close(list(terms["vb"]), expected, MEANS, scale=BITS, dtype=torch.float32)
    assert_close(list(terms["mse"]), list(((eps - noise) ** 2).mean(dim=(1, 2, 3))), MEANS)
    assert_close(terms["loss"], terms["mse"] + terms["vb"], FEW)

    model = answering(torch.cat([eps, v], dim=1))
    kinds = {
        kind: process(loss=kind).training_losses(model, x_start, T_ALL, noise=noise) for kind in LossType
    }
    assert_close(list(kinds[LossType.KL]["loss"]), list(terms["vb"]), FEW)
    assert_close(list(kinds[LossType.RESCALED_KL]["loss"]), list(20 * terms["vb"]), FEW)
    assert_close(list(kinds[LossType.RESCALED_MSE]["vb"]), list(terms["vb"] * 20 / 1000), FEW)
    assert set(kinds[LossType.KL]) == {"loss"}


def test_the_bound_trains_the_variance_only():
    output = normal(2, 5, 6, 4, 4).requires_grad_()
    terms = process().training_losses(answering(output), normal(0, *SHAPE), T_ALL, noise=normal(1, *SHAPE))
    (of_bound,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (of_error,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert of_bound[:, :3].abs().max() == 0
    assert of_bound[:, 3:].abs().min() > 0
    assert of_error[:, 3:].abs().max() == 0
    assert_close(of_error[:, :3], 2 * (output[:, :3] - normal(1, *SHAPE)).detach() / 48, FEW)


def test_whole_bound_is_the_sum_of_its_terms():
    diffusion = process(6)
    x_start = (normal(0, *SHAPE) * 0.5).clamp(-1, 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.9 * x, 0.3 * x], dim=1)

    torch.manual_seed(3)
    out = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False)
    torch.manual_seed(3)
    for column, t in enumerate(reversed(range(6))):
        noise = torch.randn_like(x_start)
        x_t = diffusion.q_sample(x_start, torch.full((5,), t), noise)
        for row in range(5):
            arrays = (x_start[row].double().numpy(), x_t[row].double().numpy())
            bits, pred = bound_in_float64(diffusion, *arrays, t, 0.9 * arrays[1], 0.3 * arrays[1])
            assert_close(out["vb"][row, column], bits, MEANS, scale=max(BITS, bits))
            assert_close(out["xstart_mse"][row, column], ((pred - arrays[0]) ** 2).mean(), MEANS)
            # The noise is solved for from the data, a difference of values of this size.
            squares = ((0.9 * arrays[1] - noise[row].double().numpy()) ** 2).mean()
            size = 1 / (1 - diffusion.alphas_cumprod[t])
            assert_close(out["mse"][row, column], squares, MEANS, scale=size)
    assert_close(out["total_bpd"], out["vb"].sum(dim=1) + out["prior_bpd"], FEW)
    torch.manual_seed(3)
    draws = {t: torch.randn_like(x_start) for t in reversed(range(6))}
    again = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False, noise=draws.__getitem__)
    assert torch.equal(again["total_bpd"], out["total_bpd"])


def test_prior_term_is_the_divergence_from_the_standard_normal():
    diffusion = GaussianDiffusion(
        betas=[0.05] * 4,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.KL,
    )
    x, alpha_bar = normal(0, *SHAPE), 0.95**4
    prior = 0.5 * (alpha_bar * x**2 - alpha_bar - np.log(1 - alpha_bar))
    assert_close(diffusion._prior_bpd(x), mean_flat(prior) / np.log(2), MEANS)
    out = diffusion.calc_bpd_loop(answering(x), x)
    assert_close(out["prior_bpd"], mean_flat(prior) / np.log(2), MEANS)
    assert prior.mean() > 0.1, "a prior that the whole bound cannot do without"
    assert_close(out["total_bpd"], out["vb"].sum(dim=1) + out["prior_bpd"], FEW)


def test_ancestral_step_adds_noise_by_the_log_variance_except_at_the_end():
    diffusion, x = process(variance=ModelVarType.FIXED_SMALL), normal(0, *SHAPE)
    out = diffusion.p_mean_variance(answering(x), x, T_ALL)
    torch.manual_seed(5)
    step = diffusion.p_sample(answering(x), x, T_ALL)
    torch.manual_seed(5)
    noise = torch.randn_like(x)
    noise[0] = 0
    assert_close(step["sample"], out["mean"] + out["variance"].sqrt() * noise, FEW)


def test_ddim_with_eta_one_is_ancestral_sampling():
    """DDIM, section 4.1: eta = 1 has the posterior's mean and variance."""
    diffusion = process(variance=ModelVarType.FIXED_SMALL)
    x, t = normal(0, *SHAPE), torch.tensor([0, 1, 5, 10, 15])
    torch.manual_seed(5)
    ancestral = diffusion.p_sample(answering(x.tanh()), x, t, clip_denoised=False)["sample"]
    torch.manual_seed(5)
    ddim = diffusion.ddim_sample(answering(x.tanh()), x, t, clip_denoised=False, eta=1.0)["sample"]
    # Data predicted from noise, and noise from it, are of the size of x over the data's coefficient.
    size = largest(x) / float(diffusion.alphas_cumprod[t].min()) ** 0.5
    assert_close(ddim, ancestral, FEW, scale=size)


def test_ddim_reverse_inverts_ddim():
    """Where the model does not look at x both directions follow one line exactly."""
    diffusion = process(variance=ModelVarType.FIXED_SMALL)
    x, eps = normal(0, *SHAPE), normal(1, *SHAPE)
    for i in range(14):
        t = torch.full((5,), i)
        later = diffusion.ddim_reverse_sample(answering(eps), x, t, clip_denoised=False)["sample"]
        back = diffusion.ddim_sample(answering(eps), later, t + 1, clip_denoised=False)["sample"]
        # There and back over the data, whose error is that of x over its coefficient.
        assert_close(back, x, 2 * FEW, scale=largest(later) / float(diffusion.alphas_cumprod[i + 1]) ** 0.5)
        x = later
    with pytest.raises(ConfigError, match=r"eta must be 0, not 0\.5"):
        diffusion.ddim_reverse_sample(answering(eps), x, t, eta=0.5)
    with pytest.raises(ConfigError, match=r"between 0 .* not 1\.5"):
        diffusion.ddim_sample(answering(eps), x, t, eta=1.5)


def test_ddim_loop_finds_the_x_start_that_constant_noise_implies():
    diffusion = create_diffusion("ddim10", learn_sigma=False)
    eps, x = normal(1, *SHAPE), normal(0, *SHAPE)
    sample = diffusion.ddim_sample_loop(answering(eps), SHAPE, noise=x, clip_denoised=False)
    alpha_bar = diffusion.alphas_cumprod[-1]
    expected = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    # Ten steps; the data that is solved for at the first one is of this size.
    assert_close(sample, expected, 10 * FEW, scale=largest(x) / math.sqrt(alpha_bar))


def test_classifier_guidance_moves_the_mean_and_the_score():
    diffusion = create_diffusion("4", learn_sigma=False, sigma_small=True)
    x, gradient = normal(0, 4, 3, 4, 4), normal(2, 4, 3, 4, 4)
    t = torch.tensor([0, 1, 2, 3])
    seen = []

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((t.tolist(), y))
        return gradient

    def model(x: Tensor, t: Tensor, y: str) -> Tensor:
        return x.tanh()

    arguments = {"clip_denoised": False, "model_kwargs": {"y": "label"}}
    plain = diffusion.p_mean_variance(model, x, t, **arguments)
    torch.manual_seed(1)
    unguided = diffusion.p_sample(model, x, t, **arguments)["sample"]
    torch.manual_seed(1)
    guided = diffusion.p_sample(model, x, t, cond_fn=cond_fn, **arguments)["sample"]
    assert_close(guided - unguided, plain["variance"] * gradient, FEW, scale=largest(guided))

    scored = diffusion.condition_score(cond_fn, plain, x, t, model_kwargs={"y": "label"})
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod).float().view(4, 1, 1, 1)
    shift = (1 - alpha_bar) / alpha_bar.sqrt() * gradient
    size = largest(scored["pred_xstart"])
    assert_close(scored["pred_xstart"] - plain["pred_xstart"], shift, FEW, scale=size)
    mean, _, _ = diffusion.q_posterior_mean_variance(scored["pred_xstart"], x, t)
    assert_close(scored["mean"], mean, FEW, scale=size)
    ddim = diffusion.ddim_sample(model, x, t, cond_fn=cond_fn, **arguments)
    assert_close(ddim["pred_xstart"], scored["pred_xstart"], FEW)
    reverse = diffusion.ddim_reverse_sample(model, x, t, cond_fn=cond_fn, **arguments)
    assert_close(reverse["pred_xstart"], scored["pred_xstart"], FEW)
    assert seen == [(diffusion.timestep_map, "label")] * 4
    assert diffusion.timestep_map == [0, 333, 666, 999]


def test_bad_shapes_are_named():
    diffusion, x = process(), normal(0, *SHAPE)
    with pytest.raises(
        ConfigError, match=r"returned \(5, 3, 4, 4\) .* learned variance it must return 6 channels"
    ):
        diffusion.p_mean_variance(answering(x), x, T_ALL)
    with pytest.raises(ConfigError, match="must return 6 channels"):
        diffusion.training_losses(answering(x), x, T_ALL)
    with pytest.raises(ConfigError, match=r"noise \(1, 3, 4, 4\)"):
        diffusion.q_sample(x, T_ALL, x[:1])
    with pytest.raises(ConfigError, match="one shape"):
        diffusion.q_posterior_mean_variance(x[:1], x, T_ALL)
    with pytest.raises(
        ConfigError, match=r"noise \(5, 3, 4, 4\) must have the requested shape \(2, 3, 4, 4\)"
    ):
        diffusion.p_sample_loop(answering(x), (2, 3, 4, 4), noise=x)
    with pytest.raises(ConfigError, match="no parameters, so that its device is unknown"):
        diffusion.p_sample_loop(answering(x), SHAPE)


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.1], [0.1, math.nan]])
def test_bad_betas(betas):
    with pytest.raises(ConfigError, match="betas must"):
        GaussianDiffusion(
            betas=betas,
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )
