"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_fast.errors import DataError

# Of the distances that are held at a time.
_CHUNK_BYTES = 256 * 2**20
# Of two points' squares: below it their squared distance is rounding of the products, and they are one point.
_ROUNDING = 1e-13


def precision_recall(
    generated: Tensor, real: Tensor, k: int = 3, chunk_bytes: int = _CHUNK_BYTES
) -> tuple[float, float]:
    """Precision: share of `generated` (M, D) within a ball about a real sample that reaches to its `k`-th nearest
    other real sample. Recall: the same with the sides exchanged, `real` (N, D).

    Distances are in float64 from products of centred features, `chunk_bytes` of them at a time. Raises DataError for
    different D, or for a side of no more than `k` samples.
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
    # Large squares would cancel.
    centre = real.double().mean(dim=0)
    generated, real = generated.double() - centre, real.double() - centre
    precision = _covered(generated, real, _radii(real, k, chunk_bytes), chunk_bytes)
    recall = _covered(real, generated, _radii(generated, k, chunk_bytes), chunk_bytes)
    return precision, recall


def _radii(points: Tensor, k: int, chunk_bytes: int) -> Tensor:
    """Squared distance of each of (N, D) to its k-th nearest other."""
    return torch.cat(
        # Its own distance, zero, comes first.
        [squares.kthvalue(k + 1, dim=1).values for squares in _distances(points, points, chunk_bytes)]
    )


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk_bytes: int) -> float:
    """Share of `points` (M, D) in any ball about `centres` (N, D) with squared `radii` (N,)."""
    inside = [(squares <= radii).any(dim=1) for squares in _distances(points, centres, chunk_bytes)]
    return float(torch.cat(inside).double().mean())


def _distances(points: Tensor, others: Tensor, chunk_bytes: int) -> Iterator[Tensor]:
    """Squared distances (rows, N) of `points` (M, D), some rows at a time, to all `others` (N, D)."""
    rows = max(1, chunk_bytes // (8 * len(others)))
    other_squares = others.square().sum(dim=1)
    for part in points.split(rows):
        norms = part.square().sum(dim=1, keepdim=True) + other_squares
        squares = norms - 2.0 * (part @ others.T)
        yield squares.masked_fill(squares <= _ROUNDING * norms, 0.0)
