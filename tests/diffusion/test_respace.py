"""Noise schedules, respacing and `create_diffusion`."""

import numpy as np
import pytest

from dit_fast.diffusion import create_diffusion, gaussian_diffusion
from dit_fast.diffusion.gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_beta_schedule,
    get_named_beta_schedule,
)
from dit_fast.diffusion.respace import SpacedDiffusion, space_timesteps
from dit_fast.errors import ConfigError


def test_linear_schedule():
    betas = get_named_beta_schedule("linear", 1000)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, 1e-4 + np.arange(1000) * (0.02 - 1e-4) / 999, rtol=1e-12)
    assert np.cumprod(1 - betas)[-1] == pytest.approx(4.036e-5, rel=1e-3)
    np.testing.assert_allclose(get_named_beta_schedule("linear", 50)[[0, -1]], [0.002, 0.4])


def test_cosine_schedule():
    betas = get_named_beta_schedule("squaredcos_cap_v2", 100)
    u = np.arange(101) / 100
    curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:99], (curve / curve[0])[1:100], rtol=1e-10)
    assert betas[-1] == 0.999
    np.testing.assert_allclose(
        betas_for_alpha_bar(4, lambda u: 1 - u / 2), 1 - np.array([7 / 8, 6 / 7, 5 / 6, 4 / 5])
    )


def test_older_schedules():
    def schedule(name: str) -> np.ndarray:
        return get_beta_schedule(name, beta_start=0.04, beta_end=0.25, num_diffusion_timesteps=10)

    np.testing.assert_allclose(schedule("linear"), np.linspace(0.04, 0.25, 10))
    np.testing.assert_allclose(np.sqrt(schedule("quad")), np.linspace(0.2, 0.5, 10))
    np.testing.assert_allclose(schedule("const"), 0.25)
    np.testing.assert_allclose(schedule("jsd"), [1 / n for n in range(10, 0, -1)])
    np.testing.assert_allclose(schedule("warmup10"), [0.04] + [0.25] * 9)
    np.testing.assert_allclose(schedule("warmup50"), [*np.linspace(0.04, 0.25, 5), *[0.25] * 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: get_named_beta_schedule("cosine", 10),
            "unknown noise schedule 'cosine'; known: linear, squared",
        ),
        (lambda: get_named_beta_schedule("linear", 10), "use at least 20 steps"),
        (lambda: get_named_beta_schedule("linear", 0), "give a whole number from 1"),
        (lambda: get_named_beta_schedule("linear", 10.5), "whole number"),
        (
            lambda: get_beta_schedule("x", beta_start=0.1, beta_end=0.1, num_diffusion_timesteps=3),
            "unknown beta schedule 'x'",
        ),
        (lambda: create_diffusion("", noise_schedule="sqrt"), "unknown noise schedule 'sqrt'"),
        (lambda: create_diffusion("1001"), "asks for 1001 steps of a section that has 1000"),
        (lambda: create_diffusion("10,500,10"), "asks for 500 steps of a section that has 333"),
        (
            lambda: create_diffusion("ddim999"),
            "no integer stride keeps 999 of 1000 steps; nearest: ddim500 or ddim1000",
        ),
        (lambda: create_diffusion("ddim2000"), "nearest: ddim1000$"),
        (lambda: create_diffusion("ddim1"), "nearest: ddim2$"),
        (lambda: create_diffusion("ddim0"), "keeps no step"),
        (lambda: create_diffusion("ddimx"), "is invalid at"),
        (lambda: create_diffusion("fast"), "is invalid at 'fast'"),
        (lambda: create_diffusion("10,,10"), "is invalid at ''"),
        (lambda: create_diffusion("-5"), "is invalid at"),
        (lambda: create_diffusion([2.5]), "is invalid at 2.5"),
        (lambda: create_diffusion("0"), "keeps no step"),
        (lambda: create_diffusion([]), "keeps no step"),
    ],
)
def test_bad_input_gets_one_line(call, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_counts_spread_evenly():
    kept = sorted(space_timesteps(1000, "250"))
    assert len(kept) == 250
    assert (kept[0], kept[-1]) == (0, 999)
    assert set(np.diff(kept)) == {4, 5}
    assert space_timesteps(1000, [250]) == space_timesteps(1000, 250) == set(kept)
    assert space_timesteps(1000, [1000]) == set(range(1000))
    assert space_timesteps(9, "1,3,2") == {0, 3, 4, 5, 6, 8}
    assert space_timesteps(5, "1,1") == {0, 3}
    sections = sorted(space_timesteps(300, "10,15,20"))
    assert [sum(lo <= t < lo + 100 for t in sections) for lo in (0, 100, 200)] == [10, 15, 20]
    assert {0, 99, 100, 199, 200, 299} <= set(sections)


def test_ddim_uses_the_smallest_stride_that_fits():
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    by_count: dict[int, set[int]] = {}
    for stride in range(1, 1000):
        kept = range(0, 1000, stride)
        by_count.setdefault(len(kept), set(kept))
    for count in range(1, 1001):
        if count in by_count:
            assert space_timesteps(1000, f"ddim{count}") == by_count[count]
        else:
            with pytest.raises(ConfigError):
                space_timesteps(1000, f"ddim{count}")


@pytest.mark.parametrize("respacing", ["", "250", "ddim25", "10,20,5", "1"])
def test_respaced_process_keeps_alpha_bar_at_kept_steps(respacing):
    original, spaced = create_diffusion(""), create_diffusion(respacing)
    assert spaced.timestep_map == sorted(spaced.use_timesteps)
    assert spaced.num_timesteps == len(spaced.betas) == len(spaced.timestep_map)
    assert spaced.original_num_steps == 1000
    np.testing.assert_allclose(
        spaced.alphas_cumprod, original.alphas_cumprod[spaced.timestep_map], rtol=1e-12
    )
    for name in ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1"):
        assert np.isfinite(getattr(spaced, name)).all()
        assert getattr(spaced, name).dtype == np.float64


def test_timesteps_outside_the_process():
    arguments = {
        "betas": [0.1] * 4,
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_SMALL,
        "loss_type": LossType.MSE,
    }
    assert SpacedDiffusion([3, 1], **arguments).timestep_map == [1, 3]
    with pytest.raises(ConfigError, match=r"0\.\.3; found 0 to 4"):
        SpacedDiffusion([0, 4], **arguments)
    with pytest.raises(ConfigError, match="no timestep"):
        SpacedDiffusion([], **arguments)


def test_options_of_create_diffusion():
    def kinds(**options: object) -> tuple[ModelMeanType, ModelVarType, LossType]:
        diffusion = create_diffusion(None, **options)
        return diffusion.model_mean_type, diffusion.model_var_type, diffusion.loss_type

    mean, variance = ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE
    assert kinds() == (mean, variance, LossType.MSE)
    assert kinds(use_kl=True) == (mean, variance, LossType.RESCALED_KL)
    assert kinds(rescale_learned_sigmas=True) == (mean, variance, LossType.RESCALED_MSE)
    assert kinds(predict_xstart=True) == (ModelMeanType.START_X, variance, LossType.MSE)
    assert kinds(learn_sigma=False) == (mean, ModelVarType.FIXED_LARGE, LossType.MSE)
    assert kinds(learn_sigma=False, sigma_small=True) == (mean, ModelVarType.FIXED_SMALL, LossType.MSE)
    assert create_diffusion("", diffusion_steps=40).num_timesteps == 40
    assert [kind.is_vb() for kind in LossType] == [False, False, True, True]
    assert gaussian_diffusion.GaussianDiffusion in SpacedDiffusion.__mro__
