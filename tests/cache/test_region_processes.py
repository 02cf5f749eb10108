"""Regions that several processes fill, are killed in, or fork during a fill."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.cache.mapped import EMPTY
from tests.cache.regions import (
    COUNT,
    FORK,
    opened,
    random_box,
    whole,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


# -- processes

OWN_CHUNKS = [*itertools.product((0, 64), (0, 64, 128), (0, 64, 128))][1:9]  # the first voxel of eight of the chunks


def read_boxes(region, store, data, seed, barrier, queue):
    """In another process: a chunk of its own, random boxes, then everything; puts (all right, chunks it decoded)."""
    try:
        before = store.decoded
        rng = np.random.default_rng(seed)
        barrier.wait(200)
        region.read_into(OWN_CHUNKS[seed], np.empty((1, 1, 1), np.uint8))
        barrier.wait(200)  # so that each decodes at least one, however late the machine runs it
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


def run_processes(context, target, *args):
    """Return the number of chunks that each of some processes decoded; fewer where each imports everything again."""
    number = 8 if context is FORK else 3
    barrier, queue = context.Barrier(number), context.Queue()
    processes = [context.Process(target=target, args=(*args, seed, barrier, queue)) for seed in range(number)]
    [p.start() for p in processes]
    found = [queue.get(timeout=100) for _ in processes]
    [p.join(60) for p in processes]
    assert [p.exitcode for p in processes] == [0] * number
    assert [right for right, _ in found] == [True] * number
    return [count for _, count in found]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_processes_decode_every_chunk_once(stored, method, mode):
    """However they came by the region: inherited, or sent to them."""
    path, data = stored
    region, store = opened(path, mode)
    region.read_into((0, 0, 0), np.empty((70, 1, 1), np.uint8))  # two chunks here, before the others begin
    decoded = run_processes(multiprocessing.get_context(method), read_boxes, region, store, data)
    assert store.decoded + sum(decoded) == COUNT
    assert all(n > 0 for n in decoded), "the work was shared"
    assert (whole(region) == data).all()
    assert store.decoded == 2
    store.close()


def test_eight_runs_that_begin_at_once_decode_every_chunk_once(stored):
    """Each makes the folder, the file of locks and the region, unless another one was faster."""
    path, data = stored
    assert sum(run_processes(FORK, read_anew, path, data)) == COUNT


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
    """Nothing that an unfinished process writes may be seen."""
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
def test_reads_after_a_killed_process_are_correct(stored, kill, mode, again):
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


def test_a_waiting_process_takes_over_from_a_killed_one(stored):
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
    """The child has neither the decoding thread nor its locks; the parent continues."""
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
