"""FID, sFID, Inception score, precision and recall of a set of images against a reference."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import Conversion, ImageSet, Size, Split
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
from dit_fast.evaluation.label_agreement import LabelAgreement, LabelClassifier, label_agreement
from dit_fast.evaluation.metrics import (
    NearestTraining,
    StreamingStatistics,
    compare_nearest,
    frechet_distance,
    inception_score,
    nearest_training_distance,
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
    """What is kept of a set of images: moments of its features, the features themselves, and class logits."""

    statistics: SavedStatistics
    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: images, statistics of more images than are there (ADM), or both."""

    name: str
    images: ImageSource | None
    statistics: SavedStatistics | None


@dataclass(frozen=True)
class Quality:
    """Scores, None where they were not asked for or cannot be had. `proxy`: the features are not those of FID, and no
    score is comparable with a published one.
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
        """The scores and notes for a person, a line each."""
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
        """JSON values; the scores of a proxy are named proxy_fid and so on."""
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
    """What `open_source` takes, or an .npz archive with `mu` and `sigma`, which may hold images too, as ADM's do."""
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
    """Run all images through the feature network, `batch_size` at a time; `on_batch` hears of the size of each."""
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
    """The scores of `samples`; `metrics` None: all that can be had, with a note for each that cannot.

    splits: parts of the Inception score; k: neighbours of precision and recall, computed on `device`. Raises
    ConfigError for statistics of another feature network, DataError for a metric that was asked for and cannot be had.
    """
    unknown = sorted(set(metrics or ()) - set(METRICS))
    if unknown:
        raise ConfigError(f"unknown metric {unknown[0]!r}: choose {', '.join(METRICS)}")
    ours, own = samples.statistics, samples.statistics.extractor
    check_reference(reference, str(own), proxy)
    missing = _missing(samples, reference, reference_features, splits, k)
    for metric in metrics or ():
        if metric in missing:
            raise DataError(f"{metric}: {missing[metric]}")
    wanted = [metric for metric in metrics or METRICS if metric not in missing]
    notes = [f"no {_NAMES[m]}: {missing[m]}" for m in METRICS if metrics is None and m in missing]
    values: dict[str, float] = {}
    if "fid" in wanted:
        values["fid"] = frechet_distance(ours.pooled, reference.pooled)
    if "sfid" in wanted and ours.spatial is not None and reference.spatial is not None:
        values["sfid"] = frechet_distance(ours.spatial, reference.spatial)
    if "is" in wanted and samples.logits is not None:
        values["inception_score"], values["inception_score_std"] = inception_score(samples.logits, splits)
    if {"precision", "recall"} & set(wanted) and reference_features is not None:
        pair = precision_recall(samples.features.to(device), reference_features.to(device), k)
        values |= {
            name: value for name, value in zip(("precision", "recall"), pair, strict=True) if name in wanted
        }
    num, dim = len(samples.features), samples.features.shape[1]
    if "fid" in values and num <= dim:
        notes.append(
            f"{num} images for {dim} features: their covariance is singular and the distance biased upwards"
        )
    return Quality(str(own), proxy, num, reference.pooled.num, notes=tuple(notes), **values)


def check_reference(reference: SavedStatistics, extractor: str, proxy: bool) -> None:
    """Raise ConfigError where the statistics are not known to be of the features of `extractor`."""
    if reference.extractor not in (None, extractor):
        raise ConfigError(
            f"the reference statistics are of {reference.extractor} features, the samples' of {extractor}"
        )
    if reference.extractor is None and proxy:
        raise ConfigError(
            f"the reference statistics do not say that they are of {extractor} features; those of ADM and pytorch-fid "
            "are of Inception's: use --features inception"
        )


def _missing(
    samples: Activations,
    reference: SavedStatistics,
    reference_features: Tensor | None,
    splits: int,
    k: int,
) -> dict[str, str]:
    """Metrics that cannot be had, and why."""
    missing = {}
    if samples.statistics.spatial is None:
        missing["sfid"] = f"{samples.statistics.extractor} has no spatial features"
    elif reference.spatial is None:
        missing["sfid"] = "the reference statistics have no mu_s and sigma_s"
    if samples.logits is None:
        missing["is"] = f"{samples.statistics.extractor} has no class logits"
    elif len(samples.logits) < splits:
        missing["is"] = f"{len(samples.logits)} images are fewer than {splits} parts (--splits)"
    reason = None
    if reference_features is None:
        reason = "the reference has statistics only, no images"
    elif min(len(samples.features), len(reference_features)) <= k:
        reason = f"needs at least {k + 1} images on each side"
    if reason is not None:
        missing["precision"] = missing["recall"] = reason
    return missing


_MOST_BYTES = 2 * 2**30
_MOST_REFERENCES = 2_000


@dataclass(frozen=True)
class Scores:
    """`num_training` of `all_training` training images were compared with. `left_out` says where the real
    images that the samples are measured beside come from: "heldout", or "training" when the set holds
    nothing out and each of a part of its training images is compared with all the others.
    """

    data: str
    labels: LabelAgreement
    nearest: NearestTraining
    num_training: int
    all_training: int
    left_out: str

    def lines(self) -> list[str]:
        """The scores as two lines for a person."""
        near, agree = self.nearest, self.labels
        part = "" if self.num_training == self.all_training else f" (of {self.all_training})"
        real = "held-out images" if self.left_out == "heldout" else "training images, themselves left out,"
        return [
            f"label agreement: {agree.agreement:.1%} of {agree.num_samples} samples are classified as the "
            f"label they were conditioned on (the classifier is right on {agree.classifier_accuracy:.1%} of "
            f"{agree.num_heldout} real images it was not trained on)",
            f"nearest training image: median RMS distance {near.samples_median:.3f} for samples, "
            f"{near.heldout_median:.3f} for real {real} among {self.num_training}{part}; "
            f"{near.share_below:.1%} of samples are nearer than their nearest 1% ({near.threshold:.3f})",
        ]

    def as_json(self) -> dict[str, Any]:
        """The scores as JSON values."""
        return asdict(self)


class Scorer:
    """Scores samples against `images`; fitting the classifier happens here, before any sampling time is
    spent.

    Raises DataError for a set too small to score with and MissingExtraError without scikit-learn.
    """

    def __init__(self, images: ImageSet, seed: int = 0) -> None:
        self._set = images
        generator = torch.Generator().manual_seed(seed)
        self._training, self._training_labels = _read(images.train, generator)
        if len(images.heldout):
            self._real = _read(images.heldout, generator, _MOST_REFERENCES)
            fitted = slice(None)
        else:
            # The model saw every image; the classifier at least is judged on a tenth that it did not see.
            tenth = len(self._training) // 10
            if tenth == 0:
                raise DataError(
                    f"{images.name}: {len(self._training)} images are too few to score samples with"
                )
            self._real = (self._training[:tenth], self._training_labels[:tenth])
            fitted = slice(tenth, None)
        self._classifier = LabelClassifier(self._training[fitted], self._training_labels[fitted], seed)

    def __call__(self, samples: Tensor, labels: Tensor) -> Scores:
        """Scores of `samples` float (M, C, H, W) in [-1, 1] with the `labels` (M,) that they were
        conditioned on.
        """
        drawn = samples.numpy()
        held_out = len(self._set.heldout) > 0
        real = self._real[0][:_MOST_REFERENCES]
        itself = None if held_out else np.arange(len(real))
        reference, _ = nearest_training_distance(real, self._training, self._set.flip, itself)
        distance, _ = nearest_training_distance(drawn, self._training, self._set.flip)
        return Scores(
            data=self._set.name,
            labels=label_agreement(self._classifier, drawn, labels.numpy(), self._real),
            nearest=compare_nearest(distance, reference),
            num_training=len(self._training),
            all_training=len(self._set.train),
            left_out="heldout" if held_out else "training",
        )


def _read(split: Split, generator: torch.Generator, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split in random order, as many as fit in memory and `most`."""
    fits = _MOST_BYTES // (4 * int(np.prod(split.sample_shape)))
    chosen = torch.randperm(len(split), generator=generator)[: min(fits, most or fits)]
    images = torch.cat([split.batch(part) for part in chosen.split(1024)])
    return images.numpy(), split.labels[chosen].numpy()
