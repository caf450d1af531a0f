"""The forward process q: adding noise, and a step's posterior given the clean data (DDPM, section 2)."""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dit_fast.diffusion.coefficients import CoefficientTables
from dit_fast.diffusion.paths import Point
from dit_fast.errors import ConfigError


class ForwardProcess:
    """q(x_t | x_0) and q(x_{t-1} | x_t, x_0) for a sequence of betas.

    The numpy attributes are float64 arrays (steps,). Methods use float32 copies of them on the device of `t`,
    gathered for the batch as (N, 1, ...) views. Arithmetic is in float32 also for float16 and bfloat16 data
    (float64 data stay float64); only what a model will read, such as the result of `q_sample`, is rounded
    back to the data's type.

    Args:
        betas: variances (steps,) of the steps, each in (0, 1].

    Raises:
        ConfigError: betas of another shape or range.
    """

    def __init__(self, *, betas: ArrayLike) -> None:
        self.betas: NDArray[np.float64] = np.array(betas, dtype=np.float64)
        if self.betas.ndim != 1 or self.betas.size == 0:
            raise ConfigError(
                f"betas must be a non-empty list of numbers, not an array of shape {self.betas.shape}"
            )
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ConfigError(
                f"betas must lie in (0, 1]; found values from {self.betas.min():g} to {self.betas.max():g}"
            )
        self.num_timesteps = int(self.betas.size)

        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas, dtype=np.float64)
        one_minus = 1.0 - self.alphas_cumprod
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(one_minus)
        self.log_one_minus_alphas_cumprod = np.log(one_minus)
        # A last beta of 1 leaves no signal: its reciprocals are infinite, and only models of x_0 can use it.
        with np.errstate(divide="ignore"):
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # DDPM, eq. 7.
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / one_minus
        # The first step's posterior variance is 0: its logarithm is the second's, or of its beta if alone.
        clipped = np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        self.posterior_log_variance_clipped = np.log(clipped if self.num_timesteps > 1 else self.betas)

        fixed_large = (
            np.append(self.posterior_variance[1:2], self.betas[1:]) if self.num_timesteps > 1 else self.betas
        )
        self._coefficients = CoefficientTables(
            alphas_cumprod=self.alphas_cumprod,
            alphas_cumprod_prev=self.alphas_cumprod_prev,
            alphas_cumprod_next=self.alphas_cumprod_next,
            one_minus_alphas_cumprod=one_minus,
            log_one_minus_alphas_cumprod=self.log_one_minus_alphas_cumprod,
            sqrt_alphas_cumprod=self.sqrt_alphas_cumprod,
            sqrt_one_minus_alphas_cumprod=self.sqrt_one_minus_alphas_cumprod,
            sqrt_recip_alphas_cumprod=self.sqrt_recip_alphas_cumprod,
            sqrt_recipm1_alphas_cumprod=self.sqrt_recipm1_alphas_cumprod,
            posterior_mean_coef1=self.posterior_mean_coef1,
            posterior_mean_coef2=self.posterior_mean_coef2,
            posterior_variance=self.posterior_variance,
            posterior_log_variance_clipped=self.posterior_log_variance_clipped,
            log_betas=np.log(self.betas),
            fixed_large_variance=fixed_large,
            fixed_large_log_variance=np.log(fixed_large),
        )

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each shaped like `x_start` (DDPM, eq. 4).

        Args:
            x_start: clean data (N, ...).
            t: timesteps (N,), integer, 0 meaning one step of noise.

        Variances are read-only broadcast views.
        """
        scale, variance, log_variance = self._coefficients.at(
            t,
            x_start.dim(),
            "sqrt_alphas_cumprod",
            "one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
        )
        return scale * x_start, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noisy data x_t (N, ...) of `x_start`'s type: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, eq.
        4).

        Args:
            x_start: clean data (N, ...).
            t: timesteps (N,).
            noise: standard normal noise shaped like `x_start`; drawn when None.

        Raises:
            ConfigError: noise of another shape.
        """
        noise = self._noise_for(x_start, noise)
        scale, noise_scale = self._coefficients.at(
            t, x_start.dim(), "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
        )
        return (scale * x_start + noise_scale * noise).to(x_start.dtype)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), shaped like `x_t` (DDPM, eqs. 6
        and 7).

        Args:
            x_start: clean data (N, ...).
            x_t: noisy data (N, ...).
            t: timesteps (N,).

        The variance at t = 0 is 0; its logarithm is that of t = 1. Variances are read-only broadcast views.

        Raises:
            ConfigError: the shapes of the two data differ.
        """
        if x_start.shape != x_t.shape:
            raise ConfigError(
                f"x_start {tuple(x_start.shape)} and x_t {tuple(x_t.shape)} must have one shape"
            )
        coef1, coef2, variance, log_variance = self._coefficients.at(
            t,
            x_t.dim(),
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "posterior_variance",
            "posterior_log_variance_clipped",
        )
        mean = coef1 * x_start + coef2 * x_t
        return mean, variance.expand_as(x_t), log_variance.expand_as(x_t)

    def times_at(self, places: Tensor) -> Tensor:
        """Timesteps, int64, at `places` from 0 to 1 of all of them."""
        return (places * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def noise_level(self, t: Tensor) -> Tensor:
        """How much of the way from data to noise lies behind: 0 the first timestep, below 1 the last."""
        return t / self.num_timesteps

    def at(self, t: Tensor, ndim: int) -> Point:
        """The shares of x_0 and of noise at timesteps t (N,), each a float32 view (N, 1, ...) of `ndim` dimensions."""
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return Point(*self._coefficients.at(t, ndim, *names))

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 from x_t and its noise: q_sample solved for x_0."""
        scale, noise_scale = self._coefficients.at(
            t, x_t.dim(), "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"
        )
        return scale * x_t - noise_scale * eps

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise in x_t, given x_0: q_sample solved for the noise."""
        scale, noise_scale = self._coefficients.at(
            t, x_t.dim(), "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"
        )
        return (scale * x_t - pred_xstart) / noise_scale

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """x_0 from x_t and the posterior mean of x_{t-1}: DDPM, eq. 7 solved for x_0."""
        coef1, coef2 = self._coefficients.at(t, x_t.dim(), "posterior_mean_coef1", "posterior_mean_coef2")
        return (xprev - coef2 * x_t) / coef1

    @staticmethod
    def _noise_for(x: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return torch.randn_like(x)
        if noise.shape != x.shape:
            raise ConfigError(f"noise {tuple(noise.shape)} must be shaped like the data {tuple(x.shape)}")
        return noise
