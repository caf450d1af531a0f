"""Gaussian divergences and likelihoods against their closed forms."""

import math

import pytest
import torch

from dit_fast.diffusion.diffusion_utils import (
    approx_standard_normal_cdf,
    continuous_gaussian_log_likelihood,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from dit_fast.errors import ConfigError
from tests.tolerance import assert_close


def test_normal_kl_is_the_closed_form():
    mean1, mean2, sigma1, sigma2 = 0.3, -1.2, 0.7, 1.9
    expected = math.log(sigma2 / sigma1) + (sigma1**2 + (mean1 - mean2) ** 2) / (2 * sigma2**2) - 0.5
    double = torch.tensor(mean1, dtype=torch.float64)
    assert normal_kl(double, 2 * math.log(sigma1), mean2, 2 * math.log(sigma2)).item() == pytest.approx(
        expected
    )
    logvar = torch.tensor(2 * math.log(sigma2), dtype=torch.float64)
    assert normal_kl(mean1, 2 * math.log(sigma1), mean2, logvar).item() == pytest.approx(expected)
    assert normal_kl(torch.zeros(3), 0.0, 0.0, 0.0).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("mean", "sigma"), [(0.0, 0.05), (-0.4, 0.3), (0.97, 0.01), (1.5, 0.4), (0.2, 5.0)])
def test_discretised_likelihood_sums_to_one_over_the_bins(mean, sigma):
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_likelihood = discretized_gaussian_log_likelihood(
        bins, means=torch.full_like(bins, mean), log_scales=torch.full_like(bins, math.log(sigma))
    )
    assert log_likelihood.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    inner = log_likelihood[100].exp().item()
    edges = (bins[100] + torch.tensor([1, -1]) / 255 - mean) / sigma
    exact = 0.5 * (torch.erf(edges[0] / 2**0.5) - torch.erf(edges[1] / 2**0.5)).item()
    assert inner == pytest.approx(exact, abs=5e-4)


def test_normal_distribution_function_and_density():
    x = torch.linspace(-5, 5, 201, dtype=torch.float64)
    exact = 0.5 * (1 + torch.erf(x / 2**0.5))
    assert (approx_standard_normal_cdf(x) - exact).abs().max() < 3e-4
    z = torch.distributions.Normal(0.0, 1.0)
    got = continuous_gaussian_log_likelihood(x, means=x / 2, log_scales=torch.full_like(x, 0.3))
    assert_close(got, z.log_prob(x / 2 * math.exp(-0.3)))
    with pytest.raises(ConfigError, match="one shape"):
        discretized_gaussian_log_likelihood(x, means=x[:1], log_scales=x)
