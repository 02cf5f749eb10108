"""Displaced patches: raw, labels and masks are those of one map, compared with its formulas point by point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellmap_lightning.geometry.lattice import AXES, Lattice
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.geometry.sample_map import outside, sample_map
from cellmap_lightning.transforms.spatial import SpatialTransforms
from tests.cache.plain_voxels import Voxels
from tests.geometry.warped_points import world_points

LATTICE = Lattice((-30.0, 12.0, 5.0), (10.0, 8.0, 4.0), (30, 36, 60))
CENTER = np.asarray(LATTICE.box.center)
FILL = -1000


def index_of(points):
    return (points - LATTICE.origin) / LATTICE.step


RAMPS = [Voxels(np.moveaxis(np.indices(LATTICE.shape), 0, -1)[..., i].astype(np.float32)) for i in range(3)]
NUMBERS = Voxels(np.arange(np.prod(LATTICE.shape), dtype=np.int32).reshape(LATTICE.shape))


def read(source, amap, method, fill=FILL):
    out = np.empty(amap.shape, source.dtype)
    evaluate(source, amap, out, method=method, fill=fill)
    return out


def check(shape, scale, config, sample=0, center=CENTER):
    """Compare raw, labels and the mask of one sample with its formulas; return its indices."""
    transforms = SpatialTransforms(config)
    turn, warp = transforms.turns(5, [sample])[0], transforms.warps(5, [sample])[0]
    amap = sample_map(center, shape, np.asarray(scale), LATTICE, turn, warp)
    index = index_of(world_points(center, shape, np.asarray(scale), turn, warp))
    least, most = -0.5, np.asarray(LATTICE.shape) - 0.5
    near = (np.abs(index - least) < 1e-3) | (np.abs(index - most) < 1e-3)
    inside, clear = ((index > least) & (index < most)).all(axis=-1), ~near.any(axis=-1)
    for axis, ramp in enumerate(RAMPS):
        out = read(ramp, amap, "linear")
        # Where a voxel is averaged over part of its volume, the border cuts it off; otherwise a ramp has no curvature.
        reach = np.abs(amap.matrix).sum(axis=1)[axis] / 2 + 1
        deep = inside & (index[..., axis] > reach) & (index[..., axis] < LATTICE.shape[axis] - 1 - reach)
        np.testing.assert_allclose(out[deep], index[..., axis][deep], atol=1e-3)
        np.testing.assert_array_equal((out == FILL)[clear], ~inside[clear])
    nearest = np.rint(index)
    unique = clear & (np.abs(index - nearest) < 0.499).all(axis=-1)
    expected = np.ravel_multi_index(np.moveaxis(nearest.astype(int), -1, 0), LATTICE.shape, mode="clip")
    np.testing.assert_array_equal(read(NUMBERS, amap, "nearest")[unique], np.where(inside, expected, FILL)[unique])
    np.testing.assert_allclose(amap.points(), index, atol=1e-3)
    mask = outside(amap, LATTICE.shape)
    np.testing.assert_array_equal((np.zeros(shape, bool) if mask is None else mask)[clear], ~inside[clear])
    low, high = amap.bounds()
    assert (index >= low - 1e-3).all()
    assert (index <= high + 1e-3).all()
    return index


def spans(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted)


def axes(values, names=AXES):
    return st.fixed_dictionaries({"axes": st.dictionaries(st.sampled_from(names), values, max_size=3)})


PAIRS = ("zy", "zx", "yz", "yx", "xz", "xy")
LENGTHS = st.floats(20, 200)
ELASTIC = st.builds(
    lambda spacing, part, axes: {"spacing": spacing, "magnitude": part * min(spacing.values()), "axes": axes},
    st.fixed_dictionaries(dict.fromkeys("zyx", LENGTHS)),
    st.floats(0.01, 0.4),
    st.lists(st.sampled_from("zyx"), min_size=1, unique=True),
)
SHIFTS = {
    "axis": st.sampled_from("zyx"),
    "probability": st.floats(0, 1),
    "max_shift": st.floats(0, 40),
    "thickness": st.floats(4, 60),
}
TRANSFORMS = {
    "mirror": axes(st.floats(0, 1)),
    "transpose": st.fixed_dictionaries({"axes": st.lists(st.sampled_from("zyx"), unique=True)}),
    "rotate": axes(spans(-180, 180)),
    "zoom": axes(spans(0.6, 1.7)) | spans(0.6, 1.7),
    "shear": axes(spans(-0.4, 0.4), PAIRS),
    "elastic": ELASTIC,
    "slip": st.fixed_dictionaries(SHIFTS),
    "misalign": st.fixed_dictionaries({**SHIFTS, "rotate": st.floats(0, 20)}),
}
SHAPES = st.tuples(*[st.integers(1, 9)] * 3)
SCALES = st.tuples(*[st.floats(2, 14)] * 3)


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), shape=SHAPES, scale=SCALES, sample=st.integers(0, 2**40))
def test_each_transform_is_its_formula(name, data, shape, scale, sample):
    check(shape, scale, {name: data.draw(TRANSFORMS[name])}, sample)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    config=st.fixed_dictionaries({}, optional=TRANSFORMS),
    shape=SHAPES,
    scale=SCALES,
    sample=st.integers(0, 2**40),
    away=st.tuples(*[st.floats(-1, 1)] * 3),
)
def test_compositions_are_their_formula(config, shape, scale, sample, away):
    """Also in patches across the border of the volume."""
    check(shape, scale, config, sample, CENTER + np.multiply(away, LATTICE.box.extent / 2))
