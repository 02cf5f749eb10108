"""Stored bytes against tensorstore's reading of them; decoded chunks shared by threads, and their faults."""

import itertools
import math
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, TransposeCodec, ZstdCodec

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.errors import ChunkError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level

SHAPE, CHUNKS = (11, 13, 17), (4, 8, 6)  # ragged at every end
DTYPES = ["uint8", "uint16", "uint32", "uint64", "int16", "int64", "float32", "float64", "bool"]


def chunkwise(level, cache, label=""):
    """A region that is decoded by single chunks, however small they are."""
    image = StoredImage(level, cache, label)
    image.region.chunks = image.reader.chunks
    return image.region


def values(dtype, shape=SHAPE):
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=np.dtype(dtype).newbyteorder("="), endpoint=True)


def level(path, axes=(0, 1, 2), ndim=3):
    return Level(path, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), axes, ndim)


def by_tensorstore(path, driver):
    store = tensorstore.open({"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}}).result()
    return store.read().result()


def check(path, driver, dtype):
    """Every box of a handful, read through chunks and patches, equals tensorstore's bit for bit."""
    expected = np.ascontiguousarray(by_tensorstore(path, driver))
    assert expected.dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
    kind = np.uint8 if expected.dtype == bool else expected.dtype.newbyteorder("=")
    expected = expected.astype(kind)
    reader = ChunkReader(level(path))
    assert (reader.shape, reader.dtype) == (expected.shape, kind)
    region = chunkwise(level(path), ChunkCache())
    boxes = [((0, 0, 0), expected.shape), ((3, 7, 5), (2, 2, 2)), ((10, 12, 16), (1, 1, 1)), ((0, 5, 11), (11, 1, 6))]
    for start, shape in boxes:
        box = expected[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        read = reader.read(start, shape)
        assert read.dtype == kind
        assert read.tobytes() == box.tobytes()
        out = np.empty(shape[::-1], kind).transpose()  # any strides
        region.read_into(start, out)
        assert out.tobytes() == box.tobytes()
    return expected


COMPRESSORS = {
    "blosc": numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE),
    "gzip": numcodecs.GZip(1),
    "zlib": numcodecs.Zlib(1),
    "raw": None,
}


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize(("order", "separator"), [("C", "."), ("F", "/"), ("C", "/"), ("F", ".")])
@pytest.mark.parametrize("dtype", ["uint8", ">u2", "float32"])
def test_v2(tmp_path, compressor, order, separator, dtype):
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, order=order,
        compressors=COMPRESSORS[compressor], chunk_key_encoding={"name": "v2", "separator": separator},
    )  # fmt: skip
    array[...] = values(dtype)
    assert (check(tmp_path / "a", "zarr", dtype) == values(dtype)).all()
    # A whole chunk is read as a file.
    reader = ChunkReader(level(tmp_path / "a"))
    whole = reader.read((0, 0, 0), CHUNKS)
    assert reader._plain_chunks[1] is not None
    assert (whole == values(dtype)[: CHUNKS[0], : CHUNKS[1], : CHUNKS[2]]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, ">u2", ">i4", ">f4", ">u8", ">f8"])
def test_v2_types(tmp_path, dtype):
    array = zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=2, fill_value=0)
    array[...] = values(dtype)
    assert (check(tmp_path / "a", "zarr", dtype) == values(dtype)).all()


V3 = {
    "zstd": {"compressors": ZstdCodec(level=1)},
    "raw": {"compressors": None},
    "gzip": {"compressors": GzipCodec(level=1)},
    "blosc": {"compressors": BloscCodec(cname="zstd", clevel=1)},
    "big endian": {"serializer": BytesCodec(endian="big"), "compressors": None},
    "transposed": {"filters": TransposeCodec(order=(2, 0, 1)), "compressors": ZstdCodec(level=1)},
    "sharded": {"shards": (8, 8, 12), "compressors": ZstdCodec(level=1)},
    "sharded, transposed": {"shards": (8, 8, 12), "filters": TransposeCodec(order=(2, 1, 0)), "compressors": None},
    "keys with dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "keys of v2": {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
}


@pytest.mark.parametrize("how", V3)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_v3(tmp_path, how, dtype):
    array = zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=3, **V3[how])
    array[...] = values(dtype)
    assert (check(tmp_path / "a", "zarr3", dtype) == values(dtype)).all()
    assert ChunkReader(level(tmp_path / "a")).chunks == CHUNKS, "of a shard, the part that can be read by itself"


@pytest.mark.parametrize("dtype", DTYPES)
def test_v3_types(tmp_path, dtype):
    array = zarr.create_array(tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype=dtype, zarr_format=3)
    array[...] = values(dtype)
    assert (check(tmp_path / "a", "zarr3", dtype) == values(dtype)).all()


@pytest.mark.parametrize(
    ("zarr_format", "driver", "shards"), [(2, "zarr", None), (3, "zarr3", None), (3, "zarr3", (8, 8, 12))]
)
@pytest.mark.parametrize(
    ("dtype", "fill"), [("uint8", 7), ("uint64", 2**63 + 1), ("float32", math.nan), ("bool", True)]
)
def test_chunks_that_are_not_stored_hold_the_fill_value(tmp_path, zarr_format, driver, dtype, fill, shards):
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, shards=shards, dtype=dtype, zarr_format=zarr_format, fill_value=fill
    )
    array[4:8, 8:13, :6] = values(dtype)[4:8, 8:13, :6]
    read = check(tmp_path / "a", driver, dtype)
    filled = np.full(SHAPE, fill, dtype).astype(read.dtype)
    filled[4:8, 8:13, :6] = values(dtype)[4:8, 8:13, :6]
    assert read.tobytes() == filled.tobytes()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_of_axes_on_disk(tmp_path, order):
    data = values("uint16")
    stored = data.transpose(order)[None, :, None]  # a channel first and a time in between
    axes = tuple((1, 3, 4)[order.index(a)] for a in range(3))
    zarr.create_array(tmp_path / "a", data=stored, chunks=(1, 3, 1, 4, 5), zarr_format=3)
    reader = ChunkReader(level(tmp_path / "a", axes, 5))
    assert reader.shape == SHAPE
    assert (reader.read((0, 0, 0), SHAPE) == data).all()
    assert (reader.read((3, 7, 5), (2, 3, 4)) == data[3:5, 7:10, 5:9]).all()


@pytest.fixture
def stored(tmp_path):
    """An array of uint16 in v2 chunks."""
    array = zarr.create_array(
        tmp_path / "a", shape=SHAPE, chunks=CHUNKS, dtype="uint16", zarr_format=2, compressors=numcodecs.GZip(1)
    )
    array[...] = values("uint16")
    return tmp_path / "a"


def read_all(reader):
    return reader.read((0, 0, 0), SHAPE)


@pytest.mark.parametrize("used", [False, True])
def test_a_reader_and_a_cache_can_be_pickled(stored, used):
    region = chunkwise(level(stored), ChunkCache(10**6), "crop1/mito")
    out = np.empty(SHAPE, np.uint16)
    if used:
        region.read_into((0, 0, 0), out)
    reader = ChunkReader(level(stored), "crop1/mito")
    if used:
        read_all(reader)
    copy, cache = pickle.loads(pickle.dumps((reader, region.cache)))
    assert (read_all(copy) == values("uint16")).all()
    assert (copy.label, cache.budget, cache.nbytes, cache.decoded) == ("crop1/mito", 10**6, 0, 0)
    assert len(pickle.dumps(reader)) < 2000, "no chunk and no open file travels"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_reads_while_the_parents_threads_are_decoding(stored):
    cache = ChunkCache()
    region = chunkwise(level(stored), cache)
    out = np.empty(SHAPE, np.uint16)
    region.read_into((0, 0, 0), out)
    started, release = threading.Event(), threading.Event()

    def decode():
        started.set()
        release.wait(120)
        return np.zeros(1)

    waiting = threading.Thread(target=cache.get, args=("slow", decode))
    waiting.start()
    started.wait(120)

    def child(queue):
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda _: _read(region), range(8)))
        # What the parent was decoding is decoded here, and not waited for.
        mine = cache.get("slow", lambda: np.ones(1))
        queue.put((all((p == values("uint16")).all() for p in parts), float(mine[0]), cache.decoded))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with cache._once.lock:  # held by a thread that the child does not have
        process = context.Process(target=child, args=(queue,))
        process.start()
    process.join(120)
    alive = process.is_alive()
    if alive:
        process.kill()
    release.set()
    waiting.join()
    assert not alive
    assert queue.get() == (True, 1.0, 3 * 2 * 3 + 1)
    assert cache.decoded == 3 * 2 * 3 + 1


def _read(region):
    out = np.empty(SHAPE, np.uint16)
    region.read_into((0, 0, 0), out)
    return out


def test_eight_threads_read_what_one_reads(stored):
    rng = np.random.default_rng(1)
    boxes = []
    for _ in range(200):
        start = [int(rng.integers(0, n)) for n in SHAPE]
        boxes.append((tuple(start), tuple(int(rng.integers(1, n - a + 1)) for a, n in zip(start, SHAPE, strict=True))))

    def run(box):
        out = np.empty(box[1], np.uint16)
        region.read_into(box[0], out)
        return out

    expected = [values("uint16")[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in boxes]
    for budget in (0, 3 * 4 * 8 * 6 * 2, 10**6):  # nothing cached, almost nothing, everything
        region = chunkwise(level(stored), ChunkCache(budget))
        with ThreadPoolExecutor(8) as pool:
            for got, right in zip(pool.map(run, boxes), expected, strict=True):
                assert (got == right).all()
        assert region.cache.nbytes <= budget
    assert region.cache.decoded == 3 * 2 * 3


CORRUPT = {"truncated": lambda b: b[: len(b) // 2], "empty": lambda b: b"", "garbage": lambda b: b"\x5a" * len(b)}


@pytest.mark.parametrize("how", CORRUPT)
def test_a_corrupt_chunk_is_named(stored, how):
    chunk = stored / "1.1.2"
    whole = chunk.read_bytes()
    chunk.write_bytes(CORRUPT[how](whole))
    region = chunkwise(level(stored), ChunkCache(), "crop12/mito")
    out = np.empty((4, 5, 5), np.uint16)
    with pytest.raises(
        ChunkError, match=r"crop12/mito: .*a: voxels z\[4:8\], y\[8:13\], x\[12:17\] could not be read"
    ) as e:
        region.read_into((4, 8, 12), out)
    assert str(stored) in str(e.value)
    assert isinstance(e.value, OSError)
    assert e.value.__cause__ is not None
    region.read_into((0, 0, 0), out)  # the others are whole
    assert (out == values("uint16")[:4, :5, :5]).all()
    chunk.write_bytes(whole)
    region.read_into((4, 8, 12), out)
    assert (out == values("uint16")[4:8, 8:13, 12:17]).all()


def test_an_array_that_went_away_is_named(stored):
    reader = ChunkReader(level(stored), "crop12/mito")
    (stored / ".zarray").unlink()
    with pytest.raises(ChunkError, match=r"crop12/mito: .*could not be read"):
        read_all(reader)


def counted(calls, pause=0.01):
    def decode(start, shape):
        with lock:
            calls[start] = calls.get(start, 0) + 1
        time.sleep(pause)
        return np.full(shape, start[0], np.uint8)

    lock = threading.Lock()
    return decode


def test_a_chunk_is_decoded_once_however_many_threads_want_it():
    calls: dict = {}
    region = Region((6, 4, 4), (1, 4, 4), np.dtype(np.uint8), counted(calls), ChunkCache(), "a")
    barrier = threading.Barrier(8)

    def run(_):
        out = np.empty((6, 4, 4), np.uint8)
        barrier.wait()
        region.read_into((0, 0, 0), out)
        return out

    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(run, range(8)):
            assert (out == np.arange(6)[:, None, None]).all()
    assert calls == {(z, 0, 0): 1 for z in range(6)}
    assert region.cache.decoded == 6


def test_arrays_of_one_cache_are_separate():
    cache = ChunkCache()
    regions = [
        Region((2, 2, 2), (2, 2, 2), np.dtype(np.uint8), lambda s, n, v=v: np.full(n, v, np.uint8), cache, str(v))
        for v in range(3)
    ]
    out = np.empty((2, 2, 2), np.uint8)
    for _ in range(2):
        for v, region in enumerate(regions):
            region.read_into((0, 0, 0), out)
            assert (out == v).all()
    assert cache.decoded == 3


def test_the_least_recently_used_is_dropped_first():
    cache = ChunkCache(300)
    made = []

    def get(key, size=100):
        def decode():
            made.append(key)
            return np.zeros(size, np.uint8)

        return cache.get(key, decode)

    for key in "abc":
        get(key)
    get("a")  # now b is the oldest
    get("d")
    assert cache.nbytes == 300
    for key in "acd":
        get(key)
    assert made == list("abcd")
    get("b")
    assert made == list("abcdb")
    # One that is larger than all the room is handed out, and drops nothing.
    assert get("huge", 301).nbytes == 301
    for key in "cdb":
        get(key)
    assert made == [*"abcdb", "huge"]
    get("large", 250)
    assert cache.nbytes == 250
    cache.clear()
    assert cache.nbytes == 0
    get("large", 250)
    assert made[-1] == "large"
    assert cache.decoded == len(made)


def test_the_budget_holds_under_threads():
    cache = ChunkCache(1000)

    def work(seed):
        rng = np.random.default_rng(seed)
        for key in rng.integers(0, 40, 300).tolist():
            chunk = cache.get(key, lambda key=key: np.full(100, key, np.uint8))
            assert (chunk == key).all()
            assert cache.nbytes <= 1100  # one may just be going in

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert cache.nbytes == 1000
    assert len(cache._chunks) == 10
    assert not cache._once._coming


def test_shared_chunks_are_read_only():
    cache = ChunkCache()
    chunk = cache.get("a", lambda: np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        chunk[0] = 1


def test_a_failure_reaches_every_thread_and_is_not_cached():
    cache = ChunkCache()
    barrier = threading.Barrier(8)

    def fail():
        time.sleep(0.01)
        raise ChunkError("broken")

    def run(_):
        barrier.wait()
        with pytest.raises(ChunkError, match="broken"):
            cache.get("a", fail)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))
    assert cache.decoded == 0
    assert cache.get("a", lambda: np.ones(1)).item() == 1
    assert not cache._once._coming


def test_reading_writes_nothing(stored):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(stored.rglob("*")) if p.is_file()}
    read_all(ChunkReader(level(Path(stored))))
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(stored.rglob("*")) if p.is_file()}
