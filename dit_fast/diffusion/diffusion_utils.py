"""Gaussian divergences and likelihoods, elementwise and in nats, and small tensor helpers."""

import math

import torch
from torch import Tensor

from dit_fast.errors import ConfigError

# Half the distance between neighboring gray levels when 0..255 is mapped to [-1, 1].
_HALF_BIN = 1.0 / 255.0
# Beyond this magnitude a value belongs to the first or the last gray level, whose bin is open.
_OPEN_BIN = 0.999
_LEAST_PROBABILITY = 1e-12


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, elementwise with broadcasting.

    Each argument is a tensor or a number; at least one is a tensor. DDPM, eq. 5 takes its terms from here.

    Raises:
        ConfigError: All four are numbers.
    """
    result = 0.5 * (
        -1.0 + logvar2 - logvar1 + _exp(logvar1 - logvar2) + ((mean1 - mean2) ** 2) * _exp(-logvar2)
    )
    if not isinstance(result, Tensor):
        raise ConfigError("normal_kl was given four numbers; pass at least one tensor")
    return result


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function by its tanh approximation (Page 1977), as in GELU."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def continuous_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log N(z; 0, 1) of z = (x - means) / exp(log_scales), elementwise, in nats.

    As in the reference, this is the density of z: that of x is smaller by `log_scales`.
    """
    z = (x - means) * torch.exp(-log_scales)
    return -0.5 * (z**2 + math.log(2.0 * math.pi))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """log of the Gaussian mass in the bin of each 8-bit value, elementwise, in nats (DDPM, eq. 13).

    Args:
        x: Values in [-1, 1], where the 256 gray levels lie 2/255 apart.
        means: Gaussian means, shaped like `x`.
        log_scales: Logarithms of the standard deviations, shaped like `x`.

    The outermost bins reach to infinity. A mass below 1e-12 counts as 1e-12, so the result is at least -27.6.

    Raises:
        ConfigError: Shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ConfigError(
            f"x, means and log_scales must have one shape, not {tuple(x.shape)}, {tuple(means.shape)} and "
            f"{tuple(log_scales.shape)}"
        )
    centered = x - means
    inverse_scale = torch.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(inverse_scale * (centered + _HALF_BIN))
    below_lower = approx_standard_normal_cdf(inverse_scale * (centered - _HALF_BIN))
    mass = torch.where(
        x < -_OPEN_BIN,
        below_upper,
        torch.where(x > _OPEN_BIN, 1.0 - below_lower, below_upper - below_lower),
    )
    return torch.log(mass.clamp(min=_LEAST_PROBABILITY))


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over every dimension but the first: (N, ...) -> (N,)."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def noise_like(x: Tensor, noise: Tensor | None) -> Tensor:
    """`noise`, or standard normal noise shaped like `x` when None; ConfigError for another shape."""
    if noise is None:
        return torch.randn_like(x)
    if noise.shape != x.shape:
        raise ConfigError(f"noise {tuple(noise.shape)} must be shaped like the data {tuple(x.shape)}")
    return noise


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; other dtypes unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _exp(value: Tensor | float) -> Tensor | float:
    return torch.exp(value) if isinstance(value, Tensor) else math.exp(value)
