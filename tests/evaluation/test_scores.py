"""Scores against closed forms: planted copies show, shifted images lie as far as they were shifted."""

import numpy as np
import pytest
import torch

from dit_fast.data import from_arrays
from dit_fast.errors import DataError, MissingExtraError
from dit_fast.evaluation import (
    LabelClassifier,
    Scorer,
    compare_nearest,
    label_agreement,
    nearest_training_distance,
)
from tests.tolerance import assert_close


def noise(count: int, seed: int, shape: tuple[int, ...] = (3, 4, 4)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def test_nearest_is_the_brute_force_answer():
    images, training = noise(7, 0), noise(50, 1)
    distance, index = nearest_training_distance(images, training)
    squares = ((images[:, None].astype(np.float64) - training[None]) ** 2).mean(axis=(2, 3, 4))
    assert_close(distance, np.sqrt(squares.min(axis=1)))
    assert (index == squares.argmin(axis=1)).all()


def test_shifted_copies_lie_at_their_shift():
    training = noise(40, 1)
    shifts = np.array([0.0, 0.01, 0.05], dtype=np.float32)
    distance, index = nearest_training_distance(training[[4, 17, 39]] + shifts[:, None, None, None], training)
    assert_close(distance, shifts)
    assert index.tolist() == [4, 17, 39]


def test_chunks_do_not_change_the_answer(monkeypatch):
    images, training = noise(5, 0), noise(64, 1)
    whole = nearest_training_distance(images, training)
    monkeypatch.setattr("dit_fast.evaluation.metrics._CHUNK_BYTES", 8 * (5 + 2 * 48) * 10)
    parts = nearest_training_distance(images, training)
    assert_close(whole[0], parts[0])
    assert (whole[1] == parts[1]).all()


def test_mirrored_copies_count_with_flips_only():
    training = noise(30, 1)
    mirrored = training[[3, 8], :, :, ::-1]
    assert nearest_training_distance(mirrored, training, flip=True)[0].max() < 1e-6
    assert nearest_training_distance(mirrored, training, flip=False)[0].min() > 0.1


def test_leaving_one_out_skips_the_image_itself_and_nothing_else(monkeypatch):
    training = noise(20, 1)
    training[5] = training[11]
    monkeypatch.setattr("dit_fast.evaluation.metrics._CHUNK_BYTES", 8 * (20 + 2 * 48) * 7)
    distance, index = nearest_training_distance(training, training, itself=np.arange(20))
    assert (index != np.arange(20)).all()
    assert distance[[5, 11]].max() < 1e-6
    assert np.delete(distance, [5, 11]).min() > 0.1


def test_share_below_the_first_percentile():
    heldout = np.arange(1, 1001) / 1000.0
    like_data = compare_nearest(heldout + 0.0, heldout)
    assert like_data.threshold == pytest.approx(0.01099)
    assert like_data.share_below == pytest.approx(0.01)
    copies = compare_nearest(np.concatenate([np.full(30, 1e-4), np.full(70, 0.5)]), heldout)
    assert copies.share_below == pytest.approx(0.3)
    assert (copies.closest, copies.samples_median, copies.heldout_median) == pytest.approx(
        (1e-4, 0.5, 0.5005)
    )


def two_classes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey images whose left (class 0) or right (class 1) half is bright, with noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    images = generator.normal(0, 0.2, (count, 1, 6, 6))
    images[labels == 0, :, :, :3] += 0.8
    images[labels == 1, :, :, 3:] += 0.8
    return images.astype(np.float32), labels


def test_agreement_counts_the_labels_that_are_right():
    classifier = LabelClassifier(*two_classes(200, 0))
    images, labels = two_classes(80, 1)
    asked = labels.copy()
    asked[:20] = 1 - asked[:20]
    result = label_agreement(classifier, images, asked, two_classes(50, 2))
    assert result.agreement == pytest.approx(0.75)
    assert (result.classifier_accuracy, result.num_heldout, result.num_samples) == (1.0, 50, 80)
    counts = {label: (asked == label).sum() for label in (0, 1)}
    assert sum(result.by_class[label] * counts[label] for label in (0, 1)) == pytest.approx(60)


def test_classifier_needs_two_classes_and_scikit_learn(monkeypatch):
    images, labels = two_classes(20, 0)
    with pytest.raises(DataError, match="at least two classes"):
        LabelClassifier(images, np.zeros_like(labels))
    monkeypatch.setitem(__import__("sys").modules, "sklearn.svm", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn is not installed; pip install .*\[demo\]'"):
        LabelClassifier(images, labels)


def image_set(holdout: float, count: int = 300):
    images, labels = two_classes(count, 0)
    pixels = np.clip(127.5 * (images[:, 0] + 1), 0, 255).astype(np.uint8)
    return from_arrays("halves", pixels, labels, ("left", "right"), holdout=holdout, flip=False)


@pytest.mark.parametrize("holdout", [0.2, 0.0])
def test_scorer_shows_planted_copies(holdout):
    images = image_set(holdout)
    scorer = Scorer(images)
    real, labels = (torch.from_numpy(part) for part in two_classes(100, 9))
    honest = scorer(real.float(), labels)
    # the first half are exact training images
    real[:50] = images.train.batch(torch.arange(50))
    labels[:50] = images.train.labels[:50]
    copying = scorer(real.float(), labels)
    assert honest.labels.agreement == copying.labels.agreement == 1.0
    assert honest.labels.classifier_accuracy == 1.0
    assert honest.nearest.share_below < 0.1
    assert 0.5 <= copying.nearest.share_below < 0.6
    assert copying.nearest.closest == 0.0
    assert abs(honest.nearest.samples_median / honest.nearest.heldout_median - 1) < 0.1
    assert copying.left_out == ("heldout" if holdout else "training")
    assert (copying.num_training, copying.all_training) == (len(images.train), len(images.train))
    assert "100.0% of 100 samples" in copying.lines()[0]


def test_scorer_refuses_a_tiny_set():
    with pytest.raises(DataError, match="8 images are too few"):
        Scorer(image_set(0.0, count=8))


def test_scorer_says_how_many_training_images_fit(monkeypatch):
    monkeypatch.setattr("dit_fast.evaluation.scorer._MOST_BYTES", 4 * 36 * 100)
    scores = Scorer(image_set(0.2))(*(torch.from_numpy(part).float() for part in two_classes(10, 1)))
    assert (scores.num_training, scores.all_training) == (100, 240)
    assert "among 100 (of 240)" in scores.lines()[1]
