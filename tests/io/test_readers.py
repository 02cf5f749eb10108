"""Two libraries decode; what they read is the same, and so is what they say when they cannot."""

import itertools
import math
import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numcodecs
import numpy as np
import pytest
import zarr

pytest.importorskip("tensorstore")

from cellmap_lightning.errors import CellMapError, ChunkError, MissingExtraError
from cellmap_lightning.io.array_reader import chunk_shape
from cellmap_lightning.io.chunks import ChunkReader, check_reader
from cellmap_lightning.io.openable import READERS
from tests.io.test_chunks import CHUNKS, COMPRESSORS, CORRUPT, DTYPES, SHAPE, V3, level, values

BOXES = [((0, 0, 0), SHAPE), ((3, 7, 5), (2, 2, 2)), ((10, 12, 16), (1, 1, 1)), ((0, 5, 11), (11, 1, 6))]


def same(path, expected, label="crop12/mito", **kwargs):
    """Both readers, at once and begun before, give the bytes of zarr-python's own reading."""
    kind = np.uint8 if expected.dtype == bool else expected.dtype.newbyteorder("=")
    for name in READERS:
        reader = ChunkReader(level(path, **kwargs), label, name)
        assert (reader.shape, reader.dtype) == (expected.shape, kind)
        for start, shape in BOXES:
            box = np.ascontiguousarray(expected[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))])
            for begun in (None, reader.begin(start, shape)):
                found = reader.read(start, shape, begun)
                assert found.dtype == kind
                assert found.flags.c_contiguous
                assert found.tobytes() == box.astype(kind).tobytes(), (name, start)
    return True


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize(("order", "separator"), [("C", "."), ("F", "/"), ("C", "/"), ("F", ".")])
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "float32"])
def test_v2(tmp_path, compressor, order, separator, dtype):
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, order=order,
        compressors=COMPRESSORS[compressor], chunk_key_encoding={"name": "v2", "separator": separator},
    )  # fmt: skip
    array[...] = values(dtype)
    assert same(tmp_path / "a", values(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, ">u2", ">i4", ">f4", ">u8", ">f8"])
def test_types_of_v2(tmp_path, dtype):
    array = zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, fill_value=0)
    array[...] = values(dtype)
    assert same(tmp_path / "a", values(dtype))


@pytest.mark.parametrize("how", V3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_v3(tmp_path, how, dtype):
    array = zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=3, **V3[how])
    array[...] = values(dtype)
    assert same(tmp_path / "a", values(dtype))


@pytest.mark.parametrize(("zarr_format", "shards"), [(2, None), (3, None), (3, (8, 8, 12))])
@pytest.mark.parametrize(
    ("dtype", "fill"), [("uint8", 7), ("uint64", 2**63 + 1), ("float32", math.nan), ("bool", True)]
)
def test_chunks_that_are_not_stored(tmp_path, zarr_format, dtype, fill, shards):
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, shards=shards, dtype=dtype, zarr_format=zarr_format, fill_value=fill
    )
    array[4:8, 8:13, :6] = values(dtype)[4:8, 8:13, :6]
    expected = np.full(SHAPE, fill, dtype)
    expected[4:8, 8:13, :6] = values(dtype)[4:8, 8:13, :6]
    assert same(tmp_path / "a", expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_of_axes(tmp_path, order):
    data = values("uint16")
    zarr.create_array(tmp_path / "a", data=data.transpose(order)[None, :, None], chunks=(1, 3, 1, 4, 5), zarr_format=3)
    assert same(tmp_path / "a", data, axes=tuple((1, 3, 4)[order.index(a)] for a in range(3)), ndim=5)


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """A reader of an array of uint16 in v2 chunks."""
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype="uint16", zarr_format=2, compressors=numcodecs.GZip(1)
    )
    array[...] = values("uint16")
    return ChunkReader(level(tmp_path / "a"), "crop12/mito", request.param)


@pytest.mark.parametrize("how", CORRUPT)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_corrupt_chunk_is_named(reader, how, ahead):
    """The chunk, the array and its usual name; the rest can be read."""
    chunk = reader.level.path / "1.1.2"
    chunk.write_bytes(CORRUPT[how](chunk.read_bytes()))
    begun = reader.begin((0, 0, 0), SHAPE) if ahead else None
    with pytest.raises(
        ChunkError, match=r"crop12/mito: .*a: voxels z\[4:8\], y\[8:13\], x\[12:17\] could not be read: \w+: ."
    ) as e:
        reader.read((0, 0, 0), SHAPE, begun)
    assert str(reader.level.path) in str(e.value)
    assert isinstance(e.value, OSError)
    assert e.value.__cause__ is not None
    assert (reader.read((0, 0, 0), (11, 8, 17)) == values("uint16")[:, :8]).all()


def test_an_array_that_went_away_is_named(reader):
    assert reader.shape == SHAPE
    (reader.level.path / ".zarray").unlink()
    begun = reader.begin((0, 0, 0), SHAPE)
    with pytest.raises(ChunkError, match=r"crop12/mito: .*could not be read"):
        reader.read((0, 0, 0), SHAPE, begun)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read anything")
def test_a_chunk_that_may_not_be_read_is_named(reader):
    (reader.level.path / "0.0.0").chmod(0)
    with pytest.raises(ChunkError, match=r"voxels z\[0:4\], y\[0:8\], x\[0:6\] could not be read"):
        reader.read((0, 0, 0), SHAPE)


def test_a_reader_can_be_pickled_and_used_by_many_threads(reader):
    reader.read((0, 0, 0), SHAPE)
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.reader, copy.label) == (reader.reader, "crop12/mito")
    assert len(pickle.dumps(reader)) < 2000, "no open file travels"
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: copy.read((0, 0, 0), SHAPE), range(16)):
            assert (found == values("uint16")).all()


def test_chunks_written_later_are_read(reader):
    """Readers cache no chunks."""
    reader.read((0, 0, 0), SHAPE)
    zarr.open_array(reader.level.path, mode="r+")[:4] = 5
    assert (reader.read((0, 0, 0), (4, 13, 17)) == 5).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_tensorstore_does_not_outlive_a_fork(reader):
    """It would hang in the child. What never used it before may use it there; zarr-python may always."""
    assert (reader.read((0, 0, 0), SHAPE) == values("uint16")).all()

    def child(queue):
        found = []
        for read in (lambda: reader.read((0, 0, 0), SHAPE), lambda: reader.begin((0, 0, 0), SHAPE)):
            try:
                found.append(str(type(read())))
            except ChunkError as e:
                found.append(str(e))
        queue.put(found)

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join(120)
    alive = process.is_alive()
    process.kill()
    assert not alive
    for found in queue.get():
        if reader.reader == "tensorstore":
            assert found.startswith("crop12/mito: TensorStore was used in the process that this one was forked from")
            assert "multiprocessing_context='forkserver'" in found
            assert "reader='zarr'" in found
        else:
            assert found.startswith("<class")


def test_available_readers(monkeypatch):
    assert [check_reader(name) for name in READERS] == ["zarr", "tensorstore"]
    with pytest.raises(CellMapError, match="reader must be one of zarr, tensorstore, got 'z5'") as e:
        check_reader("z5")
    assert isinstance(e.value, KeyError)
    monkeypatch.setitem(sys.modules, "tensorstore", None)  # as where it is not installed
    with pytest.raises(MissingExtraError, match=r'pip install -e "\.\[fast\]"') as e:
        check_reader("tensorstore")
    assert isinstance(e.value, ImportError)
    assert check_reader("zarr") == "zarr"


def test_chunks_that_are_decoded_together(tmp_path):
    """Whole chunks of the larger ones, no fewer than 64 voxels along an axis, no more than there are."""
    readers = []
    for number, (shape, chunks) in enumerate([((200, 100, 50), (16, 70, 7)), ((200, 100, 50), (10, 128, 100))]):
        zarr.create_array(tmp_path / str(number), shape=shape, chunks=chunks, dtype="uint8", zarr_format=2)
        readers.append(ChunkReader(level(tmp_path / str(number))))
    assert chunk_shape(readers[:1]) == (64, 70, 50)
    assert chunk_shape(readers[1:]) == (70, 100, 50)
    assert chunk_shape(readers) == (64, 100, 50)
