"""The metrics' own maths against closed forms, and against torch-fidelity where it is installed."""

import math

import numpy as np
import pytest
import torch

from dit_fast.errors import DataError
from dit_fast.evaluation import (
    GaussianStatistics,
    StreamingStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from dit_fast.evaluation.metrics import _distances
from tests.tolerance import FEW, assert_close


def gaussian(mean, covariance) -> GaussianStatistics:
    return GaussianStatistics(
        torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64)
    )


def statistics_of(features: torch.Tensor, batch: int) -> GaussianStatistics:
    stream = StreamingStatistics()
    for part in features.split(batch):
        stream.update(part)
    return stream.finish()


def spread(dim: int, num: int = 400, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(num, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + offset


# Moments


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_streamed_moments_are_those_of_one_pass(batch):
    # A mean of a thousand deviations: sums of squares about zero would lose six digits, deviations lose three.
    features = spread(12, 301, offset=1e4)
    got = statistics_of(features, batch)
    assert_close(got.mean, features.mean(0))
    expected = np.cov(features.numpy(), rowvar=False)
    assert_close(got.covariance.numpy(), expected, scale=1e4)
    assert got.num == 301


def test_order_and_merging_do_not_matter():
    features = spread(8, 200, offset=50.0)
    whole = statistics_of(features, 200)
    shuffled = statistics_of(features[torch.randperm(200)], 9)
    first, second, empty = StreamingStatistics(), StreamingStatistics(), StreamingStatistics()
    first.update(features[:150])
    second.update(features[150:])
    second.merge(empty)
    empty.merge(second)
    empty.merge(first)
    for other in (shuffled, empty.finish()):
        assert_close(other.mean, whole.mean)
        assert_close(other.covariance, whole.covariance)
    assert second.num == 50


def test_moments_of_half_precision_features_are_summed_in_double():
    features = (torch.randn(3000, 3) + 100).half()
    got = statistics_of(features, 17)
    assert_close(got.mean, features.double().mean(0))


def test_moments_that_cannot_be():
    stream = StreamingStatistics()
    stream.update(torch.ones(1, 3))
    with pytest.raises(DataError, match="1 feature vectors have no covariance"):
        stream.finish()
    with pytest.raises(DataError, match=r"features are \(2, 4\), expected \(B, 3\)"):
        stream.update(torch.ones(2, 4))
    with pytest.raises(DataError, match="NaN or infinity"):
        stream.update(torch.full((2, 3), math.nan))


# Frechet distance


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    first, second = torch.tensor([4.0, 1, 9, 0.25, 2]).double(), torch.tensor([1.0, 1, 4, 0.01, 8]).double()
    shift = torch.tensor([1.0, -2, 0, 3, 0.5]).double()
    distance = frechet_distance(
        gaussian(torch.zeros(5), basis * first @ basis.T), gaussian(shift, basis * second @ basis.T)
    )
    expected = shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert abs(distance - float(expected)) < 1e-12


def test_frechet_distance_of_general_covariances_in_two_dimensions():
    # For 2 x 2 matrices tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)).
    first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    product = first @ second
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = 1 + np.trace(first) + np.trace(second) - 2 * root
    assert abs(frechet_distance(gaussian([0, 0], first), gaussian([1, 0], second)) - expected) < 1e-12


def test_frechet_distance_is_zero_to_itself_and_finite_for_singular_covariances():
    few = statistics_of(spread(40, 10), 10)
    assert 0 <= frechet_distance(few, few) < 1e-10 * float(few.covariance.trace())
    # Along the axes: one Gaussian has no width where the other has all of its own.
    first, second = torch.diag(torch.tensor([4.0, 0])), torch.diag(torch.tensor([0.0, 9]))
    assert abs(frechet_distance(gaussian([0, 0], first), gaussian([0, 0], second)) - 13) < 1e-12


def test_frechet_distance_grows_with_the_shift_and_refuses_other_networks():
    base = statistics_of(spread(6), 50)
    moved = GaussianStatistics(base.mean + 0.5, base.covariance)
    assert abs(frechet_distance(base, moved) - 6 * 0.25) < 1e-9
    with pytest.raises(DataError, match="of 6 and of 5 features"):
        frechet_distance(base, gaussian(torch.zeros(5), torch.eye(5)))


# Inception score


@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_of_sure_and_unsure_predictions(splits):
    sure = torch.eye(10).repeat(50, 1) * 1e4
    mean, deviation = inception_score(sure, splits, seed=None)
    assert abs(mean - 10) < 1e-9
    assert deviation < 1e-9
    for same in (torch.zeros(100, 7), sure[:1].expand(100, -1)):
        mean, deviation = inception_score(same, splits)
        assert abs(mean - 1) < 1e-12
        assert deviation < 1e-12


def test_inception_score_of_two_known_distributions():
    # Half of the samples say (p, 1-p), half (1-p, p): the marginal is even, so KL = ln 2 - H(p).
    p = 0.8
    logits = torch.tensor([[p, 1 - p], [1 - p, p]]).log().repeat(30, 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    # The logits are rounded to float32.
    assert_close(inception_score(logits, 1)[0], 2 / math.exp(entropy), FEW)


def test_inception_score_shuffles_samples_that_lie_class_by_class():
    sorted_by_class = torch.eye(10).repeat_interleave(100, dim=0) * 1e4
    assert abs(inception_score(sorted_by_class, 10, seed=None)[0] - 1) < 1e-9
    assert inception_score(sorted_by_class, 10)[0] > 9
    assert inception_score(sorted_by_class, 10) == inception_score(sorted_by_class, 10)
    with pytest.raises(DataError, match="3 samples in 10 parts"):
        inception_score(torch.zeros(3, 2))


# Precision and recall


def test_precision_and_recall_of_points_on_a_line():
    # k = 1: balls of radius 1 about 0, 1, 2, 3, so [-1, 4] is covered.
    real = torch.tensor([[0.0], [1], [2], [3]])
    generated = torch.tensor([[0.5], [4.0], [4.5], [100.0]])
    # About 0.5: 3.5; about 4 and 4.5: 0.5; about 100: 95.5. The last covers none but [4.5, 195.5], the first [-3, 4].
    assert precision_recall(generated, real, k=1) == (0.5, 1.0)
    assert precision_recall(torch.tensor([[50.0], [51], [52], [53]]), real, k=1) == (0.0, 0.0)


def test_precision_sees_a_dropped_mode_as_good_and_recall_as_bad():
    near, far = torch.randn(60, 3), torch.randn(60, 3) + 100
    real = torch.cat([near, far])
    precision, recall = precision_recall(near + 0.01, real)
    assert precision == 1.0
    assert recall < 0.55
    precision, recall = precision_recall(real + 0.01, near)
    assert precision < 0.55
    assert recall == 1.0


def test_copies_are_covered_and_chunks_do_not_matter():
    generated, real = spread(5, 80).float() + 1000, spread(5, 90).float() + 1000
    whole = precision_recall(generated, real)
    assert whole == precision_recall(generated, real, chunk_bytes=8 * 90 * 7)
    assert 0 < whole[0] < 1
    assert precision_recall(real, real) == (1.0, 1.0)
    # Balls of radius zero hold their own centre, far from the origin as well.
    same = torch.randn(1, 300, dtype=torch.float64).repeat(7, 1)
    assert torch.equal(next(_distances(same, same, 1 << 20)), torch.zeros(7, 7, dtype=torch.float64))
    copies = torch.tensor([[1e5, 3.3]]).repeat(5, 1)
    assert precision_recall(copies, torch.cat([copies, copies + 1])) == (1.0, 0.5)


def test_precision_and_recall_are_the_brute_force_answer():
    generated, real = spread(4, 50), spread(4, 60)

    def share(points, centres):
        between = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
        radii = between.sort(dim=1).values[:, 3]
        far = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        return float((far <= radii).any(dim=1).double().mean())

    assert precision_recall(generated, real) == (share(generated, real), share(real, generated))


def test_too_few_points_and_other_features_are_refused():
    with pytest.raises(DataError, match="at least 4 images on each side, one has 3"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))
    with pytest.raises(DataError, match="expected"):
        precision_recall(torch.randn(9, 3), torch.randn(9, 2))


# The library


def test_torch_fidelity_agrees():
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    first, second = spread(16, 300), spread(16, 250, offset=0.5)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(statistics_of(first, 64), statistics_of(second, 64)) == pytest.approx(
        theirs, rel=1e-8
    )
    ours = inception_score(first, 5, seed=None)
    score = isc_features_to_metric(first, splits=5, shuffle=False)
    assert ours[0] == pytest.approx(score["inception_score_mean"], rel=1e-10)
    assert ours[1] == pytest.approx(score["inception_score_std"], rel=1e-8)
    assert precision_recall(first, second) == pytest.approx(
        calculate_precision_recall_full(first, second), abs=1e-6
    )
