"""Tasks that a pool does ahead, with nobody waiting for them."""

import threading
import time

import pytest

from cellmap_lightning.runtime.thread_pool import ReadPool

pytestmark = pytest.mark.usefixtures("no_threads_left")


@pytest.fixture
def pool():
    found = ReadPool(1)
    yield found
    found.close()


def test_tasks_ahead_are_done_and_their_errors_are_nobodys(pool):
    done = []

    def fail():
        done.append("failed")
        raise OSError("of a task that nobody waits for")

    pool.ahead([fail, lambda: done.append("second")])
    pool.run([lambda: done.append("waited for"), lambda: None])
    assert done == ["failed", "second", "waited for"]


def after_the_cancelling(pool, go):
    """Let the first task of a pool end once the last one was cancelled."""
    last = list(pool._queued)[-1]

    def wait():
        while not last.cancelled():
            time.sleep(0.01)
        go.set()

    threading.Thread(target=wait, daemon=True).start()


def test_what_has_begun_is_waited_for_and_the_rest_is_given_up(pool):
    begun, go, done = threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        go.wait(120)
        done.append("slow")

    pool.ahead([slow, lambda: done.append("never")])
    assert begun.wait(120)
    after_the_cancelling(pool, go)
    pool.cancel_ahead()
    assert done == ["slow"]
    pool.run([lambda: done.append("next"), lambda: None])
    assert done == ["slow", "next"]


def test_closing_gives_up_what_is_ahead():
    pool, begun, go, done = ReadPool(1), threading.Event(), threading.Event(), []

    def slow():
        begun.set()
        go.wait(120)

    pool.ahead([slow, lambda: done.append("never")])
    assert begun.wait(120)
    after_the_cancelling(pool, go)
    pool.close()
    assert done == []
