"""How far is each sample from its nearest training image, compared with real images held out of training?

A model that copies puts samples nearer to the training set than new real images lie.
"""

from dataclasses import dataclass

import numpy as np

_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class NearestTraining:
    """Distances are root mean squares over pixels and channels, in the images' own units.

    `samples_median` and `heldout_median` are medians of the nearest distances; `threshold` is the 1st
    percentile of the held-out ones and `share_below` the share of samples nearer than that: about 0.01 for
    a model that draws like the data, near 1 for one that copies. `closest` is the smallest distance of any
    sample.
    """

    samples_median: float
    heldout_median: float
    threshold: float
    share_below: float
    closest: float


def nearest_training_distance(
    images: np.ndarray, training: np.ndarray, flip: bool = False, itself: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each image of (M, C, H, W), the RMS distance to and the index of its nearest in (K, C, H, W): two
    (M,).

    `flip`: a training image counts in both its orientations, for models trained with horizontal flips.
    `itself` (M,): the index of a training image that does not count for this image, to leave one out.
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
    # Cancellation leaves about 1e-14 for equal images, below zero too.
    return np.sqrt(np.maximum(best, 0.0) / queries.shape[1]), index


def compare_nearest(distance: np.ndarray, heldout_distance: np.ndarray) -> NearestTraining:
    """Nearest distances (M,) of samples beside those of real held-out images."""
    threshold = float(np.percentile(heldout_distance, 1))
    return NearestTraining(
        samples_median=float(np.median(distance)),
        heldout_median=float(np.median(heldout_distance)),
        threshold=threshold,
        share_below=float(np.mean(distance < threshold)),
        closest=float(distance.min()),
    )
