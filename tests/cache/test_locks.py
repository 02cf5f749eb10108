"""Locks between processes and threads, and single-flight execution."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cellmap_lightning.cache.locks import Locks, SingleFlight

FORK = multiprocessing.get_context("fork")

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share memory so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


# -- locks


def hold_until_told(path, number, pipe):
    with Locks(path).hold(number):
        pipe.send("held")
        pipe.recv()


@contextlib.contextmanager
def another_holds(path, number):
    """Another process holds a lock; yields its process and what ends it."""
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=hold_until_told, args=(path, number, theirs))
    process.start()
    assert mine.poll(120)
    assert mine.recv() == "held"
    try:
        yield process, mine
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def gets(locks, number, within):
    """Return True if a lock is acquired within so many seconds."""
    found = threading.Event()

    def take():
        with locks.hold(number):
            found.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return found.wait(within), thread


def test_a_process_waits_for_the_lock_of_another(tmp_path):
    path = str(tmp_path / "locks")
    with another_holds(path, 5) as (_, pipe):
        locks = Locks(path)
        had, _ = gets(locks, 6, 20)
        assert had, "another chunk's lock is free"
        had, thread = gets(locks, 5, 0.1)
        assert not had
        pipe.send("go on")
        thread.join(120)
        assert not thread.is_alive()
    assert (tmp_path / "locks").stat().st_mode & 0o777 == 0o600


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    path = str(tmp_path / "locks")
    with another_holds(path, 5) as (process, _):
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        had, _ = gets(Locks(path), 5, 20)
    assert had


def cross(path, mine, theirs, barrier, queue):
    """Hold one lock while a thread asks for another one, which the other process holds meanwhile."""
    locks = Locks(path)

    def ask():
        with locks.hold(theirs):
            return True

    with ThreadPoolExecutor(1) as pool:
        with locks.hold(mine):
            barrier.wait(120)
            asked = pool.submit(ask)
            time.sleep(0.05)
        queue.put(asked.result(120))


def test_threads_that_wait_for_each_others_chunks_are_no_deadlock(tmp_path):
    """The kernel sees processes: it would refuse the wait with EDEADLK."""
    barrier, queue = FORK.Barrier(2), FORK.Queue()
    path = str(tmp_path / "locks")
    processes = [FORK.Process(target=cross, args=(path, a, b, barrier, queue)) for a, b in ((1, 2), (2, 1))]
    [p.start() for p in processes]
    assert [queue.get(timeout=120) for _ in processes] == [True, True]
    [p.join(120) for p in processes]
    assert [p.exitcode for p in processes] == [0, 0]


def test_a_forked_child_holds_none_of_its_parents_locks(tmp_path):
    """And closing its copy of the parent's file gives none of the parent's back."""
    locks = Locks(str(tmp_path / "locks"))
    queue = FORK.Queue()

    def child():
        had, _ = gets(locks, 5, 0.1)
        locks.close()
        queue.put(had)

    with locks.hold(5):
        process = FORK.Process(target=child)
        process.start()
        assert queue.get(timeout=120) is False
        process.join(120)
        with pytest.raises(AssertionError), another_holds_quickly(locks.path):
            pytest.fail("the parent's lock is gone")


@contextlib.contextmanager
def another_holds_quickly(path):
    mine, theirs = FORK.Pipe()
    process = FORK.Process(target=hold_until_told, args=(path, 5, theirs))
    process.start()
    try:
        assert mine.poll(0.2)
        yield
    finally:
        process.kill()
        process.join()


def test_fork_while_a_thread_waits_for_a_lock(tmp_path):
    locks = Locks(str(tmp_path / "locks"))
    held, release = threading.Event(), threading.Event()

    def hold():
        with locks._changed:
            held.set()
            release.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(120)
    process = FORK.Process(target=lambda: locks.use(7))
    process.start()
    process.join(120)
    alive = process.is_alive()
    process.kill()
    release.set()
    thread.join()
    process.join()
    assert not alive


def test_work_is_done_once_and_again_after_a_failure():
    once, done, running = SingleFlight(), [], []
    barrier = threading.Barrier(6)

    def run(number):
        barrier.wait(120)
        if once.begin("a", lambda: done[0] if done else None) is not None:
            return "found"
        try:
            running.append(number)
            time.sleep(0.01)
            if len(running) == 1:
                raise ValueError
            done.append(number)
            return "made"
        except ValueError:
            return "failed"
        finally:
            once.end("a")

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(run, range(6))) == ["failed", *["found"] * 4, "made"]
    assert once._coming == {}
