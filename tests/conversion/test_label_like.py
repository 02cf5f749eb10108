"""Conversion of masks and label maps for which no classes are given."""

import logging

import numpy as np
import pytest
import zarr

from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.label_like import MOST_VALUES, few_values
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.source_reader import SourceReader
from cellmap_lightning.prediction.blocks import BlockGrid
from tests.io.formats import writers

SHAPE = (16, 96, 96)


def random(values, dtype=np.uint8):
    return np.random.default_rng(0).choice(np.array(values, dtype), SHAPE)


def convert_array(folder, voxels, **values):
    path = writers.npy(folder, voxels)
    settings = {"input": str(path), "output": str(folder / "out.zarr"), "voxel_size": [40, 8, 8], "chunks": 16}
    return convert(ConversionOptions(**settings | values))


def coarse(path):
    return set(np.unique(zarr.open_array(path / "s1", mode="r")[...]).tolist())


@pytest.mark.parametrize(
    ("values", "dtype", "classes"),
    [
        ([0, 255], "uint8", "'classes={255:NAME}'"),
        ([0, 1], "uint8", "'classes={1:NAME}'"),
        ([0, 1], "int16", "'classes={1:NAME}'"),
        ([0, 1, 255], "uint8", "'classes={1:NAME,255:unknown}'"),
        ([3, 1000], "uint16", "'classes={3:NAME,1000:NAME}'"),
        (range(MOST_VALUES), "uint8", "15:NAME}'"),
    ],
)
def test_few_values_are_not_averaged(tmp_path, caplog, values, dtype, classes):
    with caplog.at_level(logging.WARNING):
        out = convert_array(tmp_path, random(values, dtype))
    assert coarse(out) <= set(values)
    (record,) = caplog.records
    assert classes in record.getMessage()
    assert "pyramid=mean" in record.getMessage()


@pytest.mark.parametrize(
    ("voxels", "options"),
    [
        (random(range(0, 255, 10)), {}),  # raw
        (random([0, 255]), {"pyramid": "mean"}),
        (random([0.0, 1.0], "float32"), {}),  # perhaps a probability
    ],
    ids=["raw", "mean", "float"],
)
def test_other_volumes_are_averaged(tmp_path, caplog, voxels, options):
    with caplog.at_level(logging.WARNING):
        out = convert_array(tmp_path, voxels, **options)
    assert not caplog.records
    assert coarse(out) - set(np.unique(voxels).tolist())


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([0, 255], {"classes": {255: "mito"}}),
        ([0, 255], {"pyramid": "mode"}),
        ([0, 255], {"pyramid": "none"}),
        ([7], {}),
    ],
)
def test_nothing_is_reported_where_nothing_was_assumed(tmp_path, caplog, values, options):
    with caplog.at_level(logging.WARNING):
        convert_array(tmp_path, random(values), **options)
    assert not caplog.records


def values_of(path):
    level = read_image(path, Overrides(voxel_size=(8, 8, 8))).finest
    grid = BlockGrid(level.lattice, (0, 0, 0), SHAPE, (8, 48, 48))
    return few_values(open_reader(level), grid)


@pytest.mark.parametrize("place", [(0, 0, 0), (3, 50, 2), (-1, -1, -1)])
def test_one_other_value_is_found_wherever_it_is(tmp_path, place):
    voxels = random(range(MOST_VALUES))
    assert values_of(writers.npy(tmp_path, voxels)) == list(range(MOST_VALUES))
    voxels[place] = 200
    assert values_of(writers.npy(tmp_path, voxels)) == []


@pytest.mark.parametrize(("voxels", "count"), [(random(range(100)), 1), (random([0, 1]), 1 + 8), (random([5]), 1 + 8)])
def test_raw_is_not_read_to_its_end(tmp_path, monkeypatch, voxels, count):
    reads, read = [], SourceReader.read
    monkeypatch.setattr(SourceReader, "read", lambda *args: reads.append(args) or read(*args))
    values_of(writers.npy(tmp_path, voxels))
    assert len(reads) == count


def test_the_decision_is_not_made_again_in_other_processes(tmp_path):
    voxels = random([0, 255])
    (tmp_path / "threads").mkdir()
    (tmp_path / "processes").mkdir()
    one = convert_array(tmp_path / "threads", voxels)
    other = convert_array(tmp_path / "processes", voxels, scheduler="processes", workers=2)
    for level in ("s0", "s1"):
        arrays = [zarr.open_array(path / level, mode="r")[...] for path in (one, other)]
        np.testing.assert_array_equal(*arrays)
    assert coarse(other) == {0, 255}
