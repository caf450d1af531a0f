"""Respacing: a process over a subset of another's timesteps, for faster sampling (Improved DDPM, section 4)."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from dit_fast.diffusion.gaussian_diffusion import (
    DeviceTable,
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from dit_fast.errors import ConfigError
from dit_fast.utils.values import Whole, shown

_COUNT = Whole(0)
_DDIM_PREFIX = "ddim"


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int] | int) -> set[int]:
    """Choose timesteps to keep.

    Args:
        num_timesteps: Number of steps of the original process.
        section_counts: How many steps to keep. "250", 250 or [250]: that many, evenly from the first to the
            last. "10,15,20" or a list: the process is cut into as many equal sections, and each keeps its
            number of steps, evenly from its first to its last. "ddim50": that many at the one integer stride
            that gives them, from 0 (DDIM, section 5; the last kept step is then below the last step).

    Raises:
        ConfigError: Not a number, more steps than the section has, no step at all, or no such stride.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith(_DDIM_PREFIX):
            return _strided(num_timesteps, section_counts)
        parts: Sequence[str | int] = section_counts.split(",")
    else:
        parts = section_counts if isinstance(section_counts, Iterable) else [section_counts]
    counts = [_count(part, section_counts) for part in parts]
    if sum(counts) == 0:
        raise ConfigError(f"timestep respacing {section_counts!r} keeps no step; ask for at least one")

    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if count > size:
            raise ConfigError(
                f"timestep respacing {section_counts!r} asks for {count} steps of a section that has {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed rather than multiplied, so that a position between two steps rounds as in the reference.
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += size
    return kept


def _strided(num_timesteps: int, respacing: str) -> set[int]:
    wanted = _count(respacing.removeprefix(_DDIM_PREFIX), respacing)
    if wanted < 1:
        raise ConfigError(f"timestep respacing {respacing!r} keeps no step; ask for at least one")
    # The smallest stride that keeps no more than `wanted`; if that is fewer, no stride keeps as many.
    stride = -(-num_timesteps // wanted)
    kept = range(0, num_timesteps, stride)
    if len(kept) != wanted or stride >= max(num_timesteps, 2):
        possible = sorted({len(range(0, num_timesteps, s)) for s in range(1, num_timesteps)})
        below = [n for n in possible if n < wanted][-1:]
        above = [n for n in possible if n > wanted][:1]
        nearest = " or ".join(f"{_DDIM_PREFIX}{n}" for n in below + above)
        raise ConfigError(
            f"timestep respacing {respacing!r}: no integer stride keeps {wanted} of {num_timesteps} steps; "
            f"nearest: {nearest}"
        )
    return set(kept)


def _count(part: str | int, respacing: object) -> int:
    try:
        return _COUNT.accept(_COUNT.parse(part) if isinstance(part, str) else part)
    except (TypeError, ValueError):
        raise ConfigError(
            f"timestep respacing {shown(respacing)} is invalid at {shown(part)}; "
            "write a number, numbers with commas, or ddim and a number"
        ) from None


class SpacedDiffusion(GaussianDiffusion):
    """A process over a subset of the timesteps of another, with the same alpha-bar at each.

    Its own timesteps count from 0; models and classifiers receive those of the original process.

    Args:
        use_timesteps: Timesteps of the original process to keep, in any order.
        betas: Variances (original steps,) of the original process.
        model_mean_type: As for `GaussianDiffusion`, like the next three.
        model_var_type: As for `GaussianDiffusion`.
        loss_type: As for `GaussianDiffusion`.
        min_snr_gamma: As for `GaussianDiffusion`.

    Attributes:
        use_timesteps: The kept timesteps as a set.
        timestep_map: The kept timesteps in order; entry i is step i of this process.
        original_num_steps: Number of steps of the original process.

    Raises:
        ConfigError: No timestep, or one that the original process does not have.
    """

    def __init__(
        self,
        use_timesteps: Iterable[int],
        *,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        min_snr_gamma: float | None = None,
    ) -> None:
        original_betas = np.array(betas, dtype=np.float64)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = len(original_betas)
        if not self.timestep_map:
            raise ConfigError("no timestep is kept; ask for at least one")
        if self.timestep_map[0] < 0 or self.timestep_map[-1] >= self.original_num_steps:
            raise ConfigError(
                f"timesteps to keep must lie in 0..{self.original_num_steps - 1}; "
                f"found {self.timestep_map[0]} to {self.timestep_map[-1]}"
            )
        kept = np.cumprod(1.0 - original_betas)[self.timestep_map]
        super().__init__(
            betas=1 - kept / np.append(1.0, kept[:-1]),
            model_mean_type=model_mean_type,
            model_var_type=model_var_type,
            loss_type=loss_type,
            min_snr_gamma=min_snr_gamma,
        )
        if self.num_timesteps != self.original_num_steps:
            self._timestep_table = DeviceTable(torch.tensor(self.timestep_map, dtype=torch.int64))
