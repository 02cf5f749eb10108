"""Folders that hold metadata of both versions of Zarr: a stray group of v3 hides nothing of v2."""

import json

import numpy as np
import pytest
import zarr

from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import read_array, read_attributes, read_multiscale

DATA = np.arange(1, 513, dtype=np.uint16).reshape(8, 8, 8)
OTHER = DATA + 1000
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
STRAY = {
    "empty": GROUP,
    "without attributes": {"zarr_format": 3, "node_type": "group"},
    "consolidated": GROUP | {"consolidated_metadata": {"kind": "inline", "metadata": {}, "must_understand": False}},
    "other attributes": GROUP | {"attributes": {"written_by": "another program"}},
}
READERS = ["zarr", "tensorstore"]


@pytest.fixture
def image(write):
    """An image of Zarr v2, whose level has attributes."""
    path = write({"s0": (DATA, (4, 4, 4), (0, 0, 0))}, name="image", chunks=(4, 4, 4))
    (path / "s0" / ".zattrs").write_text(json.dumps({"cellmap": {"annotation": {"class_name": "mito"}}}))
    return path


def put(path, content):
    (path / "zarr.json").write_text(json.dumps(content))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("where", ["group", "array", "both"])
def test_an_image_of_v2_is_read_beside_it(image, stray, where, reader):
    if where in ("group", "both"):
        put(image, STRAY[stray])
    if where in ("array", "both"):
        put(image / "s0", STRAY[stray])
    assert read_attributes(image)[1] == 2
    attributes, zarr_format = read_attributes(image / "s0")
    assert (zarr_format, attributes["cellmap"]["annotation"]["class_name"]) == (2, "mito")
    level = read_multiscale(image).finest
    assert level.array.zarr_format == 2
    assert (ChunkReader(level, "raw", reader).read((0, 0, 0), (8, 8, 8)) == DATA).all()
    spec = {"raw": {"shape": [8, 8, 8], "scale": [4, 4, 4]}}
    with CellMapDataset(
        str(image),
        input_arrays=spec,
        read=ReadOptions(cache="none"),
        intensity=IntensityOptions(raw_value_transforms=None),
    ) as data:
        assert (data[0]["raw"][0].numpy() == DATA).all()


@pytest.mark.parametrize("reader", READERS)
def test_zarr_v3_is_preferred_where_both_versions_are_complete(image, write, reader):
    newer = write({"s0": (OTHER, (4, 4, 4), (0, 0, 0))}, name="newer", version="0.5", chunks=(4, 4, 4))
    for part in ("zarr.json", "s0/zarr.json"):
        (image / part).write_bytes((newer / part).read_bytes())
    (newer / "s0" / "c").rename(image / "s0" / "c")
    level = read_multiscale(image).finest
    assert level.array.zarr_format == 3
    assert (ChunkReader(level, "raw", reader).read((0, 0, 0), (8, 8, 8)) == OTHER).all()


@pytest.mark.parametrize("attributes", [{}, {"a": 1}])
def test_a_group_of_v3_alone_stays_one(tmp_path, attributes):
    put(tmp_path, GROUP | {"attributes": attributes})
    assert read_attributes(tmp_path) == (attributes, 3)
    assert read_array(tmp_path) is None
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    assert read_attributes(tmp_path) == (attributes, 3)
    with pytest.raises(MetadataError, match=r"no 'multiscales' in zarr\.json"):
        read_multiscale(tmp_path)


def test_an_array_of_v3_is_not_hidden_by_attributes_of_v2(tmp_path):
    zarr.create_array(tmp_path / "a", data=DATA, chunks=(4, 4, 4), zarr_format=3, attributes={"a": 3})
    (tmp_path / "a" / ".zattrs").write_text('{"a": 2}')
    assert read_attributes(tmp_path / "a") == ({"a": 3}, 3)
    assert read_array(tmp_path / "a").zarr_format == 3
