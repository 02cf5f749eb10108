"""Boundaries, compared with a search over all pairs of voxels."""

import numpy as np
import pytest

from tests.transforms.kinds.patches import blobs, computed, voxel_distances


@pytest.mark.parametrize("nm", [3.9, 4.0, 9.0, 30.0])
def test_boundaries_are_near_another_id(nm):
    ids = blobs(0, (8, 12, 12), 8)
    ids[3, 4:6, 5] = -1
    _, (found,) = computed({"kind": "boundary", "nm": nm}, ids, (0, 0, 0), ids.shape)
    _, distances = voxel_distances(ids)
    border = np.stack(np.meshgrid(*(np.minimum(np.arange(n), np.arange(n)[::-1]) for n in ids.shape), indexing="ij"))
    outside = ((border + 1) * np.array([8, 4, 4])[:, None, None, None]).min(0)
    for voxel in np.ndindex(ids.shape):
        near = distances(voxel) <= nm
        if ids[voxel] == -1:
            expected = np.nan
        elif (near & (ids != ids[voxel]) & (ids != -1)).any():
            expected = 1
        else:
            expected = np.nan if (near & (ids == -1)).any() or outside[voxel] <= nm else 0
        np.testing.assert_equal(found[voxel], expected)


def test_an_instance_beyond_an_unknown_voxel_is_a_boundary():
    ids = np.full((5, 5, 9), 1)
    ids[:, :, 4:6], ids[:, :, 6:] = -1, 2
    _, (found,) = computed({"kind": "boundary", "nm": 12.0}, ids, (0, 0, 0), ids.shape)
    assert found[2, 2, 3] == 1  # the instance 2 is three voxels away, for any value of the unknown one
    assert np.isnan(found[2, 2, 2])
