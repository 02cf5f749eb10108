"""Local shape descriptors, compared with weighted sums over explicit windows."""

import numpy as np
import pytest

from tests.transforms.kinds.patches import SCALE, blobs, computed, voxel_distances

SIGMA = 9.0


def window(voxel, shape):
    """The weights of a Gaussian cut off at three sigma, normalized as a whole."""
    weights = np.ones(shape)
    for axis, (n, scale) in enumerate(zip(shape, SCALE, strict=True)):
        steps = np.arange(n) - voxel[axis]
        radius = int(3 * SIGMA / scale + 0.5)
        every = np.arange(-radius, radius + 1)
        line = np.exp(-0.5 * (steps * scale / SIGMA) ** 2) * (abs(steps) <= radius)
        line = line / np.exp(-0.5 * (every * scale / SIGMA) ** 2).sum()
        weights = weights * line.reshape([-1 if a == axis else 1 for a in range(3)])
    return weights


def test_descriptors_are_moments_of_the_instance_in_the_window():
    ids = blobs(3, (20, 30, 30), 20, radius=30.0)
    _, found = computed({"kind": "lsd", "sigma": SIGMA}, ids, (0, 0, 0), ids.shape)
    assert found.shape == (10, *ids.shape)
    places, _ = voxel_distances(ids)
    known = np.argwhere(np.isfinite(found[0]) & (ids > 0))
    for voxel in map(tuple, known[:: max(1, len(known) // 60)]):
        weights = window(voxel, ids.shape) * (ids == ids[voxel])
        size = weights.sum()
        mean = (weights[..., None] * places).sum((0, 1, 2)) / size
        centered = (places - mean).reshape(-1, 3)
        covariance = (centered * weights.reshape(-1, 1)).T @ centered / size
        variance = np.maximum(np.diag(covariance), 1e-3)
        pearson = [covariance[i, j] / np.sqrt(variance[i] * variance[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        expected = np.concatenate(
            [0.5 + 0.5 * (mean - places[voxel]) / SIGMA, variance / SIGMA**2, 0.5 + 0.5 * np.array(pearson), [size]]
        )
        np.testing.assert_allclose(found[(slice(None), *voxel)], np.clip(expected, 0, 1), atol=6e-4)
    assert (found[:, ids == 0][:, np.isfinite(found[0][ids == 0])] == 0).all()


def test_a_long_rod_varies_along_its_axis():
    ids = np.zeros((25, 41, 41), int)
    ids[12, 20, :] = 5
    _, found = computed({"kind": "lsd", "sigma": 8.0}, ids, (8, 14, 14), (9, 13, 13))
    z, y, x = found[3:6, 4, 6, 6]
    assert x == pytest.approx(1, abs=0.05)  # the variance of the window itself
    assert z == y == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(found[:3, 4, 6, 6], 0.5, atol=1e-3)
