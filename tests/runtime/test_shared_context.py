"""Values that exist while any thread has their context open."""

import os
import threading

import pytest

from cellmap_lightning.runtime.shared_context import SharedContext


def held_open(context):
    """Open the context in a thread; returns the thread and the event that closes it."""
    opened, close = threading.Event(), threading.Event()

    def hold():
        with context.open():
            opened.set()
            close.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert opened.wait(60)
    return thread, close


def test_the_value_exists_inside_nested_contexts_only():
    context = SharedContext(dict)
    assert context.value is None
    with context.open():
        value = context.value
        assert value == {}
        with context.open():
            assert context.value is value
        assert context.value is value
    assert context.value is None


def test_an_error_closes_the_context():
    context = SharedContext(dict)
    with pytest.raises(ValueError, match="x"), context.open():
        raise ValueError("x")
    assert context.value is None


@pytest.mark.parametrize("other_first", [False, True])
def test_overlapping_threads_share_the_value_until_the_last_one_closes(other_first):
    context = SharedContext(dict)
    thread, close = held_open(context)
    value = context.value
    with context.open():
        assert context.value is value
        if other_first:
            close.set()
            thread.join(60)
            assert context.value is value
    assert (context.value is None) == other_first
    close.set()
    thread.join(60)
    assert context.value is None
    with context.open():
        assert context.value is not value, "nothing stale is found again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_a_forked_child_drops_the_contexts_of_other_threads(inside):
    context = SharedContext(dict)
    thread, close = held_open(context)

    def value_after_closing():
        """In a child: 0 if the value is gone once the thread that forked has left its own context."""
        child = os.fork()
        if child == 0:
            os._exit(0 if (context.value is not None) == inside else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    if inside:
        with context.open():
            assert value_after_closing() == 0
    else:
        assert value_after_closing() == 0
    close.set()
    thread.join(60)
