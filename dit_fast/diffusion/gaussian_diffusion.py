"""Gaussian diffusion: training losses and likelihood bounds on top of the forward and reverse processes."""

import enum
import math
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dit_fast.diffusion.beta_schedules import (
    betas_for_alpha_bar,
    get_beta_schedule,
    get_named_beta_schedule,
)
from dit_fast.diffusion.diffusion_utils import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from dit_fast.diffusion.paths import determinant, target
from dit_fast.diffusion.reverse_process import Model, ModelKwargs, ModelMeanType, ModelVarType
from dit_fast.diffusion.sampling_loops import SamplingLoops
from dit_fast.errors import ConfigError

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_beta_schedule",
    "get_named_beta_schedule",
    "mean_flat",
]

PREDICTIONS = {
    "epsilon": ModelMeanType.EPSILON,
    "x0": ModelMeanType.START_X,
    "v": ModelMeanType.V,
}
"""What `dit_fast.diffusion.paths` calls them."""

# The step count for which Improved DDPM's weight of the variance loss is 1.
_RESCALED_MSE_STEPS = 1000.0


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()
    """Squared error, plus the variational bound for a learned variance (Improved DDPM, eq. 16)."""
    RESCALED_MSE = enum.auto()
    """MSE with the bound times steps / 1000."""
    KL = enum.auto()
    """The variational bound alone (DDPM, eq. 5)."""
    RESCALED_KL = enum.auto()
    """KL times the number of steps: an estimate of the whole bound."""

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(SamplingLoops):
    """A diffusion process: adds noise, trains a model to remove it, and samples with that model.

    Bounds are in bits per dimension, after the unit of 8-bit images in [-1, 1]; on latents the first term
    keeps those bins.

    Args:
        betas: variances (steps,) of the forward steps, each in (0, 1].
        model_mean_type: what the model predicts.
        model_var_type: where the reverse variance comes from.
        loss_type: what `training_losses` returns.
        min_snr_gamma: weigh the squared error so that x_0's has the weight min(SNR, gamma), whatever is predicted
            (Hang et al. 2023, arXiv:2303.09556, section 3); None weighs all timesteps alike.

    Raises:
        ConfigError: betas of another shape or range, or a gamma that cannot be.
    """

    def __init__(
        self,
        *,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__(betas=betas, model_mean_type=model_mean_type, model_var_type=model_var_type)
        self.loss_type = loss_type
        self.min_snr_gamma = min_snr_gamma
        if min_snr_gamma is None:
            return
        if not min_snr_gamma > 0:
            raise ConfigError(f"min-SNR gamma {min_snr_gamma}: choose a number above 0 (5 is usual)")
        if loss_type.is_vb() or model_mean_type is ModelMeanType.PREVIOUS_X:
            raise ConfigError(
                "min-SNR weighs squared errors of noise, x_0 or v; the bound has weights of its own: leave one out"
            )

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The training loss of each sample (DDPM, eq. 14; Improved DDPM, eq. 16 with a learned variance).

        "mse" is as the model's answer has it; in "loss" it has the weight of `min_snr_gamma`.

        Args:
            model: as for `p_mean_variance`.
            x_start: clean data (N, C, ...).
            t: timesteps (N,).
            model_kwargs: further arguments of the model.
            noise: standard normal noise shaped like `x_start`; drawn when None.

        Returns:
            "loss" (N,); for the MSE losses also "mse" (N,), and "vb" (N,) in bits per dimension with a
            learned variance. The bound trains the variance only: its mean is detached.

        Raises:
            ConfigError: noise or the model's output of the wrong shape.
        """
        noise = self._noise_for(x_start, noise)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1
            return {"loss": bound["output"] * scale}

        output, _ = self._evaluate(model, x_t, t, model_kwargs)
        prediction, variance_values = self._split_output(output, x_t)
        terms = {"mse": mean_flat((self._target(x_start, x_t, t, noise) - prediction) ** 2)}
        weighted = self._weighted(terms["mse"], t)
        terms["loss"] = weighted
        if variance_values is not None:
            posterior = self._posterior(prediction.detach(), variance_values, x_t, t, clip_denoised=False)
            terms["vb"] = self._bound(x_start, x_t, t, posterior)
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / _RESCALED_MSE_STEPS)
            terms["loss"] = weighted + terms["vb"]
        return terms

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The whole variational bound of the data, term by term, in bits per dimension (DDPM, eq. 5).

        Args:
            model: as for `p_mean_variance`.
            x_start: clean data (N, C, ...).
            clip_denoised: clip predicted x_0 to [-1, 1].
            model_kwargs: further arguments of the model.
            noise: standard normal noise of a timestep, shaped like `x_start`; drawn when None.

        Returns:
            "total_bpd" (N,) and "prior_bpd" (N,); "vb", "xstart_mse" and "mse", each (N, steps), the last
            timestep first.
        """
        timesteps = self._all_timesteps(x_start.shape[0], x_start.device)
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = timesteps[i]
            added = self._noise_for(x_start, None if noise is None else noise(i))
            x_t = self.q_sample(x_start, t, noise=added)
            out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - added) ** 2))
        terms = {
            "vb": torch.stack(vb, dim=1),
            "xstart_mse": torch.stack(xstart_mse, dim=1),
            "mse": torch.stack(mse, dim=1),
        }
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Any]:
        """ "output" (N,), the term of the bound that belongs to `t`, and "pred_xstart" (N, C, ...)."""
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._bound(x_start, x_t, t, out), "pred_xstart": out["pred_xstart"]}

    def _bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, posterior: dict[str, Any]) -> Tensor:
        """DDPM, eq. 5: L_0, the discretised likelihood, where t = 0; else the divergence of posteriors."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        mean, log_variance = posterior["mean"], posterior["log_variance"]
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=mean, log_scales=0.5 * log_variance
        )
        return torch.where(t == 0, -_bits_per_dim(log_likelihood), _bits_per_dim(divergence))

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """L_T (N,) of DDPM, eq. 5: the divergence of q(x_T | x_0) from N(0, 1), in bits per dimension."""
        last = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return _bits_per_dim(normal_kl(mean, log_variance, 0.0, 0.0))

    def _weighted(self, mse: Tensor, t: Tensor) -> Tensor:
        """Squared errors (N,) of the model's answers times their weights."""
        if self.min_snr_gamma is None:
            return mse
        point = self.at(t, 1)
        snr = (point.alpha / point.sigma) ** 2
        # The weight is of x_0's error, and this ratio is x_0's error for one of the answer.
        ratio = point.sigma / determinant(self.prediction, point)
        return mse * (snr.clamp(max=self.min_snr_gamma) * ratio**2)

    @property
    def prediction(self) -> str:
        """One of PREDICTIONS. Raises ConfigError for a model of the posterior mean."""
        for name, mean_type in PREDICTIONS.items():
            if mean_type is self.model_mean_type:
                return name
        raise ConfigError("a model of the posterior mean is sampled by the process's own loops only")

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model's prediction is compared with, shaped like `x_start`."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        if self.model_mean_type is ModelMeanType.V:
            return target("v", x_start, noise, self.at(t, x_start.dim()))
        return self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]


def _bits_per_dim(nats: Tensor) -> Tensor:
    return mean_flat(nats) / math.log(2.0)
