"""Stores that are closed during reads: correct voxels or a specific error, and no leaks."""

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.locks import CLOSED, Locks
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.cache.shared_memory import SharedBlock
from cellmap_lightning.errors import CacheError

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share memory so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
FORK = multiprocessing.get_context("fork")
SHAPE, CHUNKS = (16, 20, 24), (4, 10, 12)
DATA = np.random.default_rng(2).integers(1, 256, SHAPE, np.uint8)
COUNT = 16


def decode(start, shape):
    return DATA[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def opened(mode, decode=decode):
    region = Region(
        SHAPE, CHUNKS, DATA.dtype, decode, ChunkCache(), "a", identity=lambda: ("closing",), name="the array"
    )
    store = RegionStore(mode)
    store.plan([region], False, "test")
    return region, store


def outcome(region):
    """The results of a reader: right voxels, wrong ones, or the error."""
    found = np.empty(SHAPE, np.uint8)
    try:
        region.read_into((0, 0, 0), found)
    except CacheError as e:
        return str(e)
    except BaseException as e:
        return repr(e)
    return "right" if (found == DATA).all() else "wrong"


def descriptors():
    """The files that this process has open, by their numbers."""
    found = {}
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(file.name)] = str(file.readlink())
    return found


def of_blocks():
    return sum("memfd:cellmap" in name for name in descriptors().values())


class Others:
    """Files of another part of the program, which take the numbers of descriptors that were closed."""

    def __init__(self, folder):
        self.path = folder / "another file"
        self.path.write_bytes(b"untouched")
        self.files = []

    def take(self, count=40):
        self.files += [self.path.open("r+b") for _ in range(count)]

    def untouched(self):
        """Check in another process that nothing was written to them, and nothing locks them."""
        right = FORK.SimpleQueue()

        def child():
            with self.path.open("r+b") as file:
                try:
                    fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    right.put(True)
                except OSError:
                    right.put(False)

        process = FORK.Process(target=child)
        process.start()
        process.join(60)
        return right.get() and self.path.read_bytes() == b"untouched"

    def close(self):
        for file in self.files:
            file.close()


@pytest.fixture
def others(tmp_path):
    found = Others(tmp_path)
    yield found
    found.close()


# -- at every step of a fill


@pytest.mark.parametrize("step", ["before the lock", "after the lock", "while decoding", "before unlocking"])
@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_closed_at_any_step_of_a_fill(mode, step, others, monkeypatch):
    """The descriptor of the locks stays open while a thread uses it: its number is not given to another file."""
    before, numbers, lockf = of_blocks(), [], fcntl.lockf

    def close():
        monkeypatch.setattr(fcntl, "lockf", lockf)
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(60)
        others.take()

    def watched(fd, command, *args):
        numbers.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        wanted = fcntl.LOCK_UN if step == "before unlocking" else fcntl.LOCK_EX | fcntl.LOCK_NB
        if command != wanted or step == "while decoding" or (mode == "disk" and len(numbers) < 6):
            return lockf(fd, command, *args)
        if step == "after the lock":
            lockf(fd, command, *args)
            return close()
        close()
        numbers.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        return lockf(fd, command, *args)

    def decoding(start, shape):
        if step == "while decoding" and not others.files:
            close()
        return decode(start, shape)

    region, store = opened(mode, decoding)
    monkeypatch.setattr(fcntl, "lockf", watched)
    found = outcome(region)
    assert others.files, "it was closed"
    assert found in ("right", CLOSED)
    assert (found == "right") == (mode == "disk"), "the locks of a folder are never closed"
    assert others.untouched()
    region = store = None
    assert all("cellmap" in name or "locks" in name for name in numbers)
    assert of_blocks() == before


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("seed", range(4))
def test_closed_while_many_threads_read(mode, seed, others):
    rng = np.random.default_rng(seed)
    before, pause = of_blocks(), rng.random() * 0.02

    def slowly(start, shape):
        time.sleep(0.001)
        return decode(start, shape)

    region, store = opened(mode, slowly)
    barrier = threading.Barrier(7)

    def read():
        barrier.wait(60)
        return [outcome(region) for _ in range(3)]

    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read) for _ in range(6)]
        barrier.wait(60)
        time.sleep(pause)
        store.close()
        others.take()
        found = {result for future in reading for result in future.result(60)}
    assert found <= {"right", CLOSED}
    assert outcome(region) == "right", "without a place"
    store.close()
    store.close()
    assert others.untouched()
    region = store = None
    assert of_blocks() == before


# -- while a thread waits for a lock


def holding(locks, number, pipe):
    with locks.hold(number):
        pipe.send("held")
        pipe.recv()


def closes(locks, waiting):
    """Close locks that a thread waits for; returns what it raised."""
    time.sleep(0.05)
    assert not waiting.done()
    locks.close()
    return waiting.exception(20)


def hold(locks, number=5):
    with locks.hold(number):
        return "held"


@pytest.mark.parametrize("holder", ["process", "thread"])
def test_closed_while_a_thread_waits_for_a_lock(holder):
    block = SharedBlock(1)
    locks = Locks(block.path, block.inode)
    mine, theirs = FORK.Pipe()
    runner = FORK.Process if holder == "process" else threading.Thread
    other = runner(target=holding, args=(locks, 5, theirs))
    other.start()
    assert mine.recv() == "held"
    with ThreadPoolExecutor(1) as pool:
        error = closes(locks, pool.submit(hold, locks))
    assert isinstance(error, CacheError)
    assert str(error) == CLOSED
    mine.send("go on")
    other.join(60)
    assert not getattr(other, "exitcode", 0), "the holder went on undisturbed"
    with pytest.raises(CacheError, match=CLOSED):
        hold(locks)
    locks.close()
    block.close()


def test_threads_of_one_process_exclude_each_other(tmp_path):
    """The system does not do that for them."""
    locks, inside, most = Locks(str(tmp_path / "locks")), [], []

    def enter(number):
        for _ in range(20):
            with locks.hold(number % 2):
                inside.append(number)
                most.append(len([n for n in inside if n % 2 == number % 2]))
                time.sleep(0.0002)
                inside.remove(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(6)))
    assert max(most) == 1
    assert locks._users == 0
    assert not locks._held


def test_collections_of_one_process_decode_a_chunk_once():
    """Such as those of training and validation, which share a raw volume."""
    calls, barrier = [], threading.Barrier(2)

    def slowly(start, shape):
        calls.append(start)
        time.sleep(0.002)
        return decode(start, shape)

    stores = [opened("disk", slowly) for _ in range(2)]

    def read(region):
        barrier.wait(60)
        return outcome(region)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read, [region for region, _ in stores])) == ["right", "right"]
    assert len(calls) == COUNT == len(set(calls))
    for _, store in stores:
        store.close()


# -- after a fork, and in other processes


def in_a_child(work):
    """Return the result of a forked child."""
    queue = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: queue.put(work()))
    process.start()
    found = queue.get()
    process.join(60)
    assert process.exitcode == 0
    return found


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("filled", [True, False], ids=["filled", "empty"])
def test_a_child_that_closes_leaves_its_parent_alone(mode, filled):
    region, store = opened(mode)
    if filled:
        assert outcome(region) == "right"

    def child():
        store.close()
        store.close()
        return outcome(region)

    assert in_a_child(child) == "right"
    assert outcome(region) == "right"
    assert store.decoded == COUNT
    store.close()


@pytest.mark.parametrize("reuse", [False, True], ids=["closed", "number reused"])
@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_child_whose_parent_has_closed(mode, reuse, others):
    """The child finds the locks by the number of the parent's descriptor, which may be another file's now."""
    region, store = opened(mode)
    region.read_into((0, 0, 0), np.empty((4, 10, 12), np.uint8))
    mine, theirs = FORK.Pipe()

    def child():
        theirs.recv()
        theirs.send(outcome(region))

    process = FORK.Process(target=child)
    process.start()
    store.close()
    if reuse:
        others.take()
    mine.send("read")
    assert mine.poll(60)
    assert mine.recv() == (CLOSED if mode == "memory" else "right")
    process.join(60)
    assert others.untouched()


@pytest.mark.parametrize("reuse", [False, True], ids=["closed", "number reused"])
def test_memory_that_arrives_after_it_was_closed(reuse, others):
    block = SharedBlock(10000)
    sent = pickle.dumps(block)
    assert len(pickle.loads(sent).buffer) == 10000
    block.close()
    if reuse:
        others.take()
    with pytest.raises(CacheError, match=CLOSED):
        pickle.loads(sent)
    assert others.untouched()


@pytest.mark.parametrize("what", ["folder", "file", "locks"])
def test_a_cache_that_was_removed_before_a_child_reads(what, cache_dir):
    region, store = opened("disk")
    region.read_into((0, 0, 0), np.empty((4, 10, 12), np.uint8))
    (file,) = cache_dir.rglob("*.region")
    if what == "folder":
        shutil.rmtree(cache_dir)
    else:
        (file if what == "file" else file.with_name("locks")).unlink()

    def child():
        return outcome(region), store.close(), outcome(region)

    assert in_a_child(child) == ("right", None, "right")
    assert child() == ("right", None, "right")


@pytest.mark.parametrize("inside", ["hold", "unused", "_descriptor"])
def test_a_child_that_leaves_what_its_parent_had_begun(inside, tmp_path):
    """Forked while locks are in use: the child counts only what it uses itself."""
    locks, before = Locks(str(tmp_path / "locks")), len(descriptors())
    status = 1
    try:
        with getattr(locks, inside)(*[5][: inside != "_descriptor"]):
            pid = os.fork()
    finally:
        if pid == 0:
            with contextlib.suppress(BaseException):
                with locks.hold(5 if inside == "unused" else 6):
                    assert locks._users == 1
                    locks.close()
                    own = locks._opened
                    os.fstat(own[1])
                assert (locks._users, locks._opened) == (0, None)
                with contextlib.suppress(OSError):
                    os.fstat(own[1])
                    os._exit(2)
                status = 0
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert locks._users == 0
    locks.close()
    assert len(descriptors()) == before


# -- a mapping does not outlive its store


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_region_keeps_no_mapping_of_a_store_that_was_closed(mode):
    """Closed just after another thread has attached the region, and planned again."""
    region, store = opened(mode)
    attach = store.attach

    def interrupted(region):
        mapped = attach(region)
        store.attach = attach
        store.close()
        return mapped

    store.attach = interrupted
    assert outcome(region) in ("right", CLOSED)
    assert region.mapped is None
    store.plan([region], False, "test")
    assert outcome(region) == "right"
    assert store.decoded == (COUNT if mode == "memory" else 0)
    store.close()


def test_the_digest_of_a_region_whose_store_is_closed_meanwhile():
    region, store = opened("memory")
    whole = region.digest()

    class Interrupted(Region):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_digest" and value is not None:
                store.close()

    region._digest = None
    region.__class__ = Interrupted
    assert region.digest() == whole
    assert region._digest is None


def test_many_locks_are_closed_when_they_are_forgotten(tmp_path):
    before = len(descriptors())
    for number in range(5):
        locks = Locks(str(tmp_path / f"locks{number}"))
        assert hold(locks) == "held"
        if number % 2:
            locks.close()
            locks.close()
    del locks
    assert len(descriptors()) == before
    with tempfile.TemporaryFile() as file:
        assert file.fileno() not in (number for number, name in descriptors().items() if "locks" in name)
