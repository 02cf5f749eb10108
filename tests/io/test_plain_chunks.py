"""Chunks of Zarr v2 read and written as files: the same as through zarr-python, byte for byte."""

import os

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from cellmap_lightning.io.integrity import Encoded
from cellmap_lightning.io.plain_chunks import PlainChunks

BLOSC = {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 1, "blocksize": 0}
CODECS = [None, BLOSC, {"id": "zstd", "level": 3}, {"id": "gzip", "level": 5}, {"id": "lz4"}]
SHAPE, CHUNKS = (20, 17, 33), (8, 9, 16)
GRID = [(z, y, x) for z in range(3) for y in range(2) for x in range(3)]


def make(path, dtype="uint8", codec=BLOSC, order="C", fill=0, separator="/", **more):
    return zarr.create_array(
        str(path), shape=SHAPE, chunks=CHUNKS, dtype=dtype, compressors=codec, order=order, fill_value=fill,
        zarr_format=2, chunk_key_encoding={"name": "v2", "separator": separator}, **more,
    )  # fmt: skip


def values(dtype, fill=0):
    rng = np.random.default_rng(3)
    found = rng.integers(0, 2 if dtype == "bool" else 200, SHAPE).astype(dtype)
    found[:8, :9, :16] = fill  # a chunk of nothing else
    return found


def box_of(index):
    return tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, CHUNKS, SHAPE, strict=True))


def encoded(array, codec):
    nbytes = int(np.prod(CHUNKS)) * array.dtype.itemsize
    return Encoded(codec["id"] if codec else "", nbytes)


def files(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name[0] != "."
    }


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c["id"] if c else "none")
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "<f4", "bool", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_both_ways_are_those_of_zarr(tmp_path, codec, dtype, order):
    data = values(dtype)
    theirs = make(tmp_path / "theirs", dtype, codec, order)
    theirs[...] = data
    chunks = PlainChunks.of(theirs, LocalStore(tmp_path / "theirs"))
    for index in GRID[1:]:
        found = chunks.read(box_of(index), encoded(theirs, codec))
        assert found.dtype == theirs.dtype
        np.testing.assert_array_equal(found, data[box_of(index)])
        held = found if found.base is None else found.base
        while getattr(held, "base", None) is not None:
            held = held.base
        whole = found.shape == CHUNKS
        assert whole or memoryview(held).nbytes == found.nbytes, "a part holds the memory of no whole chunk"
    assert chunks.read(box_of(GRID[0]), encoded(theirs, codec)) is None  # it has no file
    ours = PlainChunks(make(tmp_path / "ours", dtype, codec, order), str(tmp_path / "ours"))
    for index in GRID:
        ours.write(index, data[box_of(index)])
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "ours"), mode="r")[...], data)
    assert files(tmp_path / "ours").keys() == files(tmp_path / "theirs").keys()
    if codec is None or codec["id"] != "gzip":  # whose header has the time
        assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_a_chunk_that_becomes_empty_loses_its_file(tmp_path):
    array = make(tmp_path / "a", fill=7, separator=".")
    chunks = PlainChunks(array, str(tmp_path / "a"))
    chunks.write((0, 0, 0), np.full(CHUNKS, 3, np.uint8))
    assert (tmp_path / "a" / "0.0.0").is_file()
    chunks.write((0, 0, 0), np.full(CHUNKS, 7, np.uint8))
    assert files(tmp_path / "a") == {}
    assert (array[...] == 7).all()


def test_arrays_that_need_zarr_python(tmp_path):
    plain = make(tmp_path / "a")
    assert PlainChunks.of(plain, LocalStore(tmp_path / "a")) is not None
    assert PlainChunks.of(plain, MemoryStore()) is None
    filtered = make(tmp_path / "b", "int32", filters=[numcodecs.Delta("<i4")])
    assert PlainChunks.of(filtered, LocalStore(tmp_path / "b")) is None
    newer = zarr.create_array(str(tmp_path / "c"), shape=SHAPE, chunks=CHUNKS, dtype="u1", zarr_format=3)
    assert PlainChunks.of(newer, LocalStore(tmp_path / "c")) is None


@pytest.mark.parametrize(
    "box", [(slice(0, 8), slice(0, 9), slice(0, 15)), (slice(1, 9), slice(0, 9), slice(0, 16)), (0, slice(0, 9), 0)]
)
def test_other_boxes_than_chunks_are_left_to_zarr(tmp_path, box):
    array = make(tmp_path / "a")
    array[...] = 1
    chunks = PlainChunks.of(array, LocalStore(tmp_path / "a"))
    assert chunks.read(box, encoded(array, BLOSC)) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "folder", "pipe"])
def test_damaged_chunks_are_left_to_zarr_python(tmp_path, damage):
    array = make(tmp_path / "a")
    array[...] = values("uint8")
    path = tmp_path / "a" / "1" / "0" / "0"
    stored = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({"cut": stored[:-9], "empty": b"", "noise": os.urandom(300)}[damage])
    chunks = PlainChunks.of(array, LocalStore(tmp_path / "a"))
    assert chunks.read(box_of((1, 0, 0)), encoded(array, BLOSC)) is None


def test_a_draft_does_not_stay_when_writing_fails(tmp_path):
    chunks = PlainChunks(make(tmp_path / "a"), str(tmp_path / "a"))
    (tmp_path / "a" / "0" / "0" / "0").mkdir(parents=True)
    with pytest.raises(OSError, match="irectory"):
        chunks.write((0, 0, 0), np.ones(CHUNKS, np.uint8))
    assert list(tmp_path.rglob("*.partial")) == []
