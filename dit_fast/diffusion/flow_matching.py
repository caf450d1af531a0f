"""Flow matching on the paths of SiT (Ma et al. 2024, arXiv:2401.08740): training losses and the learned velocity."""

import torch
from torch import Tensor

from dit_fast.diffusion.diffusion_utils import at_least_float32, mean_flat, noise_like
from dit_fast.diffusion.objective import Model, ModelKwargs, NoisyBatch, Objective
from dit_fast.diffusion.paths import PATHS, Point, determinant, target, velocity_coefficients
from dit_fast.errors import ConfigError
from dit_fast.utils.values import Number

FLOW_PREDICTIONS = ("velocity", "score", "epsilon", "x0")
FLOW_WEIGHTINGS = ("none", "velocity", "likelihood")

# Distance of times from 0 and 1 where the equations are singular there: SiT's training intervals.
_EPS = 1e-3
_VP_EPS = 1e-5
# Lower bound of sigma in the weight of a model of x_0, 1 / sigma^2 (Li & He 2025, arXiv:2511.13720).
_LEAST_SIGMA = 0.05

TRAIN_EPS = Number(0, 0.5, below=True)


class FlowMatching(Objective):
    """A path between noise (t = 0) and data (t = 1), and a model of its velocity, its score, the noise or x_0.

    The model reads t itself, in [0, 1] and not scaled, as in SiT: `model(x, t, **model_kwargs)` -> (N, C, ...), or
    2 C channels, as SiT's models have, of which the first C are the prediction.

    Args:
        path: "linear", "gvp" or "vp".
        prediction: What the model predicts: "velocity", "score", "epsilon" or "x0".
        loss_weighting: Weight of the squared error: "none"; "velocity", which makes it the error of the velocity;
            "likelihood", the weight of the bound (SiT, section 2). With "none", a score's error is multiplied by
            sigma, which makes it the error of the noise.
        direction_loss: For a model of the velocity, add the mean of 1 - cos of the angle between prediction and
            velocity (Yao et al. 2024, arXiv:2410.10356; LightningDiT).
        train_eps: Distance of the training times from the ends at which the equations are singular; None: SiT's.

    Raises:
        ConfigError: An unknown value, or values that do not fit together.
    """

    num_timesteps: None = None
    prediction: str = "velocity"

    def __init__(
        self,
        path: str = "linear",
        prediction: str = "velocity",
        loss_weighting: str = "none",
        direction_loss: bool = False,
        train_eps: float | None = None,
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
                f"loss weighting {loss_weighting!r} applies only to models of score, noise or x_0; a model of the "
                "velocity takes none"
            )
        if direction_loss and prediction != "velocity":
            raise ConfigError(
                f"the direction loss is of the velocity, this model's prediction is {prediction}"
            )
        self.path, self.prediction, self.loss_weighting = path, prediction, loss_weighting
        self.direction_loss = direction_loss
        self.train_eps = None if train_eps is None else TRAIN_EPS.check("train_eps", train_eps)

    @property
    def interval(self) -> tuple[float, float]:
        """Training times, (first, last): [0, 1] without the ends at which the equations are singular."""
        if self.path == "vp":
            return 0.0, 1 - (_VP_EPS if self.train_eps is None else self.train_eps)
        eps = _EPS if self.train_eps is None else self.train_eps
        return (0.0, 1.0) if self.prediction == "velocity" else (eps, 1 - eps)

    def sampling_interval(self, sample_eps: float | None = None) -> tuple[float, float]:
        """SiT's (first, last) time of its ODE; `sample_eps` replaces its distance from singular ends, 0.001."""
        eps = _EPS if sample_eps is None else sample_eps
        if self.path == "vp":
            return 0.0, 1 - eps
        return (0.0, 1.0) if self.prediction == "velocity" else (eps, 1 - eps)

    def encoding_interval(self, sample_eps: float | None = None) -> tuple[float, float]:
        """SiT's (first, last) time of its ODE from data to noise: 1 - t of both ends of `sampling_interval`.

        On the path "vp" it starts at t = 1, except where the prediction does not determine the velocity there.
        """
        first, last = self.sampling_interval(sample_eps)
        if self.path == "vp" and self.prediction in ("epsilon", "x0"):
            return last, 1 - last
        return 1 - first, 1 - last

    def times_at(self, places: Tensor) -> Tensor:
        """Times (N,) at `places`, from 0 to 1, of the interval."""
        first, last = self.interval
        return first + (last - first) * places

    def noise_level(self, t: Tensor) -> Tensor:
        """Position of times (N,) between data, 0, and noise, 1."""
        return 1 - t

    def at(self, t: Tensor, ndim: int) -> Point:
        """The path at times t (N,), each coefficient a view (N, 1, ...) of `ndim` dimensions."""
        return PATHS[self.path](t.view(*t.shape, *(1,) * (ndim - t.dim())))

    def add_noise(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> NoisyBatch:
        """alpha x_0 + sigma noise of clean data (N, C, ...) at times t (N,), with the target, see `Objective`."""
        noise = noise_like(x_start, noise)
        point = self.at(t, x_start.dim())
        x_t = (point.alpha * x_start + point.sigma * noise).to(x_start.dtype)
        return NoisyBatch(x_t, t, x_start, t, target(self.prediction, x_start, noise, point))

    def loss(self, output: Tensor, batch: NoisyBatch) -> dict[str, Tensor]:
        """The loss of each sample (SiT, section 2).

        Args:
            output: The model's output (N, C, ...), or (N, 2 C, ...), of which the first C channels are the prediction.
            batch: The batch from `add_noise`.

        Returns:
            "loss" (N,), weighted, and its terms "mse" (N,) and, with the direction loss, "direction" (N,).

        Raises:
            ConfigError: An output of the wrong shape.
        """
        prediction, wanted = self._prediction(output, batch.x_t), batch.target
        assert wanted is not None
        mse = mean_flat((prediction - wanted) ** 2)
        if self.direction_loss:
            direction = mean_flat(1 - torch.cosine_similarity(prediction, wanted, dim=1))
            return {"mse": mse, "direction": direction, "loss": mse + direction}
        weights = self._weights(self.at(batch.t, prediction.dim()))
        return {"mse": mse, "loss": mse if weights is None else mse * weights.flatten()}

    def velocity(self, model: Model, x: Tensor, t: Tensor, model_kwargs: ModelKwargs = None) -> Tensor:
        """dx/dt of the probability flow, shaped like x (N, C, ...), at times t (N,) (SiT, section 2)."""
        prediction = self._prediction(model(x, t, **(model_kwargs or {})), x)
        a, b = velocity_coefficients(self.prediction, self.at(t, x.dim()))
        return a * x + b * prediction

    def _prediction(self, output: Tensor, x: Tensor) -> Tensor:
        if output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ConfigError(
                f"the model returned {tuple(output.shape)} for x {tuple(x.shape)}; expected as many channels, or "
                "twice as many"
            )
        return at_least_float32(output)

    def _weights(self, point: Point) -> Tensor | None:
        """Weights (N, 1, ...) of the squared error of the prediction; None for 1."""
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
