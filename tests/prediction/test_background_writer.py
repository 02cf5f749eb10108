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


def test_tasks_run_one_by_one(behind):
    done, go, begun = [], threading.Event(), threading.Event()

    def first():
        begun.set()
        assert go.wait(120)
        done.append(1)

    behind.submit(first)
    assert begun.wait(120)
    giving = threading.Thread(target=behind.submit, args=(lambda: done.append(2),))
    giving.start()
    giving.join(0.05)
    assert giving.is_alive(), "a second task is not taken while the first is under way"
    go.set()
    giving.join(120)
    behind.wait()
    assert done == [1, 2]


def _until(behind, met, other):
    while True:  # `check` may come before the thread has put the error down
        behind.submit(lambda: other.append(1)) if met == "submit" else getattr(behind, met)()


@pytest.mark.parametrize("met", ["check", "wait", "submit"])
def test_error_is_raised_once_by_the_next_call(behind, met):
    ended = threading.Event()

    def breaks():
        try:
            raise OSError("no room")
        finally:
            ended.set()

    behind.submit(breaks)
    assert ended.wait(120)
    other = []
    with pytest.raises(OSError, match="no room"):
        _until(behind, met, other)
    assert not other
    behind.check()
    behind.wait()


def test_close_waits_for_the_running_task(behind):
    done, begun = [], threading.Event()

    def slow():
        begun.set()
        threading.Event().wait(0.05)
        done.append(1)

    behind.submit(slow)
    assert begun.wait(120)
    behind.close()
    assert done == [1]
    behind.check()


def test_backlog_is_bounded(behind):
    done, go = [], threading.Event()
    behind.submit(lambda: go.wait(120), 3)
    tasks = [behind.submit(lambda n=n: done.append(n), 3) for n in (1, 2)]
    giving = threading.Thread(target=behind.submit, args=(lambda: done.append(3), 3))
    giving.start()
    giving.join(0.05)
    assert giving.is_alive(), "three are under way"
    go.set()
    giving.join(120)
    behind.wait_for(tasks[1])
    assert done[:2] == [1, 2]
    behind.wait_for(tasks[0])  # it has ended long ago
    behind.wait()
    assert done == [1, 2, 3]


def test_no_task_runs_after_an_error_until_it_is_raised(behind):
    done, go = [], threading.Event()

    def breaks():
        assert go.wait(120)
        raise OSError("no room")

    behind.submit(breaks, 3)
    behind.submit(lambda: done.append(1), 3)
    last = behind.submit(lambda: done.append(2), 3)
    go.set()
    with pytest.raises(OSError, match="no room"):
        behind.wait_for(last)
    behind.wait()
    assert not done
    behind.submit(lambda: done.append(3))
    behind.wait()
    assert done == [3]


def test_close_runs_submitted_tasks():
    behind, done, go = BackgroundWriter(), [], threading.Event()
    behind.submit(lambda: go.wait(120), 2)
    behind.submit(lambda: done.append(1), 2)
    go.set()
    behind.close()
    assert done == [1]


def test_error_that_was_not_raised_is_logged(caplog):
    behind, go = BackgroundWriter(), threading.Event()

    def breaks():
        assert go.wait(120)
        raise OSError("no room")

    behind.submit(breaks, 2)
    go.set()
    behind.close()
    assert [record.getMessage() for record in caplog.records] == ["while the run ended: OSError: no room"]
    behind.wait()
