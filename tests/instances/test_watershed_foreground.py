"""A watershed divides components of the foreground: it removes none, joins none, and leaves no voxel out."""

import cc3d
import numpy as np
import pytest
import zarr

from cellmap_lightning.instances.agglomeration import agglomerate_boundaries
from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions
from cellmap_lightning.instances.segmenter import BlockSegmenter
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.instances.volume import VolumeSegmentation
from cellmap_lightning.instances.watershed import distance_watershed
from tests.instances.volumes import same_partition, write_prediction

VOXEL = (50, 10, 10)


def balls(shape, voxel_size, *spheres):
    """A mask of spheres, each its centre in voxels and its radius in nm."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distances = [np.linalg.norm((grid - np.array(c)) * voxel_size, axis=-1) / r for c, r in spheres]
    return np.min(distances, axis=0) < 1


def check(labels, mask, connectivity=26):
    """Check that the foreground is that of the mask, and that each object is a part of one component."""
    components = cc3d.connected_components(mask, connectivity=connectivity)
    assert ((labels > 0) == mask).all()
    pairs = np.unique(np.stack([labels[mask], components[mask]]).astype(np.int64), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]  # no object lies in two components


@pytest.mark.parametrize("seed_distance", [None, 100, 200, 400, 3000])
@pytest.mark.parametrize("gap", [20, 60, 150])
def test_a_small_object_beside_a_large_one_is_an_object(gap, seed_distance):
    beside = 60 + (400 + 100 + gap) / 10
    mask = balls((20, 200, 200), VOXEL, ((10, 60, 60), 400), ((10, 60, beside), 100), ((10, 150, 150), 100))
    assert cc3d.connected_components(mask).max() == 3
    labels = distance_watershed(mask, VOXEL, smoothing=50, seed_distance=seed_distance)
    check(labels, mask)
    assert labels.max() == 3


@pytest.mark.parametrize("sides", [(1, 1, -1), (-1, 1, -1), (1, -1, -1)])
def test_touching_objects_are_divided_beside_a_large_one(sides):
    """Two touching spheres have two seeds, even if all their voxels are lower than a larger object in the window."""
    shape, first = (72, 72, 76), np.array((36, 36, 40))
    pair = balls(shape, (8, 8, 8), (first, 60), (np.add(first, (0, 0, 12)), 60))
    large = balls(shape, (8, 8, 8), (first + 14 * np.array(sides), 115))
    assert cc3d.connected_components(pair | large).max() == 2
    for mask, objects in ((pair, 2), (pair | large, 3)):
        labels = distance_watershed(mask, (8, 8, 8), seed_distance=88)
        check(labels, mask)
        assert labels.max() == objects


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("seed", range(12))
def test_no_voxel_is_left_out_of_any_mask(seed, connectivity):
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 14, 16)) < rng.choice([0.05, 0.2, 0.4, 0.7])
    options = {"smoothing": (0, 8, 30), "seed_distance": (0, 16, 40, 400), "seed_depth": (0, 10, 1e4)}
    chosen = {key: float(rng.choice(values)) for key, values in options.items()}
    labels = distance_watershed(mask, rng.choice([4, 8, 20], 3).tolist(), connectivity=connectivity, **chosen)
    check(labels, mask, connectivity)
    boundaries = np.where(mask, 0.2, 0.9).astype(np.float32)
    check(agglomerate_boundaries(boundaries, (8, 8, 8), connectivity=connectivity), mask, connectivity)


@pytest.mark.parametrize("whole", [1, 3, 8])
def test_a_mask_without_background_is_one_object(whole):
    assert (distance_watershed(np.ones((whole,) * 3, bool), (8, 8, 8), smoothing=8) == 1).all()


@pytest.mark.parametrize(("step", "objects"), [((0, 1, 1), (2, 1, 1)), ((1, 1, 1), (2, 2, 1)), ((0, 0, 1), (1, 1, 1))])
def test_parts_at_edges_and_corners_belong_to_an_object_by_connectivity(step, objects):
    mask = np.zeros((20, 20, 20), bool)
    mask[4:11, 4:11, 4:11] = True
    for number in range(4):  # a row of voxels that begins at the last voxel of the cube
        mask[tuple(np.array((10, 10, 10)) + np.multiply(step, number))] = True
    for connectivity, count in zip((6, 18, 26), objects, strict=True):
        labels = distance_watershed(mask, (8, 8, 8), seed_distance=80, connectivity=connectivity)
        check(labels, mask, connectivity)
        components = cc3d.connected_components(mask, connectivity=connectivity)
        assert same_partition(labels, components)
        assert (labels.max() == 1) == (count == 1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_seeds_do_not_depend_on_a_connection_outside_of_their_windows(axis):
    """Two parallel bars, of which the thicker one suppresses no seeds of the other, with or without a bend far away."""
    mask = np.zeros((12, 60, 26), bool)
    mask[3:9, 4:50, 3:11], mask[4:8, 4:50, 15:19] = True, True
    apart = mask.copy()
    mask[4:8, 46:50, 3:19] = True  # the bend
    results = []
    for bars in (mask, apart):
        moved = np.ascontiguousarray(np.moveaxis(bars, 1, axis))
        labels = distance_watershed(moved, (8, 8, 8), smoothing=8, seed_distance=80)
        check(labels, moved)
        results.append(np.moveaxis(labels, axis, 1)[:, :30])
    assert same_partition(*results)
    assert cc3d.connected_components(mask).max() == 1


@pytest.fixture(scope="module")
def crowd():
    """Large spheres with small ones close by, in any block, and single voxels."""
    rng, shape = np.random.default_rng(0), (32, 48, 64)
    mask = balls(shape, (8, 8, 8), ((14, 13, 15), 80), ((16, 14, 44), 80), ((18, 36, 50), 72), ((20, 35, 14), 64))
    mask |= balls(shape, (8, 8, 8), ((27, 13, 15), 16), ((16, 26, 40), 16), ((6, 36, 50), 16), ((20, 35, 25), 16))
    mask[tuple(rng.integers(0, shape, (12, 3)).T)] = True
    return mask


@pytest.mark.parametrize("block", [(16, 16, 32), (16, 48, 16), (32, 48, 64)])
@pytest.mark.parametrize("halo", [8, 40, 400])
def test_blocks_have_the_foreground_of_the_input(tmp_path, crowd, block, halo):
    source = open_source(str(write_prediction(tmp_path / "p.zarr", crowd.astype(np.uint8), kind="mask")), "mito")
    storage = StorageOptions(chunks=(16, 16, 16), block=block)
    options = SegmentationOptions("watershed", halo=halo, seed_distance=160, smoothing=8)
    summary = VolumeSegmentation(source, tmp_path / "o.zarr", options, storage).run(report=lambda text: None)
    labels = zarr.open_array(str(summary.labels / "s0"), mode="r")[...]
    check(labels, crowd)
    components = cc3d.connected_components(crowd)
    assert components.max() > 8
    if halo == 400:  # more than the diameter of an object, the distance of seeds and the smoothing
        assert same_partition(labels, BlockSegmenter.of(source, options)(source.read((0, 0, 0), crowd.shape)))
        assert same_partition(labels, components)


def test_small_objects_are_removed_by_min_volume_alone(tmp_path, crowd):
    source = open_source(str(write_prediction(tmp_path / "p.zarr", crowd.astype(np.uint8), kind="mask")), "mito")
    options = SegmentationOptions("watershed", halo=400, seed_distance=160, min_volume=2 * 512)
    storage = StorageOptions(chunks=(16, 16, 16))
    summary = VolumeSegmentation(source, tmp_path / "o.zarr", options, storage).run(report=lambda text: None)
    labels = zarr.open_array(str(summary.labels / "s0"), mode="r")[...]
    components = cc3d.connected_components(crowd)
    expected = np.where(np.bincount(components.ravel())[components] > 1, components, 0)
    assert expected.max() > 0
    assert same_partition(labels, expected)
