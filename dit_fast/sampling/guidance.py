"""Guidance: classifier-free (Ho & Salimans 2022) and with a classifier (Dhariwal & Nichol 2021)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.sampling.schedule import Array, NoiseSchedule
from dit_fast.utils.values import Number, OneOf, Value, Whole, check_fields

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

    def accept(self, value: Any) -> tuple[float, float]:
        low, high = (LEVEL.accept(level) for level in value)
        if low > high:
            raise ValueError
        return low, high

    def __str__(self) -> str:
        return "two noise levels between 0 (data) and 1 (noise), the lower one first"


INTERVAL = Interval()
_RANGES: dict[str, Value] = {
    "scale": SCALE,
    "channels": Whole(1, 1 << 12),
    "interval": INTERVAL,
    "schedule": OneOf(tuple(SCHEDULES)),
}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: null + scale * (conditional - null), with the scale of the reference; 1 disables it.

    Args:
        scale: Guidance scale, at least 0.
        channels: Number of model channels that are guided; the others are taken from the conditional branch. The
            reference guides 3; None guides all.
        interval: Noise levels (low, high) between which guidance is applied, 0 data, 1 noise. Outside of it only the
            conditional branch is evaluated (Kynkaanniemi et al. 2024, arXiv:2404.07724).
        schedule: One of `SCHEDULES`: "constant", or increasing from 1 at noise to `scale` at data.

    Raises:
        ConfigError: A value is out of range.
    """

    scale: float = 4.0
    channels: int | None = 3
    interval: tuple[float, float] = (0.0, 1.0)
    schedule: str = "constant"

    def __post_init__(self) -> None:
        check_fields(self, _RANGES, lambda field: f"guidance {field}")

    @property
    def active(self) -> bool:
        """Whether any step may need the null class."""
        return self.scale != 1

    def scales(self, schedule: NoiseSchedule) -> Array:
        """Scale at each step, float64 (N,); exactly 1 where only the conditional branch is evaluated."""
        low, high = self.interval
        scales = 1 + (self.scale - 1) * SCHEDULES[self.schedule](1 - schedule.levels)
        return np.where((schedule.levels >= low) & (schedule.levels <= high), scales, 1.0)


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
            log_p = classifier(x, t).log_softmax(dim=-1).gather(1, y[:, None]).sum()
            return scale * torch.autograd.grad(log_p, x)[0]

    return cond_fn
