"""Decoded voxels are what is stored, wherever they are kept, whoever fills them, and whatever happens meanwhile."""

import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.mapped import EMPTY, FILLED, SYNCED
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.errors import CacheError, ChunkError
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.retrying import RetryPolicy

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
FORK = multiprocessing.get_context("fork")
SHAPE, CHUNKS = (21, 26, 40), (8, 16, 16)
GRID = (3, 2, 3)
MODES = ["disk", "memory", "chunks", "none", "kept by chunks", "read directly", "nothing planned"]
#: The 48 ways to lay an array: an order of axes, and which of them are turned round.
TURNS = [
    (order, tta_flips)
    for order in itertools.permutations(range(3))
    for tta_flips in itertools.product((1, -1), repeat=3)
]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(dtype, shape=SHAPE, depth=0, seed=0):
    """Any bits at all."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape)) * max(depth, 1) * kind.itemsize
    found = np.random.default_rng(seed).integers(0, 256, count, np.uint8).view(kind)
    return found.reshape(*shape, *([depth] if depth else []))


class Array:
    """An array in memory that is decoded by boxes; counts how often."""

    def __init__(self, data):
        self.data, self.boxes = data, []

    def __call__(self, start, shape):
        self.boxes.append((start, shape))
        return self.data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def region_of(decode, data, key="a", chunks=CHUNKS, **kwargs):
    depth = data.shape[3] if data.ndim == 4 else 0
    given = {"depth": depth, "identity": lambda: ("test", key), "name": key}
    return Region(data.shape[:3], chunks, data.dtype, decode, ChunkCache(), key, **(given | kwargs))


def planned(mode, regions):
    """A store in one of MODES."""
    if mode == "nothing planned":
        return RegionStore("none")
    if mode in ("kept by chunks", "read directly"):
        # Nothing fits into it but a few chunks.
        store = RegionStore("disk", 20_000 if mode == "kept by chunks" else 1)
        store.plan(regions, mode == "kept by chunks", "test")
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
def test_a_box_is_what_is_stored_however_it_is_laid(mode, dtype, depth):
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
def test_rows_of_any_length_are_turned_round(width, dtype):
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
def test_only_what_is_wanted_is_kept_and_the_rest_can_be_read(mode):
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


def level(path):
    return Level(path, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 1, 2), 3)


@pytest.fixture
def stored(tmp_path):
    """A Zarr array, and its voxels."""
    data = values("uint8", (100, 130, 150))
    zarr.create_array(tmp_path / "a", data=data, chunks=(32, 64, 64), zarr_format=2, chunk_key_encoding=V2)
    return tmp_path / "a", data


V2 = {"name": "v2", "separator": "/"}
COUNT = 2 * 3 * 3  # chunks that are decoded at a time are of 64 voxels


def opened(path, mode="disk", budget=None, attempts=5):
    """A Zarr array as a new run finds it: its region, planned, and the store."""
    region = StoredImage(level(path), ChunkCache(), "crop1", retry_policy=RetryPolicy(attempts)).region
    store = RegionStore(mode, budget)
    store.plan([region], False, "test")
    return region, store


def whole(region):
    out = np.empty(region.shape, region.dtype)
    region.read_into((0, 0, 0), out)
    return out


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


def random_box(rng, size, longest=60):
    shape = tuple(int(rng.integers(1, min(n, longest) + 1)) for n in size)
    return tuple(int(rng.integers(0, n - m + 1)) for n, m in zip(size, shape, strict=True)), shape


def test_what_a_run_decoded_the_next_one_finds(stored):
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


def test_a_failure_is_not_kept(stored):
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


# -- processes


def read_boxes(region, store, data, seed, barrier, queue):
    """In another process: random boxes, then everything; says whether all were right and how many chunks it decoded."""
    try:
        before = store.decoded
        rng = np.random.default_rng(seed)
        barrier.wait(60)
        right = True
        for _ in range(20):
            start, shape = random_box(rng, data.shape)
            out = np.empty(shape, np.uint8)
            region.read_into(start, out)
            right &= bool((out == data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]).all())
        right &= bool((whole(region) == data).all())
        queue.put((right, store.decoded - before))
    except BaseException as e:
        queue.put((repr(e), 0))
        raise


def read_anew(path, data, seed, barrier, queue):
    """The same, with a region and a store of the process's own."""
    region, store = opened(path)
    read_boxes(region, store, data, seed, barrier, queue)


def run_eight(context, target, *args):
    barrier, queue = context.Barrier(8), context.Queue()
    processes = [context.Process(target=target, args=(*args, seed, barrier, queue)) for seed in range(8)]
    [p.start() for p in processes]
    found = [queue.get(timeout=100) for _ in processes]
    [p.join(60) for p in processes]
    assert [p.exitcode for p in processes] == [0] * 8
    assert [right for right, _ in found] == [True] * 8
    return [count for _, count in found]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_eight_processes_decode_every_chunk_once(stored, method, mode):
    """However they came by the region: inherited, or sent to them."""
    path, data = stored
    region, store = opened(path, mode)
    region.read_into((0, 0, 0), np.empty((70, 1, 1), np.uint8))  # two chunks here, before the others begin
    decoded = run_eight(multiprocessing.get_context(method), read_boxes, region, store, data)
    assert store.decoded + sum(decoded) == COUNT
    assert sum(n > 0 for n in decoded) > 1, "the work was shared"
    assert (whole(region) == data).all()
    assert store.decoded == 2
    store.close()


def test_eight_runs_that_begin_at_once_decode_every_chunk_once(stored):
    """Each makes the folder, the file of locks and the region, unless another one was faster."""
    path, data = stored
    assert sum(run_eight(FORK, read_anew, path, data)) == COUNT


def test_processes_that_share_memory_leave_nothing_behind(stored):
    """Killed, in the middle of it."""
    path, data = stored
    names = set(Path("/dev/shm").iterdir())
    region, store = opened(path, "memory")
    queue = FORK.SimpleQueue()

    def child():
        whole(region)
        queue.put(store.decoded)
        time.sleep(60)

    process = FORK.Process(target=child)
    process.start()
    assert queue.get() == COUNT
    process.kill()
    process.join()
    assert (whole(region) == data).all()
    assert store.decoded == 0, "what the child decoded is here"
    store.close()
    assert set(Path("/dev/shm").iterdir()) == names


# -- a process that is killed


def slow(decode, pipe, start, shape):
    """Says that it is decoding, and never ends."""
    pipe.send("decoding")
    time.sleep(100)


def wrong(decode, start, shape):
    """What a process writes that has not finished: nothing of it may be seen."""
    return np.full_like(decode(start, shape), 77)


class Dies:
    """Stamps of a mapping that kill the process which writes one: the voxels are there, the flag is not."""

    def __init__(self, stamps):
        self.stamps = stamps

    def __getitem__(self, index):
        return self.stamps[index]

    def __setitem__(self, index, value):
        os.kill(os.getpid(), signal.SIGKILL)


def killed_while_decoding(path, mode, region, store):
    mine, theirs = FORK.Pipe()

    def child():
        region.decode = partial(slow, region.decode, theirs)
        whole(region)

    process = FORK.Process(target=child)
    process.start()
    assert mine.recv() == "decoding"
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def killed_before_the_flag(path, mode, region, store):
    def child():
        region.decode = partial(wrong, region.decode)
        mapped = region.attached()
        mapped.stamps = Dies(mapped.stamps)
        whole(region)

    process = FORK.Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kill", [killed_while_decoding, killed_before_the_flag])
@pytest.mark.parametrize("mode", ["disk", "memory"])
@pytest.mark.parametrize("again", [False, True], ids=["first", "replaced"])
def test_who_comes_after_a_process_that_was_killed_reads_what_is_right(stored, kill, mode, again):
    """Also where the chunk was being replaced, because what is stored had changed."""
    path, data = stored
    region, store = opened(path, mode)
    if again:
        whole(region)
        touched = path / "0" / "0" / "0"
        os.utime(touched, ns=(1, 1))
        region.attached().ready[...] = False  # as another process that begins now
        region.attached().complete = False
    before = store.decoded
    kill(path, mode, region, store)
    assert region.attached().flags[0, 0, 0] == EMPTY
    with ThreadPoolExecutor(1) as pool:
        assert (pool.submit(whole, region).result(120) == data).all()
    assert store.decoded - before == (1 if again else COUNT)
    store.close()


def test_who_waits_for_a_process_that_is_killed_does_its_work(stored):
    path, data = stored
    region, store = opened(path)
    mine, theirs = FORK.Pipe()

    def child():
        region.decode = partial(slow, region.decode, theirs)
        whole(region)

    process = FORK.Process(target=child)
    process.start()
    assert mine.recv() == "decoding"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(whole, region)
        time.sleep(0.1)
        assert not waiting.done()
        os.kill(process.pid, signal.SIGKILL)
        assert (waiting.result(120) == data).all()
    process.join()
    store.close()


@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_a_fork_in_the_middle_of_a_fill(stored, mode):
    """The child has neither the thread that decodes nor its locks; the parent goes on."""
    path, data = stored
    region, store = opened(path, mode)
    started, release = threading.Event(), threading.Event()
    decode = region.decode

    def held(start, shape):
        started.set()
        release.wait(120)
        return decode(start, shape)

    region.decode = held
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(whole, region)
        assert started.wait(120)

        def child():
            # It waits for the parent, which holds the chunk's lock, and not for a thread that it does not have.
            region.decode = decode
            os._exit(0 if (whole(region) == data).all() else 1)

        process = FORK.Process(target=child)
        process.start()
        time.sleep(0.1)
        assert process.is_alive()
        release.set()
        assert (filling.result(120) == data).all()
    process.join(120)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0
    store.close()


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


def test_what_is_written_while_it_is_decoded_is_noticed_the_next_time(stored):
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
def test_what_the_machine_wrote_before_it_stopped(stored, flag, decoded):
    """What was in its memory may be lost; what was synced is on the disk."""
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


def store_file(region, path):
    (file,) = (path.parent / "cache").rglob("*.region")
    assert file.stem == region.digest()
    return file


# -- the budget


def three(store, ordered, sizes=(16, 32, 48)):
    regions = []
    for number, z in enumerate(sizes):
        data = values("uint8", (z, 64, 65), seed=number)
        regions.append(region_of(Array(data), data, f"array {number}", (16, 32, 65)))
    store.plan(regions, ordered, "some crops")
    return regions


@pytest.mark.parametrize("mode", ["disk", "memory"])
@pytest.mark.parametrize("ordered", [True, False])
def test_what_goes_beyond_the_budget_is_not_kept_and_is_right(mode, ordered, caplog):
    first = three(RegionStore("none"), True)
    budget = first[0].layout.nbytes + first[2].layout.nbytes
    store = RegionStore(mode, budget)
    with caplog.at_level(logging.WARNING, logger="cellmap_lightning"):
        regions = three(store, ordered)
    assert store.mapped.sum() == 2
    (record,) = caplog.records
    kept = sum(r.layout.nbytes for r, k in zip(regions, store.mapped, strict=True) if k)
    rest = sum(r.layout.nbytes for r in regions) - kept
    assert kept <= budget
    for part in ("some crops: 1 of 3 arrays", f"{rest / 1e9:.2f} GB", f"{budget / 1e9:.2f} GB", "raise cache_bytes"):
        assert part in record.getMessage()
    for _ in range(2):
        for region in regions:
            np.testing.assert_array_equal(whole(region), region.decode.data)
    for region, keeps in zip(regions, store.mapped, strict=True):
        assert region.is_cached == keeps
        assert len(region.decode.boxes) == len(set(region.decode.boxes)) or not keeps
    store.close()


def test_an_array_of_several_crops_is_kept_once():
    data = values("uint8")
    regions = [region_of(Array(data), data) for _ in range(3)]
    store = RegionStore("memory", regions[0].layout.nbytes)
    store.plan(regions, False, "test")
    assert store.mapped.all()
    for region in regions:
        np.testing.assert_array_equal(whole(region), data)
    assert store.decoded == np.prod(GRID)
    store.close()


def test_regions_of_earlier_runs_make_room(cache_dir):
    """The longest unused first, and only as much as is needed; not what is wanted now, nor what somebody uses."""
    data = values("uint8", (40, 64, 65))

    def run(keys, budget=None, close=True):
        regions = [region_of(Array(data), data, key, (16, 32, 65)) for key in keys]
        store = RegionStore("disk", budget)
        store.plan(regions, False, "test")
        for region in regions:
            np.testing.assert_array_equal(whole(region), data)
        if close:
            store.close()
        return regions, store

    one = run("a")[0][0].layout.nbytes
    names = {}
    for age, key in enumerate("abcde"):
        (region,), _ = run(key)
        names[region.digest()] = key
        (file,) = cache_dir.rglob(f"{region.digest()}.region")
        os.utime(file, (1000 + age, 1000 + age))

    def there():
        return "".join(sorted(names[file.stem] for file in cache_dir.rglob("*.region")))

    _, using = run("a", close=False)  # the longest unused until now
    assert there() == "abcde"
    (region,), store = run("f", 4 * one + 3 * 4096, close=False)
    names[region.digest()] = "f"
    assert "f" in there()
    assert "a" in there(), "in use"
    assert "b" not in there()
    assert "e" in there()
    store.close()
    using.close()
    (region,), _ = run("c" if "c" in there() else "d", one)
    assert there() == names[region.digest()], "everything else had to go"


def test_nothing_goes_while_there_is_room(cache_dir):
    data = values("uint8")
    for key in "abc":
        store = RegionStore("disk")
        region = region_of(Array(data), data, key)
        store.plan([region], False, "test")
        whole(region)
        store.close()
    assert len(list(cache_dir.rglob("*.region"))) == 3


def test_what_another_collection_is_going_to_read_does_not_go(cache_dir):
    """Two collections of one process; the first has planned, and not read yet, what an earlier run left."""
    data = values("uint8", (40, 64, 65))

    def planned_for(key, budget):
        region = region_of(Array(data), data, key, (16, 32, 65))
        store = RegionStore("disk", budget)
        store.plan([region], False, "test")
        return region, store

    region, store = planned_for("a", None)
    whole(region)
    store.close()
    one = region.layout.nbytes
    region, train = planned_for("a", 2 * one)
    (file,) = cache_dir.rglob("*.region")
    os.utime(file, (1000, 1000))
    earlier, store = planned_for("b", None)
    whole(earlier)
    store.close()
    _, val = planned_for("c", 2 * one)
    np.testing.assert_array_equal(whole(region), data)
    assert train.decoded == 0
    train.close()
    val.close()


def test_the_folder_of_another_user_stops_nobody_else(cache_dir, caplog):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    (cache_dir / f"regions-{os.getuid()}").mkdir(parents=True)
    os.chown(cache_dir / f"regions-{os.getuid()}", 12345, 12345)
    data = values("uint8")
    region = region_of(Array(data), data)
    store = RegionStore("disk")
    with caplog.at_level(logging.WARNING, logger="cellmap_lightning"):
        store.plan([region], False, "test")
    (record,) = caplog.records
    assert "belongs to another user" in record.getMessage()
    np.testing.assert_array_equal(whole(region), data)
    assert store.decoded == np.prod(GRID), "in memory"
    store.close()


def test_a_file_that_others_can_read_is_refused_with_advice(stored):
    path, _ = stored
    region, store = opened(path)
    whole(region)
    store.close()
    store_file(region, path).chmod(0o644)
    region, store = opened(path)
    with pytest.raises(CacheError, match=r"others may read or write it; remove it, or set CELLMAP_CACHE_DIR"):
        whole(region)
    store.close()
