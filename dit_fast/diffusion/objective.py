"""What a model is trained to do: the interface that the training step and the samplers know an objective by."""

from typing import Any, Protocol

from torch import Tensor

from dit_fast.diffusion import FlowMatching, GaussianDiffusion, create_diffusion
from dit_fast.diffusion.gaussian_diffusion import Model, ModelKwargs
from dit_fast.diffusion.paths import Point
from dit_fast.errors import ConfigError

OBJECTIVES = ("diffusion", "flow")


class Objective(Protocol):
    """A Gaussian path, a prediction on it, and the loss of that prediction; `GaussianDiffusion` and `FlowMatching` are
    two. `num_timesteps` is None where time is continuous.
    """

    @property
    def num_timesteps(self) -> int | None: ...

    @property
    def prediction(self) -> str:
        """One of `dit_fast.diffusion.paths.PREDICTIONS`."""
        ...

    def times_at(self, places: Tensor) -> Tensor:
        """Times, as the model reads them, at `places` from 0 to 1 of those that are trained."""
        ...

    def noise_level(self, t: Tensor) -> Tensor:
        """From 0, data, to 1, noise."""
        ...

    def at(self, t: Tensor, ndim: int) -> Point:
        """The path at times t (N,), its coefficients (N, 1, ...) of `ndim` dimensions."""
        ...

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ "loss" (N,), and its terms by name."""
        ...


def create_objective(objective: str = "diffusion", **options: Any) -> GaussianDiffusion | FlowMatching:
    """The objective of that name: `create_diffusion` in all timesteps, or `FlowMatching`, with their arguments.

    Raises ConfigError for an unknown name or options that do not go together.
    """
    if objective == "diffusion":
        return create_diffusion(None, **options)
    if objective == "flow":
        return FlowMatching(**options)
    raise ConfigError(f"objective {objective!r}: choose {' or '.join(OBJECTIVES)}")
