"""Surface distances, compared with MONAI's on full annotations."""

import math

import numpy as np
import pytest
import torch

from cellmap_lightning.evaluation.surface_scores import surface, surface_distances


def points(mask, known, voxel_size):
    return np.argwhere(surface(mask, known)) * np.asarray(voxel_size)


def ball(center, radius, shape=(24, 26, 28)):
    grid = np.moveaxis(np.indices(shape), 0, -1)
    return ((grid - np.asarray(center)) ** 2).sum(-1) <= radius**2


@pytest.mark.filterwarnings("ignore:monai.metrics.utils:FutureWarning")
@pytest.mark.parametrize("voxel_size", [(1, 1, 1), (8, 8, 8), (30, 4, 4)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 0, 1), (-1, 3, 2)], ids=str)
def test_distances_equal_monai(voxel_size, shift):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    truth = ball((12, 13, 14), 7)
    predicted = ball(np.add((12, 13, 14), shift), 6) | ball((12, 13, 4), 2)
    known = np.ones_like(truth)
    score = surface_distances(points(predicted, known, voxel_size), points(truth, known, voxel_size))
    a, b = (torch.from_numpy(m)[None, None].float() for m in (predicted, truth))
    options = {"include_background": True, "spacing": voxel_size}
    assert score.hausdorff_nm == pytest.approx(float(compute_hausdorff_distance(a, b, **options)), rel=1e-5)
    expected = float(compute_hausdorff_distance(a, b, percentile=95, **options))
    assert score.hausdorff95_nm == pytest.approx(expected, rel=1e-5)
    expected = float(compute_average_surface_distance(a, b, symmetric=True, **options))
    assert score.surface_distance_nm == pytest.approx(expected, rel=1e-5)


def test_faces_of_the_crop_and_unannotated_neighbours_are_no_surface():
    mask = np.zeros((4, 4, 4), bool)
    mask[:, :, :2] = True
    known = np.ones_like(mask)
    assert surface(mask, known).sum() == 16  # only the face towards x = 2
    known[:2, :, 2] = False
    assert surface(mask, known).sum() == 8


@pytest.mark.parametrize(("n", "m", "expected"), [(0, 0, math.nan), (3, 0, math.inf), (0, 3, math.inf)])
def test_distances_without_a_surface(n, m, expected):
    score = surface_distances(np.ones((n, 3)), np.ones((m, 3)))
    assert math.isnan(score.hausdorff_nm) if math.isnan(expected) else score.surface_distance_nm == expected
