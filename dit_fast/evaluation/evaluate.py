"""FID, sFID, Inception score, precision and recall of images against a reference."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dit_fast.data import Conversion, Size
from dit_fast.errors import ConfigError, DataError
from dit_fast.evaluation.features import FeatureExtractor
from dit_fast.evaluation.images import (
    Archive,
    ImageSource,
    SavedStatistics,
    archive_images,
    open_source,
    read_statistics,
)
from dit_fast.evaluation.metrics import (
    StreamingStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)

Metric = Literal["fid", "sfid", "is", "precision", "recall"]
METRICS = get_args(Metric)
_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception score",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class Activations:
    """Results of a feature network on a set of N images.

    Args:
        statistics: moments of the features.
        features: pooled features, float32 (N, D).
        logits: class logits, float32 (N, K); None where the network has none.
    """

    statistics: SavedStatistics
    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Reference:
    """Reference of the scores: images, statistics, or both. ADM's statistics cover more images than its archives."""

    name: str
    images: ImageSource | None
    statistics: SavedStatistics | None


@dataclass(frozen=True)
class Quality:
    """Scores of a set of samples; None for a score that was not requested or cannot be computed.

    Args:
        extractor: name of the feature network.
        proxy: whether it is not the Inception-v3 of FID, so that no score is comparable with published ones.
        num_samples: number of samples.
        num_reference: number of reference images; None where unknown.
        fid: Frechet distance of pooled features.
        sfid: Frechet distance of spatial features.
        inception_score: Inception score, mean over its splits.
        precision: share of samples within the reference's manifold.
        recall: share of the reference within the samples' manifold.
        inception_score_std: standard deviation of the Inception score over its splits.
        notes: scores that are missing, and other remarks.
    """

    extractor: str
    proxy: bool
    num_samples: int
    num_reference: int | None
    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    precision: float | None = None
    recall: float | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The scores and notes as text, one per line."""
        mark = f"proxy ({self.extractor}) " if self.proxy else ""
        values = {
            "fid": self.fid,
            "sfid": self.sfid,
            "is": self.inception_score,
            "precision": self.precision,
            "recall": self.recall,
        }
        lines = []
        for metric, value in values.items():
            if value is not None:
                spread = f" +- {self.inception_score_std:.4g}" if metric == "is" else ""
                lines.append(f"{mark}{_NAMES[metric]}: {value:.6g}{spread}")
        return lines + [f"note: {note}" for note in self.notes]

    def as_json(self) -> dict[str, Any]:
        """The scores as JSON values; the names of a proxy's scores begin with proxy_."""
        prefix = "proxy_" if self.proxy else ""
        facts = ("extractor", "proxy", "num_samples", "num_reference", "notes")
        return {
            (name if name in facts else prefix + name): list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def open_reference(
    source: str | Path,
    image_size: int | None = None,
    num_workers: int = 1,
    buckets: Sequence[Size] = (),
    conversion: Conversion = Conversion(),  # noqa: B008 (frozen)
) -> Reference:
    """Open a reference: a source of `open_source`, or an .npz archive with `mu` and `sigma`, with or without images.

    The arguments are those of `open_source`.

    Raises:
        DataError: as `open_source` and `read_statistics`.
    """
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        return Reference(str(source), open_source(source, image_size, num_workers, buckets, conversion), None)
    archive = Archive(path)
    statistics = read_statistics(archive) if "mu" in archive else None
    if statistics is None:
        return Reference(str(source), open_source(source, image_size, num_workers, buckets, conversion), None)
    images = archive_images(archive, image_size) if "arr_0" in archive else None
    return Reference(str(source), images, statistics)


def collect(
    source: ImageSource,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda images: None,
) -> Activations:
    """Compute the features of all images.

    Args:
        source: the images.
        extractor: the feature network.
        batch_size: images per batch.
        on_batch: called with the size of each batch, for progress bars.

    Raises:
        ConfigError: `batch_size` is not positive.
        DataError: images are unreadable, or features are not finite.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: choose at least 1")
    pooled, spatial = StreamingStatistics(), StreamingStatistics()
    kept: list[Tensor] = []
    logits: list[Tensor] = []
    for images in source.batches(batch_size):
        features = extractor(images)
        pooled.update(features.pooled)
        kept.append(features.pooled.float().cpu())
        if features.spatial is not None:
            spatial.update(features.spatial)
        if features.logits is not None:
            logits.append(features.logits.float().cpu())
        on_batch(len(images))
    statistics = SavedStatistics(pooled.finish(), spatial.finish() if spatial.num else None, extractor.name)
    return Activations(statistics, torch.cat(kept), torch.cat(logits) if logits else None)


def score(
    samples: Activations,
    reference: SavedStatistics,
    reference_features: Tensor | None,
    proxy: bool,
    metrics: Sequence[str] | None = None,
    *,
    splits: int = 10,
    k: int = 3,
    device: torch.device | None = None,
) -> Quality:
    """Score samples against a reference.

    Args:
        samples: features of the samples.
        reference: statistics of the reference.
        reference_features: features of the reference images (M, D), for precision and recall; None without images.
        proxy: whether the feature network is a proxy.
        metrics: some of `METRICS`; None: all that can be computed, with a note for each other.
        splits: splits of the Inception score.
        k: neighbors of precision and recall.
        device: device on which precision and recall are computed.

    Raises:
        ConfigError: an unknown metric, or statistics of another feature network.
        DataError: a requested metric cannot be computed.
    """
    unknown = sorted(set(metrics or ()) - set(METRICS))
    if unknown:
        raise ConfigError(f"unknown metric {unknown[0]!r}: choose {', '.join(METRICS)}")
    statistics, extractor = samples.statistics, str(samples.statistics.extractor)
    check_reference(reference, extractor, proxy)
    missing = _missing(samples, reference, reference_features, splits, k)
    for metric in metrics or ():
        if metric in missing:
            raise DataError(f"{metric}: {missing[metric]}")
    wanted = [metric for metric in metrics or METRICS if metric not in missing]
    notes = [f"no {_NAMES[m]}: {missing[m]}" for m in METRICS if metrics is None and m in missing]
    values: dict[str, float] = {}
    if "fid" in wanted:
        values["fid"] = frechet_distance(statistics.pooled, reference.pooled)
    if "sfid" in wanted and statistics.spatial is not None and reference.spatial is not None:
        values["sfid"] = frechet_distance(statistics.spatial, reference.spatial)
    if "is" in wanted and samples.logits is not None:
        values["inception_score"], values["inception_score_std"] = inception_score(samples.logits, splits)
    if {"precision", "recall"} & set(wanted) and reference_features is not None:
        pair = precision_recall(samples.features.to(device), reference_features.to(device), k)
        values |= {
            name: value for name, value in zip(("precision", "recall"), pair, strict=True) if name in wanted
        }
    num, dim = len(samples.features), samples.features.shape[1]
    # The rank of a covariance of `num` vectors is at most num - 1.
    if "fid" in values and num <= dim:
        notes.append(
            f"{num} images for {dim} features: their covariance is singular and the distance biased upwards"
        )
    return Quality(extractor, proxy, num, reference.pooled.num, notes=tuple(notes), **values)


def check_reference(reference: SavedStatistics, extractor: str, proxy: bool) -> None:
    """Raise ConfigError unless the statistics are known to belong to the features of `extractor`."""
    if reference.extractor not in (None, extractor):
        raise ConfigError(
            f"the reference statistics belong to {reference.extractor} features, the samples' to {extractor}"
        )
    if reference.extractor is None and proxy:
        raise ConfigError(
            f"the reference statistics do not state that they belong to {extractor} features; those of ADM and "
            "pytorch-fid belong to Inception's: use --features inception"
        )


def _missing(
    samples: Activations,
    reference: SavedStatistics,
    reference_features: Tensor | None,
    splits: int,
    k: int,
) -> dict[str, str]:
    """Metrics that cannot be computed, and the reasons."""
    missing = {}
    if samples.statistics.spatial is None:
        missing["sfid"] = f"{samples.statistics.extractor} has no spatial features"
    elif reference.spatial is None:
        missing["sfid"] = "the reference statistics have no mu_s and sigma_s"
    if samples.logits is None:
        missing["is"] = f"{samples.statistics.extractor} has no class logits"
    elif len(samples.logits) < splits:
        missing["is"] = f"{len(samples.logits)} images are fewer than {splits} splits (--splits)"
    reason = None
    if reference_features is None:
        reason = "the reference has only statistics, no images"
    elif min(len(samples.features), len(reference_features)) <= k:
        reason = f"needs at least {k + 1} images on each side"
    if reason is not None:
        missing["precision"] = missing["recall"] = reason
    return missing
