"""Saved statistics of a reference set, in the names of ADM's archives: mu, sigma (pooled), mu_s, sigma_s (spatial)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dit_fast.errors import DataError
from dit_fast.evaluation.archives import Archive
from dit_fast.evaluation.frechet import GaussianStatistics


@dataclass(frozen=True)
class SavedStatistics:
    """`extractor`: name of the feature network, None in the archives of ADM and of pytorch-fid, which do not say."""

    pooled: GaussianStatistics
    spatial: GaussianStatistics | None
    extractor: str | None


def read_statistics(archive: Archive) -> SavedStatistics:
    """The statistics in an archive; DataError where mu and sigma are missing, do not fit together or are not finite."""
    if "mu" not in archive or "sigma" not in archive:
        raise DataError(f"{archive.path} has {', '.join(archive.keys[:5])}, expected mu and sigma")
    spatial = _gaussian(archive, "mu_s", "sigma_s") if "mu_s" in archive and "sigma_s" in archive else None
    extractor = None
    if "extractor" in archive:
        name = archive.read("extractor")
        if name.dtype.kind != "U" or name.ndim:
            raise DataError(f"{archive.path}: extractor is {name.dtype} {name.shape}, expected a name")
        extractor = str(name)
    return SavedStatistics(_gaussian(archive, "mu", "sigma"), spatial, extractor)


def write_statistics(path: Path, statistics: SavedStatistics) -> None:
    """Write an .npz that `read_statistics`, ADM's evaluator and pytorch-fid read."""
    arrays = {"mu": statistics.pooled.mean.numpy(), "sigma": statistics.pooled.covariance.numpy()}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean.numpy(), "sigma_s": statistics.spatial.covariance.numpy()}
    if statistics.pooled.num is not None:
        arrays["num"] = np.array(statistics.pooled.num)
    if statistics.extractor is not None:
        arrays["extractor"] = np.array(statistics.extractor)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _gaussian(archive: Archive, mean_key: str, covariance_key: str) -> GaussianStatistics:
    for key in (mean_key, covariance_key):
        if archive.member(key).dtype.kind != "f":
            raise DataError(f"{archive.path}: {key} is {archive.member(key).dtype}, expected floating point")
    mean, covariance = archive.read(mean_key), archive.read(covariance_key)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{archive.path}: {mean_key} is {mean.shape} and {covariance_key} {covariance.shape}, "
            "expected (D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{archive.path}: {mean_key} or {covariance_key} has NaN or infinite values")
    symmetric = np.abs(covariance - covariance.T).max() <= 1e-3 * max(np.abs(covariance).max(), 1e-30)
    if not len(mean) or not symmetric or (covariance.diagonal() < 0).any():
        raise DataError(
            f"{archive.path}: {covariance_key} is no covariance: not symmetric, or with negative variances"
        )
    num = int(archive.read("num")) if "num" in archive and archive.member("num").shape == () else None
    if num is not None and num < 1:
        raise DataError(f"{archive.path}: num is {num}, expected a number of images")
    return GaussianStatistics(
        torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)), num
    )
