"""Levels that are built while blocks are written, and those that are left for the end."""

from itertools import product

import numpy as np
import pytest
import zarr

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.downsampling import downsample_mean, downsample_mode
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.prediction import pyramid
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.output import PredictionOutput
from cellmap_lightning.prediction.pyramid import coarser, plan_pyramid, units_left, units_within
from cellmap_lightning.prediction.quantize import StoredValues

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
CASES = [
    ((64, 64, 64), (32, 32, 32), (8, 8, 8)),
    ((61, 50, 47), (24, 16, 48), (8, 8, 8)),  # a coarse chunk needs several blocks
    ((61, 50, 47), (10, 25, 15), (10, 25, 15)),  # starts that cannot be halved
    ((61, 50, 47), (15, 25, 21), (5, 5, 7)),  # and chunks of the next level that would fit in such a block
    ((9, 40, 33), (9, 40, 33), (8, 8, 8)),
]


def grid(shape, block, step=ONE, origin=ZERO):
    return BlockGrid(Lattice(origin, step, shape), (0, 0, 0), shape, block)


def raw_sizes(step, *ratios):
    """Voxel sizes of raw's levels; the first is ``step``."""
    return [tuple(s * f for s, f in zip(step, ratio, strict=True)) for ratio in ((1, 1, 1), *ratios)]


FIB, SERIAL = (8.0, 8.0, 8.0), (50.0, 9.2, 9.2)
CUBES, FLAT = ((2, 2, 2), (4, 4, 4), (8, 8, 8)), ((1, 2, 2), (1, 4, 4), (2, 8, 8))


@pytest.mark.parametrize(
    ("shape", "size", "raw", "steps"),
    [
        ((256, 256, 256), FIB, (), [(2, 2, 2)] * 3),
        ((255, 256, 256), FIB, (), [(2, 2, 2)] * 3),  # the longest counts
        ((63, 63, 63), FIB, (), []),
        ((20, 64, 64), FIB, (), [(2, 2, 2)]),
        ((30, 1024, 1024), SERIAL, (), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((3, 1024, 1024), SERIAL, (), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]),  # 3, 3, 3, 1, 1, 1
        ((1, 512, 512), FIB, (), [(1, 2, 2)] * 4),
        ((1000, 3, 3), SERIAL, (), [(1, 2, 2), (2, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)]),  # 9.2 nm cannot be halved
        ((200, 200, 200), (10.48, 8, 8), (), [(2, 2, 2)] * 2),
        ((200, 200, 200), (16, 8, 8), (), [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),  # 50, 25, 25
        ((200, 200, 200), (15, 8, 8), (), [(2, 2, 2)] * 2),
        ((256, 256, 256), FIB, raw_sizes(FIB, *CUBES), [(2, 2, 2)] * 3),
        ((256, 256, 256), FIB, raw_sizes(FIB, *FLAT), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 1), (2, 1, 1)]),
        ((256, 256, 256), FIB, raw_sizes(FIB, (3, 3, 3), (9, 9, 9)), [(3, 3, 3)]),  # 85, 28
        ((1000, 1000, 1000), FIB, raw_sizes(FIB, (3, 3, 3)), [(3, 3, 3), (2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((256, 256, 256), FIB, raw_sizes(FIB, (1, 2, 2)), [(1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2)]),
        ((256, 256, 256), FIB, raw_sizes(FIB, (2, 2, 2), (3, 3, 3), (4, 4, 4)), [(2, 2, 2)] * 3),  # 3 is no level of 2
        ((256, 256, 256), FIB, raw_sizes((4.0, 4.0, 4.0), *CUBES), [(2, 2, 2)] * 3),  # predicted at raw's second level
        ((256, 256, 256), FIB, raw_sizes((3.0, 3.0, 3.0), *CUBES), [(3, 3, 3), (2, 2, 2)]),  # of raw 24 nm alone
        ((256, 256, 256), (9.0,) * 3, raw_sizes((3.0,) * 3, (3, 3, 3), (9, 9, 9)), [(3, 3, 3), (2, 2, 2)]),
        ((256, 256, 256), (2.96, 2.96, 3.24), [(2.96, 2.96, 3.24), (11.84, 11.84, 12.96)], [(4, 4, 4), (2, 2, 2)]),
        ((2, 128, 128), FIB, raw_sizes(FIB, *CUBES), [(2, 2, 2), (1, 2, 2)]),
        ((2, 200, 200), FIB, raw_sizes(FIB, (3, 3, 3)), [(1, 3, 3), (2, 1, 1), (1, 2, 2)]),
    ],
)  # fmt: skip
def test_levels_follow_raw_and_then_become_isotropic(shape, size, raw, steps):
    planned = plan_pyramid(shape, size, None, raw)
    assert list(planned.steps) == steps
    assert planned.levels == 1 + len(steps)
    counts, factors = np.array(shape), np.ones(3, int)
    for level, step in enumerate(((1, 1, 1), *steps)):
        counts, factors = counts // step, factors * step
        assert planned.level_shape(level) == tuple(counts)
        assert planned.factors(level) == tuple(factors)
        assert level == 0 or max(counts) >= 32
        assert min(counts) >= 1


def test_serial_sections_become_isotropic():
    planned = plan_pyramid((400, 4000, 4000), SERIAL)
    sizes = [np.multiply(SERIAL, planned.factors(level)).round(4).tolist() for level in range(5)]
    assert sizes == [[50, 9.2, 9.2], [50, 18.4, 18.4], [50, 36.8, 36.8], [100, 73.6, 73.6], [200, 147.2, 147.2]]


@pytest.mark.parametrize(
    ("shape", "size", "raw", "most"),
    [
        ((64, 64, 64), FIB, (), 7),
        ((33, 41, 50), (10.48, 8.0, 8.0), (), 6),
        ((30, 1000, 1000), SERIAL, (), 10),
        ((1, 1, 1), FIB, (), 1),
        ((64, 64, 64), FIB, raw_sizes(FIB, (4, 4, 4)), 6),
        ((64, 64, 64), FIB, raw_sizes(FIB, (1, 2, 2)), 8),
    ],
)
def test_number_of_levels_can_be_set(shape, size, raw, most):
    for levels in range(1, most + 1):
        planned = plan_pyramid(shape, size, levels, raw)
        assert planned.levels == levels
        assert min(planned.level_shape(levels - 1)) >= 1
    assert max(planned.level_shape(most - 1)) == 1
    text = rf"levels must be from 1 to {most} for \[{', '.join(map(str, shape))}\] voxels of \[.*\] nm, got "
    for levels in (0, most + 1, -1):
        with pytest.raises(CellMapValueError, match=f"{text}{levels}$"):
            plan_pyramid(shape, size, levels, raw)


@pytest.mark.parametrize(("shape", "block", "unit"), CASES)
@pytest.mark.parametrize("factors", [*((1 << k,) * 3 for k in range(4)), (1, 2, 2), (3, 3, 3), (1, 4, 8), (6, 2, 1)])
def test_a_chunk_is_made_of_one_block_alone_or_left(shape, block, unit, factors):
    blocks = grid(shape, block)
    # By definition: the blocks that the fine voxels of each chunk lie in.
    count = [-(-(n // f) // u) for n, f, u in zip(shape, factors, unit, strict=True)]
    made = np.zeros(count, int)
    for number in range(len(blocks)):
        units = units_within(blocks, number, factors, unit)
        start, length = blocks[number]
        if units is None:
            continue
        made[units] += 1
        for index in product(*(range(s.start, s.stop) for s in units)):
            for i, u, n, a, m, f in zip(index, unit, shape, start, length, factors, strict=True):
                assert i * u * f >= a
                assert min((i + 1) * u, n // f) * f <= a + m
    assert made.max() <= 1
    left = units_left(blocks, factors, unit)
    assert set(left) == {tuple(i) for i in np.argwhere(made == 0).tolist()}
    if factors == (1, 1, 1):
        assert left == []


@pytest.mark.parametrize("shape", [(33, 20, 21), (32, 16, 8), (2, 3, 2), (50, 2, 2)])
@pytest.mark.parametrize("mean", [downsample_mean, downsample_mode])
@pytest.mark.parametrize("voxels", [1, 1000, 1 << 18])
@pytest.mark.parametrize("step", [(2, 2, 2), (1, 2, 2), (2, 1, 2), (2, 3, 1)])
def test_a_few_planes_at_a_time_are_all_at_once(shape, mean, voxels, step, monkeypatch):
    if shape[1] < step[1]:
        pytest.skip("no whole voxel")
    monkeypatch.setattr(pyramid, "_VOXELS", voxels)
    data = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    np.testing.assert_array_equal(coarser(data, mean, step), mean(data, step))


@pytest.mark.cover(1)  # types with formats and steps: `test_levels_by_plain_numpy`
@pytest.mark.parametrize(("shape", "block", "unit"), CASES)
@pytest.mark.parametrize(
    ("dtype", "zarr_format"),
    [
        *(("uint8", 2), ("float32", 2), ("labels", 2), ("uint8", 3)),
        *(pytest.param(dtype, 3, marks=pytest.mark.slow) for dtype in ("float32", "labels")),
    ],
)
def test_levels_are_those_of_the_whole_at_once(tmp_path, shape, block, unit, dtype, zarr_format):
    values = np.random.default_rng(1).random((2, *shape)).astype(np.float32)
    values[1, : block[0]] = 0  # blocks of nothing, which have no files
    kept = StoredValues(dtype)
    output = PredictionOutput(tmp_path / "p.zarr", ["a", "b"], grid(shape, block), kept, unit, None, zarr_format, 4)
    whole = np.empty(values.shape, kept.dtype)
    kept.store(values, whole, "it")
    output.open({"some": "settings"})
    order = np.random.default_rng(2).permutation(len(output.grid)).tolist()
    for number in order:
        start, length = output.grid[number]
        here = tuple(slice(a, a + n) for a, n in zip(start, length, strict=True))
        output.write(number, whole[:, *here], [0, 0])
    if block == (32, 32, 32):  # two chunks of the next level along each axis; class a has something in each
        early = [p for p in (tmp_path / "p.zarr" / "a" / "s1").rglob("*") if p.is_file() and p.name.isdigit()]
        assert len(early) == 64
    assert output.finish(0, 1, lambda: None)
    for name, stored in zip("ab", whole, strict=True):
        write_multiscale(
            tmp_path / name, stored, scale=ONE, translation=ZERO, levels=4,
            storage=ArrayOptions(chunks=unit, zarr_format=zarr_format),
            mode="mode" if dtype == "labels" else "mean",
        )  # fmt: skip
        for level in range(4):
            found, expected = (
                zarr.open_array(str(path / f"s{level}"), mode="r")[...]
                for path in (tmp_path / "p.zarr" / name, tmp_path / name)
            )
            np.testing.assert_array_equal(found, expected)


def windows(data, step):
    """All windows of whole voxels, ``[z, y, x, voxels of a window]``."""
    whole = data[tuple(slice(0, n // f * f) for n, f in zip(data.shape, step, strict=True))]
    z, y, x = (n // f for n, f in zip(data.shape, step, strict=True))
    parts = whole.reshape(z, step[0], y, step[1], x, step[2])
    return parts.transpose(0, 2, 4, 1, 3, 5).reshape(z, y, x, -1)


def next_level(data, step, dtype):
    """The next level by plain numpy."""
    parts = windows(data, step)
    if dtype == "labels":
        present, half = parts.astype(int).sum(-1) * 2, parts.shape[-1]
        return np.where(present == half, parts[..., 0], present > half).astype(np.uint8)
    if dtype == "uint8":
        return np.floor(parts.mean(-1) + 0.5 + 1e-9).astype(np.uint8)
    return parts.astype(np.float64).mean(-1).astype(np.float32)


ANISOTROPIC = [
    ((40, 66, 70), (16, 32, 32), (8, 16, 16), FIB, (), 4),
    ((30, 70, 64), (16, 32, 32), (8, 16, 16), SERIAL, (), 5),  # serial sections: z is halved from the third level on
    ((30, 70, 64), (16, 32, 32), (8, 16, 16), FIB, raw_sizes(FIB, *FLAT), 4),
    ((45, 70, 64), (16, 32, 32), (8, 16, 16), FIB, raw_sizes(FIB, (3, 3, 3), (6, 6, 6)), 3),
    ((45, 70, 64), (18, 36, 36), (6, 12, 12), FIB, raw_sizes(FIB, (3, 3, 3), (3, 9, 9)), 4),  # chunks of whole windows
    ((2, 70, 64), (2, 32, 32), (2, 16, 16), FIB, (), 4),  # z is 2, 1, 1, 1
]


@pytest.mark.cover(2)
@pytest.mark.parametrize(("shape", "block", "unit", "size", "raw", "levels"), ANISOTROPIC)
@pytest.mark.parametrize(("dtype", "classes"), [("uint8", "a"), ("float32", "ab"), ("labels", "ab")])
@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_levels_by_plain_numpy(tmp_path, shape, block, unit, size, raw, levels, dtype, classes, kind):
    chunks, shards = (tuple(u // 2 for u in unit), unit) if kind == "sharded" else (unit, None)
    zarr_format = 2 if kind == "v2" else 3
    values = np.random.default_rng(1).random((len(classes), *shape)).astype(np.float32)
    stored_as = StoredValues(dtype)
    origin = (5.24, -4.0, 2.5)
    output = PredictionOutput(
        tmp_path / "p.zarr", classes, grid(shape, block, size, origin), stored_as, chunks, shards, zarr_format, levels,
        raw=raw,
    )  # fmt: skip
    whole = np.empty(values.shape, stored_as.dtype)
    stored_as.store(values, whole, "it")
    output.open({"some": "settings"})
    for number in range(len(output.grid)):
        start, length = output.grid[number]
        here = tuple(slice(a, a + n) for a, n in zip(start, length, strict=True))
        output.write(number, whole[:, *here], [0] * len(classes))
    assert output.finish(0, 1, lambda: None)
    voxels = 0
    for name, expected in zip(classes, whole, strict=True):
        image = read_multiscale(tmp_path / "p.zarr" / name)
        assert [level.name for level in image.levels] == [f"s{level}" for level in range(levels)]
        factors = np.ones(3, int)
        for level, stored in enumerate(image.levels):
            if level:
                step = output.pyramid.steps[level - 1]
                expected, factors = next_level(expected, step, dtype), factors * step
            found = zarr.open_array(str(tmp_path / "p.zarr" / name / f"s{level}"), mode="r")[...]
            assert found.shape == tuple(np.array(shape) // factors)
            if dtype == "float32":
                np.testing.assert_allclose(found, expected, rtol=1e-6)
                expected = found
            else:
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_allclose(stored.scale, np.multiply(size, factors), rtol=1e-12)
            np.testing.assert_allclose(stored.translation, origin + np.multiply(size, factors - 1) / 2, atol=1e-9)
            voxels += found.size
    assert output.nbytes == voxels * stored_as.dtype.itemsize
