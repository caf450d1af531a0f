"""Averages of the weights whose width is chosen after training (post-hoc EMA).

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv:2312.02696), section 3
and appendix C. A power-function average at time t weighs the weights of time u <= t by

    p(u) = (gamma + 1) u^gamma / t^(gamma + 1),

a profile that grows with the training; its relative width sigma_rel, the profile's standard deviation over t, is

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

Two of them are tracked, and snapshots of both are kept. The average of any other width is the sum of snapshots whose
profiles, so weighted, come nearest to its own in least squares. Time is counted in optimiser steps.
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
"""The parts of a checkpoint that hold the tracked averages, and their widths: the paper's."""

WIDEST = 12**-0.5
"""sigma_rel of gamma = 0: the plain mean of all weights."""

SNAPSHOTS = "averages"
"""Folder of a run with the snapshots, laid out as a run of its own."""

EVERY = 10
"""Steps between two updates: reading and writing both averages costs 2.4 bytes a parameter and step, not 24."""

MOST_OFF = 0.1
"""Greatest distance of a reconstructed profile, relative to its norm, that is still called an average of that width."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """The weighting of a power-function average: its width and the time at which it ends.

    Raises ConfigError for a width that no power function has.
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
        """The exponent of the width."""
        # (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2, whose greatest root is the one above 0.
        t = self.sigma_rel**-2
        return float(max(np.roots([1, 7, 16 - t, 12 - t]).real))

    def inner(self, other: "Profile") -> float:
        """Integral of the product of both over all time."""
        a, b = self.gamma, other.gamma
        first, last = sorted((self, other), key=lambda profile: profile.end)
        overlap = (first.end / last.end) ** last.gamma / last.end
        return (a + 1) * (b + 1) / (a + b + 1) * overlap


def combination(present: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Factors of the profiles `present`, which add up to 1, whose sum is nearest to `wanted`, and how far off it is.

    The distance is that of the profiles in L2, relative to the norm of `wanted`. With factors that add up to 1, what
    training does not change comes out as it is.
    """
    gram = np.array([[a.inner(b) for b in present] for a in present])
    target = np.array([a.inner(wanted) for a in present])
    # Profiles of unit norm, and a Lagrange multiplier for the sum.
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
    """The tracked averages of `parameters`, by name, sharded as they are: 8 bytes a parameter beside the optimiser's.

    `step`: up to which step they hold. An update weighs the weights of now by the part of the profile since the last
    one, so that steps in between are taken to have had the same weights.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = dict(parameters)
        self.step = 0
        self._held = {
            part: {name: p.detach().clone() for name, p in self.parameters.items()} for part in SIGMAS
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Called after every optimiser step; does its work after every `EVERY`th. Waits for nothing."""
        if step % EVERY:
            return
        weights = [shard(p) for p in self.parameters.values()]
        for part, sigma_rel in SIGMAS.items():
            kept = (self.step / step) ** (Profile(sigma_rel, 1.0).gamma + 1)
            averages = [shard(average) for average in self._held[part].values()]
            torch._foreach_lerp_(averages, weights, 1 - kept)
        self.step = step

    def state(self, model: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """A whole state dict of `model` for each part of `SIGMAS`; the tensors are live."""
        return {
            part: {name: held.get(name, tensor.detach()) for name, tensor in model.items()}
            for part, held in self._held.items()
        }

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {"step": self.step, "sigma_rel": SIGMAS}


def reconstruct(folder: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float]:
    """The weights averaged with width `sigma_rel` up to the checkpoint `folder`, and how far off their profile is.

    They are made of the checkpoint's own averages and of the run's snapshots before it, in float64; a damaged snapshot
    is left out with a warning. Raises CheckpointError for a run without snapshots, or with too few for this width.
    """
    own = _tracked(folder)
    end = max(profile.end for profile in own.values())
    found = [(folder, part, profile) for part, profile in own.items()]
    for path in step_folders(folder.resolve().parents[1] / SNAPSHOTS):
        try:
            tracked = _tracked(path)
        except CheckpointError as error:
            logger.warning("%s; going on without it", error)
            continue
        found += [(path, part, profile) for part, profile in tracked.items() if profile.end < end]
    factors, off = combination([profile for _, _, profile in found], Profile(sigma_rel, end))
    if off > MOST_OFF:
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
    """The profiles of the averages in a checkpoint, by part, whose files are verified."""
    manifest = read_manifest(folder)
    described = manifest.get("power_averages")
    if not described or not described["step"]:
        raise CheckpointError(
            f"{folder} holds no averages of a width to choose: they are kept by dit-fast train --ema-snapshot-every N"
            + (f", from step {EVERY} on" if described else "")
        )
    widths = described["sigma_rel"]
    verify_files(folder, manifest, [name for part in widths for name in part_files(manifest["files"], part)])
    return {part: Profile(sigma_rel, described["step"]) for part, sigma_rel in widths.items()}
