"""Frechet distance between Gaussians fitted to features, and their moments from a stream of batches.

FID is this distance on Inception's pooled features (Heusel et al. 2017, arXiv:1706.08500, eq. 6); sFID on features that
keep their place (Nash et al. 2021, arXiv:2103.03841).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_fast.errors import DataError


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D, D), both float64, of `num` feature vectors; `num` None where it is not known."""

    mean: Tensor
    covariance: Tensor
    num: int | None = None


class StreamingStatistics:
    """Mean and covariance of feature vectors that come in batches, in float64 whatever their dtype.

    Sums of squares about the running mean, merged pairwise (Chan, Golub & LeVeque 1983, eq. 1.5), so that neither the
    size nor the order of the batches matters beyond rounding. Memory: D * D numbers, on the device of the first batch.
    """

    def __init__(self) -> None:
        self.num = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add `features` (B, D); DataError for another D than before or for values that are not finite."""
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != len(self._mean)):
            expected = "(B, D)" if self._mean is None else f"(B, {len(self._mean)})"
            raise DataError(f"features are {tuple(features.shape)}, expected {expected}")
        if not len(features):
            return
        if not features.isfinite().all():
            raise DataError(
                "the feature network answers NaN or infinity: damaged weights or too low a precision"
            )
        batch = features.double()
        mean = batch.mean(dim=0)
        centred = batch - mean
        self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: "StreamingStatistics") -> None:
        """Add all that `other` has seen."""
        if other._mean is None or other._scatter is None:
            return
        if self._mean is not None and len(self._mean) != len(other._mean):
            raise DataError(f"statistics of {len(other._mean)} features, expected {len(self._mean)}")
        self._add(other.num, other._mean, other._scatter)

    def _add(self, num: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.num, self._mean, self._scatter = num, mean.clone(), scatter.clone()
            return
        total = self.num + num
        step = mean - self._mean
        self._scatter += scatter + torch.outer(step, step) * (self.num * num / total)
        self._mean += step * (num / total)
        self.num = total

    def finish(self) -> GaussianStatistics:
        """Mean and unbiased covariance, on the CPU; DataError after fewer than 2 vectors."""
        if self.num < 2 or self._mean is None or self._scatter is None:
            raise DataError(f"{self.num} feature vectors have no covariance; give at least 2 images")
        return GaussianStatistics(self._mean.cpu(), (self._scatter / (self.num - 1)).cpu(), self.num)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson & Landau 1982, eq. 4, in float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2 for S = A A^T. Taking them from factors, not from the
    product of covariances, neither squares its condition nor leaves complex roots where a covariance is singular.
    Raises DataError for different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise DataError(
            f"statistics of {len(first.mean)} and of {len(second.mean)} features cannot be compared: "
            "they are of different feature networks"
        )
    overlap = torch.linalg.svdvals(_factor(first.covariance).T @ _factor(second.covariance)).sum()
    squares = (first.mean - second.mean).square().sum()
    distance = squares + first.covariance.trace() + second.covariance.trace() - 2.0 * overlap
    # Of equal Gaussians rounding leaves some 1e-14 of the traces, below zero too.
    return max(float(distance), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance, whose negative eigenvalues are rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0.0).sqrt()
