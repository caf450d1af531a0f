"""Guidance: classifier-free (Ho & Salimans 2022) and with a classifier (Dhariwal & Nichol 2021)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_fast.sampling.schedule import Array
from dit_fast.utils.options import check_options, documented, option
from dit_fast.utils.values import Number, Value, Whole

GuidanceSchedule = Literal["constant", "linear", "cosine", "power-cosine"]
SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": np.ones_like,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - np.cos(np.pi * progress)) / 2,
    "power-cosine": lambda progress: (1 - np.cos(np.pi * progress**4)) / 2,
}
"""Fraction of (scale - 1) that is applied, by progress from 0 (noise) to 1 (data).

Linear and cosine: Wang et al. 2024 (arXiv:2404.13040), section 4; power-cosine: Gao et al. 2023 (MDT).
"""

SCALE = Number(0, 1e6)
LEVEL = Number(0, 1)


class Interval(Value):
    """Two noise levels from 0 (data) to 1 (noise), the lower one first."""

    nargs = 2

    @property
    def item(self) -> Value:
        return LEVEL

    def accept(self, value: Any) -> tuple[float, float]:
        low, high = (LEVEL.accept(level) for level in value)
        if low > high:
            raise ValueError
        return low, high

    def __str__(self) -> str:
        return "two noise levels between 0 (data) and 1 (noise), the lower one first"


INTERVAL = Interval()


@documented
@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: output = null + scale * (conditional - null) (Ho & Salimans 2022).

    Raises:
        ConfigError: a value is out of range.
    """

    scale: float = option(4.0, "Guidance scale; 1 evaluates the conditional branch alone", SCALE)
    channels: int | None = option(
        3,
        "Number of channels that are guided, the first ones of the model's output; None for all",
        Whole(1, 1 << 12),
    )
    interval: tuple[float, float] = option(
        (0.0, 1.0),
        "Noise levels between which guidance is applied, 0 is data and 1 is noise (arXiv:2404.07724)",
        INTERVAL,
        metavar=("LOW", "HIGH"),
    )
    schedule: GuidanceSchedule = option(
        "constant", "How the guidance scale rises from 1 at noise to its full value at data"
    )

    def __post_init__(self) -> None:
        check_options(self, lambda field: f"guidance {field}")

    @property
    def active(self) -> bool:
        """Whether any step may need the null class."""
        return self.scale != 1

    def guided(self, channels: int) -> int:
        """Number of guided channels of a model with this many."""
        return channels if self.channels is None else min(self.channels, channels)

    def summary(self, channels: int) -> str:
        """Scale and guided channels of a model with this many, for the user."""
        if not self.active:
            return "no guidance"
        guided = self.guided(channels)
        return f"guidance {self.scale:g} on {'all' if guided == channels else f'{guided} of {channels}'} channels"

    def scales(self, levels: Array) -> Array:
        """Scale at each noise level of `NoiseSchedule.levels`, float64; exactly 1 without the null branch."""
        low, high = self.interval
        scales = 1 + (self.scale - 1) * SCHEDULES[self.schedule](1 - levels)
        # The comparison with exactly 1 selects the steps that skip the null branch.
        return np.where((levels >= low) & (levels <= high), scales, 1.0)


def guide(output: Tensor, scale: Tensor | float, channels: int) -> Tensor:
    """Combine both branches of a model output.

    Args:
        output: (2n, C, H, W), the conditional half first.
        scale: Guidance scale.
        channels: Number of channels that are guided, at most C.

    Returns:
        The guided output (n, C, H, W).
    """
    conditional, null = output.chunk(2)
    guided = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
    if channels == output.shape[1]:
        return guided
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def classifier_cond_fn(
    classifier: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Callable[..., Tensor]:
    """Classifier guidance for `Sampler(cond_fn=...)` (Dhariwal & Nichol 2021).

    Args:
        classifier: classifier(x, t) returns logits (N, classes) for noisy x (N, C, H, W) at model timesteps t (N,).
        scale: Factor of the gradient.

    Returns:
        cond_fn(x, t, y), which returns scale * grad_x log p(y | x), (N, C, H, W).
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # Summed over the batch: samples do not interact, so that the gradient of each is its own.
            log_p = classifier(x, t).log_softmax(dim=-1).gather(1, y[:, None]).sum()
            return scale * torch.autograd.grad(log_p, x)[0]

    return cond_fn
