"""All scores of a set of samples against the image set that the model was trained on."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import ImageSet, Split
from dit_fast.errors import DataError
from dit_fast.evaluation.label_agreement import LabelAgreement, LabelClassifier, label_agreement
from dit_fast.evaluation.nearest import NearestTraining, compare_nearest, nearest_training_distance

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
