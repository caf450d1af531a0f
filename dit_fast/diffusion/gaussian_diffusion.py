"""Gaussian diffusion in discrete steps: noise, training losses, likelihood bound and sampling.

Notation and equations of DDPM (Ho et al. 2020, arXiv:2006.11239); other sources as named in `dit_fast.diffusion`.
abar_t is the product of 1 - beta up to t; timesteps are counted from 0 here, and from 1 in the papers.
"""

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from dit_fast.diffusion.beta_schedules import (
    betas_for_alpha_bar,
    get_beta_schedule,
    get_named_beta_schedule,
)
from dit_fast.diffusion.diffusion_utils import (
    at_least_float32,
    discretized_gaussian_log_likelihood,
    mean_flat,
    noise_like,
    normal_kl,
)
from dit_fast.diffusion.objective import Model, ModelKwargs, NoisyBatch, Objective
from dit_fast.diffusion.paths import Point, data_and_noise, determinant, target
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

# denoised_fn(x_0) -> x_0, applied to each prediction before it is clipped.
DenoisedFn = Callable[[Tensor], Tensor]
# cond_fn(x, t, **model_kwargs) -> gradient of log p(y | x) with respect to x.
CondFn = Callable[..., Tensor]

# The step count for which Improved DDPM's weight of the variance loss is 1.
_RESCALED_MSE_STEPS = 1000.0


class DeviceTable:
    """A host tensor that is copied to each device once, at its first use there.

    A CUDA graph must therefore be captured after a warm-up step. Pickles and deep copies leave the copies out.
    """

    def __init__(self, host: Tensor) -> None:
        self._host = host
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The table as a tensor on `device`."""
        if device not in self._copies:
            self._copies[device] = self._host.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict[str, object]:
        return {"_host": self._host, "_copies": {}}


class CoefficientTables:
    """Named coefficients of every timestep, gathered for a batch of timesteps by a single indexing.

    Args:
        columns: Arrays (steps,) in float64, one per coefficient; each entry is rounded to float32 once.
    """

    def __init__(self, **columns: NDArray[np.float64]) -> None:
        self._column = {name: index for index, name in enumerate(columns)}
        self._table = DeviceTable(torch.from_numpy(np.stack(list(columns.values()), axis=1)).float())

    def at(self, t: Tensor, ndim: int, *names: str) -> list[Tensor]:
        """The coefficients `names` at timesteps `t` (N,), each a float32 view (N, 1, ...)."""
        rows = self._table.on(t.device)[t]
        shape = (*t.shape, *(1,) * (ndim - t.dim()))
        return [rows[..., self._column[name]].view(shape) for name in names]


class ModelMeanType(enum.Enum):
    """Meaning of the model's first C output channels."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    V = enum.auto()


class ModelVarType(enum.Enum):
    """Source of a reverse step's variance; a learned one takes C more output channels."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    @property
    def is_learned(self) -> bool:
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """Loss that training minimizes."""

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


PREDICTIONS = {
    "epsilon": ModelMeanType.EPSILON,
    "x0": ModelMeanType.START_X,
    "v": ModelMeanType.V,
}
"""By their names in `dit_fast.diffusion.paths`."""


class GaussianDiffusion(Objective):
    """A diffusion process: adds noise, trains a model to remove it, and samples with that model.

    The numpy attributes are float64 arrays (steps,). Methods gather float32 copies of them on the device of `t` as
    (N, 1, ...) views. Arithmetic is in float32 also for float16 and bfloat16 data and model outputs (float64 data stay
    float64); only a model's next input, such as the result of `q_sample`, is rounded back to the data's dtype. No
    method but the loops waits for the device.

    Bounds are in bits per dimension, for 8-bit images in [-1, 1]; on latents the first term keeps those bins.

    Args:
        betas: Variances (steps,) of the forward steps, each in (0, 1].
        model_mean_type: Meaning of the model's first C output channels.
        model_var_type: Source of the reverse variance.
        loss_type: Loss that `training_losses` returns.
        min_snr_gamma: Weight the squared error so that x_0's error has the weight min(SNR, gamma), whatever is
            predicted (Hang et al. 2023, arXiv:2303.09556, section 3); None weights all timesteps alike.

    Raises:
        ConfigError: Betas of another shape or range, or a gamma that is not positive or does not fit the loss.
    """

    num_timesteps: int
    # The timesteps that the model was trained with, where this process is a respaced one (`SpacedDiffusion`).
    _timestep_table: DeviceTable | None = None

    def __init__(
        self,
        *,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        min_snr_gamma: float | None = None,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.min_snr_gamma = min_snr_gamma
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ConfigError(f"min-SNR gamma {min_snr_gamma}: choose a number above 0 (5 is usual)")
        if min_snr_gamma is not None and (loss_type.is_vb() or model_mean_type is ModelMeanType.PREVIOUS_X):
            raise ConfigError(
                "min-SNR weights squared errors of noise, x_0 or v; the bound has its own weights: remove one of them"
            )

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
        # A last beta of 1 leaves no signal: these reciprocals are infinite, and only models of x_0 can use that step.
        with np.errstate(divide="ignore"):
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # DDPM, eq. 7.
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / one_minus
        # The first step's posterior variance is 0; for its logarithm, the second's takes its place, or its own beta.
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

    # The path between data and noise, as an `Objective`.

    @property
    def prediction(self) -> str:
        """One of PREDICTIONS. Raises ConfigError for a model of the posterior mean."""
        for name, mean_type in PREDICTIONS.items():
            if mean_type is self.model_mean_type:
                return name
        raise ConfigError("a model of the posterior mean is sampled by the process's own loops only")

    def times_at(self, places: Tensor) -> Tensor:
        """Timesteps, int64 (N,), at `places` from 0 to 1 of all of them."""
        return (places * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def noise_level(self, t: Tensor) -> Tensor:
        """Position of timesteps (N,) between data and noise: 0 for the first, below 1 for the last."""
        return t / self.num_timesteps

    def at(self, t: Tensor, ndim: int) -> Point:
        """Coefficients of x_0 and noise at timesteps t (N,), each a float32 view (N, 1, ...) of `ndim` dimensions."""
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return Point(*self._coefficients.at(t, ndim, *names))

    # The forward process q.

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each shaped like `x_start` (DDPM, eq. 4).

        Args:
            x_start: Clean data (N, ...).
            t: Timesteps (N,), integer, 0 meaning one step of noise.

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
        """Noisy data x_t (N, ...) of `x_start`'s dtype: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, eq. 4).

        Args:
            x_start: Clean data (N, ...).
            t: Timesteps (N,).
            noise: Standard normal noise shaped like `x_start`; drawn when None.

        Raises:
            ConfigError: Noise of another shape.
        """
        noise = noise_like(x_start, noise)
        scale, noise_scale = self._coefficients.at(
            t, x_start.dim(), "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"
        )
        return (scale * x_start + noise_scale * noise).to(x_start.dtype)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), shaped like `x_t` (DDPM, eqs. 6 and 7).

        Args:
            x_start: Clean data (N, ...).
            x_t: Noisy data (N, ...).
            t: Timesteps (N,).

        The variance at t = 0 is 0; its logarithm is that of t = 1. Variances are read-only broadcast views.

        Raises:
            ConfigError: The shapes of the two data differ.
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

    # Training.

    def add_noise(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> NoisyBatch:
        """x_t of clean data (N, C, ...) at timesteps t (N,), with the target of the prediction, see `Objective`."""
        noise = noise_like(x_start, noise)
        x_t = self.q_sample(x_start, t, noise=noise)
        target = None if self.loss_type.is_vb() else self._target(x_start, x_t, t, noise)
        return NoisyBatch(x_t, self._model_timesteps(t), x_start, t, target)

    def loss(self, output: Tensor, batch: NoisyBatch) -> dict[str, Tensor]:
        """The training loss of each sample (DDPM, eq. 14; Improved DDPM, eq. 16 with a learned variance).

        Args:
            output: The model's output (N, C, ...), or (N, 2 C, ...) with a learned variance.
            batch: The batch from `add_noise`.

        Returns:
            "loss" (N,); for the MSE losses also "mse" (N,), without the weight of `min_snr_gamma`, and with a learned
            variance "vb" (N,) in bits per dimension. The bound trains the variance only: its mean is detached.

        Raises:
            ConfigError: An output of the wrong shape.
        """
        x_t, _, x_start, t, target = batch
        prediction, variance_values = self._split_output(at_least_float32(output), x_t)
        if target is None:
            posterior = self._posterior(prediction, variance_values, x_t, t, clip_denoised=False)
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1
            return {"loss": self._bound(x_start, x_t, t, posterior) * scale}
        mse = mean_flat((target - prediction) ** 2)
        terms = {"mse": mse, "loss": self._weighted(mse, t)}
        if variance_values is not None:
            # Detached: the bound trains the variance only (Improved DDPM, section 3.1).
            posterior = self._posterior(prediction.detach(), variance_values, x_t, t, clip_denoised=False)
            terms["vb"] = self._bound(x_start, x_t, t, posterior)
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / _RESCALED_MSE_STEPS)
            terms["loss"] = terms["loss"] + terms["vb"]
        return terms

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Target of the model's prediction, shaped like `x_start`."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        if self.model_mean_type is ModelMeanType.V:
            return target("v", x_start, noise, self.at(t, x_start.dim()))
        return self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]

    def _weighted(self, mse: Tensor, t: Tensor) -> Tensor:
        """Squared errors (N,) of the prediction times their min-SNR weights."""
        if self.min_snr_gamma is None:
            return mse
        point = self.at(t, 1)
        snr = (point.alpha / point.sigma) ** 2
        # The weight applies to the error of x_0, which is this ratio times the error of the prediction.
        ratio = point.sigma / determinant(self.prediction, point)
        return mse * (snr.clamp(max=self.min_snr_gamma) * ratio**2)

    # The variational bound.

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
            model: As for `p_mean_variance`.
            x_start: Clean data (N, C, ...).
            clip_denoised: Clip predicted x_0 to [-1, 1].
            model_kwargs: Further arguments of the model.
            noise: Standard normal noise of a timestep, shaped like `x_start`; drawn when None.

        Returns:
            "total_bpd" (N,) and "prior_bpd" (N,); "vb", "xstart_mse" and "mse", each (N, steps), the last
            timestep first.
        """
        timesteps = self._all_timesteps(x_start.shape[0], x_start.device)
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = timesteps[i]
            added = noise_like(x_start, None if noise is None else noise(i))
            x_t = self.q_sample(x_start, t, noise=added)
            out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(self._bound(x_start, x_t, t, out))
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - added) ** 2))
        terms = {
            "vb": torch.stack(vb, dim=1),
            "xstart_mse": torch.stack(xstart_mse, dim=1),
            "mse": torch.stack(mse, dim=1),
        }
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}

    def _bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, posterior: dict[str, Any]) -> Tensor:
        """The term (N,) of DDPM, eq. 5, at `t`: the discretized likelihood L_0 at t = 0, else the KL of posteriors."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        mean, log_variance = posterior["mean"], posterior["log_variance"]
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        log_likelihood = discretized_gaussian_log_likelihood(
            x_start, means=mean, log_scales=0.5 * log_variance
        )
        # Both for all samples: selecting those with t = 0 would make the host wait for the device.
        return torch.where(t == 0, -_bits_per_dim(log_likelihood), _bits_per_dim(divergence))

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """L_T (N,) of DDPM, eq. 5: the divergence of q(x_T | x_0) from N(0, 1), in bits per dimension."""
        last = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return _bits_per_dim(normal_kl(mean, log_variance, 0.0, 0.0))

    # The reverse process p(x_{t-1} | x_t) as the model predicts it.

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Any]:
        """The Gaussian p(x_{t-1} | x_t) and the model's prediction of x_0.

        Args:
            model: `model(x, t, **model_kwargs)` -> (N, C, ...), (N, 2C, ...) with a learned variance, or a
                pair of that and anything else.
            x: Noisy data x_t (N, C, ...).
            t: Timesteps (N,).
            clip_denoised: Clip the predicted x_0 to [-1, 1].
            denoised_fn: Applied to the predicted x_0 before clipping.
            model_kwargs: Further arguments of the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", each shaped like `x`, and "extra", what
            the model returned beside its output, or None. A variance that is not learned is a read-only broadcast
            view.

        Raises:
            ConfigError: The model's output has the wrong shape.
        """
        output = model(x, self._model_timesteps(t), **(model_kwargs or {}))
        output, extra = output if isinstance(output, tuple) else (output, None)
        prediction, variance_values = self._split_output(at_least_float32(output), x)
        posterior = self._posterior(prediction, variance_values, x, t, clip_denoised, denoised_fn)
        return {**posterior, "extra": extra}

    def _split_output(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and the channels of a learned variance (else None), each shaped like `x`."""
        channels = x.shape[1]
        expected = 2 * channels if self.model_var_type.is_learned else channels
        if output.shape != (x.shape[0], expected, *x.shape[2:]):
            kind = "learned" if self.model_var_type.is_learned else "fixed"
            raise ConfigError(
                f"the model returned {tuple(output.shape)} for x {tuple(x.shape)}; with a {kind} variance "
                f"it must return {expected} channels (learn_sigma must agree in model and create_diffusion)"
            )
        if not self.model_var_type.is_learned:
            return output, None
        prediction, variance_values = output.split(channels, dim=1)
        return prediction, variance_values

    def _posterior(
        self,
        prediction: Tensor,
        variance_values: Tensor | None,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: DenoisedFn | None = None,
    ) -> dict[str, Tensor]:
        """The posterior of `p_mean_variance` from the two halves of a model's output."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x, t, prediction)
        elif self.model_mean_type is ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x, t, prediction)
        elif self.model_mean_type is ModelMeanType.V:
            pred_xstart, _ = data_and_noise("v", prediction, x, self.at(t, x.dim()))
        else:
            pred_xstart = prediction
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)

        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        variance, log_variance = self._model_variance(variance_values, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _model_variance(self, values: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log variance of p(x_{t-1} | x_t), shaped like `x`."""
        if values is not None and self.model_var_type is ModelVarType.LEARNED:
            return torch.exp(values), values
        if values is not None:
            # Improved DDPM, eq. 15, with the model's [-1, 1] mapped to a fraction in [0, 1].
            least, most = self._coefficients.at(t, x.dim(), "posterior_log_variance_clipped", "log_betas")
            fraction = (values + 1) / 2
            log_variance = fraction * most + (1 - fraction) * least
            return torch.exp(log_variance), log_variance
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            names = ("fixed_large_variance", "fixed_large_log_variance")
        else:
            names = ("posterior_variance", "posterior_log_variance_clipped")
        variance, log_variance = self._coefficients.at(t, x.dim(), *names)
        return variance.expand_as(x), log_variance.expand_as(x)

    def _model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps (N,) that model and classifier were trained with; a respaced process maps them."""
        if self._timestep_table is None:
            return t
        return self._timestep_table.on(t.device)[t].to(t.dtype)

    # Single sampling steps.

    def condition_mean(
        self,
        cond_fn: CondFn,
        p_mean_var: Mapping[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
    ) -> Tensor:
        """The mean moved by the classifier: mean + variance * grad log p(y | x) (ADM, algorithm 1)."""
        gradient = cond_fn(x, self._model_timesteps(t), **(model_kwargs or {}))
        return at_least_float32(p_mean_var["mean"]) + p_mean_var["variance"] * at_least_float32(gradient)

    def condition_score(
        self,
        cond_fn: CondFn,
        p_mean_var: Mapping[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Any]:
        """`p_mean_var` with noise eps - sqrt(1 - abar_t) grad log p(y | x), for DDIM (ADM, algorithm 2)."""
        (alpha_bar,) = self._coefficients.at(t, x.dim(), "alphas_cumprod")
        gradient = cond_fn(x, self._model_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - (1 - alpha_bar).sqrt() * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """One ancestral step x_t -> x_{t-1} (DDPM, algorithm 2).

        Arguments as for `p_mean_variance`; `cond_fn(x, t, **model_kwargs)` adds classifier guidance. One
        `randn_like(x)` is drawn at every step, also at t = 0 where it is not used.

        Returns:
            "sample" (N, C, ...) of `x`'s type, and "pred_xstart".
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        # Also drawn where it is not used, as in the reference: a seed then gives the same samples.
        noise = torch.randn_like(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sample = mean + _later_than_first(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step x_t -> x_{t-1} (DDIM, eqs. 12 and 16).

        Arguments and result as for `p_sample`; `eta` from 0 (deterministic) to 1 (DDPM's variance). One
        `randn_like(x)` is drawn at every step, whatever `eta`.

        Raises:
            ConfigError: `eta` outside [0, 1].
        """
        if not 0.0 <= eta <= 1.0:
            raise ConfigError(f"eta must lie between 0 (deterministic DDIM) and 1 (DDPM's noise), not {eta}")
        out = self._guided_mean_variance(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        pred_xstart = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar, alpha_bar_prev = self._coefficients.at(t, x.dim(), "alphas_cumprod", "alphas_cumprod_prev")
        sigma = (
            eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        )
        noise = torch.randn_like(x)
        mean = pred_xstart * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        sample = mean + _later_than_first(t, x) * sigma * noise
        return {"sample": sample.to(x.dtype), "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step x_t -> x_{t+1} of the deterministic DDIM path, from data to noise (DDIM, section 4.3).

        Arguments and result as for `p_sample`, but nothing is drawn. The last step ends at alpha-bar 0.

        Raises:
            ConfigError: `eta` other than 0.
        """
        if eta != 0.0:
            raise ConfigError(f"only the deterministic DDIM path can be reversed: eta must be 0, not {eta}")
        out = self._guided_mean_variance(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        pred_xstart = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        (alpha_bar_next,) = self._coefficients.at(t, x.dim(), "alphas_cumprod_next")
        sample = pred_xstart * alpha_bar_next.sqrt() + (1 - alpha_bar_next).sqrt() * eps
        return {"sample": sample.to(x.dtype), "pred_xstart": pred_xstart}

    def _guided_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: DenoisedFn | None,
        cond_fn: CondFn | None,
        model_kwargs: ModelKwargs,
    ) -> dict[str, Any]:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is None:
            return out
        return self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)

    # Sampling loops, from noise to data over all timesteps, without gradients. Arguments that the four share:
    #     model, clip_denoised, denoised_fn, cond_fn, model_kwargs: as for `p_sample`.
    #     shape: shape (N, C, ...) of the data.
    #     noise: x_T of that shape; drawn as float32 when None. The result has its dtype.
    #     device: where to sample; None: the noise's device, or else that of the model's parameters.
    #     progress: show a tqdm bar.
    # All raise ConfigError where noise and shape differ or no device can be found.

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples (N, C, ...) by ancestral sampling (DDPM, algorithm 2)."""
        steps = self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
        )
        return _last_sample(steps)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `p_sample` returns, for each step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return self._trajectory(step, model, shape, noise, device, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Samples (N, C, ...) by DDIM with noise `eta` from 0 to 1 (DDIM, eq. 12)."""
        steps = self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
        )
        return _last_sample(steps)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `ddim_sample` returns, for each step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

        return self._trajectory(step, model, shape, noise, device, progress)

    def _trajectory(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ConfigError(f"noise {tuple(noise.shape)} must have the requested shape {tuple(shape)}")
        if device is None:
            device = noise.device if noise is not None else _device_of(model)
        x = torch.randn(*shape, device=device) if noise is None else noise
        # Rows are views: no step makes a tensor of timesteps on the host.
        timesteps = self._all_timesteps(shape[0], device)
        for i in _reversed_range(self.num_timesteps, progress):
            with torch.no_grad():
                out = step(x, timesteps[i])
            yield out
            x = out["sample"]

    def _all_timesteps(self, batch: int, device: torch.device | str) -> Tensor:
        """Every timestep, repeated for the batch: int64 (steps, batch)."""
        return torch.arange(self.num_timesteps, device=device)[:, None].repeat(1, batch)


def _bits_per_dim(nats: Tensor) -> Tensor:
    return mean_flat(nats) / math.log(2.0)


def _later_than_first(t: Tensor, x: Tensor) -> Tensor:
    """1 where noise is still to be added, 0 at t = 0; float32 (N, 1, ...)."""
    return (t != 0).float().view(*t.shape, *(1,) * (x.dim() - t.dim()))


def _last_sample(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample


def _reversed_range(steps: int, progress: bool) -> Any:
    indices = range(steps - 1, -1, -1)
    if not progress:
        return indices
    from tqdm.auto import tqdm

    return tqdm(indices)


def _device_of(model: Model) -> torch.device:
    """The device of a module, or of the module that a bound method belongs to."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if parameter is None:
        raise ConfigError(
            "the model has no parameters, so that its device is unknown: pass device=... or noise=..."
        )
    return parameter.device
