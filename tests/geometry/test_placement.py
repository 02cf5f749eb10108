"""Positions of patches in crops, on the lattices of their arrays, also with the geometries of the challenge."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import Lattice, patch_map, to_vector
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.io.ngff import ArrayInfo, Level, Multiscale

many = settings(max_examples=80, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate, Phase.shrink])
MANIFEST = Path(__file__).parents[3] / "shared" / "data" / "challenge" / "train_crop_manifest.csv"


def lattice(shape, step, lower=(0, 0, 0)):
    """Return a lattice by its lower edge, at which crops are cut."""
    return Lattice(to_vector(np.add(lower, np.divide(step, 2))), to_vector(step), tuple(shape))


def spans(placement, window):
    """Return lower and upper edges of the patch at every position, ``[positions, 3]`` each."""
    centers = np.stack([placement.center(i) for i in range(len(placement))])
    return centers - window.extent / 2, centers + window.extent / 2


@pytest.mark.parametrize("step", [(4.0, 4.0, 4.0), (2.62, 2.0, 2.0), (1.62, 2.0, 2.0)])
def test_a_crop_as_large_as_the_patch_has_one_position(step):
    crop = lattice((20, 30, 40), step, (3130.9, 898.0, 25862.0))
    window = Window((20, 30, 40), step)
    placement = Placement.plan(crop.box, [window], [(window, crop)], pad=False)
    assert len(placement) == placement.tile_count == 1
    lower, upper = spans(placement, window)
    np.testing.assert_allclose(lower[0], crop.box.lower, atol=1e-6)
    np.testing.assert_allclose(upper[0], crop.box.upper, atol=1e-6)


@many
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(0, 4)] * 3),
    st.tuples(*[st.sampled_from([1.62, 2.0, 2.62, 4.0, 8.0])] * 3),
    st.tuples(*[st.integers(-50000, 50000)] * 3),
)
def test_every_position_exists_first_and_last_included(shape, more, step, lower):
    crop = lattice(np.add(shape, more).tolist(), step, np.multiply(lower, step))
    window = Window(shape, step)
    placement = Placement.plan(crop.box, [window], [(window, crop)], pad=False)
    assert placement.counts == tuple(m + 1 for m in more)
    low, high = spans(placement, window)
    starts = (low - crop.box.lower) / step
    assert abs(starts - np.rint(starts)).max() < 1e-6
    # The order is z, y, x, and none is missing or twice.
    assert np.rint(starts).astype(int).tolist() == [list(i) for i in np.ndindex(*placement.counts)]
    assert (low >= np.asarray(crop.box.lower) - 1e-6).all()
    assert (high <= np.asarray(crop.box.upper) + 1e-6).all()
    np.testing.assert_allclose(placement.centers.lower, placement.center(0), atol=1e-9)
    np.testing.assert_allclose(placement.centers.upper, placement.center(len(placement) - 1), atol=1e-6)
    for number, place in enumerate(np.ndindex(*placement.counts)):
        assert placement.index(place) == number


def covers(placement, window, grid):
    """Return whether every voxel centre of ``grid`` lies in some tile."""
    tiles = [placement.tile(number) for number in range(placement.tile_count)]
    assert all(0 <= tile < len(placement) for tile in tiles)
    centers = np.stack([placement.center(tile) for tile in tiles])
    along = [np.unique(centers[:, axis]) for axis in range(3)]
    # As many different tiles as a full product of their places along each axis has: then axis by axis is enough.
    assert len(set(tiles)) == len(tiles) == math.prod(len(a) for a in along)
    return all(
        (abs(points[:, None] - places) < half + 1e-6).any(axis=1).all()
        for points, places, half in zip(
            [t + s * np.arange(n) for t, s, n in zip(grid.origin, grid.step, grid.shape, strict=True)],
            along,
            window.extent / 2,
            strict=True,
        )
    )


@many
@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(0, 9)] * 3))
def test_tiles_cover_every_voxel(shape, more):
    crop = lattice(np.add(shape, more).tolist(), (2.62, 2.0, 2.0), (3130.9, 898.0, 25862.0))
    window = Window(shape, crop.step)
    placement = Placement.plan(crop.box, [window], [(window, crop)], pad=False)
    assert covers(placement, window, crop)
    least = math.prod(-(-n // w) for n, w in zip(crop.shape, shape, strict=True))
    assert placement.tile_count == least


@many
@given(
    st.tuples(*[st.integers(3, 8)] * 3),
    st.tuples(*[st.integers(4, 40)] * 3),
    st.tuples(*[st.sampled_from([3.0, 4.0, 5.24, 7.3])] * 3),
)
def test_off_the_lattice_patches_are_slices_anchored_at_the_crop(shape, size, scale):
    crop = lattice(size, (2.62, 2.0, 1.62), (3130.9, 898.0, 25862.0))
    window = Window(shape, scale)
    if (window.extent > crop.box.extent).any():
        return
    inside = Placement.plan(crop.box, [window], [(window, crop)], pad=False)
    padded = Placement.plan(crop.box, [window], [(window, crop)], pad=True)
    tied = np.isclose(scale, crop.step)
    for placement in (inside, padded):
        np.testing.assert_allclose(placement.center(0) - window.extent / 2, crop.box.lower, atol=1e-6)
        np.testing.assert_allclose(placement.step, scale, rtol=1e-9)
    beyond = padded.center(len(padded) - 1) + window.extent / 2 - crop.box.upper
    assert ((beyond > -1e-6) & (beyond < np.asarray(scale))).all()
    left = crop.box.upper - (inside.center(len(inside) - 1) + window.extent / 2)
    assert ((left > -1e-6) & (left < np.asarray(scale))).all()
    assert not tied.any()
    assert covers(padded, window, crop)


def test_a_thin_patch_beside_a_coarse_one_leaves_no_slice_out():
    """One 4 nm label slice and its 8 nm raw slice: steps of 8 nm would never show every other label slice."""
    crop = lattice((10, 16, 16), (4.0, 4.0, 4.0))
    raw = lattice((10, 16, 16), (8.0, 4.0, 4.0))
    target, given = Window((1, 16, 16), (4, 4, 4)), Window((1, 16, 16), (8, 4, 4))
    placement = Placement.plan(crop.box, [target], [(target, crop), (given, raw)], pad=False)
    assert placement.counts == (10, 1, 1)
    assert covers(placement, target, crop)


def test_the_first_of_equal_lattices_is_used_despite_float_noise():
    labels = lattice((50, 50, 50), (8.0, 8.0, 8.0), (4.0, 4.0, 4.0))
    raw = lattice((100, 100, 100), (8.000000000000002,) * 3)
    window = Window((16, 16, 16), (8, 8, 8))
    placement = Placement.plan(labels.box, [window], [(window, labels), (window, raw)], pad=False)
    assert placement.counts == (35, 35, 35)
    np.testing.assert_allclose(placement.center(0) - window.extent / 2, labels.box.lower, atol=1e-6)


@many
@given(st.tuples(*[st.integers(1, 12)] * 3), st.tuples(*[st.integers(1, 12)] * 3))
def test_with_pad_a_larger_patch_holds_the_crop(shape, size):
    crop = lattice(size, (2.62, 2.0, 2.0), (3130.9, 898.0, 25862.0))
    window = Window(shape, crop.step)
    placement = Placement.plan(crop.box, [window], [(window, crop)], pad=True)
    low, high = spans(placement, window)
    for axis in range(3):
        if shape[axis] > size[axis]:
            assert (low[:, axis] <= crop.box.lower[axis] + 1e-6).all()
            assert (high[:, axis] >= crop.box.upper[axis] - 1e-6).all()
        else:
            assert (low[:, axis] >= crop.box.lower[axis] - 1e-6).all()
            assert (high[:, axis] <= crop.box.upper[axis] + 1e-6).all()
        assert placement.counts[axis] == abs(size[axis] - shape[axis]) + 1
    assert covers(placement, window, crop)
    starts = (low - crop.box.lower) / crop.step
    assert abs(starts - np.rint(starts)).max() < 1e-6


def test_without_pad_a_larger_patch_is_refused_with_both_sizes():
    crop = lattice((20, 100, 100), (4.0, 4.0, 4.0))
    window = Window((32, 32, 32), (4, 4, 4))
    with pytest.raises(CellMapValueError, match=r"crop7: the patch is 128 nm long along z .* only 80 nm .*pad=True"):
        Placement.plan(crop.box, [window], [(window, crop)], pad=False, label="crop7")


def test_a_raw_patch_stays_in_its_volume():
    crop = lattice((100, 100, 100), (4.0, 4.0, 4.0))
    volume = lattice((110, 200, 200), (4.0, 4.0, 4.0), (0, -200, -200))
    target, context = Window((20, 20, 20), (4, 4, 4)), Window((60, 60, 60), (4, 4, 4))
    arrays = [(target, crop), (context, volume)]
    placement = Placement.plan(crop.box, [target], arrays, False, "", [(context, volume.box)])
    low = placement.center(0) - context.extent / 2
    high = placement.center(len(placement) - 1) + context.extent / 2
    assert (low >= np.asarray(volume.box.lower) - 1e-6).all()
    assert (high <= np.asarray(volume.box.upper) + 1e-6).all()
    assert placement.counts == (51, 81, 81)
    narrow = lattice((40, 200, 200), (4.0, 4.0, 4.0))
    with pytest.raises(CellMapValueError, match="no position for the patch along z"):
        Placement.plan(crop.box, [target], arrays, False, "crop7", [(context, narrow.box)])


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((0, 1, 1), (1, 1, 1)), ((1, 1), (1, 1, 1)), ((1.5, 1, 1), (1, 1, 1)), ((1, 1, 1), (1, -1, 1)),
     ((1, 1, 1), (1, math.nan, 1)), ((1, 1, 1), (1, math.inf, 1)), ((1, 1, 1), (1, 1)), ((-3, 1, 1), (1, 1, 1))],
)  # fmt: skip
def test_windows_are_positive(shape, scale):
    with pytest.raises(CellMapValueError, match="three positive"):
        Window(shape, scale)


# The challenge: voxel size, translation and shape of one crop of each kind, as its manifest gives them.
CROPS = [
    ((1.62, 2, 2), (9528.03, 355, 27839), (980, 440, 620)),
    ((1.68, 2, 2), (28223.16, 1599, 32399), (400, 400, 400)),
    ((1.72, 2, 2), (14103.14, 1739, 24799), (400, 400, 400)),
    ((1.74, 2, 2), (20527.65, 7903, 35703), (400, 400, 400)),
    ((2.28, 2, 2), (25078.859999999997, 2979, 18819), (170, 400, 400)),
    ((2.62, 2, 2), (3132.21, 899, 25863), (200, 1000, 1000)),
    ((2, 2, 2), (19043, 19807, 25971), (400, 400, 400)),
    ((2, 2, 2), (2760, 5160, 10670), (400, 400, 400)),  # raw of the same voxel size
    ((4, 4, 4), (88198, 30198, 54918), (200, 200, 200)),
    ((8, 8, 8), (79568, 20432, 46408), (300, 300, 300)),
    ((8, 8, 8), (3, 2403, 803), (450, 600, 1100)),  # raw four times as fine
    ((16, 16, 16), (84004, 22788, 53316), (400, 300, 300)),  # twice
    ((16, 16, 16), (17190, 4022, 3222), (584, 550, 550)),
    ((32, 32, 32), (57900, 67372, 62092), (400, 400, 400)),
    ((64, 64, 64), (33372, 66908, 91996), (400, 400, 390)),  # eight times
]


def pyramid(step, origin, shape, levels):
    """The challenge's images as their metadata describes them, with nothing on disk."""
    out = []
    for k in range(levels):
        if min(shape) >> k == 0:
            break
        level = Level(
            Path(f"s{k}"), f"s{k}", to_vector(np.multiply(step, 2.0**k)),
            to_vector(np.add(origin, np.multiply(step, (2.0**k - 1) / 2))), (0, 1, 2), 3,
        )  # fmt: skip
        size = tuple(n >> k for n in shape)
        level.__dict__["info"] = ArrayInfo(level.path, 2, size, size, np.dtype(np.uint8), {})
        out.append(level)
    return Multiscale(Path("image"), tuple(out), {})


class Spy:
    """A source that records whether it was read straight into the patch, as only slices are."""

    dtype = np.dtype(np.uint8)

    def __init__(self, shape, patch):
        self.shape, self.patch, self.start = shape, patch, None

    def read_into(self, start, out):
        if np.shares_memory(out, self.patch):
            self.start = start
            assert out.shape == self.patch.shape, "a patch inside the crop is read whole"
        out[...] = 0

    def read(self, start, shape):
        return np.zeros(shape, self.dtype)


def copied_from(center, window, grid, method):
    """Return the start of the slice that a patch is, or None when it is resampled."""
    patch = np.empty(window.shape, np.uint8)
    spy = Spy(grid.shape, patch)
    evaluate(spy, patch_map(center, window.shape, window.scale, grid), patch, method=method, fill=0)
    return spy.start


def check_crop(step, origin, shape):
    """Boxes coincide, and slices are taken wherever the lattices allow it. Returns how often they were."""
    step, origin = np.asarray(step, float), np.asarray(origin, float)
    # The raw voxel size for which the crop's corners lie on corners of raw voxels, coarsest first.
    for ratio in (2, 1, 1 / 2, 1 / 4, 1 / 8):
        corner = (origin - step / 2) / (step * ratio) + 0.5
        if abs(corner - np.rint(corner)).max() < 0.005:
            break
    else:
        raise AssertionError(f"{origin} is on no raw lattice")
    labels = pyramid(step, origin, shape, 4)
    raw = pyramid(step * ratio, (0, 0, 0), tuple(int(n) for n in (origin + step * shape) / (step * ratio) + 500), 8)
    sliced = 0
    for scale in [np.full(3, s) for s in (2.0, 4.0, 8.0, 16.0)] + [step, 2 * step]:
        try:
            of_label, of_raw = choose_level(labels, scale, "", 1.0), choose_level(raw, scale, "", 2.0)
        except CellMapValueError:
            continue  # finer than what is stored
        window = Window((8, 6, 5), scale)
        box = labels.finest.lattice.box
        if (window.extent > box.extent).any():
            continue
        arrays = [(window, of_label.lattice), (window, of_raw.lattice)]
        placement = Placement.plan(box, [window], arrays, pad=False)
        label_fits = abs(np.divide(of_label.scale, scale) - 1).max() < 1e-6
        raw_fits = abs(np.divide(of_raw.scale, scale) - 1).max() < 1e-6
        apart = np.subtract(of_label.lattice.box.lower, of_raw.lattice.box.lower) / scale
        meet = abs(apart - np.rint(apart)).max() < 1e-4
        rng = np.random.default_rng(0)
        for position in (0, len(placement) - 1, *rng.integers(0, len(placement), 1).tolist()):
            center = placement.center(position)
            low, high = center - window.extent / 2, center + window.extent / 2
            assert (low >= np.asarray(box.lower) - 1e-6).all()
            assert (high <= np.asarray(box.upper) + 1e-6).all()
            starts = [
                copied_from(center, window, of_label.lattice, "nearest"),
                copied_from(center, window, of_raw.lattice, "linear"),
            ]
            assert (starts[0] is not None) == label_fits, (step, origin, scale, "labels")
            # Axis by axis raw gives way to labels of the same voxel size that lie elsewhere.
            if raw_fits and label_fits:
                assert (starts[1] is not None) == meet, (step, origin, scale, "raw")
            elif not raw_fits:
                assert starts[1] is None
            if None not in starts:
                edges = [
                    g.box.lower + np.multiply(g.step, s)
                    for g, s in zip((of_label.lattice, of_raw.lattice), starts, strict=True)
                ]
                np.testing.assert_allclose(edges[0], edges[1], rtol=0, atol=1e-6)
                np.testing.assert_allclose(edges[0], low, rtol=0, atol=1e-6)
                sliced += 1
    return sliced


@pytest.mark.parametrize(("step", "origin", "shape"), CROPS)
def test_raw_and_labels_of_the_challenge_coincide(step, origin, shape):
    assert check_crop(step, origin, shape) >= 3, "at its own voxel size or twice that, everything is sliced"


@pytest.mark.skipif(not MANIFEST.exists(), reason="the challenge's manifest is not part of the repository")
def test_raw_and_labels_of_every_crop_of_the_challenge_coincide():
    with MANIFEST.open() as lines:
        crops = {
            tuple(
                tuple(float(v) for v in row[key].strip("[]").split(";"))
                for key in ("voxel_size", "translation", "shape")
            )
            for row in csv.DictReader(lines)
        }
    assert len(crops) > 250
    for step, origin, shape in sorted(crops):
        assert check_crop(step, origin, tuple(int(n) for n in shape)) >= 3, (step, origin, shape)
