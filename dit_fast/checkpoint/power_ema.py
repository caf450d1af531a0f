"""Post-hoc EMA: averages of the weights whose width is chosen after training.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv:2312.02696), section 3
and appendix C. A power-function average at time t weights the parameters of time u <= t by the profile

    p(u) = (gamma + 1) u^gamma / t^(gamma + 1),

which grows with the training. Its relative width sigma_rel is the standard deviation of the profile divided by t:

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

Two averages are tracked during training, and snapshots of both are kept. An average of any other width is the linear
combination of snapshots whose profile is nearest to its own in least squares. Time is counted in optimizer steps.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.checkpoint.folder import read_part, step_folders
from dit_fast.checkpoint.manifest import read_manifest, verify_files
from dit_fast.checkpoint.tensors import part_files
from dit_fast.distributed.sharding import shard
from dit_fast.errors import CheckpointError, ConfigError

SIGMAS = {"sigma_050": 0.05, "sigma_100": 0.10}
"""Relative widths of the tracked averages, as in the paper, by the part of a checkpoint that stores them."""

WIDEST = 12**-0.5
"""sigma_rel of gamma = 0: the mean of all weights."""

SNAPSHOTS = "averages"
"""Folder of a run with the snapshots, which has the layout of a run."""

EVERY = 10
"""Steps between two updates: memory traffic for both averages is then 2.4 bytes per parameter and step, not 24."""

MAX_DISTANCE = 0.1
"""Largest accepted distance of a reconstructed profile from the requested one, relative to the norm of the latter."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """Profile of a power-function average.

    Args:
        sigma_rel: Relative width.
        end: Time of the average.

    Raises:
        ConfigError: No power function has this width.
    """

    sigma_rel: float
    end: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < WIDEST:
            raise ConfigError(
                f"relative width {self.sigma_rel:g}: give more than 0 and less than {WIDEST:.4f}"
            )

    @cached_property
    def gamma(self) -> float:
        """Exponent of the power function."""
        # Of the roots of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2, the largest is the positive one.
        t = self.sigma_rel**-2
        return float(max(np.roots([1, 7, 16 - t, 12 - t]).real))

    def inner(self, other: "Profile") -> float:
        """Integral over time of the product of both profiles."""
        a, b = self.gamma, other.gamma
        first, last = sorted((self, other), key=lambda profile: profile.end)
        overlap = (first.end / last.end) ** last.gamma / last.end
        return (a + 1) * (b + 1) / (a + b + 1) * overlap


def combination(present: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Find the linear combination of profiles that is nearest to another profile in L2.

    The factors sum to 1, so that parameters that training does not change are reproduced.

    Args:
        present: Profiles of the snapshots.
        wanted: The requested profile.

    Returns:
        The factors, and the distance to `wanted` relative to its norm.
    """
    # Least squares: the Gram matrix of the profiles times the factors equals their products with the requested one.
    gram = np.array([[a.inner(b) for b in present] for a in present])
    target = np.array([a.inner(wanted) for a in present])
    # Profiles scaled to unit norm, for conditioning, and a Lagrange multiplier for the sum of the factors.
    norms = np.sqrt(np.diag(gram))
    count = len(present)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram / np.outer(norms, norms)
    system[:count, count] = system[count, :count] = 1 / norms
    solved = np.linalg.lstsq(system, np.append(target / norms, 1.0), rcond=None)[0]
    factors = solved[:count] / norms
    norm = wanted.inner(wanted)
    square = factors @ gram @ factors - 2 * factors @ target + norm
    return factors.tolist(), float(np.sqrt(max(square, 0.0) / norm))


class PowerAverages:
    """The tracked averages: 8 bytes per parameter, with the sharding of the parameters.

    An update weights the current parameters by the integral of the profile since the last update (`step`), as if they
    had not changed in between.

    Args:
        parameters: Parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = dict(parameters)
        self.step = 0
        self._held = {
            part: {name: p.detach().clone() for name, p in self.parameters.items()} for part in SIGMAS
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update every `EVERY` steps; called after each optimizer step. Does not synchronize with the device."""
        if step % EVERY:
            return
        weights = [shard(p) for p in self.parameters.values()]
        for part, sigma_rel in SIGMAS.items():
            # Integral of the profile up to the last update, by which the old average is weighted.
            kept = (self.step / step) ** (Profile(sigma_rel, 1.0).gamma + 1)
            averages = [shard(average) for average in self._held[part].values()]
            torch._foreach_lerp_(averages, weights, 1 - kept)
        self.step = step

    def state(self, model: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """State dict of `model` for each tracked average, by part of the checkpoint; the tensors are not copied."""
        return {
            part: {name: held.get(name, tensor.detach()) for name, tensor in model.items()}
            for part, held in self._held.items()
        }

    def describe(self) -> dict[str, Any]:
        """Entry of the manifest."""
        return {"step": self.step, "sigma_rel": SIGMAS}


def reconstruct(folder: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """Reconstruct an average from the snapshots of a run, in float64.

    Args:
        folder: Checkpoint at which the average ends. Its own averages and the earlier snapshots of its run are used; a
            damaged snapshot is skipped with a warning.
        sigma_rel: Relative width.

    Returns:
        The averaged weights, and the relative distance of their profile from the requested one.

    Raises:
        CheckpointError: The run has no snapshots, or too few for this width.
    """
    own = _tracked(folder)
    end = max(profile.end for profile in own.values())
    found = [(folder, part, profile) for part, profile in own.items()]
    for path in step_folders(folder.resolve().parents[1] / SNAPSHOTS):
        try:
            tracked = _tracked(path)
        except CheckpointError as error:
            logger.warning("%s; continuing without it", error)
            continue
        found += [(path, part, profile) for part, profile in tracked.items() if profile.end < end]
    factors, off = combination([profile for _, _, profile in found], Profile(sigma_rel, end))
    if off > MAX_DISTANCE:
        raise CheckpointError(
            f"{folder}: its {len(found) // len(SIGMAS)} snapshots give no average of relative width {sigma_rel:g} "
            f"(the nearest is {off:.0%} off); give a width nearer to {' or '.join(map(str, SIGMAS.values()))}, or "
            f"train with a smaller --ema-snapshot-every"
        )
    total: dict[str, Tensor] = {}
    for factor, (path, part, _) in zip(factors, found, strict=True):
        for name, tensor in read_part(path, read_manifest(path), part).items():
            if name not in total:
                total[name] = torch.zeros_like(tensor, dtype=torch.float64)
            total[name].add_(tensor, alpha=factor)
    return {name: tensor.float() for name, tensor in total.items()}, off


def _tracked(folder: Path) -> dict[str, Profile]:
    """Profiles of the averages in a checkpoint, by part, after verifying their files."""
    manifest = read_manifest(folder)
    described = manifest.get("power_averages")
    if not described or not described["step"]:
        raise CheckpointError(
            f"{folder} has no averages of selectable width: they are written by dit-fast train --ema-snapshot-every N"
            + (f", from step {EVERY} on" if described else "")
        )
    widths = described["sigma_rel"]
    verify_files(folder, manifest, [name for part in widths for name in part_files(manifest["files"], part)])
    return {part: Profile(sigma_rel, described["step"]) for part, sigma_rel in widths.items()}
