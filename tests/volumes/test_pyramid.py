"""Levels that are built while blocks are written, and those that are left for the end."""

from itertools import product

import numpy as np
import pytest
import zarr

from cellmap_lightning.volumes import pyramid
from cellmap_lightning.volumes.blocks import BlockGrid
from cellmap_lightning.volumes.geometry import Lattice
from cellmap_lightning.volumes.output import PredictionOutput
from cellmap_lightning.volumes.pyramid import coarser, units_left, units_within
from cellmap_lightning.volumes.values import StoredValues
from cellmap_lightning.volumes.writer import downsample_mean, downsample_mode, write_multiscale

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
CASES = [
    ((64, 64, 64), (32, 32, 32), (8, 8, 8)),
    ((61, 50, 47), (24, 16, 48), (8, 8, 8)),  # blocks of which a coarse chunk needs several
    ((61, 50, 47), (10, 25, 15), (10, 25, 15)),  # starts that cannot be halved
    ((9, 40, 33), (9, 40, 33), (8, 8, 8)),
]


def grid(shape, block):
    return BlockGrid(Lattice(ZERO, ONE, shape), (0, 0, 0), shape, block)


@pytest.mark.parametrize(("shape", "block", "unit"), CASES)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_chunk_is_made_of_one_block_alone_or_left(shape, block, unit, level):
    blocks = grid(shape, block)
    # By definition: the blocks that the fine voxels of each chunk lie in.
    count = [-(-(n >> level) // u) for n, u in zip(shape, unit, strict=True)]
    made = np.zeros(count, int)
    for number in range(len(blocks)):
        units = units_within(blocks, number, level, unit)
        start, length = blocks[number]
        if units is None:
            continue
        made[units] += 1
        for index in product(*(range(s.start, s.stop) for s in units)):
            for i, u, n, a, m in zip(index, unit, shape, start, length, strict=True):
                assert i * u << level >= a
                assert min((i + 1) * u, n >> level) << level <= a + m
    assert made.max() <= 1
    left = units_left(blocks, level, unit)
    assert set(left) == {tuple(i) for i in np.argwhere(made == 0).tolist()}
    if level == 0:
        assert left == []


@pytest.mark.parametrize("shape", [(33, 20, 21), (32, 16, 8), (2, 3, 2), (50, 2, 2)])
@pytest.mark.parametrize("mean", [downsample_mean, downsample_mode])
@pytest.mark.parametrize("voxels", [1, 1000, 1 << 18])
def test_a_few_planes_at_a_time_are_all_at_once(shape, mean, voxels, monkeypatch):
    monkeypatch.setattr(pyramid, "_VOXELS", voxels)
    data = np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    np.testing.assert_array_equal(coarser(data, mean), mean(data))


@pytest.mark.parametrize(("shape", "block", "unit"), CASES)
@pytest.mark.parametrize("dtype", ["uint8", "float32", "labels"])
@pytest.mark.parametrize("zarr_format", [2, 3])
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
            tmp_path / name, stored, scale=ONE, translation=ZERO, levels=4, chunks=unit, zarr_format=zarr_format,
            mode="mode" if dtype == "labels" else "mean",
        )  # fmt: skip
        for level in range(4):
            found, expected = (
                zarr.open_array(str(path / f"s{level}"), mode="r")[...]
                for path in (tmp_path / "p.zarr" / name, tmp_path / name)
            )
            np.testing.assert_array_equal(found, expected)
