"""Regions equal stored voxels in all cache modes, with several threads, and while sources change."""

import itertools
import json
import os
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.mapped import FILLED, SYNCED
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.errors import ChunkError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level
from tests.cache.regions import (
    COUNT,
    FORK,
    GRID,
    SHAPE,
    V2,
    Array,
    level,
    opened,
    random_box,
    region_of,
    store_file,
    values,
    whole,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
MODES = ["disk", "memory", "chunks", "none", "cached by chunks", "read directly", "nothing planned"]
#: The 48 ways to lay an array: an order of axes, and which of them are turned round.
TURNS = [
    (order, tta_flips)
    for order in itertools.permutations(range(3))
    for tta_flips in itertools.product((1, -1), repeat=3)
]


def planned(mode, regions):
    """A store in one of MODES."""
    if mode == "nothing planned":
        return RegionStore("none")
    if mode in ("cached by chunks", "read directly"):
        # Nothing fits into it but a few chunks.
        store = RegionStore("disk", 20_000 if mode == "cached by chunks" else 1)
        store.plan(regions, mode == "cached by chunks", "test")
        assert not store.mapped.any()
        assert all(region.direct == (mode == "read directly") for region in regions)
    else:
        store = RegionStore(mode)
        store.plan(regions, False, "test")
        assert store.mapped.all() == (mode in ("disk", "memory"))
    return store


def laid(shape, order, tta_flips, dtype, depth):
    """An array whose axes, seen in another order and from other ends, have a shape; and that view of it."""
    out = np.empty((*(shape[order.index(axis)] for axis in range(3)), *([depth] if depth else [])), dtype)
    view = out.transpose(*order, *range(3, out.ndim))[tuple(slice(None, None, f) for f in tta_flips)]
    assert view.shape[:3] == shape
    return out, view


BOXES = [((0, 0, 0), SHAPE), ((3, 5, 7), (9, 11, 16)), ((13, 2, 24), (8, 8, 8)), ((20, 25, 39), (1, 1, 1)),
         ((7, 15, 14), (3, 2, 4)), ((0, 9, 0), (21, 1, 40))]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "depth"),
    [("uint8", 0), ("int8", 0), ("uint16", 0), ("int16", 0), ("float16", 0), ("uint32", 0), ("float32", 0),
     ("int64", 0), ("float64", 0), ("uint8", 2), ("uint8", 4), ("uint8", 6), ("uint8", 8)],
)  # fmt: skip
def test_boxes_equal_stored_voxels_for_any_strides(mode, dtype, depth):
    """Bit for bit, in the 48 orders of the axes."""
    data = values(dtype, depth=depth)
    region = region_of(Array(data), data)
    store = planned(mode, [region])
    for start, shape in BOXES:
        expected = data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        for order, tta_flips in TURNS:
            _, view = laid(shape, order, tta_flips, dtype, depth)
            region.read_into(start, view)
            assert np.ascontiguousarray(view).tobytes() == expected.tobytes(), (start, shape, order, tta_flips)
        assert np.ascontiguousarray(region.read(start, shape)).tobytes() == expected.tobytes()
    if mode in ("disk", "memory"):
        assert store.decoded == np.prod(GRID)
        assert region.cache.decoded == 0
    store.close()


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 63, 64, 65, 128, 250, 256])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32"])
def test_rows_of_any_length_are_mirrored(width, dtype):
    data = values(dtype, (9, 3, 260))
    region = region_of(Array(data), data)
    store = planned("memory", [region])
    for first in (0, 1, 3):
        out = np.zeros((9, 3, width + 2), dtype)
        region.read_into((0, 0, first), out[:, :, 1:-1][:, :, ::-1])
        assert out[:, :, 1:-1].tobytes() == data[:, :, first : first + width][:, :, ::-1].tobytes()
        assert not out[:, :, [0, -1]].any(), "what lies beside it is not touched"
    store.close()


@pytest.mark.parametrize("mode", MODES)
def test_only_the_limited_box_is_cached_and_the_rest_is_readable(mode):
    data = values("uint16")
    region = region_of(Array(data), data)
    region.limit((3, 10, -5), (11, 30, 33))
    assert region.layout.shape == (8, 16, 33)
    store = planned(mode, [region])
    for start, shape in [((3, 10, 0), (8, 16, 33)), ((4, 17, 20), (5, 2, 13)), *BOXES]:
        _, view = laid(shape, (2, 0, 1), (1, -1, 1), "uint16", 0)
        region.read_into(start, view)
        expected = data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
        np.testing.assert_array_equal(view, expected)
    if mode in ("disk", "memory"):
        assert store.decoded == 2 * 2 * 3, "the chunks that hold some of it"
    store.close()


# -- what is decoded, and how often


@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_threads_decode_every_chunk_once(stored, mode):
    path, data = stored
    region, store = opened(path, mode)
    barrier = threading.Barrier(8)

    def read(seed):
        rng = np.random.default_rng(seed)
        barrier.wait(120)
        for _ in range(20):
            start, shape = random_box(rng, data.shape)
            out = np.empty(shape, np.uint8)
            region.read_into(start, out)
            if not (out == data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]).all():
                return False
        return bool((whole(region) == data).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert store.decoded == COUNT
    assert region.cache.decoded == 0
    store.close()


def test_a_later_run_reuses_decoded_chunks(stored):
    path, data = stored
    region, store = opened(path)
    assert (whole(region) == data).all()
    assert store.decoded == COUNT
    store.close()
    region, store = opened(path)
    assert (whole(region) == data).all()
    assert store.decoded == 0
    mapped = region.attached()
    assert (mapped.flags == SYNCED).all(), "it was closed in order"
    store.close()


def test_a_store_that_was_closed_can_be_used_again(stored):
    path, data = stored
    for mode in ("memory", "disk"):
        region, store = opened(path, mode)
        whole(region)
        store.close()
        assert store.decoded == 0
        assert (whole(region) == data).all(), "without a plan, from chunks"
        store.plan([region], False, "test")
        assert (whole(region) == data).all()
        assert store.decoded == (COUNT if mode == "memory" else 0)
        store.close()


def test_failures_are_not_cached(stored):
    path, data = stored
    chunk = path / "1" / "1" / "1"
    content, stat = chunk.read_bytes(), chunk.stat()
    chunk.write_bytes(b"not a chunk")
    for mode in ("disk", "memory"):
        region, store = opened(path, mode, attempts=1)
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(whole, region) for _ in range(4)]:
                with pytest.raises(ChunkError, match=r"crop1: .*voxels z\[32:64\], y\[64:128\], x\[64:128\]"):
                    future.result(120)
        region.read_into((64, 64, 0), np.empty((36, 66, 64), np.uint8))  # the others are whole
        chunk.write_bytes(content)
        os.utime(chunk, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (whole(region) == data).all()
        store.close()
        chunk.write_bytes(b"not a chunk")


# -- a source that changes


def overwrite(path, index, value):
    """One chunk of an array in other voxels, as another program would."""
    array = zarr.open_array(path, mode="r+")
    box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
    file = path.joinpath(*map(str, index))
    before = file.stat().st_mtime_ns if file.exists() else 0
    array[box] = value
    while file.exists() and file.stat().st_mtime_ns == before:  # the clock of the file system ticks slowly
        file.touch()


@pytest.mark.parametrize("closed", [True, False])
def test_a_chunk_that_changed_is_decoded_again_and_no_other(stored, closed):
    path, data = stored
    region, store = opened(path)
    whole(region)
    if closed:
        store.close()
    overwrite(path, (2, 1, 0), 7)
    now = data.copy()
    now[64:96, 64:128, :64] = 7
    other, again = opened(path)
    np.testing.assert_array_equal(whole(other), now)
    assert again.decoded == 1
    again.close()
    store.close()


def test_a_chunk_that_was_removed_holds_the_fill_value(stored):
    path, data = stored
    region, store = opened(path)
    whole(region)
    store.close()
    (path / "3" / "2" / "2").unlink()
    now = data.copy()
    now[96:, 128:, 128:] = 0
    region, store = opened(path)
    np.testing.assert_array_equal(whole(region), now)
    assert store.decoded == 1
    store.close()
    overwrite(path, (3, 2, 2), 9)
    now[96:, 128:, 128:] = 9
    region, store = opened(path)
    np.testing.assert_array_equal(whole(region), now)
    assert store.decoded == 1
    store.close()


def test_a_write_during_decoding_makes_the_chunk_stale(stored):
    """The stamp is taken before the voxels."""
    path, data = stored
    region, store = opened(path)
    decode = region.decode

    def meanwhile(start, shape):
        found = decode(start, shape)
        if start == (0, 0, 0):
            overwrite(path, (1, 0, 0), 3)
        return found

    region.decode = meanwhile
    whole(region)
    store.close()
    region, store = opened(path)
    now = data.copy()
    now[32:64, :64, :64] = 3
    np.testing.assert_array_equal(whole(region), now)
    assert store.decoded == 1
    store.close()


def test_metadata_that_changed_is_another_array(stored):
    """Here the value of what is not stored."""
    path, data = stored
    (path / "0" / "0" / "0").unlink()
    now = data.copy()
    for fill in (0, 5):
        file = path / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fill_value": fill}))
        now[:32, :64, :64] = fill
        region, store = opened(path)
        np.testing.assert_array_equal(whole(region), now)
        assert store.decoded == COUNT
        store.close()


def test_arrays_that_differ_have_keys_that_differ(stored, tmp_path):
    """And those that do not, do not: in another process, through a link, after pickling."""
    path, data = stored
    first = StoredImage(level(path), ChunkCache(), "crop1").region
    digests = {first.digest()}
    zarr.create_array(tmp_path / "b", data=data, chunks=(32, 64, 64), zarr_format=2, chunk_key_encoding=V2)
    digests.add(StoredImage(level(tmp_path / "b"), ChunkCache()).region.digest())
    swapped = Level(path, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 2, 1), 3)
    digests.add(StoredImage(swapped, ChunkCache()).region.digest())
    limited = StoredImage(level(path), ChunkCache()).region
    limited.limit((1, 0, 0), (50, 50, 50))
    digests.add(limited.digest())
    limited.limit((1, 0, 0), (50, 50, 51))
    digests.add(limited.digest())
    assert len(digests) == 5
    (tmp_path / "link").symlink_to(path)
    assert StoredImage(level(tmp_path / "link"), ChunkCache(), "another name").region.digest() == first.digest()
    assert pickle.loads(pickle.dumps(first)).digest() == first.digest()
    queue = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: queue.put(StoredImage(level(path), ChunkCache()).region.digest()))
    process.start()
    assert queue.get() == first.digest()
    process.join()


@pytest.mark.parametrize("layout", ["v2 .", "v2 /", "v3 /", "v3 .", "v3 as v2", "sharded"])
def test_every_way_to_name_chunks_is_watched(tmp_path, layout):
    """The stamp of a box changes with the file that holds some of it, and with no other."""
    how = {
        "v2 .": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "."}},
        "v2 /": {"zarr_format": 2, "chunk_key_encoding": V2},
        "v3 /": {"zarr_format": 3},
        "v3 .": {"zarr_format": 3, "chunk_key_encoding": {"name": "default", "separator": "."}},
        "v3 as v2": {"zarr_format": 3, "chunk_key_encoding": V2},
        "sharded": {"zarr_format": 3, "shards": (16, 16, 16)},
    }[layout]
    data = values("uint8", (40, 40, 40))
    zarr.create_array(tmp_path / "a", data=data, chunks=(8, 8, 8), **how)
    files = sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name[0] not in ".z")
    size = 16 if layout == "sharded" else 8
    assert len(files) == (-(-40 // size)) ** 3
    boxes = [((0, 0, 0), (40, 40, 40)), ((0, 0, 0), (8, 8, 8)), ((15, 20, 39), (2, 1, 1)), ((30, 33, 16), (10, 7, 8))]
    reader = ChunkReader(level(tmp_path / "a"))
    assert len({0, *(reader.stamp(*box) for box in boxes)}) == 1 + len(boxes)
    for file in files:
        before = [reader.stamp(*box) for box in boxes]
        index = [int(n) for n in re.findall(r"\d+", str(file.relative_to(tmp_path / "a")))]
        os.utime(file, ns=(1, 1))
        for (start, shape), stamp in zip(boxes, before, strict=True):
            touched = all(i * size < a + n and (i + 1) * size > a for i, a, n in zip(index, start, shape, strict=True))
            assert (reader.stamp(start, shape) != stamp) == touched, (file, start)


@pytest.mark.parametrize(("flag", "decoded"), [(FILLED, COUNT), (SYNCED, 0)])
def test_only_synced_chunks_are_valid_after_a_restart(stored, flag, decoded):
    """Voxels in its memory may be lost; synced ones are on the disk."""
    path, data = stored
    region, store = opened(path)
    whole(region)
    store.close()
    file = store_file(region, path)
    content = bytearray(file.read_bytes())
    head = content[:4096].rstrip(b"\0")
    assert b'"boot": "' in head
    at = head.index(b'"boot": "') + 9
    content[at : at + 4] = b"dead"
    first = region.layout.parts.flags
    content[first : first + COUNT] = bytes([flag] * COUNT)
    if flag == FILLED:
        content[region.layout.parts.voxels :] = bytes(len(content) - region.layout.parts.voxels)
    file.write_bytes(content)
    region, store = opened(path)
    assert (whole(region) == data).all()
    assert store.decoded == decoded
    store.close()
