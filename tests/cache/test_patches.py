"""Patches of cached regions, compared with the direct evaluation of plain arrays."""

import itertools
import sys

import numpy as np
import pytest
import zarr

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import Patches, Resampled, reached, stored_box
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.geometry.lattice import Lattice, patch_map
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.transforms.spatial import rotation
from tests.cache.plain_voxels import SIGNED_PERMUTATIONS, Voxels


def direct(array, lattice, center, window, turn, method, fill):
    out = np.full((*window.shape, *array.shape[3:]), 99, array.dtype)
    evaluate(Voxels(array), patch_map(center, window.shape, window.scale, lattice, turn), out, method=method, fill=fill)
    return out


# -- patches of raw


def stored(tmp_path, dtype="uint8", shape=(50, 40, 44), step=(8.0, 8.0, 8.0), origin=(100.0, -60.0, 7.0)):
    """An array in a Zarr store, where it lies, and its voxels."""
    rng = np.random.default_rng(0)
    if dtype == "float32":
        data = rng.normal(size=shape).astype(dtype)
        data[20:22, 5:30, 17] = np.nan
    else:
        data = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    zarr.create_array(tmp_path / "s0", data=data, chunks=(16, 16, 16), zarr_format=2)
    return Level(tmp_path / "s0", "s0", step, origin, (0, 1, 2), 3), data


def patches_of(level, window, pad=False, box=None, turned=False, roaming=False, mode="memory"):
    """Patches of an array as a dataset places them; what they keep, and the store."""
    image = StoredImage(level, ChunkCache(), "raw")
    box = box or image.lattice.box
    placement = Placement.plan(box, [window], [(window, image.lattice)], pad)
    patches = Patches(image.region, image.lattice, window, placement, image)
    image.region.limit(*reached(placement, window, image.lattice, turned, roaming or not patches.sliced))
    if not patches.sliced:
        again = Resampled(image, image.lattice.box, window, placement, image.region.dtype, 0, ChunkCache(), "raw")
        patches = again.patches(window, placement, None)
        again.region.limit(*reached(placement, window, again.lattice, turned, roaming))
    store = RegionStore(mode)
    store.plan(list({id(r): r for r in (patches.region, image.region)}.values()), False, "test")
    return patches, store


def some_places(placement, count=12, seed=0):
    """Corners of the placement's grid, and places inside."""
    ends = [sorted({0, n - 1}) for n in placement.counts]
    rng = np.random.default_rng(seed)
    return [*itertools.product(*ends), *(tuple(int(rng.integers(n)) for n in placement.counts) for _ in range(count))]


def compare(patches, array, turns, fill=7, rounding=False):
    """Every place, in every turn; integers may be rounded otherwise where float noise decides."""
    wrong = total = 0
    for place in some_places(patches.placement):
        center = patches.placement.first + patches.placement.step * place
        for turn in turns:
            out = np.full(patches.window.shape, 99, array.dtype)
            patches.read_into(place, out, turn, fill)
            expected = direct(array, patches.source.lattice, center, patches.window, turn, "linear", fill)
            if not rounding:
                np.testing.assert_array_equal(out, expected)
            elif array.dtype.kind == "f":
                np.testing.assert_allclose(out, expected, atol=1e-5)
            else:
                assert np.abs(out.astype(int) - expected.astype(int)).max() <= 1
                wrong += (out != expected).sum()
                total += out.size
    assert wrong <= (5e-3 if array.dtype.itemsize == 2 else 1e-4) * total


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_on_the_lattice_patches_are_boxes_in_the_48_turns(tmp_path, dtype, pad):
    level, data = stored(tmp_path, dtype)
    window = Window((56 if pad else 12, 11, 16), (8, 8, 8))
    patches, store = patches_of(level, window, pad, turned=True)
    assert patches.sliced
    compare(patches, data, [None, *SIGNED_PERMUTATIONS])
    assert store.decoded > 0
    assert store.chunks.decoded == 0, "nothing was read that is not cached"
    store.close()


@pytest.mark.parametrize("step", [(2.62, 8.0, 8.0), (1.7, 5.24, 8.0), (8.0, 8.0, 6.1)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("pad", [False, True])
def test_off_the_lattice_patches_are_slices_of_a_resampled_array(tmp_path, step, dtype, pad):
    level, data = stored(tmp_path, dtype, (70, 50, 44), step)
    window = Window((30 if pad else 8, 12, 16), (8, 8, 8))
    patches, store = patches_of(level, window, pad, turned=True)
    assert patches.sliced
    assert patches.region is not patches.source.region
    turns = [None, *SIGNED_PERMUTATIONS[1::5]]
    compare(patches, data, turns, rounding=True)
    assert patches.region.is_cached
    assert store.decoded > 0
    store.close()


@pytest.mark.parametrize("step", [(8.0, 8.0, 8.0), (2.62, 8.0, 8.0)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_patches_rotated_by_any_angle_are_evaluated_from_stored_voxels(tmp_path, step, dtype):
    level, data = stored(tmp_path, dtype, (70, 50, 44), step)
    patches, store = patches_of(level, Window((8, 12, 16), (8, 8, 8)), True, roaming=True)
    turns = [rotation("z", 33), rotation("x", -70.1), rotation("y", 12) @ rotation("z", 200), rotation("z", 90)]
    compare(patches, data, turns, rounding=True)
    assert store.chunks.decoded == 0, "nothing was read that is not cached"
    store.close()


@pytest.mark.parametrize("scale", [(8.0, 8.0, 10.48), (16.0, 16.0, 16.0), (20.0, 8.0, 9.0)])
def test_coarser_patches_of_anisotropic_voxels(tmp_path, scale):
    """Antialiased once; turned, they may be no boxes of it, and are the same."""
    level, data = stored(tmp_path, "uint16", (60, 50, 44), (5.24, 8.0, 7.0))
    patches, store = patches_of(level, Window((6, 9, 12), scale), turned=True)
    assert patches.sliced
    compare(patches, data, [None, *SIGNED_PERMUTATIONS[::7]], rounding=True)
    store.close()


def test_a_crop_caches_only_the_part_of_the_volume_it_can_touch(tmp_path):
    level, data = stored(tmp_path, "uint8")
    lattice = level.lattice
    inner = Lattice(tuple(np.add(lattice.origin, 16 * 8.0)), lattice.step, (14, 12, 13)).box
    for turned, longest in ((False, (8, 6, 10)), (True, (10, 10, 10))):
        patches, store = patches_of(level, Window((8, 6, 10), (8, 8, 8)), box=inner, turned=turned)
        counts = np.subtract((14, 12, 13), (8, 6, 10))
        assert patches.region.layout.shape == tuple((counts + longest).tolist())
        compare(patches, data, SIGNED_PERMUTATIONS if turned else [None, np.diag([-1.0, 1, -1])])
        assert store.chunks.decoded == 0
        store.close()


def test_chunks_that_are_missing_are_those_of_the_patch(tmp_path):
    level, _ = stored(tmp_path, "uint8", (130, 130, 130))
    patches, store = patches_of(level, Window((10, 10, 10), (8, 8, 8)))
    assert patches.missing((0, 0, 0), None) == [(0, 0, 0)]
    assert sorted(patches.missing((60, 0, 60), None)) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    patches.region.fill((0, 0, 1))
    assert store.decoded == 1
    assert sorted(patches.missing((60, 0, 60), None)) == [(0, 0, 0), (1, 0, 0), (1, 0, 1)]
    patches.read_into((60, 0, 60), np.empty((10, 10, 10), np.uint8), None, 0)
    assert store.decoded == 4
    assert patches.missing((60, 0, 60), np.diag([1.0, -1, -1])) == []
    assert patches.missing((60, 0, 60), rotation("z", 10)) is None, "it must be computed"
    store.close()
    patches, store = patches_of(level, Window((10, 10, 10), (8, 8, 8)), mode="none")
    assert patches.missing((0, 0, 0), None) is None, "it is not cached"


def test_single_cached_chunks_can_be_decoded_ahead(tmp_path):
    level, data = stored(tmp_path, "uint8", (130, 130, 130))
    patches, store = patches_of(level, Window((10, 10, 10), (8, 8, 8)), mode="chunks")
    assert sorted(patches.missing((60, 0, 60), None)) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    patches.region.fill((0, 0, 1))
    assert sorted(patches.missing((60, 0, 60), None)) == [(0, 0, 0), (1, 0, 0), (1, 0, 1)]
    out = np.empty((10, 10, 10), np.uint8)
    patches.read_into((60, 0, 60), out, None, 0)
    np.testing.assert_array_equal(out, data[60:70, :10, 60:70])
    assert patches.missing((60, 0, 60), None) == []
    assert (store.chunks.decoded, store.decoded) == (4, 0)
    store.chunks.budget = 4 * 64**3
    assert patches.missing((0, 60, 0), None) is None, "what would be decoded first is gone before it is copied"
    store.close()


@pytest.mark.parametrize(("before", "after"), [("memory", "chunks"), ("chunks", "memory"), ("memory", "none")])
def test_chunk_indices_are_the_same_in_all_cache_modes(tmp_path, before, after):
    """A crop in the middle of an array; its dataset is closed and used again between asking and filling."""
    level, data = stored(tmp_path, "uint8", (130, 130, 200))
    inner = Lattice(tuple(np.add(level.lattice.origin, 70 * 8.0)), level.lattice.step, (50, 50, 100)).box
    patches, store = patches_of(level, Window((10, 10, 10), (8, 8, 8)), box=inner, mode=before)
    found = patches.missing((0, 0, 60), None)
    assert found == [(1, 1, 2)]
    store.close()
    store.mode = after
    store.plan([patches.region], False, "test")
    patches.region.fill(found[0])
    assert patches.missing((0, 0, 60), None) == (None if after == "none" else [])
    out = np.empty((10, 10, 10), np.uint8)
    patches.read_into((0, 0, 60), out, None, 0)
    np.testing.assert_array_equal(out, data[70:80, 70:80, 130:140])
    store.close()


def test_positions_that_are_no_whole_number_of_voxels_apart_are_evaluated(tmp_path):
    """Steps of the placement come from another array, which is finer than this one's patches."""
    level, data = stored(tmp_path, "uint8")
    image = StoredImage(level, ChunkCache())
    window = Window((5, 5, 5), (16, 16, 16))
    fine = Lattice(level.translation, (8.0, 8.0, 8.0), (50, 40, 44))
    placement = Placement.plan(
        fine.box, [Window((10, 10, 10), (8, 8, 8))], [(Window((1, 1, 1), (8, 8, 8)), fine)], False
    )
    again = Resampled(image, image.lattice.box, window, placement, np.dtype(np.uint8), 0, ChunkCache())
    patches = again.patches(window, placement, None)
    assert not patches.sliced
    compare(patches, data, [None, np.diag([-1.0, 1, 1])], rounding=True)


def test_the_identity_of_a_resampled_array_depends_on_its_lattice(tmp_path):
    """Not only from the voxels: a translation that was corrected is another array."""
    level, _ = stored(tmp_path, "uint8", (70, 50, 44), (2.62, 8.0, 8.0))
    window = Window((8, 12, 16), (8, 8, 8))
    image = StoredImage(level, ChunkCache())
    placement = Placement.plan(image.lattice.box, [window], [(window, image.lattice)], True)

    def key(translation=level.translation, scale=level.scale):
        source = StoredImage(Level(level.path, "s0", scale, translation, (0, 1, 2), 3), ChunkCache())
        again = Resampled(source, image.lattice.box, window, placement, np.dtype(np.uint8), 0, ChunkCache())
        return again.lattice, again.region.digest()

    assert key() == key()
    for other in (key((100.4, -60.0, 7.0)), key(scale=(2.63, 8.0, 8.0))):
        assert other[0] == key()[0]
        assert other[1] != key()[1]


@pytest.mark.parametrize("scale", [(2.7, 3.9, 4.1), (8.9, 8.1, 8.0), (12.0, 16.0, 12.4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32", "float64"])
def test_a_resampled_voxel_has_the_same_bits_in_any_box(dtype, scale):
    """Otherwise patches would depend on whether blocks are cached or evaluated for each patch."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 250, (60, 50, 44)).astype(dtype)
    if data.dtype.kind == "f":
        data = (data - 100) / 7
        data[20:22, 5:30, 17] = np.nan

    class Source:
        lattice = Lattice((100.3, -60.1, 7.7), (5.24, 4.0, 8.0), data.shape)
        lattices = (lattice,)

        def evaluate(self, where, out, fill):
            evaluate(Voxels(data), where(self.lattice), out, method="linear", fill=fill)

    window = Window((8, 8, 8), scale)
    placement = Placement.plan(Source.lattice.box, [window], [(window, Source.lattice)], False)
    again = Resampled(Source(), Source.lattice.box, window, placement, data.dtype, 0, ChunkCache())
    shape = again.region.shape
    whole = again._decode((0, 0, 0), shape)
    assert len(np.unique(whole)) > 100
    for _ in range(40):
        size = [int(rng.integers(1, min(n, 20) + 1)) for n in shape]
        start = [int(rng.integers(0, n - m + 1)) for n, m in zip(shape, size, strict=True)]
        part = again._decode(tuple(start), tuple(size))
        expected = whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        assert part.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_the_stamp_of_a_block_covers_all_its_sources(tmp_path):
    """Also of the neighbours that interpolate at its border."""
    level, data = stored(tmp_path, "uint8", (70, 40, 40), (2.62, 8.0, 8.0), (0.0, 0.0, 0.0))
    window = Window((4, 8, 8), (8, 8, 8))
    image = StoredImage(level, ChunkCache())
    placement = Placement.plan(image.lattice.box, [window], [(window, image.lattice)], False)
    again = Resampled(image, image.lattice.box, window, placement, np.dtype(np.uint8), 0, ChunkCache())
    region = again.region
    for z in range(region.shape[0]):
        box = ((z, 0, 0), (1, *region.shape[1:]))
        image.region.decode = Voxels(data).read
        image.region.cache.clear()
        before = region.decode(*box), region.stamp(*box)
        for first in range(0, 70, 16):  # planes of chunks
            changed = data.copy()
            changed[first : first + 16] ^= 0xFF
            image.region.decode = Voxels(changed).read
            image.region.cache.clear()
            differs = (region.decode(*box) != before[0]).any()
            found = stored_box(image.lattice, again._box(*box), 2)
            watched = found[0][0] < first + 16 and found[0][0] + found[1][0] > first
            assert watched or not differs, (z, first)


@pytest.mark.parametrize(
    ("thickness", "at", "planes"), [(2.5, 3.9, 0), (2.5, 0.0, 1), (30.0, 3.9, 3), (2.5, 8.1, 1), (2.5, 12.4, 0)]
)
def test_an_array_that_holds_no_voxel_centre_is_outside_everywhere(tmp_path, thickness, at, planes):
    """Thinner than a voxel of the patches, and between their centres."""
    data = np.full((1, 20, 20), 5, np.uint8)
    zarr.create_array(tmp_path / "s0", data=data, zarr_format=2)
    level = Level(tmp_path / "s0", "s0", (thickness, 8.0, 8.0), (at, 0.0, 0.0), (0, 1, 2), 3)
    image = StoredImage(level, ChunkCache())
    window = Window((6, 8, 8), (8, 8, 8))
    around = Lattice((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), (6, 20, 20))
    placement = Placement.plan(around.box, [window], [(window, around)], False)
    again = Resampled(image, image.lattice.box, window, placement, np.dtype(np.uint8), 0, ChunkCache())
    patches = again.patches(window, placement, None)
    out = np.empty(window.shape, np.uint8)
    patches.read_into((0, 3, 3), out, None, 9)
    np.testing.assert_array_equal(
        out, direct(data, image.lattice, placement.first + placement.step * (0, 3, 3), window, None, "linear", 9)
    )
    assert (out == 5).any(axis=(1, 2)).sum() == planes


if not sys.platform.startswith("linux"):
    pytestmark = pytest.mark.skip(reason="regions are shared between processes on Linux only")
