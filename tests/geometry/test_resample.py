"""Resampled patches against independent computations: ramps in world coordinates, slices, integrals of np.interp."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from cellmap_lightning.geometry.lattice import Lattice, patch_map
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.transforms.spatial import rotation

many = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining a failure takes longer than all the rest
)


STEPS = [1.62, 2.62, 3.24, 4.0, 5.24, 8.0, 16.0]
SIGNED_PERMUTATIONS = [
    np.eye(3)[list(p)] * (1 - 2 * np.asarray(signs))
    for p in itertools.permutations(range(3))
    for signs in np.ndindex(2, 2, 2)
]


class Voxels:
    """An array in memory that raises on reads outside of it."""

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape[:3]

    def read_into(self, start, out):
        box = tuple(slice(a, a + n) for a, n in zip(start, out.shape, strict=False))
        assert all(s.start >= 0 and s.stop <= n for s, n in zip(box, self.shape, strict=True)), (box, self.shape)
        out[...] = self.array[box]

    def read(self, start, shape):
        out = np.empty((*shape, *self.array.shape[3:]), self.dtype)
        self.read_into(start, out)
        return out


def read(array, amap, method, fill=0, dtype=None):
    out = np.full((*amap.shape, *array.shape[3:]), 77, dtype or array.dtype)
    evaluate(Voxels(array), amap, out, method=method, fill=fill)
    return out


def world(center, shape, scale, turn):
    """World coordinates of the patch's voxel centres, ``[z, y, x, 3]``: each voxel by itself."""
    points = np.empty((*shape, 3))
    for index in np.ndindex(*shape):
        points[index] = center + turn @ ((np.asarray(index) - (np.asarray(shape) - 1) / 2) * scale)
    return points


def random_rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.diag(r))


turns = st.one_of(st.just(np.eye(3)), st.sampled_from(SIGNED_PERMUTATIONS), st.integers(0, 10**6).map(random_rotation))


@st.composite
def scenes(draw, turns=turns):
    """A lattice anywhere, and a patch that lies in it, across its border, or outside."""
    shape = tuple(draw(st.tuples(*[st.integers(1, 14)] * 3)))
    step = np.asarray(draw(st.tuples(*[st.sampled_from(STEPS)] * 3)))
    origin = np.asarray(draw(st.tuples(*[st.floats(-1e5, 1e5).map(lambda v: round(v, 2))] * 3)))
    patch = tuple(draw(st.tuples(*[st.integers(1, 7)] * 3)))
    ratio = st.one_of(st.just(1.0), st.sampled_from([0.5, 2.0, 8 / 5.24, 4 / 5.24]), st.floats(0.3, 4.5))
    scale = step * draw(st.tuples(*[ratio] * 3))
    along = st.one_of(st.floats(0.2, 0.8), st.floats(-0.3, 1.3))
    center = origin + step * (np.asarray(draw(st.tuples(*[along] * 3))) * shape - 0.5)
    return Lattice(tuple(origin), tuple(step), shape), patch, scale, center, draw(turns)


def inside_by(points, lattice):
    """Voxels by which each point lies inside the array (negative: outside)."""
    index = (points - lattice.origin) / lattice.step
    return np.minimum(index + 0.5, np.asarray(lattice.shape) - 0.5 - index).min(axis=-1)


def reach(scale, turn, lattice):
    """Half the box in array voxels that an output voxel is the mean of; zero along its axes that are not coarser."""
    edges = turn * scale / np.asarray(lattice.step)[:, None]
    coarser = np.linalg.norm(edges, axis=0) > 1.01
    return (abs(edges) * coarser).sum(axis=1) / 2


@many
@given(scenes(), st.sampled_from(["float32", "float64", "uint16"]), st.tuples(*[st.integers(-3, 3)] * 3))
def test_a_ramp_in_the_world_is_read_as_that_ramp(scene, dtype, slopes):
    lattice, shape, scale, center, turn = scene
    # Along an axis of one voxel there is nothing that a slope could be seen from.
    slopes = np.where(np.asarray(lattice.shape) > 1, slopes, 0) * (500 if dtype == "uint16" else 1)
    base = 32000 if dtype == "uint16" else 5
    stored = base + sum(
        np.meshgrid(*[k * np.arange(n) for k, n in zip(slopes, lattice.shape, strict=True)], indexing="ij")
    )
    out = read(stored.astype(dtype), patch_map(center, shape, scale, lattice, turn), "linear", fill=7)

    points = world(center, shape, scale, turn)
    expected = base + (points - lattice.origin) / lattice.step @ slopes
    tolerance = 1e-3 * abs(slopes).sum() + (0.5 if dtype == "uint16" else 1e-4)
    margin = inside_by(points, lattice)
    half = reach(scale, turn, lattice)
    index = (points - lattice.origin) / lattice.step
    whole = ((index - half >= -0.5) & (index + half <= np.asarray(lattice.shape) - 0.5)).all(axis=-1) & (margin > 1e-5)
    assert abs(out.astype(float) - expected)[whole].max(initial=0) <= tolerance
    assert (out[margin < -1e-5] == 7).all()


@many
@given(scenes(), st.integers(1, 3))
def test_labels_are_the_voxel_that_holds_the_centre(scene, depth):
    lattice, shape, scale, center, turn = scene
    ids = np.arange(1, math.prod(lattice.shape) + 1, dtype=np.int32).reshape(lattice.shape)
    packed = np.stack([(ids >> (8 * i)) & 255 for i in range(depth)], axis=-1).astype(np.uint8)
    amap = patch_map(center, shape, scale, lattice, turn)
    out, out_packed = read(ids, amap, "nearest"), read(packed, amap, "nearest")

    points = world(center, shape, scale, turn)
    edges = [
        t + (np.arange(n + 1) - 0.5) * s for t, s, n in zip(lattice.origin, lattice.step, lattice.shape, strict=True)
    ]
    clear = np.ones(shape, bool)  # away from the edges, where float noise may choose the voxel
    expected = np.zeros(shape, np.int32)
    for place in np.ndindex(*shape):
        voxel = []
        for p, edge, s in zip(points[place], edges, lattice.step, strict=True):
            clear[place] &= abs(edge - p).min() > 1e-5 * s
            voxel.append(int(np.searchsorted(edge, p)) - 1)
        if all(0 <= v < n for v, n in zip(voxel, lattice.shape, strict=True)):
            expected[place] = ids[tuple(voxel)]
    # The map may be taken for one of slices when it is off by less than 5e-4 voxels, hence ties are left out here.
    off = abs((points - lattice.origin) / lattice.step % 1 - 0.5).min(axis=-1) > 1e-3
    assert (out == expected)[clear & off].all()
    for i in range(depth):
        assert (out_packed[..., i] == (out >> (8 * i)) & 255).all()


def test_a_label_on_a_tie_is_the_lower_voxel():
    ids = np.arange(1, 9, dtype=np.uint8).reshape(8, 1, 1) * np.ones((1, 8, 8), np.uint8)
    lattice = Lattice((100.0, 0.0, 0.0), (2.0, 2.0, 2.0), (8, 8, 8))
    center = np.asarray(lattice.box.center)
    for turn, expected in ((np.eye(3), [1, 3, 5, 7]), (np.diag([-1.0, 1, 1]), [7, 5, 3, 1])):
        out = read(ids, patch_map(center, (4, 4, 4), np.full(3, 4.0), lattice, turn), "nearest")
        assert out[:, 0, 0].tolist() == expected
    # A centre on the border of the array belongs to it.
    out = read(ids, patch_map(center - [8, 0, 0], (1, 1, 1), np.full(3, 2.0), lattice), "nearest", fill=99)
    assert out.item() == 1
    out = read(ids, patch_map(center - [-8, 0, 0], (1, 1, 1), np.full(3, 2.0), lattice), "nearest", fill=99)
    assert out.item() == 8


DTYPES = ["uint8", "int16", "int32", "uint64", "int64", "float32", "float64"]


@many
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(-10, 10)] * 3),
    st.tuples(*[st.sampled_from(STEPS)] * 3),
    st.sampled_from(SIGNED_PERMUTATIONS),
    st.sampled_from(DTYPES),
    st.sampled_from(["linear", "nearest"]),
    st.integers(0, 3),
)
def test_on_the_lattice_a_patch_is_a_slice_bit_for_bit(size, shape, start, step, turn, dtype, method, depth):
    rng = np.random.default_rng(0)
    depth = 0 if method == "linear" else depth
    count = math.prod(size) * max(depth, 1) * np.dtype(dtype).itemsize
    # Any bits at all, NaN among them: nothing may be computed with them.
    array = rng.integers(0, 256, count, np.uint8).view(dtype).reshape(*size, *([depth] if depth else []))
    axes = abs(turn).argmax(axis=0)
    window = [0, 0, 0]
    for patch_axis, axis in enumerate(axes):
        window[axis] = shape[patch_axis]
    step, origin = np.asarray(step), np.asarray([3132.21, -899.0, 25863.0])
    center = origin + step * (np.asarray(start) + (np.asarray(window) - 1) / 2)
    amap = patch_map(center, shape, step[axes], Lattice(tuple(origin), tuple(step), tuple(size)), turn)
    out = read(array, amap, method, fill=3)

    padded = np.pad(array, [(20, 30)] * 3 + [(0, 0)] * bool(depth), constant_values=3)
    expected = padded[tuple(slice(20 + a, 20 + a + n) for a, n in zip(start, window, strict=True))]
    expected = np.flip(expected, [axis for axis in range(3) if turn[axis].sum() < 0])
    expected = expected.transpose(*axes, *([3] if depth else []))
    assert out.tobytes() == np.ascontiguousarray(expected).tobytes()


def interpolant(values):
    """Knots of the linear interpolant of stored voxels, its last slopes continued for half a voxel."""
    n = len(values)
    first = values[0] - (values[1] - values[0]) / 2 if n > 1 else values[0]
    last = values[-1] + (values[-1] - values[-2]) / 2 if n > 1 else values[-1]
    return np.r_[-0.5, np.arange(n), n - 0.5], np.r_[first, values, last]


def mean_along(values, at, width):
    """The mean of the interpolant over ``width`` around ``at`` (cut at the border): trapezoids between knots."""
    knots, heights = interpolant(values)
    a, b = max(at - width / 2, -0.5), min(at + width / 2, len(values) - 0.5)
    if width <= 1.01 or b <= a:  # where it lies outside, what it is does not matter
        return np.interp(at, knots, heights)
    x = np.r_[a, knots[(knots > a) & (knots < b)], b]
    y = np.interp(x, knots, heights)
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (b - a)


@settings(many, max_examples=60)
@given(scenes(st.sampled_from(SIGNED_PERMUTATIONS)), st.sampled_from(["float64", "uint8", "int16", "float32"]))
def test_along_the_axes_a_voxel_is_the_mean_of_the_interpolant(scene, dtype):
    lattice, shape, scale, center, turn = scene
    stored = np.random.default_rng(1).integers(0, 250, lattice.shape).astype(dtype)
    out = read(stored, patch_map(center, shape, scale, lattice, turn), "linear", fill=9)
    axes = abs(turn).argmax(axis=0)
    values = stored.astype(float)
    margin = np.full((), np.inf)
    for patch_axis, axis in enumerate(axes):
        at = (center[axis] - lattice.origin[axis]) / lattice.step[axis]
        width = scale[patch_axis] / lattice.step[axis]
        at = at + turn[axis].sum() * width * (np.arange(shape[patch_axis]) - (shape[patch_axis] - 1) / 2)
        values = np.apply_along_axis(
            lambda v, at=at, w=width: np.asarray([mean_along(v, p, w) for p in at]), axis, values
        )
        margins = np.minimum(at + 0.5, lattice.shape[axis] - 0.5 - at)
        margin = np.minimum(margin, margins.reshape([-1 if a == axis else 1 for a in range(3)]))
    expected, margin = values.transpose(axes), np.broadcast_to(margin, values.shape).transpose(axes)
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    if info:  # rounded and bounded; half a unit either way is decided by float noise
        expected = expected.clip(info.min, info.max)
    assert abs(out.astype(float) - expected)[margin > 1e-5].max(initial=0) <= (0.501 if info else 1e-3)
    assert (out[margin < -1e-5] == 9).all()


@settings(many, max_examples=25)
@given(scenes(st.integers(0, 10**6).map(random_rotation)))
def test_turned_a_voxel_is_the_interpolant_at_its_centre(scene):
    lattice, shape, scale, center, turn = scene
    scale = np.minimum(scale, min(lattice.step))  # nowhere coarser than the array
    shape = tuple(min(n, 4) for n in shape)
    stored = np.random.default_rng(2).normal(size=lattice.shape)
    out = read(stored, patch_map(center, shape, scale, lattice, turn), "linear", fill=9)
    points = world(center, shape, scale, turn)
    margin = inside_by(points, lattice)
    for place in np.ndindex(*shape):
        if margin[place] > 1e-5:
            at = (points[place] - lattice.origin) / lattice.step
            values = stored
            for p in at:  # reduces the first axis each time
                values = np.apply_along_axis(lambda v, p=p: mean_along(v, p, 1), 0, values)
            assert out[place] == pytest.approx(float(values), abs=1e-6)
        elif margin[place] < -1e-5:
            assert out[place] == 9


def test_a_single_coarse_slice_is_the_mean_of_the_slices_it_covers():
    """Three stored slices in the thickness of a two-dimensional patch: its centre alone would be on the lattice."""
    stored = np.random.default_rng(3).normal(size=(9, 8, 8))
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (9, 8, 8))
    out = read(stored, patch_map(np.asarray([16.0, 14, 14]), (1, 8, 8), np.asarray([12.0, 4, 4]), lattice), "linear")
    expected = [[mean_along(stored[:, y, x], 4, 3) for x in range(8)] for y in range(8)]
    np.testing.assert_allclose(out[0], expected, atol=1e-12)


@pytest.mark.parametrize("turn", [np.eye(3), rotation("z", 30), np.eye(3)[[2, 0, 1]]])
@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_a_patch_outside_is_all_fill(turn, method):
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (5, 6, 7))
    for center in ([1000.0, 0, 0], [0, -1000, 0], [0, 0, 37.3 + 28], [-33.0, 5, 5]):
        amap = patch_map(np.asarray(center), (4, 4, 4), np.full(3, 3.1), lattice, turn)
        assert (read(np.ones(lattice.shape, np.uint8), amap, method, fill=5) == 5).all()
        assert np.isnan(read(np.ones(lattice.shape, np.float32), amap, method, fill=np.nan)).all()


@pytest.mark.parametrize("turn", [np.eye(3), random_rotation(4)])
def test_one_voxel_thick_arrays_are_constant_along_that_axis(turn):
    stored = np.full((1, 1, 1), 42, np.uint8)
    lattice = Lattice((10.0, 20.0, 30.0), (4.0, 8.0, 2.0), (1, 1, 1))
    for scale in (0.1, 0.4, 3.0):
        for method in ("linear", "nearest"):
            amap = patch_map(np.asarray(lattice.origin), (3, 3, 3), np.full(3, scale), lattice, turn)
            out = read(stored, amap, method, fill=0)
            inside = inside_by(world(np.asarray(lattice.origin), (3, 3, 3), np.full(3, scale), turn), lattice)
            assert (out[inside > 1e-5] == 42).all()
            assert (out[inside < -1e-5] == 0).all()


@pytest.mark.parametrize("turn", [np.eye(3), rotation("x", 20)])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_stay_in_their_range(dtype, turn):
    info = np.iinfo(dtype)
    stored = np.full((6, 6, 6), info.min, dtype)
    stored[3:] = info.max  # the slopes that continue past the border leave the range
    stored[0], stored[5] = info.max, info.min
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (6, 6, 6))
    amap = patch_map(np.full(3, 10.0), (13, 5, 5), np.full(3, 1.9), lattice, turn)
    out = read(stored, amap, "linear", fill=0)
    wide = read(stored.astype(np.float64), amap, "linear", fill=0)
    assert wide.min() < info.min
    assert wide.max() > info.max
    step = max(1, info.max * 2.0**-50)  # what float64 can tell apart
    error = abs(out.astype(np.float64) - np.clip(wide, info.min, info.max))
    assert error.max() <= 0.5 * step + (0.01 if np.dtype(dtype).itemsize <= 2 else step)


def test_integers_are_rounded_and_not_cut():
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (2, 1, 1))
    stored = np.asarray([10, 11], np.uint8).reshape(2, 1, 1)
    for part, expected in ((0.25, 10), (0.75, 11)):
        amap = patch_map(np.asarray([4 * part, 0, 0]), (1, 1, 1), np.full(3, 4.0), lattice)
        assert read(stored, amap, "linear").item() == expected
        assert read(stored, amap, "linear", dtype=np.float32).item() == pytest.approx(10 + part)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("turn", [np.eye(3), rotation("z", 15)])
def test_a_voxel_that_is_no_number_spoils_its_neighbours_only(turn, bad):
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (9, 9, 9))
    stored = np.random.default_rng(5).normal(size=(9, 9, 9)).astype(np.float32)
    spoilt = stored.copy()
    spoilt[4, 5, 6] = bad
    center, scale = np.full(3, 16.0), np.full(3, 3.0)
    amap = patch_map(center, (9, 9, 9), scale, lattice, turn)
    clean, out = read(stored, amap, "linear"), read(spoilt, amap, "linear")
    index = world(center, (9, 9, 9), scale, turn) / 4
    touched = (abs(index - [4, 5, 6]) < 1 - 1e-6).all(axis=-1)
    untouched = (abs(index - [4, 5, 6]) > 1 + 1e-6).any(axis=-1) | (abs(abs(index - [4, 5, 6]) - 1) < 1e-9).any(axis=-1)
    assert touched.sum() > 5
    assert np.isnan(out[touched]).all()
    np.testing.assert_allclose(out[untouched], clean[untouched], atol=1e-5)
    assert not np.isnan(out[untouched]).any()


@settings(many, max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([3.0, 4.0, 5.24]))
@example(0, 4.0)
def test_a_ball_stays_a_ball(seed, scale):
    """Turned and resampled, anisotropic raw and its finer labels still show the same ball."""
    radius, middle = 80.0, np.asarray([3200.3, 1000.7, 900.1])

    def distance(lattice):
        axes = [
            t + s * np.arange(n) - m
            for t, s, n, m in zip(lattice.origin, lattice.step, lattice.shape, middle, strict=True)
        ]
        z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
        return np.sqrt(z * z + y * y + x * x)

    raw = Lattice((3095.0, 892.0, 792.0), (5.24, 4.0, 4.0), (42, 54, 54))
    label = Lattice((3095 - 1.31, 891.0, 791.0), (2.62, 2.0, 2.0), (84, 108, 108))
    grey = (128 + radius - distance(raw)).clip(0, 255).astype(np.float32)
    ids = (distance(label) < radius).astype(np.uint8)
    n = int(190 / scale)
    turn = random_rotation(seed)
    center = middle - [-1.3, 2.1, -0.7]
    seen = read(grey, patch_map(center, (n, n, n), np.full(3, scale), raw, turn), "linear") > 128
    named = read(ids, patch_map(center, (n, n, n), np.full(3, scale), label, turn), "nearest") > 0
    true = 4 / 3 * math.pi * radius**3 / scale**3
    assert seen.sum() == pytest.approx(true, rel=0.01)
    assert named.sum() == pytest.approx(seen.sum(), rel=0.01)
    found = turn @ ((np.argwhere(named).mean(axis=0) - (n - 1) / 2) * scale) + center
    np.testing.assert_allclose(found, middle, atol=0.3)


@pytest.mark.parametrize(("axis", "source", "target"), [("z", "x", "y"), ("x", "y", "z"), ("y", "z", "x")])
def test_a_quarter_turn_moves_content(axis, source, target):
    """A right-handed 90 degrees about z shows at +y what lay at +x."""
    names = "zyx"
    stored = np.zeros((9, 9, 9), np.uint8)
    place = [4, 4, 4]
    place[names.index(source)] = 7
    stored[tuple(place)] = 1
    lattice = Lattice((0.0, 0.0, 0.0), (4.0, 4.0, 4.0), (9, 9, 9))
    # `turn` takes the patch's directions to the world's, so content goes the other way.
    for method in ("linear", "nearest"):
        out = read(
            stored, patch_map(np.full(3, 16.0), (9, 9, 9), np.full(3, 4.0), lattice, rotation(axis, 90).T), method
        )
        expected = [4, 4, 4]
        expected[names.index(target)] = 7
        assert np.argwhere(out).tolist() == [expected]
        out = read(
            stored, patch_map(np.full(3, 16.0), (9, 9, 9), np.full(3, 4.0), lattice, rotation(axis, 89.0).T), "nearest"
        )
        assert np.argwhere(out).tolist() == [expected]
