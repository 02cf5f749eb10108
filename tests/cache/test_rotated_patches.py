"""Patches rotated about one axis against rotations about any, and slices."""

import itertools
import sys

import numpy as np
import pytest

from cellmap_lightning.geometry.lattice import Lattice, patch_map
from cellmap_lightning.geometry.resample import copy_slices, evaluate, slices
from cellmap_lightning.geometry.rotation import gather, gather_about_axis
from cellmap_lightning.transforms.spatial import rotation
from tests.cache.plain_voxels import SIGNED_PERMUTATIONS, Voxels

# -- rotations about one axis


def scene(rng, dtype, coarse):
    """A plain array, and a patch that is turned about one axis, somewhere in it, across its border, or outside."""
    shape = tuple(int(rng.integers(1, 20)) for _ in range(3))
    if rng.random() < 0.3:
        shape = tuple(1 if rng.random() < 0.4 else n for n in shape)
    step = rng.choice([2.62, 4.0, 5.24, 8.0], 3)
    patch = tuple(int(n) for n in rng.integers(1, 12, 3))
    axis = str(rng.choice(list("zyx")))
    turn = rotation(axis, rng.uniform(-180, 180)) @ np.diag(rng.choice([-1.0, 1.0], 3))
    if rng.random() < 0.4:
        turn = turn @ np.eye(3)[rng.permutation(3)]
    theirs = "zyx".index(axis)
    mine = int(np.abs(turn[theirs]).argmax())
    if coarse:
        scale = step * rng.uniform(0.5, 3, 3)
        scale[mine] = step[theirs] * rng.uniform(0.3, 1)
    else:
        scale = np.full(3, step.min()) * rng.choice([rng.uniform(0.3, 1), 1.0])
    lattice = Lattice(tuple(rng.uniform(-1e4, 1e4, 3)), tuple(step), shape)
    center = np.asarray(lattice.origin) + step * (rng.uniform(-0.4, 1.4, 3) * shape - 0.5)
    if dtype.startswith("packed"):
        array = rng.integers(0, 256, (*shape, int(dtype[-1])), np.uint8)
    elif dtype.startswith("float"):
        array = rng.normal(size=shape).astype("float32")
        if dtype.endswith("nan"):
            array[tuple(int(rng.integers(n)) for n in shape)] = rng.choice([np.nan, np.inf])
    else:
        array = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    return array, patch_map(center, patch, scale, lattice, turn), (mine, theirs)


KINDS = ["uint8", "uint16", "int32", "float32", "float32 nan"]


@pytest.mark.parametrize(
    ("dtype", "method"),
    [*itertools.product(KINDS, ["linear", "nearest"]), *((f"packed {n}", "nearest") for n in (2, 4, 6, 8))],
)
@pytest.mark.parametrize("coarse", [False, True])
def test_rotations_about_one_axis_equal_the_general_path(dtype, method, coarse):
    """The neighbours that lie along the axis are shared; nothing else differs from the general road."""
    rng = np.random.default_rng([len(dtype), coarse])
    about = 0
    for _ in range(250):
        array, amap, _ = scene(rng, dtype, coarse)
        if amap.separable() is not None:
            continue
        expected, out = (np.full((*amap.shape, *array.shape[3:]), 77, array.dtype) for _ in range(2))
        fill = 0 if dtype.startswith("packed") else 3
        gather(Voxels(array), amap, expected, method, fill)
        if not gather_about_axis(Voxels(array), amap, out, method, fill):
            assert dtype == "float32 nan"
            evaluate(Voxels(array), amap, out, method=method, fill=fill)
        else:
            about += 1
        if method == "nearest":
            assert out.tobytes() == expected.tobytes()
        elif array.dtype.kind == "f":
            np.testing.assert_allclose(out, expected, atol=1e-5)
        else:
            assert np.abs(out.astype(np.int64) - expected).max() <= (array.dtype.itemsize == 2)
    assert about > (50 if dtype == "float32 nan" else 150)


def test_along_the_axis_a_coarse_voxel_is_the_exact_mean():
    """As it is where nothing is turned: first the means along the axis, then a rotation of these."""
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(120):
        array, amap, (mine, theirs) = scene(rng, "float32", True)
        stretched = amap.matrix.copy()
        factor = rng.uniform(1.2, 3) / np.abs(stretched[theirs, mine])
        stretched[theirs, mine] *= factor
        amap = type(amap)(stretched, amap.offset, amap.shape)
        if amap.separable() is not None:
            continue
        out, expected = np.full(amap.shape, 77, "float32"), np.full(amap.shape, 77, "float32")
        assert gather_about_axis(Voxels(array), amap, out, "linear", 3)
        # The means, as an array whose voxels are those of the patch along the axis.
        along = np.eye(3)
        along[theirs, theirs] = stretched[theirs, mine]
        shape = list(array.shape)
        shape[theirs] = amap.shape[mine]
        offset = np.zeros(3)
        offset[theirs] = amap.offset[theirs]
        means = np.full(shape, np.nan)
        evaluate(
            Voxels(array.astype(float)), type(amap)(along, offset, tuple(shape)), means, method="linear", fill=np.nan
        )
        matrix, offset = stretched.copy(), amap.offset.copy()
        matrix[theirs, mine], offset[theirs] = 1, 0
        hidden = np.isnan(means)
        wide = np.full(amap.shape, 77.0)
        gather(Voxels(np.where(hidden, 0, means)), type(amap)(matrix, offset, amap.shape), wide, "linear", 3)
        expected[...] = wide
        lost = np.moveaxis(hidden, theirs, 0).reshape(amap.shape[mine], -1).all(axis=1)
        np.moveaxis(expected, mine, 0)[lost] = 3
        np.testing.assert_allclose(out, expected, atol=2e-5)
        compared += 1
    assert compared > 100


def test_a_rotation_reads_only_the_box_it_needs():
    class Watched(Voxels):
        def read(self, start, shape):
            self.read_shape = shape
            return super().read(start, shape)

    source = Watched(np.zeros((100, 100, 100), np.uint8))
    lattice = Lattice((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), (100, 100, 100))
    amap = patch_map(np.full(3, 400.0), (10, 20, 20), np.full(3, 8.0), lattice, rotation("z", 45))
    out = np.empty((10, 20, 20), np.uint8)
    for method in ("nearest", "linear"):
        assert gather_about_axis(source, amap, out, method, 0)
        assert source.read_shape[0] <= 11
        assert max(source.read_shape[1:]) <= 20 * 2**0.5 + 5


def test_rotations_about_no_axis_use_the_general_path():
    lattice = Lattice((0.0, 0.0, 0.0), (8.0, 8.0, 8.0), (20, 20, 20))
    amap = patch_map(np.full(3, 80.0), (5, 5, 5), np.full(3, 8.0), lattice, rotation("z", 20) @ rotation("x", 30))
    out = np.full((5, 5, 5), 7, np.uint8)
    assert not gather_about_axis(Voxels(np.zeros((20, 20, 20), np.uint8)), amap, out, "linear", 0)
    assert (out == 7).all(), "nothing was written"


# -- slices


@pytest.mark.parametrize("turn", SIGNED_PERMUTATIONS)
@pytest.mark.parametrize("depth", [0, 2, 6])
def test_slices_inside_across_and_outside(turn, depth):
    rng = np.random.default_rng(3)
    array = rng.integers(0, 256, (9, 10, 11, *([depth] if depth else [])), np.uint8)
    lattice = Lattice((3.0, -5.0, 100.0), (4.0, 4.0, 4.0), (9, 10, 11))
    shape = (3, 6, 8)
    lower = np.subtract(lattice.origin, 2)
    size = np.asarray(shape)[np.abs(turn).argmax(axis=1)]
    padded = np.pad(array, [(20, 20)] * 3 + [(0, 0)] * bool(depth), constant_values=5)
    for start in [(0, 0, 0), (2, 3, 1), (-2, 3, 4), (6, 9, 10), (-20, 0, 0), (0, 0, 12), (-1, -1, -1)]:
        center = lower + 4 * (np.asarray(start) + size / 2)
        cut = slices(patch_map(center, shape, np.full(3, 4.0), lattice, turn))
        assert cut.start == start
        assert cut.shape(shape) == tuple(size.tolist())
        out = np.full((*shape, *array.shape[3:]), 77, np.uint8)
        copy_slices(Voxels(array), cut, cut.start, out, 5)
        expected = padded[tuple(slice(20 + a, 20 + a + n) for a, n in zip(start, size.tolist(), strict=True))]
        np.testing.assert_array_equal(cut.view(out), expected)
        voxel = tuple(int(rng.integers(n)) for n in shape)
        world = center + turn @ ((np.asarray(voxel) - (np.asarray(shape) - 1) / 2) * 4)
        index = np.rint((world - lattice.origin) / 4).astype(int) + 20
        np.testing.assert_array_equal(out[voxel], padded[tuple(index)])


def test_maps_that_are_not_aligned_have_no_slices():
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (20, 20, 20))
    for center, scale, turn in (
        (40.0, 4.01, None),
        (40.3, 4.0, None),
        (40.0, 8.0, None),
        (40.0, 4.0, rotation("z", 1)),
    ):
        assert slices(patch_map(np.full(3, center), (5, 5, 5), np.full(3, scale), lattice, turn)) is None
    assert slices(patch_map(np.full(3, 40.0), (5, 5, 5), np.full(3, 4.0), lattice)).plain


if not sys.platform.startswith("linux"):
    pytestmark = pytest.mark.skip(reason="regions are shared between processes on Linux only")
