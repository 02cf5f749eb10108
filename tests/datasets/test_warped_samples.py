"""Samples with zoom, shear, elastic deformation and displaced sections, as datasets read them."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import zarr

from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from tests.geometry.warped_points import world_points
from tests.make import make_dataset

STEP = np.array([10.0, 8.0, 8.0])
COUNT = np.array([48, 60, 60])
CROP = Box((140.0, 128.0, 128.0), (340.0, 352.0, 352.0))
MIDDLE, RADIUS = np.array([240.0, 240.0, 240.0]), 70.0
SLOPES = np.array([1.0, 3.0, 7.0])
WARPS = {
    "zoom": {"zoom": {"axes": {"z": [0.8, 1.3], "x": [0.8, 1.3]}}},
    "zoom together": {"zoom": [0.8, 1.3], "rotate": {"axes": {"z": [-180, 180]}}},
    "shear": {"shear": {"axes": {"zx": [-0.3, 0.3], "yx": [-0.2, 0.2]}}},
    "elastic": {"elastic": {"spacing": 80, "magnitude": 30}},
    "slip": {"slip": {"probability": 0.3, "max_shift": 20, "thickness": 10}},
    "misalign": {"misalign": {"probability": 0.3, "max_shift": 20, "rotate": 5, "thickness": 10}},
    "everything": {
        "mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}},
        "transpose": {"axes": ["y", "x"]},
        "rotate": {"axes": {"z": [-180, 180], "x": [-20, 20]}},
        "zoom": [0.9, 1.2],
        "shear": {"axes": {"zx": [-0.1, 0.1]}},
        "elastic": {"spacing": {"z": 100, "y": 80, "x": 80}, "magnitude": {"y": 25, "x": 25}, "axes": ["y", "x"]},
        "slip": {"probability": 0.1, "max_shift": 12, "thickness": 10},
        "misalign": {"probability": 0.1, "max_shift": 12, "rotate": 3, "thickness": 10},
    },
}
FINE = {"shape": [9, 12, 14], "scale": [10, 8, 8]}
AROUND = {"shape": [5, 6, 7], "scale": [20, 16, 16]}


@pytest.fixture(scope="module")
def ball(tmp_path_factory):
    """A raw volume that is linear in nm, and a crop inside it with a ball and, as ids, its octants."""
    root = tmp_path_factory.mktemp("warped") / "v.zarr"
    grid = np.moveaxis(np.indices(COUNT), 0, -1) * STEP + STEP / 2
    write_multiscale(root / "raw", (grid @ SLOPES).astype("f4"), scale=STEP, translation=STEP / 2)
    low, high = (np.rint(np.divide(c, STEP)).astype(int) for c in (CROP.lower, CROP.upper))
    inside = grid[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    away = inside - MIDDLE
    labels = (np.linalg.norm(away, axis=-1) < RADIUS).astype("u1")
    translation = np.asarray(CROP.lower) + STEP / 2
    for name, values in (("ball", labels), ("octant", labels * (1 + (away > 0) @ [1, 2, 4]).astype("u1"))):
        write_multiscale(root / "crop" / name, values, scale=STEP, translation=translation, mode="mode")
    return root


def opened(root, config, targets=None, **options):
    inputs = {"raw": FINE, "around": AROUND}
    targets = targets or {"labels": FINE, "ids": {**FINE, "kind": "instances"}}
    return make_dataset(
        root / "raw", f"{root}/crop/[ball,octant]", ["ball", "octant"], inputs, targets, is_train=True, seed=2,
        spatial_transforms=config, normalize={"range": [0, 1]}, **{"cache": "none", **options},
    )  # fmt: skip


def samples(dataset, count=12):
    draws = dataset.draw(range(count), True, 2)
    return draws, dataset.layout.finish(dataset.read(draws))


def points(dataset, draw, spec):
    crop, place = dataset.locate(draw.position)
    center = crop.placement.center(place)
    return world_points(center, tuple(spec["shape"]), np.asarray(spec["scale"], float), draw.turn, draw.warp)


@pytest.mark.parametrize("name", WARPS)
def test_inputs_and_targets_show_one_map(ball, name):
    """Raw of two resolutions and labels, which never end in an empty corner before the volume or the crop does."""
    with opened(ball, WARPS[name]) as dataset:
        draws, batch = samples(dataset)
        for row, draw in enumerate(draws):
            for array, spec in (("raw", FINE), ("around", AROUND)):
                world = points(dataset, draw, spec)
                deep = ((world > 2 * STEP) & (world < (COUNT - 2) * STEP)).all(axis=-1)
                raw = batch[array][row, 0].numpy()
                # A thousandth of a voxel along each axis.
                np.testing.assert_allclose(raw[deep], (world @ SLOPES)[deep], atol=1e-3 * (SLOPES @ STEP))
            world = points(dataset, draw, FINE)
            inside = ((world > CROP.lower) & (world < CROP.upper)).all(axis=-1)
            border = (np.abs(world - CROP.lower) < 0.01).any(-1) | (np.abs(world - CROP.upper) < 0.01).any(-1)
            near = np.abs(world / STEP - np.rint(world / STEP)).min(axis=-1) < 1e-3  # between two voxels
            stored = (np.floor(world / STEP) + 0.5) * STEP - MIDDLE
            is_ball = np.linalg.norm(stored, axis=-1) < RADIUS
            labels, ids = batch["labels"][row].numpy(), batch["ids"][row].numpy()
            clear = inside & ~border & ~near
            np.testing.assert_array_equal(labels[0][clear], is_ball[clear])
            np.testing.assert_array_equal(ids[1][clear], (is_ball * (1 + (stored > 0) @ [1, 2, 4]))[clear])
            for values in (np.isnan(labels), ids == -1):
                np.testing.assert_array_equal(values[:, ~border], np.broadcast_to(~inside, values.shape)[:, ~border])


#: Transforms by which patches reach many voxels beyond their box.
WIDE = {
    "far zoom": {"zoom": [0.3, 0.35]},
    "far shear": {"shear": {"axes": {"zx": [-3, 3]}}},
    "far elastic": {"elastic": {"spacing": 500, "magnitude": 200}},
    "far slip": {"slip": {"probability": 0.5, "max_shift": 150, "thickness": 10}},
    "far misalign": {"misalign": {"probability": 0.5, "max_shift": 20, "rotate": 90, "thickness": 10}},
}


@pytest.mark.parametrize("name", [*WARPS, *WIDE])
def test_a_cache_holds_all_that_is_read(ball, name):
    """The cached part of raw follows from the bounds of the map: what is outside would be decoded for each sample."""
    with opened(ball, (WARPS | WIDE)[name], cache="memory") as dataset:
        ends = [sorted({0, n - 1}) for n in dataset.crop.placement.counts]
        boxes = []
        for patches in dataset.crop.raw.patches.values():
            region = patches.region
            read, (start, shape) = region.read, region.extent

            def spy(begin, size, read=read, start=start, shape=shape):
                boxes.append((begin, size))
                assert (np.asarray(begin) >= start).all()
                assert (np.add(begin, size) <= np.add(start, shape)).all()
                return read(begin, size)

            region.read = spy
        draws = dataset.draw(range(24), True, 2)
        corners = itertools.cycle(itertools.product(*ends))
        dataset.read([dataclasses.replace(d, position=dataset.crop.placement.index(next(corners))) for d in draws])
        assert boxes


def test_targets_with_a_margin_are_of_the_same_map(ball):
    """Affinities and distances are computed from a larger patch under the map, whose middle is the patch."""
    targets = {
        "ids": {**FINE, "kind": "instances"},
        "pairs": {**FINE, "kind": "affinities", "offsets": [[2, 0, 0], [0, -3, 1]]},
        "near": {**FINE, "kind": "sdt", "nm": 60},
        "labels": FINE,
    }
    with opened(ball, WARPS["everything"], targets) as dataset:
        _, batch = samples(dataset)
    ids, pairs = batch["ids"].numpy(), batch["pairs"].numpy()
    for class_number, number in itertools.product(range(2), range(2)):
        offset = targets["pairs"]["offsets"][number]
        # The neighbour of each voxel, -2 where it lies outside the patch.
        padded = np.pad(ids[:, class_number], [(0, 0), (3, 3), (3, 3), (3, 3)], constant_values=-2)
        there = padded[(slice(None), *(slice(3 + o, 3 + o + n) for o, n in zip(offset, FINE["shape"], strict=True)))]
        here, got = ids[:, class_number], pairs[:, 2 * class_number + number]
        known = (here >= 0) & (there >= 0)
        assert known.any()
        np.testing.assert_array_equal(got[known], ((here == there) & (here > 0))[known])
        assert not np.isnan(got[(here >= 0) & (there == -2)]).all()
    labels, near = batch["labels"].numpy(), batch["near"].numpy()
    known = ~np.isnan(labels) & ~np.isnan(near)
    assert known.any()
    assert ((near > 0) == (labels == 1))[known].all()


@pytest.mark.parametrize("name", ["elastic", "slip", "misalign"])
def test_targets_are_unknown_where_raw_is_not_stored(tmp_path, ball, name):
    """With ``missing_raw=mask``, exactly where raw is interpolated from a chunk that is missing."""
    shutil.copytree(ball, tmp_path / "v.zarr")
    raw = zarr.open_array(ball / "raw" / "s0", mode="r")[...]
    write_multiscale(
        tmp_path / "v.zarr" / "cut", raw, scale=STEP, translation=STEP / 2, storage=ArrayOptions(chunks=(12, 12, 12))
    )
    (tmp_path / "v.zarr" / "cut" / "s0" / "2" / "2" / "2").unlink()
    with make_dataset(
        tmp_path / "v.zarr" / "cut", f"{tmp_path}/v.zarr/crop/[ball]", ["ball"], {"raw": FINE}, {"labels": FINE},
        is_train=True, seed=2, spatial_transforms=WARPS[name], normalize={"range": [0, 1]}, cache="none",
        missing_raw="mask",
    ) as dataset:  # fmt: skip
        draws, batch = samples(dataset, 30)
        holes = 0
        for row, draw in enumerate(draws):
            world = points(dataset, draw, FINE)
            inside = ((world > np.asarray(CROP.lower) + 0.01) & (world < np.asarray(CROP.upper) - 0.01)).all(axis=-1)
            index = (world - STEP / 2) / STEP
            hole = ((index > 23) & (index < 36)).all(
                axis=-1
            )  # between voxels 24 to 35 of the chunk and their neighbours
            border = (np.abs(index - 23) < 1e-3).any(axis=-1) | (np.abs(index - 36) < 1e-3).any(axis=-1)
            unknown = np.isnan(batch["labels"][row, 0].numpy())
            np.testing.assert_array_equal(unknown[inside & ~border], hole[inside & ~border])
            holes += (hole & inside).sum()
        assert holes > 100


def test_off_the_lattice_and_on_it_show_the_same(ball):
    """Patches between the voxels of raw, which are slices of a resampled array unless they are displaced."""
    spec = {"shape": [9, 12, 14], "scale": [9, 7, 7]}
    for name in ("elastic", "slip"):
        with make_dataset(
            ball / "raw", f"{ball}/crop/[ball]", ["ball"], {"raw": spec}, {"labels": spec}, is_train=True, seed=2,
            spatial_transforms=WARPS[name], normalize={"range": [0, 1]}, cache="memory", too_coarse="upsample",
        ) as dataset:  # fmt: skip
            draws, batch = samples(dataset)
            for row, draw in enumerate(draws):
                world = points(dataset, draw, spec)
                raw = batch["raw"][row, 0].numpy()
                np.testing.assert_allclose(raw, world @ SLOPES, atol=1e-3 * (SLOPES @ STEP))


def test_samples_of_a_loader_are_those_of_the_dataset(ball):
    with opened(ball, WARPS["everything"]) as dataset:
        loader = CellMapDataLoader(dataset, 4, 0, 8)
        one, other = next(iter(loader)), dataset.layout.finish(dataset.read(dataset.draw(range(4), True, 2)))
        loader.close()
        for name in ("raw", "labels"):
            np.testing.assert_array_equal(one[name].numpy(), other[name].numpy())


def test_without_a_displacement_samples_are_as_they_were(ball):
    """Zero displacements change neither values nor the way that patches are read."""
    mirror = {"mirror": {"axes": {"x": 0.5}}}
    still = {"slip": {"probability": 0, "max_shift": 5, "thickness": 10}}
    with opened(ball, mirror) as one, opened(ball, mirror | still) as other:
        for name, values in samples(one)[1].items():
            np.testing.assert_array_equal(values.numpy(), samples(other)[1][name].numpy())
