"""Does a sample show the class that it was asked for? A classifier trained on the real images answers."""

from dataclasses import dataclass

import numpy as np

from dit_fast.errors import DataError, MissingExtraError

# Enough for a support-vector machine to be within a point of its best, and to finish within seconds.
_MOST_TRAINING_IMAGES = 10_000
_COMPONENTS = 64


@dataclass(frozen=True)
class LabelAgreement:
    """`agreement`: share of samples that the classifier gives their own label; `by_class`: the same for
    each label that was sampled; `classifier_accuracy`: the classifier on `num_heldout` real images that it
    has not seen.
    """

    agreement: float
    by_class: dict[int, float]
    num_samples: int
    classifier_accuracy: float
    num_heldout: int


class LabelClassifier:
    """Principal components, then a support-vector machine with a Gaussian kernel, on raw pixels.

    Fitted on `images` (M, C, H, W) or (M, F) with integer `labels` (M,). Raises MissingExtraError without
    scikit-learn and DataError for labels of one class only.
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
        """The label of each image, (M,)."""
        return self._pipeline.predict(images.reshape(len(images), -1))

    def features(self, images: np.ndarray) -> np.ndarray:
        """What the support-vector machine sees of each image: its principal components, (M, at most 64)."""
        return self._pipeline[0].transform(images.reshape(len(images), -1))


def label_agreement(
    classifier: LabelClassifier,
    samples: np.ndarray,
    labels: np.ndarray,
    heldout: tuple[np.ndarray, np.ndarray],
) -> LabelAgreement:
    """How often `classifier` gives samples (M, C, H, W) the labels (M,) that they were conditioned on.

    `heldout` = (images, labels) that the classifier was not trained on gives its own accuracy, the bar for
    the samples.
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
