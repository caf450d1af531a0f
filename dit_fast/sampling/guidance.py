"""Guidance: classifier-free (Ho & Salimans 2022) and by a classifier (Dhariwal & Nichol 2021)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.sampling.schedule import Array, Nodes
from dit_fast.utils.values import Number, OneOf, Value, Whole, check_fields

# How much of (scale - 1) is applied, by the share of the way from noise to data.
SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": np.ones_like,
    "linear": lambda way: way,
    "cosine": lambda way: (1 - np.cos(np.pi * way)) / 2,
    "power-cosine": lambda way: (1 - np.cos(np.pi * way**4)) / 2,
}
"""Linear and cosine rise: Wang et al. 2024 (arXiv:2404.13040), section 4; power-cosine: Gao et al. 2023 (MDT)."""


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
    """Classifier-free guidance: answer = null + scale * (conditional - null), in the reference's scaling; 1 is none.

    scale     finite, at least 0
    channels  how many of the model's channels are guided, the others being the conditional answer's: the reference's
              3, None for all
    interval  noise levels (low, high) between which there is guidance, 0 data, 1 noise; outside only the conditional
              branch is run (Kynkaanniemi et al. 2024, arXiv:2404.07724)
    schedule  one of SCHEDULES: "constant", or rising from 1 at noise to `scale` at data

    Raises ConfigError for values out of range.
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

    def scales(self, nodes: Nodes) -> Array:
        """The scale at each node, float64 (N,); exactly 1 where only the conditional branch is to be run."""
        low, high = self.interval
        scales = 1 + (self.scale - 1) * SCHEDULES[self.schedule](1 - nodes.levels)
        return np.where((nodes.levels >= low) & (nodes.levels <= high), scales, 1.0)


def guide(answer: Tensor, scale: Tensor | float, channels: int) -> Tensor:
    """(2n, C, H, W), conditional half first, to the guided answer (n, C, H, W): the first `channels` of it guided."""
    conditional, null = answer.chunk(2)
    guided = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
    if channels == answer.shape[1]:
        return guided
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def classifier_cond_fn(
    classifier: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Callable[..., Tensor]:
    """`cond_fn(x, t, y)`: scale * grad_x log p(y | x) of a classifier of noisy data (Dhariwal & Nichol 2021).

    `classifier(x, t)` gives logits (N, classes) for x (N, C, H, W) at the model's timesteps t (N,).
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(x, t).log_softmax(dim=-1).gather(1, y[:, None]).sum()
            return scale * torch.autograd.grad(log_p, x)[0]

    return cond_fn
