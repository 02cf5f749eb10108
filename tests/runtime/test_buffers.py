"""The memory pool: blocks are reused once no view of them is left, and never before."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cellmap_lightning.runtime.buffers import BUFFERS, MOST_IDLE, SMALL, Buffers

SHAPE = (3, SMALL)


def address(array):
    return array.__array_interface__["data"][0]


def idle_blocks(buffers):
    """Return the number of blocks that can be reused."""
    return sum(map(len, buffers._idle.values()))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3), "uint8"), (SHAPE, "uint8"), ((1, 4, 300, 300), "float32"), ((0, 5), "int64")]
)
def test_arrays_are_contiguous_and_writable(shape, dtype):
    array = Buffers().empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[...] = 1
    assert (array == 1).all()


@pytest.mark.parametrize(
    ("view_of", "array_of"),
    [
        (lambda a: a, np.asarray),
        (lambda a: a[1:, 5:], np.asarray),
        (lambda a: a.reshape(-1)[::-7], np.asarray),
        (lambda a: a.view(np.float32), lambda view: view.view(np.uint8)),
        (memoryview, np.asarray),
        (lambda a: iter(a[1]), lambda view: np.asarray(list(view))),
        (torch.from_numpy, np.asarray),
        (lambda a: torch.from_numpy(a)[1:, 5:], np.asarray),
        (lambda a: torch.from_numpy(a).view(torch.int32), lambda view: view.view(torch.uint8)),
        (lambda a: torch.from_numpy(a).numpy(), np.asarray),
        (lambda a: torch.from_numpy(a)[2].numpy()[3:], np.asarray),
        (lambda a: torch.from_numpy(a).untyped_storage(), lambda view: torch.empty(0, dtype=torch.uint8).set_(view)),
        (lambda a: {"raw": [torch.from_numpy(a).detach()]}, lambda view: view["raw"][0]),
    ],
)
def test_memory_is_reused_only_when_no_view_is_left(view_of, array_of):
    buffers = Buffers()
    array = buffers.empty(SHAPE, np.uint8)
    array[...] = 7
    first = address(array)
    view = view_of(array)
    del array
    others = [buffers.empty(SHAPE, np.uint8) for _ in range(MOST_IDLE + 1)]
    for other in others:
        assert address(other) != first
        other[...] = 9
    assert (np.asarray(array_of(view)) == 7).all()
    del view
    assert idle_blocks(buffers) == 1
    assert address(buffers.empty(SHAPE, np.uint8)) == first


def test_only_blocks_of_the_same_size_are_reused():
    buffers = Buffers()
    first = buffers.empty(SHAPE, np.uint8)
    place = address(first)
    del first
    assert address(buffers.empty((3, SMALL - 1), np.uint8)) != place
    assert address(buffers.empty((3 * SMALL // 4,), np.float32)) == place  # as many bytes of another type


def test_idle_blocks_are_bounded():
    buffers = Buffers()
    arrays = [buffers.empty(SHAPE, np.uint8) for _ in range(MOST_IDLE + 5)]
    assert len({address(a) for a in arrays}) == len(arrays)
    del arrays
    assert idle_blocks(buffers) == MOST_IDLE
    buffers.clear()
    assert idle_blocks(buffers) == 0
    small = buffers.empty((5,), np.uint8)
    del small
    assert idle_blocks(buffers) == 0, "small blocks are not pooled"


def test_copies_do_not_share_memory_with_the_block():
    """Such as those that a queue or a checkpoint pickles."""
    buffers = Buffers()
    array = buffers.empty(SHAPE, np.uint8)
    array[...] = 5
    copies = [pickle.loads(pickle.dumps(array)), torch.from_numpy(array).clone(), array.copy()]
    del array
    buffers.empty(SHAPE, np.uint8)[...] = 6
    assert all((np.asarray(c) == 5).all() for c in copies)


def test_threads_never_get_the_same_block():
    buffers = Buffers()

    def fill(number):
        for turn in range(40):
            array = buffers.empty(SHAPE, np.uint8)
            array[...] = number
            tensor = torch.from_numpy(array)
            del array
            if turn % 3 == 0:
                time.sleep(0.0005)
            assert (tensor == number).all()
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(fill, range(6)))
    assert idle_blocks(buffers) <= MOST_IDLE


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")


def run_forked(work, seconds=20):
    """Return the exit status of a forked child that runs a function; None if it hangs."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_reuse_blocks_of_its_parent():
    BUFFERS.clear()
    mine, spare = BUFFERS.empty(SHAPE, np.uint8), BUFFERS.empty(SHAPE, np.uint8)
    mine[...], spare[...] = 1, 2
    del spare

    def child():
        nonlocal mine
        assert (mine == 1).all()
        other = BUFFERS.empty(SHAPE, np.uint8)
        other[...] = 3
        mine[...] = 4
        before = idle_blocks(BUFFERS)
        del mine  # of the parent: writing to its pages would copy them
        assert idle_blocks(BUFFERS) == before
        place = address(other)
        del other
        assert address(BUFFERS.empty(SHAPE, np.uint8)) == place
        os._exit(0)

    assert run_forked(child) == 0
    assert (mine == 1).all()
    assert (BUFFERS.empty(SHAPE, np.uint8) == 2).all()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_takes_a_block():
    """The child must not wait for a lock that a thread of the parent holds."""
    held, release = threading.Event(), threading.Event()

    def hold():
        lock = getattr(BUFFERS, "_lock", None)
        with lock if lock is not None else threading.Lock():
            held.set()
            release.wait(120)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(120)
    try:
        status = run_forked(lambda: BUFFERS.empty(SHAPE, np.uint8), 5)
    finally:
        release.set()
        holder.join()
    assert status == 0
