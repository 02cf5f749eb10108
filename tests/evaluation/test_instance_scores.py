"""Scores of objects, compared with formulas that others published and with brute force."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_lightning.evaluation.instance_scores import THRESHOLDS, Overlaps, instance_score


def score_of(truth, predicted, pieces=1):
    """Return the score of two volumes, added in pieces."""
    overlaps = Overlaps()
    for a, b in zip(np.array_split(truth.ravel(), pieces), np.array_split(predicted.ravel(), pieces), strict=True):
        overlaps.add(a.astype(np.int64), b.astype(np.int64))
    return instance_score(overlaps)


def brute_force(truth, predicted):
    """Compute the scores voxel by voxel and object by object, with scipy's assignment instead of a greedy matching."""
    from scipy.optimize import linear_sum_assignment

    known = truth >= 0
    truth, predicted = truth[known], predicted[known]
    objects, others = [i for i in np.unique(truth) if i > 0], [i for i in np.unique(predicted) if i > 0]
    iou = np.zeros((len(objects), len(others)))
    for (i, a), (j, b) in product(enumerate(objects), enumerate(others)):
        iou[i, j] = ((truth == a) & (predicted == b)).sum() / ((truth == a) | (predicted == b)).sum()
    f1, ap = [], []
    for threshold in THRESHOLDS:
        rows, columns = linear_sum_assignment(-(iou >= threshold).astype(float) - 1e-6 * iou)
        tp = int((iou[rows, columns] >= threshold).sum())
        fp, fn = len(others) - tp, len(objects) - tp
        f1.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan)
        ap.append(tp / (tp + fp + fn) if tp + fp + fn else math.nan)
    return f1, ap


def entropies(truth, predicted):
    """Compute H(prediction | annotation) and H(annotation | prediction) in bits, as differences of joint entropies."""

    def entropy(*columns):
        _, counts = np.unique(np.stack(columns), axis=1, return_counts=True)
        p = counts / counts.sum()
        return -(p * np.log2(p)).sum()

    inside = truth > 0
    a, b = truth[inside], predicted[inside]
    joint = entropy(a, b)
    return joint - entropy(a), joint - entropy(b)


def rand_error(truth, predicted):
    """Compute the adapted Rand error by counting pairs of voxels."""
    inside = truth > 0
    a, b = truth[inside], predicted[inside]
    upper = np.triu_indices(len(a), 1)
    in_truth, in_predicted = (a[:, None] == a)[upper], (b[:, None] == b)[upper]
    both = (in_truth & in_predicted).sum()
    return 1 - 2 * both / (in_truth.sum() + in_predicted.sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_scores_equal_brute_force(seed, pieces):
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.integers(-1, 4, 20), 3)
    predicted = np.where(rng.random(60) < 0.7, np.roll(truth, rng.integers(0, 3)).clip(0), rng.integers(0, 6, 60))
    score = score_of(truth, predicted, pieces)
    f1, ap = brute_force(truth, predicted)
    np.testing.assert_allclose([score.f1_50, score.f1], [f1[0], np.mean(f1)], equal_nan=True)
    np.testing.assert_allclose([score.ap_50, score.ap], [ap[0], np.mean(ap)], equal_nan=True)
    if (truth > 0).any():
        np.testing.assert_allclose((score.voi_split, score.voi_merge), entropies(truth, predicted), atol=1e-9)
        np.testing.assert_allclose(score.adapted_rand, rand_error(truth, predicted), atol=1e-9)


def test_a_perfect_prediction_has_perfect_scores_for_any_numbers():
    truth = np.array([0, 1, 1, 2, 2, 2, 3, -1])
    score = score_of(truth, np.array([0, 9, 9, 4, 4, 4, 7, 5]))
    assert (score.objects, score.predicted, score.matched) == (3, 3, 3)
    assert (score.f1_50, score.f1, score.ap, score.panoptic_quality) == (1, 1, 1, 1)
    assert (score.voi_split, score.voi_merge, score.adapted_rand) == (0, 0, 0)


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([1, 1, 1, 1, 0, 0, 0, 0], {"matched": 1, "f1_50": 2 / 3, "voi_split": 0, "voi_merge": 0}),  # one is missed
        ([1, 1, 1, 1, 1, 1, 1, 1], {"matched": 1, "f1_50": 2 / 3, "voi_split": 0, "voi_merge": 1}),  # merged
        ([1, 1, 1, 1, 2, 2, 3, 3], {"matched": 2, "f1_50": 4 / 5, "voi_split": 0.5, "voi_merge": 0}),  # split in halves
        ([0, 0, 0, 0, 0, 0, 0, 0], {"matched": 0, "f1_50": 0, "ap": 0, "panoptic_quality": 0}),
    ],
    ids=["missed", "merged", "split", "empty"],
)  # fmt: skip
def test_errors_of_known_kinds(predicted, expected):
    score = score_of(np.array([1, 1, 1, 1, 2, 2, 2, 2]), np.array(predicted))
    for name, value in expected.items():
        assert getattr(score, name) == pytest.approx(value), name


def test_panoptic_quality_is_the_product_of_its_published_parts():
    truth = np.array([1] * 10 + [2] * 10 + [0] * 10)
    predicted = np.array([1] * 8 + [0] * 2 + [2] * 10 + [0] * 5 + [3] * 5)
    score = score_of(truth, predicted)
    segmentation_quality, recognition_quality = (0.8 + 1) / 2, 2 / (2 + 1 / 2)
    assert score.panoptic_quality == pytest.approx(segmentation_quality * recognition_quality)


def test_objects_in_unannotated_voxels_do_not_count():
    truth = np.array([-1, -1, -1, -1, 1, 1, 1, 1, 0, 0])
    # One object lies in unannotated voxels as a whole, one half of the other does.
    score = score_of(truth, np.array([7, 7, 8, 8, 8, 8, 8, 8, 0, 0]))
    assert (score.objects, score.predicted, score.matched) == (1, 1, 1)
    assert score.f1 == 1


def test_nothing_annotated_and_nothing_predicted_is_undefined():
    score = score_of(np.zeros(5, np.int64), np.zeros(5, np.int64))
    assert math.isnan(score.f1_50)
    assert math.isnan(score.panoptic_quality)
    assert math.isnan(score.adapted_rand)
