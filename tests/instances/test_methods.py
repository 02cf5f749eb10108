"""Methods on arrays, against other programs and formulas."""

import cc3d
import numpy as np
import pytest
from scipy import ndimage

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.instances.agglomeration import agglomerate_affinities, agglomerate_boundaries
from cellmap_lightning.instances.components import label_components
from cellmap_lightning.instances.measures import Measures, measure
from cellmap_lightning.instances.mutex_watershed import check_offsets, compact, foreground, mutex_watershed
from cellmap_lightning.instances.watershed import distance_watershed, mask_distance
from tests.instances.volumes import OFFSETS, affinities_of, f1, probability_of, same_partition, touching_spheres


@pytest.fixture(scope="module")
def truth():
    return touching_spheres((48, 48, 48))


@pytest.fixture(scope="module")
def affinities(truth):
    return affinities_of(truth).astype(np.float32) / 255


@pytest.mark.parametrize(("connectivity", "structure"), [(6, 1), (18, 2), (26, 3)])
def test_components_are_those_of_scipy(connectivity, structure):
    mask = np.random.default_rng(0).random((20, 30, 25)) < 0.2
    expected = ndimage.label(mask, ndimage.generate_binary_structure(3, structure))[0]
    assert same_partition(label_components(mask, connectivity), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_components_need_a_mask(dtype):
    with pytest.raises(CellMapTypeError, match="compare the values with a threshold"):
        label_components(np.zeros((2, 2, 2), dtype))


@pytest.mark.parametrize("voxel_size", [(8, 8, 8), (30, 4, 4), (5.24, 4, 4)])
def test_distances_are_those_of_scipy(truth, voxel_size):
    mask = truth % 3 > 0
    expected = ndimage.distance_transform_edt(mask, sampling=voxel_size)
    np.testing.assert_allclose(mask_distance(mask, voxel_size), expected, rtol=1e-5)


def test_watershed_divides_two_spheres_at_the_plane_between_them():
    z, y, x = np.mgrid[:24, :24, :40]
    left, right = ((z - 12) ** 2 + (y - 12) ** 2 + (x - c) ** 2 < 100 for c in (12, 27))
    labels = distance_watershed(left | right, (8, 8, 8), seed_distance=40)
    assert labels.max() == 2
    sides = labels == labels[12, 12, 12]
    assert sides[:, :, :19][left[:, :, :19]].all()
    assert not sides[:, :, 21:].any()


def test_watershed_takes_a_signed_distance(truth):
    inside = np.zeros(truth.shape, np.float32)
    for number, box in enumerate(ndimage.find_objects(truth), 1):
        if box is not None:
            here = np.pad(truth[box] == number, 1)
            inside[box] += ndimage.distance_transform_edt(here)[1:-1, 1:-1, 1:-1].astype(np.float32) * 8
    labels = distance_watershed(inside > 0, (8, 8, 8), inside, seed_distance=32)
    assert f1(labels, truth) > 0.99
    with pytest.raises(CellMapValueError, match="distance: the shape is"):
        distance_watershed(inside > 0, (8, 8, 8), inside[1:])


def test_watershed_does_not_depend_on_the_place(truth):
    """The same voxels give the same objects elsewhere in an array, where ties have the same order."""
    mask = np.zeros((52, 72, 80), bool)
    mask[2:50, 2:50, 2:50] = truth > 0  # away from the border, at which there is no background
    moved = np.roll(mask, (17, 25), (1, 2))
    a, b = (distance_watershed(m, (8, 8, 8), smoothing=8, seed_distance=32) for m in (mask, moved))
    assert a.max() > 50
    assert same_partition(np.roll(a, (17, 25), (1, 2)), b)


def test_objects_that_touch_are_separated(truth, affinities):
    mask = probability_of(truth) >= 128
    assert f1(label_components(mask), truth) < 0.2
    assert f1(distance_watershed(mask, (8, 8, 8), smoothing=8, seed_distance=32), truth) >= 0.95
    assert f1(mutex_watershed(affinities, OFFSETS), truth, 30) >= 0.95
    assert f1(mutex_watershed(affinities, OFFSETS, strides=(2, 2, 2)), truth, 30) >= 0.95
    merged = agglomerate_affinities(affinities, OFFSETS, (8, 8, 8), merge_threshold=0.75, smoothing=8, seed_distance=24)
    assert f1(merged, truth) >= 0.85
    boundaries = 1 - affinities[:3].min(axis=0)
    merged = agglomerate_boundaries(boundaries, (8, 8, 8), 0.6, 0.75, smoothing=8, seed_distance=24)
    assert f1(merged, truth) >= 0.7


def test_a_low_threshold_merges_more(affinities):
    counts = [
        agglomerate_affinities(affinities, OFFSETS, (8, 8, 8), merge_threshold=t, seed_distance=16).max()
        for t in (0.1, 0.6, 0.8, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] / 2


def test_mutex_watershed_takes_channels_in_any_order(truth, affinities):
    order = [4, 0, 3, 2, 5, 1]
    labels = mutex_watershed(affinities[order], [OFFSETS[i] for i in order])
    assert f1(labels, truth, 30) >= 0.95


def test_foreground_has_an_affinity_to_a_direct_neighbour():
    values = np.zeros((2, 1, 1, 6), np.float32)
    values[0, 0, 0, 3], values[1, 0, 0, 1] = 0.9, 0.9
    mask = foreground(values, [(0, 0, -1), (0, 0, 4)])
    assert mask[0, 0].tolist() == [False, False, True, True, False, False]
    assert foreground(values, [(0, 0, 1), (0, 0, 4)])[0, 0].tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("offsets", [[[1, 0]], [[0, 0, 0]], [[0.5, 0, 0]], [[0, 0, 3]], [[0, 0, 1], [0, 1, 0]]])
def test_invalid_offsets(offsets):
    with pytest.raises(CellMapValueError, match="offsets: "):
        check_offsets(offsets, 1)


def test_empty_arrays_have_no_objects():
    zeros = np.zeros((6, 4, 4, 4), np.float32)
    assert not mutex_watershed(zeros, OFFSETS).any()
    assert not agglomerate_affinities(zeros, OFFSETS, (8, 8, 8)).any()
    assert not agglomerate_boundaries(np.ones((4, 4, 4), np.float32), (8, 8, 8)).any()
    assert not distance_watershed(zeros[0] > 0, (8, 8, 8)).any()
    assert not label_components(zeros[0] > 0).any()


def test_compact_numbers():
    labels = np.array([[[0, 7, 7], [3, 0, 9]]], np.uint64)
    assert compact(labels).tolist() == [[[0, 2, 2], [1, 0, 3]]]


def test_measures_of_many_planes():
    labels = np.zeros((24, 256, 256), np.uint32)  # more than are measured at a time
    labels[3:22, 10:20, 30:60] = 1
    labels[20, 100, 100:103] = 2
    measures = measure(labels, 2, (8, 0, 0), (32, 256, 256))
    assert measures.voxels.tolist() == [19 * 10 * 30, 3]
    assert measures.low.tolist() == [[11, 10, 30], [28, 100, 100]]
    assert measures.high.tolist() == [[29, 19, 59], [28, 100, 102]]
    np.testing.assert_allclose(measures.sums / measures.voxels[:, None], [[20, 14.5, 44.5], [28, 100, 101]])
    assert measures.first.tolist() == [(11 * 256 + 10) * 256 + 30, (28 * 256 + 100) * 256 + 100]


def test_measures_are_those_of_scipy_and_add_up(truth):
    labels = cc3d.connected_components(truth)
    count, start, volume = int(labels.max()), (16, 0, 5), (64, 48, 60)
    whole = measure(labels, count, start, volume)
    index = np.arange(1, count + 1)
    assert whole.voxels.tolist() == np.bincount(labels.ravel())[1:].tolist()
    centers = np.array(ndimage.center_of_mass(labels > 0, labels, index)) + start
    np.testing.assert_allclose(whole.sums / whole.voxels[:, None], centers)
    boxes = ndimage.find_objects(labels)
    assert whole.low.tolist() == [[s.start + o for s, o in zip(box, start, strict=True)] for box in boxes]
    assert whole.high.tolist() == [[s.stop - 1 + o for s, o in zip(box, start, strict=True)] for box in boxes]
    assert whole.border[:, 0].sum() == (labels[-1] > 0).sum()
    assert whole.border[:, 1].sum() == (labels[:, 0] > 0).sum() + (labels[:, -1] > 0).sum()
    assert whole.border[:, 2].sum() == 0
    first = np.ravel_multi_index([p + o for p, o in zip(np.nonzero(labels == 9), start, strict=True)], volume)[0]
    assert whole.first[8] == first
    halves = [measure(labels[:20], count, start, volume), measure(labels[20:], count, (36, 0, 5), volume)]
    total = Measures.empty(count)
    for half in halves:
        total.add(np.arange(count), half)
    for name, values in whole.as_arrays().items():
        assert total.as_arrays()[name].tolist() == values.tolist(), name
