"""Metrics of features and pixels: Frechet distance, Inception score, precision and recall, nearest training images.

FID is the Frechet distance of Inception's pooled features (Heusel et al. 2017, arXiv:1706.08500, eq. 6), sFID that of
spatial features (Nash et al. 2021, arXiv:2103.03841).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_fast.errors import DataError


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D, D), both float64, of `num` feature vectors; `num` is None where unknown."""

    mean: Tensor
    covariance: Tensor
    num: int | None = None


class StreamingStatistics:
    """Mean and covariance of feature vectors that arrive in batches, in float64 for any input dtype.

    Accumulates sums of squares about the running mean, merged pairwise (Chan, Golub & LeVeque 1983, eq. 1.5): size and
    order of the batches affect only rounding. Requires D * D numbers on the device of the first batch.
    """

    def __init__(self) -> None:
        self.num = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add `features` (B, D). Raises DataError if D differs from before, or values are not finite."""
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != len(self._mean)):
            expected = "(B, D)" if self._mean is None else f"(B, {len(self._mean)})"
            raise DataError(f"features are {tuple(features.shape)}, expected {expected}")
        if not len(features):
            return
        if not features.isfinite().all():
            raise DataError(
                "the output of the feature network has NaN or infinity: damaged weights or too low a precision"
            )
        batch = features.double()
        mean = batch.mean(dim=0)
        centered = batch - mean
        self._add(len(batch), mean, centered.T @ centered)

    def merge(self, other: "StreamingStatistics") -> None:
        """Add all feature vectors of `other`."""
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
        """Mean and unbiased covariance, on the CPU. Raises DataError for fewer than 2 vectors."""
        if self.num < 2 or self._mean is None or self._scatter is None:
            raise DataError(f"{self.num} feature vectors have no covariance; give at least 2 images")
        return GaussianStatistics(self._mean.cpu(), (self._scatter / (self.num - 1)).cpu(), self.num)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau 1982, eq. 4), in float64.

    Raises:
        DataError: the statistics have different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise DataError(
            f"statistics of {len(first.mean)} and of {len(second.mean)} features cannot be compared: "
            "they belong to different feature networks"
        )
    # tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2 for S = A A^T. In contrast to a root of the product
    # S1 S2, the factors do not square the condition number, and no complex roots appear for a singular covariance.
    overlap = torch.linalg.svdvals(_factor(first.covariance).T @ _factor(second.covariance)).sum()
    squares = (first.mean - second.mean).square().sum()
    distance = squares + first.covariance.trace() + second.covariance.trace() - 2.0 * overlap
    # For equal Gaussians, rounding leaves about 1e-14 of the traces, of either sign.
    return max(float(distance), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance; negative eigenvalues are rounding errors and are set to 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0.0).sqrt()


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """Inception score exp E_x KL(p(y|x) || p(y)) (Salimans et al. 2016, arXiv:1606.03498), in float64.

    Args:
        logits: class logits (M, K).
        splits: number of parts; for 50,000 samples, 10 parts are ADM's parts of 5,000.
        seed: seed of a shuffle, because the samples of a folder may be ordered by class; None keeps their order.

    Returns:
        mean and standard deviation over the parts.

    Raises:
        DataError: there are fewer samples than parts.
    """
    if splits < 1 or len(logits) < splits:
        raise DataError(
            f"the Inception score of {len(logits)} samples in {splits} parts: choose 1 to {len(logits)}"
        )
    if seed is not None:
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
        logits = logits[order.to(logits.device)]
    scores = []
    for part in torch.tensor_split(logits, splits):
        probabilities = part.double().softmax(dim=1)
        # The mean divergence from the marginal is its entropy minus the mean entropy; entr(0) is 0, not NaN.
        marginal = torch.special.entr(probabilities.mean(dim=0)).sum()
        conditional = torch.special.entr(probabilities).sum(dim=1).mean()
        scores.append((marginal - conditional).exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


# Memory of the distances that are computed at a time.
_CHUNK_BYTES = 256 * 2**20
# Relative to two points' squared norms: a smaller squared distance is rounding error, and the points are equal.
_ROUNDING = 1e-13


def precision_recall(
    generated: Tensor, real: Tensor, k: int = 3, chunk_bytes: int = _CHUNK_BYTES
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), in float64.

    Precision is the fraction of generated samples in the manifold of the real ones: the union of the balls around each
    real sample that reach its k-th nearest neighbor. Recall is the same with the two sets exchanged.

    Args:
        generated: features (M, D).
        real: features (N, D).
        k: the neighbor that determines the radius.
        chunk_bytes: memory of the distances that are computed at a time.

    Returns:
        precision and recall.

    Raises:
        DataError: different D, or a set of at most `k` samples.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise DataError(
            f"features are {tuple(generated.shape)} and {tuple(real.shape)}, expected (M, D) and (N, D)"
        )
    least = min(len(generated), len(real))
    if k < 1 or least <= k:
        raise DataError(
            f"precision and recall with k = {k} need at least {k + 1} images on each side, one has {least}"
        )
    # Centered, because the difference of large squared norms would cancel.
    center = real.double().mean(dim=0)
    generated, real = generated.double() - center, real.double() - center
    precision = _covered(generated, real, _radii(real, k, chunk_bytes), chunk_bytes)
    recall = _covered(real, generated, _radii(generated, k, chunk_bytes), chunk_bytes)
    return precision, recall


def _radii(points: Tensor, k: int, chunk_bytes: int) -> Tensor:
    """Squared distance of each point of (N, D) to its k-th nearest neighbor, (N,)."""
    return torch.cat(
        # The first is the point itself, at distance zero.
        [squares.kthvalue(k + 1, dim=1).values for squares in _distances(points, points, chunk_bytes)]
    )


def _covered(points: Tensor, centers: Tensor, radii: Tensor, chunk_bytes: int) -> float:
    """Fraction of `points` (M, D) in any ball around `centers` (N, D) with squared `radii` (N,)."""
    inside = [(squares <= radii).any(dim=1) for squares in _distances(points, centers, chunk_bytes)]
    return float(torch.cat(inside).double().mean())


def _distances(points: Tensor, others: Tensor, chunk_bytes: int) -> Iterator[Tensor]:
    """Yield squared distances (rows, N) of some rows of `points` (M, D) to all `others` (N, D)."""
    rows = max(1, chunk_bytes // (8 * len(others)))
    other_squares = others.square().sum(dim=1)
    for part in points.split(rows):
        norms = part.square().sum(dim=1, keepdim=True) + other_squares
        squares = norms - 2.0 * (part @ others.T)
        yield squares.masked_fill(squares <= _ROUNDING * norms, 0.0)


@dataclass(frozen=True)
class NearestTraining:
    """Distances to the nearest training image: root mean squares over pixels and channels, in the images' units.

    Args:
        samples_median: median over the samples.
        heldout_median: median over real held-out images.
        threshold: 1st percentile of the distances of the held-out images.
        share_below: fraction of samples below the threshold: about 0.01 for a model that samples the data's
            distribution, near 1 for one that copies training images.
        closest: smallest distance of any sample.
    """

    samples_median: float
    heldout_median: float
    threshold: float
    share_below: float
    closest: float


def nearest_training_distance(
    images: np.ndarray, training: np.ndarray, flip: bool = False, itself: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest training image of each image.

    Args:
        images: (M, C, H, W).
        training: (K, C, H, W).
        flip: also compare with mirrored training images, for models trained with horizontal flips.
        itself: index (M,) of one training image per image to exclude, for leave-one-out distances.

    Returns:
        RMS distance and index of the nearest training image, (M,) each.
    """
    queries = np.asarray(images, dtype=np.float64).reshape(len(images), -1)
    best = np.full(len(queries), np.inf)
    index = np.zeros(len(queries), dtype=np.int64)
    rows = max(1, _CHUNK_BYTES // (8 * (len(queries) + 2 * queries.shape[1])))
    query_squares = np.einsum("mf,mf->m", queries, queries)[:, None]
    for first in range(0, len(training), rows):
        block = np.asarray(training[first : first + rows], dtype=np.float64)
        for candidates in (block, block[..., ::-1]) if flip else (block,):
            flat = candidates.reshape(len(candidates), -1)
            squares = query_squares + np.einsum("kf,kf->k", flat, flat) - 2.0 * queries @ flat.T  # (M, rows)
            if itself is not None:
                here = (itself >= first) & (itself < first + len(flat))
                squares[here, itself[here] - first] = np.inf
            column = squares.argmin(axis=1)
            nearest = squares[np.arange(len(queries)), column]
            closer = nearest < best
            best[closer], index[closer] = nearest[closer], first + column[closer]
    # For equal images, cancellation leaves about 1e-14, of either sign.
    return np.sqrt(np.maximum(best, 0.0) / queries.shape[1]), index


def compare_nearest(distance: np.ndarray, heldout_distance: np.ndarray) -> NearestTraining:
    """Compare the nearest distances (M,) of samples with those of real held-out images."""
    threshold = float(np.percentile(heldout_distance, 1))
    return NearestTraining(
        samples_median=float(np.median(distance)),
        heldout_median=float(np.median(heldout_distance)),
        threshold=threshold,
        share_below=float(np.mean(distance < threshold)),
        closest=float(distance.min()),
    )
