"""`Objective`: what a model is trained to predict, as the training step and the samplers use it.

A training step calls `add_noise`, the model, and `loss`, in this order:

    batch = objective.add_noise(x_start, t, noise)
    terms = objective.loss(model(batch.x_t, batch.model_t, y), batch)

`GaussianDiffusion` and `FlowMatching` implement it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from dit_fast.diffusion.paths import Point

ObjectiveName = Literal["diffusion", "flow"]
OBJECTIVES = get_args(ObjectiveName)

# model(x, t, **model_kwargs) -> output, or (output, extra); the output is (N, C or 2C, ...).
Model = Callable[..., Any]
ModelKwargs = Mapping[str, Any] | None


class NoisyBatch(NamedTuple):
    """A batch with noise added: the model's inputs, and what the loss compares its output with.

    Attributes:
        x_t: Noisy data (N, C, ...), the model's input, in the data's dtype.
        model_t: Timesteps (N,) as the model reads them.
        x_start: Clean data (N, C, ...).
        t: Timesteps (N,) of the objective.
        target: Value (N, C, ...) of a perfect prediction; None where the loss is the variational bound alone.
    """

    x_t: Tensor
    model_t: Tensor
    x_start: Tensor
    t: Tensor
    target: Tensor | None


class Objective(ABC):
    """A Gaussian path between data and noise, a prediction on it, and the loss of that prediction.

    Attributes:
        num_timesteps: Number of timesteps; None where time is continuous.
    """

    num_timesteps: int | None

    @property
    @abstractmethod
    def prediction(self) -> str:
        """Quantity that the model predicts, one of `dit_fast.diffusion.paths.PREDICTIONS`."""

    @abstractmethod
    def times_at(self, places: Tensor) -> Tensor:
        """Timesteps (N,) at `places` (N,), from 0 to 1, of the range that is trained."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """Position of timesteps (N,) between data, 0, and noise, 1."""

    @abstractmethod
    def at(self, t: Tensor, ndim: int) -> Point:
        """The path at timesteps t (N,); its coefficients are views (N, 1, ...) of `ndim` dimensions."""

    @abstractmethod
    def add_noise(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> NoisyBatch:
        """Add noise to clean data.

        Args:
            x_start: Clean data (N, C, ...).
            t: Timesteps (N,).
            noise: Standard normal noise shaped like `x_start`; drawn when None.

        Raises:
            ConfigError: Noise of another shape.
        """

    @abstractmethod
    def loss(self, output: Tensor, batch: NoisyBatch) -> dict[str, Tensor]:
        """Loss of each sample.

        Args:
            output: The model's output for `batch.x_t` and `batch.model_t`, (N, C, ...), or (N, 2 C, ...).
            batch: The batch from `add_noise`.

        Returns:
            "loss" (N,), and its terms by name, each (N,).

        Raises:
            ConfigError: An output of the wrong shape.
        """

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`add_noise`, the model, and `loss` in one call, with the reference's interface.

        Args:
            model: `model(x, t, **model_kwargs)` -> output, or a pair of that and anything else.
            x_start: Clean data (N, C, ...).
            t: Timesteps (N,).
            model_kwargs: Further arguments of the model.
            noise: Standard normal noise shaped like `x_start`; drawn when None.

        Returns:
            "loss" (N,), and its terms by name, see `loss`.

        Raises:
            ConfigError: Noise or an output of the wrong shape.
        """
        batch = self.add_noise(x_start, t, noise)
        output = model(batch.x_t, batch.model_t, **(model_kwargs or {}))
        return self.loss(output[0] if isinstance(output, tuple) else output, batch)
