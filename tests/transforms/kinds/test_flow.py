"""Flow, compared with centroids of explicit sets of voxels."""

import numpy as np

from tests.transforms.kinds.patches import blobs, computed, voxel_distances


def test_small_instances_point_to_their_centroid():
    ids = np.zeros((24, 48, 48), int)
    ids[10:13, 20:27, 20:24] = 7
    ids[10:13, 20:27, 24:26] = 9
    _, found = computed({"kind": "flow", "nm": 40.0}, ids, (5, 14, 14), (14, 20, 20))
    places, _ = voxel_distances(ids)
    inside = ids[5:19, 14:34, 14:34]
    assert np.isfinite(found).all()
    for number in (7, 9):
        vectors = places[ids == number].mean(0) - places[5:19, 14:34, 14:34][inside == number]
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        expected = np.where(length > 1e-9, vectors / np.maximum(length, 1e-9), 0)
        np.testing.assert_allclose(found[:, inside == number].T, expected, atol=1e-3)
    assert (found[:, inside == 0] == 0).all()


def test_the_center_of_long_instances_is_local():
    ids = blobs(6, (14, 26, 26), 5, radius=45.0)
    nm = 16.0
    _, found = computed({"kind": "flow", "nm": nm}, ids, (0, 0, 0), ids.shape)
    places, _ = voxel_distances(ids)
    known = np.argwhere(np.isfinite(found[0]) & (ids > 0))
    assert len(known) > 100
    for voxel in map(tuple, known[::17]):
        near = (abs(places - places[voxel]) <= nm).all(-1) & (ids == ids[voxel])
        vector = places[near].mean(0) - places[voxel]
        length = np.linalg.norm(vector)
        expected = vector / length if length > 1e-9 else vector
        np.testing.assert_allclose(found[(slice(None), *voxel)], expected, atol=1e-3)
    length = np.linalg.norm(found[:, np.isfinite(found[0]) & (ids > 0)], axis=0)
    assert ((abs(length - 1) < 2e-3) | (length == 0)).all()


def test_vectors_lead_all_voxels_of_an_object_together():
    """Following the vectors, as a reconstruction of instances does, ends near one point for each object."""
    ids = np.zeros((1, 104, 104), int)
    y, x = np.mgrid[:104, :104]
    ids[0][(y - 44) ** 2 + (x - 50) ** 2 < 81] = 1
    ids[0][(y - 64) ** 2 + (x - 50) ** 2 < 100] = 2
    _, found = computed({"kind": "flow", "nm": 80.0}, ids, (0, 0, 0), ids.shape, scale=(4.0, 4.0, 4.0))
    flow = np.nan_to_num(found)
    at = np.argwhere(ids[0] == 1).astype(float)
    for _ in range(40):
        index = at.round().astype(int).clip(0, 103)
        at = at + 0.5 * flow[:, 0, index[:, 0], index[:, 1]].T
    assert np.linalg.norm(at - [44, 50], axis=1).max() < 1.5
