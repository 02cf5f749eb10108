"""Skeleton-aware distances, compared with a search over voxels and with shapes whose medial axis is known."""

import itertools

import numpy as np

from tests.transforms.kinds.patches import SCALE, blobs, computed, voxel_distances


def test_distances_are_those_of_a_search():
    ids = blobs(0, (9, 14, 14), 6, radius=26.0)
    nm = 14.0
    _, (found,) = computed({"kind": "skeleton_distance", "nm": nm}, ids, (0, 0, 0), ids.shape)
    _, distances = voxel_distances(ids)
    boundary = np.full(ids.shape, nm)
    for voxel in np.ndindex(ids.shape):
        other = distances(voxel)[ids != ids[voxel]]
        boundary[voxel] = min(nm, other.min(initial=np.inf))
    skeleton = np.zeros(ids.shape, bool)
    for voxel in np.argwhere(ids > 0):
        slopes = [0.0]
        for offset in itertools.product((-1, 0, 1), repeat=3):
            there = tuple(voxel + offset)
            inside = all(0 <= i < n for i, n in zip(there, ids.shape, strict=True))
            if any(offset) and inside and ids[there] == ids[tuple(voxel)]:
                step = np.linalg.norm(np.multiply(offset, SCALE))
                slopes.append((boundary[there] - boundary[tuple(voxel)]) / step)
        skeleton[tuple(voxel)] = max(slopes) < 0.5
    known = np.argwhere(np.isfinite(found) & (ids > 0))
    assert len(known) > 50
    for voxel in map(tuple, known):
        s = min(nm, distances(voxel)[skeleton & (ids == ids[voxel])].min(initial=np.inf))
        assert abs(found[voxel] - boundary[voxel] / (boundary[voxel] + s)) < 1e-3
    assert (found[(ids == 0) & np.isfinite(found)] == 0).all()


def test_the_middle_of_a_plate_is_one():
    ids = np.zeros((30, 30, 30), int)
    ids[:, 10:17, :] = 4  # seven voxels thick: the middle one is the skeleton
    spec = {"kind": "skeleton_distance", "nm": 30.0}
    _, (found,) = computed(spec, ids, (11, 8, 11), (8, 12, 8), scale=(4.0, 4.0, 4.0))
    b = np.array([1, 2, 3, 4, 3, 2, 1])
    expected = b / (b + abs(np.arange(-3, 4)))
    middle = found[4, :, 4]
    np.testing.assert_allclose(middle[2:9], expected, atol=1e-3)
    assert (middle[[0, 1, 9, 10]] == 0).all()
