"""Chunks whose file has 0 bytes, and chunks that were written cut at the edge of their array."""

import logging
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import GzipCodec, ZstdCodec

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.errors import ChunkError, EmptyChunkError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.retrying import RetryPolicy
from cellmap_lightning.io.statistics import statistics
from cellmap_lightning.io.store import parse_location
from tests.foreign import SEMANTIC, annotated, cube, sample, write_pair
from tests.io.faults import forbidding, serving
from tests.make import make_dataset

SHAPE, CHUNKS = (16, 16, 16), (8, 8, 8)
VALUES = np.random.default_rng(0).integers(1, 250, SHAPE)
ONCE = RetryPolicy(1, 20.0)
READERS = ["zarr", "tensorstore"]
HOW = {
    "v2 uint8, raw": (2, "uint8", {"compressors": None}),
    "v2 uint16, blosc, nested": (2, "uint16", {"chunk_key_encoding": {"name": "v2", "separator": "/"}}),
    "v2 float32, gzip": (2, "float32", {"compressors": numcodecs.GZip(1)}),
    "v3 uint8, zstd": (3, "uint8", {"compressors": ZstdCodec(level=1)}),
    "v3 uint16, raw": (3, "uint16", {"compressors": None}),
    "v3 uint8, dots": (3, "uint8", {"chunk_key_encoding": {"name": "default", "separator": "."}}),
    "v3 uint16, shards": (3, "uint16", {"shards": CHUNKS, "chunks": (4, 4, 4), "compressors": ZstdCodec(level=1)}),
    "v3 uint8, index at the start": (
        3, "uint8", {"compressors": None, "chunks": (4, 4, 4), "shards": {"shape": CHUNKS, "index_location": "start"}}
    ),
}  # fmt: skip


def write(path, how, fill=0):
    zarr_format, dtype, more = HOW[how]
    given = {"chunks": CHUNKS} | more
    array = zarr.create_array(path, shape=SHAPE, dtype=dtype, zarr_format=zarr_format, fill_value=fill, **given)
    array[...] = VALUES.astype(dtype)
    return VALUES.astype(dtype)


def level(path):
    return Level(path, "s0", (4.0, 4.0, 4.0), (2.0, 2.0, 2.0), (0, 1, 2), 3)


def empty(path, index=(1, 0, 1)):
    """Cut the file of a chunk or shard to 0 bytes."""
    file = level(path).array.file(index)
    assert level(path).array.files == CHUNKS
    with open(file, "rb+") as opened:  # noqa: PTH123
        opened.truncate(0)
    return file


def holed(values, fill):
    values = values.copy()
    values[8:, :8, 8:] = fill
    return values


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("how", HOW)
def test_an_empty_chunk_is_an_error(tmp_path, how, reader):
    values = write(tmp_path / "a", how)
    empty(tmp_path / "a")
    found = ChunkReader(level(tmp_path / "a"), "crop1/mito", reader, ONCE)
    for box in (((0, 0, 0), SHAPE), ((8, 0, 8), CHUNKS), ((9, 1, 9), (2, 2, 2))):
        with pytest.raises(
            EmptyChunkError, match=r"^crop1/mito: .* could not be read: .*it is empty: 0 bytes are stor"
        ):
            found.read(*box)
    assert (found.read((0, 0, 0), (8, 16, 16)) == values[:8]).all()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fill", [0, 7])
def test_an_empty_chunk_counts_as_missing_by_a_setting(tmp_path, how, reader, fill):
    expected = holed(write(tmp_path / "a", how, fill), fill)
    empty(tmp_path / "a")
    found = ChunkReader(level(tmp_path / "a"), "crop1/mito", reader, ONCE, empty="missing")
    for start, shape in (((0, 0, 0), SHAPE), ((8, 0, 8), CHUNKS), ((9, 1, 9), (2, 2, 2)), ((7, 7, 7), (3, 3, 3))):
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        assert (found.read(start, shape) == expected[box]).all()
    assert found.missing_chunks((0, 0, 0), SHAPE) == [(1, 0, 1)]


@pytest.mark.parametrize("how", HOW)
def test_an_empty_file_stores_nothing(tmp_path, how):
    write(tmp_path / "a", how)
    found = ChunkReader(level(tmp_path / "a"))
    assert found.absent((0, 0, 0), SHAPE) == (0, 8)
    assert len(found.stored()) == 8
    empty(tmp_path / "a")
    assert not found.has_chunk((1, 0, 1))
    assert found.is_empty((1, 0, 1))
    assert found.has_chunk((1, 0, 0))
    assert found.absent((0, 0, 0), SHAPE) == (1, 8)
    assert (1, 0, 1) not in found.stored()
    assert len(found.stored()) == 7


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("server", [serving, forbidding])
@pytest.mark.parametrize("how", ["v2 uint8, raw", "v2 uint16, blosc, nested", "v3 uint8, zstd", "v3 uint16, shards"])
def test_empty_objects_of_a_server(tmp_path, how, reader, server):
    expected = holed(write(tmp_path / "a", how), 0)
    empty(tmp_path / "a")
    with server(tmp_path) as (url, _):
        there = level(parse_location(f"{url}/a"))
        with pytest.raises(EmptyChunkError, match="it is empty: 0 bytes are stored"):
            ChunkReader(there, "crop1", reader, ONCE).read((0, 0, 0), SHAPE)
        found = ChunkReader(there, "crop1", reader, ONCE, "missing")
        voxels = found.read((0, 0, 0), SHAPE)
        assert (voxels == expected).all()
        assert found.missing_chunks((0, 0, 0), SHAPE, voxels) == [(1, 0, 1)]
        assert not found.has_chunk((1, 0, 1))
        assert found.has_chunk((0, 0, 0))


# -- raw and labels of a dataset

SPEC = {"shape": [16, 16, 16], "scale": [4.0, 4.0, 4.0]}


@pytest.fixture(params=["v2 uint8, raw", "v3 uint8, zstd"])
def root(request, tmp_path):
    import json

    for name in ("raw", "crop1/mito"):
        path = tmp_path / "volume.zarr" / name
        path.mkdir(parents=True)
        write(path / "s0", request.param)
        axes = [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
        steps = [{"type": "scale", "scale": [4.0] * 3}, {"type": "translation", "translation": [2.0] * 3}]
        image = {"axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": steps}], "version": "0.4"}
        if request.param.startswith("v2"):
            (path / ".zgroup").write_text('{"zarr_format": 2}')
            (path / ".zattrs").write_text(json.dumps({"multiscales": [image]}))
        else:
            group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": [image]}}}
            (path / "zarr.json").write_text(json.dumps(group))
    return tmp_path / "volume.zarr"


def dataset(root, **more):
    given = {"cache": "none", "read_attempts": 1, "raw_value_transforms": None, "unknown": None} | more
    return make_dataset(str(root / "raw"), f"{root}/crop1/[mito]", ["mito"], {"raw": SPEC}, {"labels": SPEC}, **given)


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("reader", READERS)
def test_empty_chunks_of_raw_follow_missing_raw(root, reader, cache, caplog):
    file = empty(root / "raw" / "s0")
    hole = holed(np.zeros(SHAPE, bool), True)
    with dataset(root, reader=reader, cache=cache) as data:
        assert "1 of the 8 chunks of raw that its patches reach are not stored" in caplog.text
        with pytest.raises(EmptyChunkError) as caught:
            data[0]
        assert "it is empty: 0 bytes are stored" in str(caught.value)
        assert "set missing_raw=warn; missing_raw=mask makes targets there unknown" in str(caught.value)
    for policy in ("warn", "mask"):
        caplog.clear()
        with caplog.at_level(logging.WARNING), dataset(root, reader=reader, missing_raw=policy, cache=cache) as data:
            sample = data[0]
        assert (sample["raw"][0].numpy() == np.where(hole, 0, VALUES)).all()
        assert (sample["labels"][0].isnan().numpy() == (hole if policy == "mask" else False)).all()
        assert f"chunk {file} is empty (0 bytes)" in caplog.text


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("missing_raw", ["error", "mask"])
def test_empty_chunks_of_labels_are_an_error(root, reader, missing_raw):
    empty(root / "crop1" / "mito" / "s0")
    with (
        dataset(root, reader=reader, missing_raw=missing_raw) as data,
        pytest.raises(EmptyChunkError, match=r"crop1/mito: .*it is empty: 0 bytes are stored") as caught,
    ):
        data[0]
    assert "missing_raw" not in str(caught.value)


def test_a_chunk_that_was_empty_and_is_written_again_is_read(root):
    whole = (root / "raw" / "s0" / ("1.0.1" if (root / "raw/s0/.zarray").exists() else "c/1/0/1")).read_bytes()
    file = empty(root / "raw" / "s0")
    with dataset(root, missing_raw="warn", cache="memory") as data:
        assert (data[0]["raw"] == 0).any()
    with open(file, "wb") as opened:  # noqa: PTH123
        opened.write(whole)
    with dataset(root, cache="memory") as data:
        assert (data[0]["raw"][0].numpy() == VALUES).all()


def test_statistics_leave_empty_chunks_out(root):
    empty(root / "raw" / "s0")
    from cellmap_lightning.io.ngff import read_multiscale

    rest = holed(VALUES, 0)
    assert statistics(read_multiscale(root / "raw"), ONCE).mean == pytest.approx(rest[rest > 0].mean())


def test_the_policy_travels_to_other_processes(tmp_path):
    import pickle

    write(tmp_path / "a", "v2 uint8, raw")
    assert pickle.loads(pickle.dumps(ChunkReader(level(tmp_path / "a"), empty="missing"))).empty == "missing"
    for missing, expected in (("error", "error"), ("warn", "missing"), ("mask", "missing"), (None, "error")):
        assert StoredImage(level(tmp_path / "a"), ChunkCache(), missing=missing).reader.empty == expected


# -- chunks that were written cut at the edge

CUT = {
    "v2, raw": (2, {"compressors": None}, lambda part: part.tobytes()),
    "v2, blosc": (2, {"compressors": numcodecs.Blosc()}, lambda part: bytes(numcodecs.Blosc().encode(part.ravel()))),
    "v2, zlib": (2, {"compressors": numcodecs.Zlib(1)}, lambda part: numcodecs.Zlib(1).encode(part.tobytes())),
    "v2, bz2": (2, {"compressors": numcodecs.BZ2(1)}, lambda part: numcodecs.BZ2(1).encode(part.tobytes())),
    "v3, raw": (3, {"compressors": None}, lambda part: part.tobytes()),
    "v3, gzip": (3, {"compressors": GzipCodec(level=1)}, lambda part: numcodecs.GZip(1).encode(part.tobytes())),
    "v3, zstd": (3, {"compressors": ZstdCodec(level=1)}, lambda part: numcodecs.Zstd(1).encode(part.tobytes())),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("how", CUT)
def test_a_chunk_cut_at_the_edge_is_a_clear_error(tmp_path, how, dtype, reader):
    zarr_format, more, encode = CUT[how]
    data = VALUES[:, :12, :13].astype(dtype)
    array = zarr.create_array(
        tmp_path / "a", shape=data.shape, chunks=CHUNKS, dtype=dtype, zarr_format=zarr_format, **more
    )
    array[...] = data
    info = level(tmp_path / "a").array
    for index in ((0, 1, 0), (1, 1, 1)):
        box = tuple(slice(8 * i, 8 * i + 8) for i in index)
        with open(info.file(index), "wb") as opened:  # noqa: PTH123
            opened.write(encode(np.ascontiguousarray(data[box])))
    found = ChunkReader(level(tmp_path / "a"), "crop1: raw", reader, ONCE)
    assert (found.read((0, 0, 0), (16, 8, 8)) == data[:, :8, :8]).all()
    for start, shape, size in (((0, 8, 0), (8, 4, 8), "8 x 4 x 8"), ((8, 8, 8), (8, 4, 5), "8 x 4 x 5")):
        with pytest.raises(ChunkError) as caught:
            found.read(start, shape)
        text = str(caught.value)
        assert f"this is the size of the part inside the array ({size} of 8 x 8 x 8 voxels)" in text
        assert "written cut at the edge; chunks of Zarr are whole there too" in text


@pytest.mark.parametrize("reader", READERS)
def test_a_chunk_of_any_other_size_is_not_reported_as_cut_at_the_edge(tmp_path, reader):
    data = VALUES[:, :12].astype("uint8")
    zarr.create_array(tmp_path / "a", data=data, chunks=CHUNKS, zarr_format=2, compressors=None)
    info = level(tmp_path / "a").array
    for index, size in (((0, 1, 0), 200), ((0, 0, 0), 256)):
        with open(info.file(index), "wb") as opened:  # noqa: PTH123
            opened.write(bytes(size))
        with pytest.raises(ChunkError) as caught:
            ChunkReader(level(tmp_path / "a"), reader=reader, retry_policy=ONCE).read(
                tuple(8 * i for i in index), (8, 4, 8)
            )
        assert "cut at the edge" not in str(caught.value)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("missing_raw", ["error", "warn", "mask"])
def test_dead_links_are_errors_for_both_readers(tmp_path, reader, missing_raw):
    """As of files whose content was not fetched."""
    raw, target = write_pair(tmp_path, cube(), attributes=annotated(SEMANTIC))
    chunk = Path(raw) / "s0" / "0" / "0" / "0"
    chunk.unlink()
    chunk.symlink_to("../annex/objects/x")
    with pytest.raises(ChunkError, match=r"it is a link to ../annex/objects/x, which is not there"):
        sample(raw, target, reader=reader, missing_raw=missing_raw, read_attempts=1)
