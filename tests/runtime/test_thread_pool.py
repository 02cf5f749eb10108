"""Background tasks of a thread pool."""

import threading
import time

import pytest

from cellmap_lightning.runtime.thread_pool import ReadPool

pytestmark = pytest.mark.usefixtures("no_threads_left")


@pytest.fixture
def pool():
    pool = ReadPool(1)
    yield pool
    pool.close()


def test_errors_of_background_tasks_are_ignored(pool):
    done = []

    def fail():
        done.append("failed")
        raise OSError("of a background task")

    pool.ahead([fail, lambda: done.append("second")])
    pool.run([lambda: done.append("waited for"), lambda: None])
    assert done == ["failed", "second", "waited for"]


def release_after_cancelling(pool, go):
    """Let the first task of a pool end once the last one is cancelled."""
    last = list(pool._queued)[-1]

    def wait():
        while not last.cancelled():
            time.sleep(0.01)
        go.set()

    threading.Thread(target=wait, daemon=True).start()


def test_cancelling_waits_for_running_tasks_and_cancels_pending_ones(pool):
    begun, go, done = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        go.wait(120)
        done.append("slow")

    pool.ahead([slow, lambda: done.append("never")])
    assert begun.wait(120)
    release_after_cancelling(pool, go)
    pool.cancel_ahead()
    assert done == ["slow"]
    pool.run([lambda: done.append("next"), lambda: None])
    assert done == ["slow", "next"]


def test_closing_cancels_pending_background_tasks():
    pool, begun, go, done = ReadPool(1), threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        go.wait(120)

    pool.ahead([slow, lambda: done.append("never")])
    assert begun.wait(120)
    release_after_cancelling(pool, go)
    pool.close()
    assert done == []
