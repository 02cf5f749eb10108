"""A thread that works behind its owner: in order, one task at a time, its errors where the owner is."""

import threading

import pytest

from cellmap_lightning.prediction.background_writer import BackgroundWriter

pytestmark = pytest.mark.usefixtures("no_threads_left")


@pytest.fixture
def behind():
    made = BackgroundWriter()
    yield made
    made.close()


def test_tasks_are_done_one_by_one_and_none_waits(behind):
    done, go, begun = [], threading.Event(), threading.Event()

    def first():
        begun.set()
        assert go.wait(120)
        done.append(1)

    behind.give(first)
    assert begun.wait(120)
    giving = threading.Thread(target=behind.give, args=(lambda: done.append(2),))
    giving.start()
    giving.join(0.05)
    assert giving.is_alive(), "a second task is not taken while the first is under way"
    go.set()
    giving.join(120)
    behind.wait()
    assert done == [1, 2]


def _until(behind, met, other):
    while True:  # `check` may come before the thread has put the error down
        behind.give(lambda: other.append(1)) if met == "give" else getattr(behind, met)()


@pytest.mark.parametrize("met", ["check", "wait", "give"])
def test_an_error_is_met_once_by_whoever_comes_next(behind, met):
    ended = threading.Event()

    def breaks():
        try:
            raise OSError("no room")
        finally:
            ended.set()

    behind.give(breaks)
    assert ended.wait(120)
    other = []
    with pytest.raises(OSError, match="no room"):
        _until(behind, met, other)
    assert not other
    behind.check()
    behind.wait()


def test_closing_ends_what_is_under_way(behind):
    done, begun = [], threading.Event()

    def slow():
        begun.set()
        threading.Event().wait(0.05)
        done.append(1)

    behind.give(slow)
    assert begun.wait(120)
    behind.close()
    assert done == [1]
    behind.check()


def test_as_many_wait_as_may(behind):
    done, go = [], threading.Event()
    behind.give(lambda: go.wait(120), 3)
    tasks = [behind.give(lambda n=n: done.append(n), 3) for n in (1, 2)]
    giving = threading.Thread(target=behind.give, args=(lambda: done.append(3), 3))
    giving.start()
    giving.join(0.05)
    assert giving.is_alive(), "three are under way"
    go.set()
    giving.join(120)
    behind.until(tasks[1])
    assert done[:2] == [1, 2]
    behind.until(tasks[0])  # it has ended long ago
    behind.wait()
    assert done == [1, 2, 3]


def test_after_an_error_nothing_is_done_until_it_is_met(behind):
    done, go = [], threading.Event()

    def breaks():
        assert go.wait(120)
        raise OSError("no room")

    behind.give(breaks, 3)
    behind.give(lambda: done.append(1), 3)
    last = behind.give(lambda: done.append(2), 3)
    go.set()
    with pytest.raises(OSError, match="no room"):
        behind.until(last)
    behind.wait()
    assert not done
    behind.give(lambda: done.append(3))
    behind.wait()
    assert done == [3]


def test_closing_does_what_was_given():
    behind, done, go = BackgroundWriter(), [], threading.Event()
    behind.give(lambda: go.wait(120), 2)
    behind.give(lambda: done.append(1), 2)
    go.set()
    behind.close()
    assert done == [1]


def test_an_error_that_nobody_met_is_logged(caplog):
    behind, go = BackgroundWriter(), threading.Event()

    def breaks():
        assert go.wait(120)
        raise OSError("no room")

    behind.give(breaks, 2)
    go.set()
    behind.close()
    assert [record.getMessage() for record in caplog.records] == ["while the run ended: OSError: no room"]
    behind.wait()
