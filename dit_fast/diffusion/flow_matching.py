"""Flow matching on the paths of SiT (Ma et al. 2024, arXiv:2401.08740): training losses and the learned velocity."""

import torch
from torch import Tensor

from dit_fast.diffusion.diffusion_utils import mean_flat
from dit_fast.diffusion.gaussian_diffusion import Model, ModelKwargs
from dit_fast.diffusion.paths import PATHS, Point, convert, determinant, target
from dit_fast.errors import ConfigError

FLOW_PREDICTIONS = ("velocity", "score", "epsilon", "x0")
FLOW_WEIGHTINGS = ("none", "velocity", "likelihood")

# How far from noise and data times stay where the equations are singular there: SiT's training intervals.
_EPS = 1e-3
_VP_EPS = 1e-5
# Of a model of x_0, whose velocity's error has 1 / sigma^2 (Li & He 2025, arXiv:2511.13720).
_LEAST_SIGMA = 0.05


class FlowMatching:
    """A path between noise (t = 0) and data (t = 1), and a model of its velocity, its score, the noise or x_0.

    The model reads t itself, in [0, 1] and not scaled, as in SiT: `model(x, t, **model_kwargs)` -> (N, C, ...); of
    2 C channels, which SiT's models have, the first C are the answer.

    path            "linear", "gvp" or "vp"
    prediction      what the model answers: "velocity", "score", "epsilon" or "x0"
    loss_weighting  of the squared error of that answer: "none"; "velocity", which makes it the error of the velocity;
                    "likelihood", the bound's (SiT, section 2). With "none" the score's error counts times sigma,
                    which makes it the noise's.
    direction_loss  add the mean over places of 1 - cos of the angle between answer and velocity, of a model of the
                    velocity (Yao et al. 2024, arXiv:2410.10356; LightningDiT)

    `num_timesteps` is None, as t is continuous. Raises ConfigError for a combination that cannot be.
    """

    num_timesteps: None = None

    def __init__(
        self,
        path: str = "linear",
        prediction: str = "velocity",
        loss_weighting: str = "none",
        direction_loss: bool = False,
    ) -> None:
        for name, value, known in (
            ("path", path, tuple(PATHS)),
            ("prediction", prediction, FLOW_PREDICTIONS),
            ("loss weighting", loss_weighting, FLOW_WEIGHTINGS),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not of flow matching: choose {', '.join(known)}")
        if prediction == "velocity" and loss_weighting != "none":
            raise ConfigError(
                f"loss weighting {loss_weighting!r} is for models of score, noise or x_0: that of a model of the "
                "velocity is none"
            )
        if direction_loss and prediction != "velocity":
            raise ConfigError(
                f"the direction loss is of the velocity, this model's prediction is {prediction}"
            )
        self.path, self.prediction, self.loss_weighting = path, prediction, loss_weighting
        self.direction_loss = direction_loss

    @property
    def interval(self) -> tuple[float, float]:
        """Times of training, (first, last): the whole of [0, 1] but for what is singular at its ends."""
        if self.path == "vp":
            return 0.0, 1 - _VP_EPS
        return (0.0, 1.0) if self.prediction == "velocity" else (_EPS, 1 - _EPS)

    def times_at(self, places: Tensor) -> Tensor:
        """Times at `places`, from 0 to 1, of the interval."""
        first, last = self.interval
        return first + (last - first) * places

    def noise_level(self, t: Tensor) -> Tensor:
        """How much of the way from data to noise lies behind: 0 data, 1 noise."""
        return 1 - t

    def at(self, t: Tensor, ndim: int) -> Point:
        """The path at times t (N,), each coefficient a view (N, 1, ...) of `ndim` dimensions."""
        return PATHS[self.path](t.view(*t.shape, *(1,) * (ndim - t.dim())))

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample (SiT, section 2): "loss", weighted, and its terms "mse" and, where it is added,
        "direction", each (N,).

        x_start: clean data (N, C, ...); t: times (N,); noise: shaped like `x_start`, drawn when None.
        Raises ConfigError for noise or a model's answer of another shape.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        if noise.shape != x_start.shape:
            raise ConfigError(
                f"noise {tuple(noise.shape)} must be shaped like the data {tuple(x_start.shape)}"
            )
        point = self.at(t, x_start.dim())
        x = (point.alpha * x_start + point.sigma * noise).to(x_start.dtype)
        wanted = target(self.prediction, x_start, noise, point)
        answer = self._answer(model, x, t, model_kwargs)
        mse = mean_flat((answer - wanted) ** 2)
        if self.direction_loss:
            direction = mean_flat(1 - torch.cosine_similarity(answer, wanted, dim=1))
            return {"mse": mse, "direction": direction, "loss": mse + direction}
        weights = self._weights(point)
        return {"mse": mse, "loss": mse if weights is None else mse * weights.flatten()}

    def velocity(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs = None) -> Tensor:
        """dx/dt of the probability flow, shaped like x (N, C, ...), at times t (N,) (SiT, section 2)."""
        answer = self._answer(model, x, t, model_kwargs)
        return convert(answer, x, self.at(t, x.dim()), self.prediction, "velocity")

    def _answer(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        answer = model(x, t, **(model_kwargs or {}))
        if answer.shape[1] == 2 * x.shape[1]:
            answer = answer[:, : x.shape[1]]
        if answer.shape != x.shape:
            raise ConfigError(
                f"the model returned {tuple(answer.shape)} for x {tuple(x.shape)}; expected as many channels, or "
                "twice as many"
            )
        return answer.float() if answer.dtype in (torch.float16, torch.bfloat16) else answer

    def _weights(self, point: Point) -> Tensor | None:
        """Of the squared error of the model's answer, (N, 1, ...); None for 1."""
        if self.loss_weighting == "none":
            return point.sigma**2 if self.prediction == "score" else None
        alpha_rate, sigma_rate = point.rates()
        # The velocity's error is that of x_0 times this over sigma.
        wronskian = alpha_rate * point.sigma - sigma_rate * point.alpha
        scale = determinant(self.prediction, point)
        if self.prediction == "x0":
            scale = scale.clamp(max=-_LEAST_SIGMA)
        if self.loss_weighting == "velocity":
            return (wronskian / scale) ** 2
        return wronskian * point.alpha / (point.sigma * scale**2)
