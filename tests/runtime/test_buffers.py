"""Memory for batches: used again when nobody can see it any more, and never before."""

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

from cellmap_lightning.runtime.buffers import BUFFERS, SMALL, WAITING, Buffers

SHAPE = (3, SMALL)


def address(array):
    return array.__array_interface__["data"][0]


def waiting(buffers):
    """Blocks that wait to be used again."""
    return sum(map(len, buffers._waiting.values()))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3), "uint8"), (SHAPE, "uint8"), ((1, 4, 300, 300), "float32"), ((0, 5), "int64")]
)
def test_what_is_handed_out(shape, dtype):
    array = Buffers().empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array[...] = 1
    assert (array == 1).all()


@pytest.mark.parametrize(
    ("keep", "see"),
    [
        (lambda a: a, np.asarray),
        (lambda a: a[1:, 5:], np.asarray),
        (lambda a: a.reshape(-1)[::-7], np.asarray),
        (lambda a: a.view(np.float32), lambda kept: kept.view(np.uint8)),
        (memoryview, np.asarray),
        (lambda a: iter(a[1]), lambda kept: np.asarray(list(kept))),
        (torch.from_numpy, np.asarray),
        (lambda a: torch.from_numpy(a)[1:, 5:], np.asarray),
        (lambda a: torch.from_numpy(a).view(torch.int32), lambda kept: kept.view(torch.uint8)),
        (lambda a: torch.from_numpy(a).numpy(), np.asarray),
        (lambda a: torch.from_numpy(a)[2].numpy()[3:], np.asarray),
        (lambda a: torch.from_numpy(a).untyped_storage(), lambda kept: torch.empty(0, dtype=torch.uint8).set_(kept)),
        (lambda a: {"raw": [torch.from_numpy(a).detach()]}, lambda kept: kept["raw"][0]),
    ],
)
def test_memory_that_somebody_can_see_is_not_used_again(keep, see):
    """Nor is it forgotten: once nobody sees it, the next batch of its size gets it."""
    buffers = Buffers()
    array = buffers.empty(SHAPE, np.uint8)
    array[...] = 7
    first = address(array)
    kept = keep(array)
    del array
    others = [buffers.empty(SHAPE, np.uint8) for _ in range(WAITING + 1)]
    for other in others:
        assert address(other) != first
        other[...] = 9
    assert (np.asarray(see(kept)) == 7).all()
    del kept
    assert waiting(buffers) == 1
    assert address(buffers.empty(SHAPE, np.uint8)) == first


def test_only_blocks_of_the_same_size_are_used_again():
    buffers = Buffers()
    first = buffers.empty(SHAPE, np.uint8)
    place = address(first)
    del first
    assert address(buffers.empty((3, SMALL - 1), np.uint8)) != place
    assert address(buffers.empty((3 * SMALL // 4,), np.float32)) == place  # the same bytes, by another name


def test_waiting_blocks_are_bounded():
    buffers = Buffers()
    arrays = [buffers.empty(SHAPE, np.uint8) for _ in range(WAITING + 5)]
    assert len({address(a) for a in arrays}) == len(arrays)
    del arrays
    assert waiting(buffers) == WAITING
    buffers.clear()
    assert waiting(buffers) == 0
    small = buffers.empty((5,), np.uint8)
    del small
    assert waiting(buffers) == 0, "small ones are not kept"


def test_a_copy_is_a_copy():
    """What a queue or a checkpoint pickles has nothing to do with the block."""
    buffers = Buffers()
    array = buffers.empty(SHAPE, np.uint8)
    array[...] = 5
    copies = [pickle.loads(pickle.dumps(array)), torch.from_numpy(array).clone(), array.copy()]
    del array
    buffers.empty(SHAPE, np.uint8)[...] = 6
    assert all((np.asarray(c) == 5).all() for c in copies)


def test_threads_never_get_the_same_block():
    buffers = Buffers()

    def work(number):
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
        assert all(pool.map(work, range(6)))
    assert waiting(buffers) <= WAITING


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")


def run_forked(work, seconds=20):
    """Exit status of a forked child that does some work, None if it hangs."""
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
def test_a_forked_child_has_memory_of_its_own():
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
        before = waiting(BUFFERS)
        del mine  # the parent's: its pages would have to be copied before they could be written to
        assert waiting(BUFFERS) == before
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
    """The child must not wait for a thread that it does not have."""
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
