"""Scores without a feature network: agreement with the class labels, and distance to the nearest training image."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_fast.data import ImageSet, Split
from dit_fast.errors import DataError, MissingExtraError
from dit_fast.evaluation.metrics import NearestTraining, compare_nearest, nearest_training_distance

# A support-vector machine is within a point of its best accuracy with so many images, and fitted within seconds.
_MOST_TRAINING_IMAGES = 10_000
_COMPONENTS = 64
# Training images that are kept in memory, as float32.
_MOST_BYTES = 2 * 2**30
# Real images that samples are compared with.
_MOST_REFERENCES = 2_000


@dataclass(frozen=True)
class LabelAgreement:
    """Agreement of a classifier with the labels that samples were conditioned on.

    Args:
        agreement: fraction of samples that the classifier assigns their own label.
        by_class: the same for each label.
        num_samples: number of samples.
        classifier_accuracy: accuracy of the classifier on real images that it was not fitted to.
        num_heldout: number of those images.
    """

    agreement: float
    by_class: dict[int, float]
    num_samples: int
    classifier_accuracy: float
    num_heldout: int


class LabelClassifier:
    """Support-vector machine with a Gaussian kernel on the principal components of raw pixels.

    Args:
        images: images to fit to, (M, C, H, W) or (M, F).
        labels: integers (M,).
        seed: seed of the choice among many images, and of the principal components.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        DataError: the labels are of one class.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> None:
        try:
            from sklearn.decomposition import PCA
            from sklearn.pipeline import make_pipeline
            from sklearn.svm import SVC
        except ImportError as error:
            raise MissingExtraError("scikit-learn is not installed; pip install 'dit-fast[demo]'") from error
        if len(np.unique(labels)) < 2:
            raise DataError("a label classifier needs real images of at least two classes")
        if len(images) > _MOST_TRAINING_IMAGES:
            chosen = np.random.default_rng(seed).permutation(len(images))[:_MOST_TRAINING_IMAGES]
            images, labels = images[chosen], labels[chosen]
        pixels = images.reshape(len(images), -1)
        components = min(_COMPONENTS, *pixels.shape)
        self._pipeline = make_pipeline(
            PCA(components, svd_solver="randomized", random_state=seed), SVC(C=10.0, gamma="scale")
        )
        self._pipeline.fit(pixels, labels)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Predict the label of each image, (M,)."""
        return self._pipeline.predict(images.reshape(len(images), -1))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Principal components of each image, the input of the support-vector machine: (M, at most 64)."""
        return self._pipeline[0].transform(images.reshape(len(images), -1))


def label_agreement(
    classifier: LabelClassifier,
    samples: np.ndarray,
    labels: np.ndarray,
    heldout: tuple[np.ndarray, np.ndarray],
) -> LabelAgreement:
    """Compare a classifier's predictions with the labels that samples were conditioned on.

    Args:
        classifier: the fitted classifier.
        samples: (M, C, H, W).
        labels: the labels that they were conditioned on, (M,).
        heldout: real images and labels that the classifier was not fitted to, for its own accuracy.
    """
    right = classifier.predict(samples) == labels
    accuracy = float(np.mean(classifier.predict(heldout[0]) == heldout[1]))
    return LabelAgreement(
        agreement=float(right.mean()),
        by_class={int(label): float(right[labels == label].mean()) for label in np.unique(labels)},
        num_samples=len(labels),
        classifier_accuracy=accuracy,
        num_heldout=len(heldout[1]),
    )


@dataclass(frozen=True)
class Scores:
    """Scores of a `Scorer`.

    Args:
        data: name of the image set.
        labels: agreement with the class labels.
        nearest: distances to the nearest training image.
        num_training: training images that samples were compared with.
        all_training: all training images of the set.
        left_out: source of the real images that the samples' distances are compared with: "heldout", or "training"
            where the set has no held-out images, and each training image is compared with all others.
    """

    data: str
    labels: LabelAgreement
    nearest: NearestTraining
    num_training: int
    all_training: int
    left_out: str

    def lines(self) -> list[str]:
        """The scores as two lines of text."""
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
    """Scores samples against an image set. The classifier is fitted at construction, before time is spent on sampling.

    Args:
        images: the image set.
        seed: seed of the choice of images and of the classifier.

    Raises:
        DataError: the set is too small.
        MissingExtraError: scikit-learn is not installed.
    """

    def __init__(self, images: ImageSet, seed: int = 0) -> None:
        self._set = images
        generator = torch.Generator().manual_seed(seed)
        self._training, self._training_labels = _read(images.train, generator)
        if len(images.heldout):
            self._real = _read(images.heldout, generator, _MOST_REFERENCES)
            fitted = slice(None)
        else:
            # The model was trained on every image; the classifier's accuracy is measured on a tenth that it was not
            # fitted to.
            tenth = len(self._training) // 10
            if tenth == 0:
                raise DataError(
                    f"{images.name}: {len(self._training)} images are too few to score samples with"
                )
            self._real = (self._training[:tenth], self._training_labels[:tenth])
            fitted = slice(tenth, None)
        self._classifier = LabelClassifier(self._training[fitted], self._training_labels[fitted], seed)

    def __call__(self, samples: Tensor, labels: Tensor) -> Scores:
        """Score samples.

        Args:
            samples: float (M, C, H, W) in [-1, 1].
            labels: the labels that they were conditioned on, (M,).
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
    """Read images and labels of a split in random order, at most `most` and as many as `_MOST_BYTES` hold."""
    fits = _MOST_BYTES // (4 * int(np.prod(split.sample_shape)))
    chosen = torch.randperm(len(split), generator=generator)[: min(fits, most or fits)]
    images = torch.cat([split.batch(part) for part in chosen.split(1024)])
    return images.numpy(), split.labels[chosen].numpy()
