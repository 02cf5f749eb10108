"""Lists in metadata that are longer than any real one are refused before they are gone through."""

import json
import time

import fsspec
import pytest
import zarr

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.ngff import read_array, read_multiscale
from cellmap_lightning.io.store import MOST_CLASS_NAMES, Remote

SCALE = {"type": "scale", "scale": [4, 4, 4]}
IDENTITY = {"type": "identity"}
LEVEL = {"path": "s0", "coordinateTransformations": [SCALE]}
AXES = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.fixture(params=[2, 3])
def image(request, tmp_path):
    """An image, and a function that changes it."""
    path = tmp_path / "image"
    group = zarr.open_group(path, mode="w", zarr_format=request.param)
    group.create_array("s0", shape=(4, 4, 4), chunks=(4, 4, 4), dtype="u1")

    def edit(images):
        group.attrs.update({"ome": {"multiscales": images}} if request.param == 3 else {"multiscales": images})
        return path / ("zarr.json" if request.param == 3 else ".zattrs")

    edit([{"version": "0.4", "axes": AXES, "datasets": [LEVEL]}])
    return path, edit


LISTS = {
    "levels in 'datasets'": (lambda n: [{"version": "0.4", "axes": AXES, "datasets": [LEVEL] * n}], 256),
    "axes": (
        lambda n: [{"version": "0.4", "axes": AXES + [{"name": f"c{i}"} for i in range(n - 3)], "datasets": [LEVEL]}],
        32,
    ),
    "images in 'multiscales'": (lambda n: [{"version": "0.4", "axes": AXES, "datasets": [LEVEL]}] * n, 1000),
    "coordinateTransformations": (
        lambda n: [
            {
                "version": "0.4", "axes": AXES,
                "datasets": [{"path": "s0", "coordinateTransformations": [SCALE] + [IDENTITY] * (n - 1)}],
            }
        ],
        16,
    ),
    "coordinateTransformations of the image": (
        lambda n: [
            {"version": "0.4", "axes": AXES, "datasets": [LEVEL], "coordinateTransformations": [IDENTITY] * n}
        ],
        16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LISTS)
@pytest.mark.parametrize("more", [1, 5000])
def test_lists_of_an_image_are_bounded(image, what, more):
    (path, edit), (make, most) = image, LISTS[what]
    file = edit(make(most + more))
    began = time.process_time()
    with pytest.raises(MetadataError) as caught:
        read_multiscale(path)
    assert time.process_time() - began < 1
    text = str(caught.value)
    assert text.startswith(str(file))
    assert f"it lists {most + more} {what.removesuffix(' of the image')}; at most {most} are read" in text


@pytest.mark.parametrize("what", [what for what in LISTS if what != "axes"])
def test_lists_of_that_length_are_read(image, what):
    (path, edit), (make, most) = image, LISTS[what]
    edit(make(most))
    assert read_multiscale(path).finest.name == "s0"


V2 = {
    "zarr_format": 2, "shape": [4, 4, 4], "chunks": [4, 4, 4], "dtype": "|u1", "compressor": None, "filters": None,
    "fill_value": 0, "order": "C",
}  # fmt: skip
V3 = {
    "zarr_format": 3, "node_type": "array", "shape": [4, 4, 4], "data_type": "uint8", "fill_value": 0,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 4, 4]}},
    "chunk_key_encoding": {"name": "default"}, "codecs": [BYTES],
}  # fmt: skip


def shard(codecs, index):
    settings = {"chunk_shape": [2, 2, 2], "codecs": codecs, "index_codecs": index, "index_location": "end"}
    return {"name": "sharding_indexed", "configuration": settings}


CRC = {"name": "crc32c"}
ARRAYS = {
    "v2 filters": (lambda n: V2 | {"filters": [{"id": "crc32"}] * n}, "codecs", 16),
    "v3 codecs": (lambda n: V3 | {"codecs": [BYTES] + [CRC] * (n - 1)}, "codecs", 16),
    "codecs in a shard": (lambda n: V3 | {"codecs": [shard([BYTES] + [CRC] * (n - 1), [BYTES])]}, "codecs", 16),
    "codecs of an index": (lambda n: V3 | {"codecs": [shard([BYTES], [BYTES] + [CRC] * (n - 1))]}, "codecs", 16),
    "v2 shape": (lambda n: V2 | {"shape": [1] * n, "chunks": [1] * n}, "lengths in shape", 32),
    "v2 chunks": (lambda n: V2 | {"chunks": [1] * n}, "lengths in chunks", 32),
    "v3 shape": (lambda n: V3 | {"shape": [1] * n}, "lengths in shape", 32),
}


@pytest.mark.parametrize("what", ARRAYS)
@pytest.mark.parametrize("more", [1, 100_000])
def test_lists_of_an_array_are_bounded(tmp_path, what, more):
    make, name, most = ARRAYS[what]
    file = tmp_path / (".zarray" if what.startswith("v2") else "zarr.json")
    file.write_text(json.dumps(make(most + more)))
    began = time.process_time()
    with pytest.raises(MetadataError) as caught:
        read_array(tmp_path)
    assert time.process_time() - began < 1
    assert str(caught.value) == f"{file}: it lists {most + more} {name}; at most {most} are read"


@pytest.mark.parametrize("count", [1, MOST_CLASS_NAMES, MOST_CLASS_NAMES + 1])
def test_class_names_are_bounded(count):
    """They are read where a store cannot list what it holds."""
    names = [f"class{i}" for i in range(count)]
    content = {"cellmap": {"annotation": {"class_names": names}}}
    fsspec.filesystem("memory").pipe(f"/crop{count}/.zattrs", json.dumps(content).encode())
    place = Remote(f"memory://crop{count}")
    if count <= MOST_CLASS_NAMES:
        assert place._class_names() == sorted(names)
    else:
        with pytest.raises(MetadataError, match=r"crop10001: it lists 10001 class_names; at most 10000 are read"):
            place._class_names()
