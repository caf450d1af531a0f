"""The reverse process p: what a model's output means, and one step of DDPM or DDIM sampling made of it."""

import enum
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dit_fast.diffusion.forward_process import ForwardProcess
from dit_fast.diffusion.paths import data_and_noise
from dit_fast.errors import ConfigError

# model(x, t, **model_kwargs) -> output, or (output, extra); the output is (N, C or 2C, ...).
Model = Callable[..., Any]
# denoised_fn(x_0) -> x_0, applied to each prediction before it is clipped.
DenoisedFn = Callable[[Tensor], Tensor]
# cond_fn(x, t, **model_kwargs) -> gradient of log p(y | x) with respect to x.
CondFn = Callable[..., Tensor]
ModelKwargs = Mapping[str, Any] | None


class ModelMeanType(enum.Enum):
    """What the model's first C channels predict."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    V = enum.auto()


class ModelVarType(enum.Enum):
    """Where the variance of a reverse step comes from; the learned kinds take C more output channels."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    @property
    def is_learned(self) -> bool:
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class ReverseProcess(ForwardProcess):
    """p(x_{t-1} | x_t) as a model predicts it, and single steps of sampling from it.

    A model may answer in float16 or bfloat16: it is read in float32, and all means, variances and predicted
        x_0 are float32. `sample`, which the model reads next, keeps the type of `x`. No step waits for the
        device.

    Args:
        betas: variances (steps,) of the forward steps.
        model_mean_type: meaning of the model's first C channels.
        model_var_type: source of the variance.
    """

    def __init__(
        self, *, betas: ArrayLike, model_mean_type: ModelMeanType, model_var_type: ModelVarType
    ) -> None:
        super().__init__(betas=betas)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type

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
            x: noisy data x_t (N, C, ...).
            t: timesteps (N,).
            clip_denoised: clip the predicted x_0 to [-1, 1].
            denoised_fn: applied to the predicted x_0 before clipping.
            model_kwargs: further arguments of the model.

        Returns:
            "mean", "variance", "log_variance" and "pred_xstart", each shaped like `x`, and "extra", the
            second half of the model's answer or None. A variance that is not learned is a read-only broadcast
            view.

        Raises:
            ConfigError: the model's output has the wrong shape.
        """
        output, extra = self._evaluate(model, x, t, model_kwargs)
        prediction, variance_values = self._split_output(output, x)
        posterior = self._posterior(prediction, variance_values, x, t, clip_denoised, denoised_fn)
        return {**posterior, "extra": extra}

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
        return _at_least_float32(p_mean_var["mean"]) + p_mean_var["variance"] * _at_least_float32(gradient)

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

    def _model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps (N,) that model and classifier were trained with; a respaced process maps them."""
        return t

    def _evaluate(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> tuple[Tensor, Any]:
        """The model's output and what it returns beside it, or None."""
        answer = model(x, self._model_timesteps(t), **(model_kwargs or {}))
        output, extra = answer if isinstance(answer, tuple) else (answer, None)
        return _at_least_float32(output), extra

    def _split_output(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, where it is learned, the variance's channels, each shaped like `x`."""
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
        """`p_mean_variance` from the two halves of a model's output."""
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


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _later_than_first(t: Tensor, x: Tensor) -> Tensor:
    """1 where noise is still to be added, 0 at t = 0; float32 (N, 1, ...)."""
    return (t != 0).float().view(*t.shape, *(1,) * (x.dim() - t.dim()))
