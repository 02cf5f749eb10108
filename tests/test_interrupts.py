"""A Ctrl-C that arrives inside a callback whose exceptions Python prints and drops ends the program all the same."""

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.buffers import SMALL, Buffers
from cellmap_lightning.interrupts import deliver_interrupts
from cellmap_lightning.sampling.pool import ReadPool
from cellmap_lightning.volumes.shared import Locks, SharedBlock
from cellmap_lightning.weak import WeakGroup, at_end

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals cannot be sent to a thread here")

HEAD = """
import gc, os, signal, sys, threading, time, warnings, weakref
from cellmap_lightning.cli import _command

def interrupt(*_):
    signal.raise_signal(signal.SIGINT)

class Thing:
    pass

class Deleted:
    def __del__(self):
        interrupt()

def generator():
    try:
        yield
    finally:
        interrupt()

def go_on():
    print("dropped", flush=True)
    for _ in range(3000):  # half a minute, far beyond what the interrupt takes
        time.sleep(0.01)
    print("went on", flush=True)

def wait():
    print("dropped", flush=True)
    threading.Event().wait(30)
    print("went on", flush=True)
"""
#: Each has the interrupt arrive inside a callback in the main thread.
DROPPED = {
    "a finalizer": "thing = Thing(); weakref.finalize(thing, interrupt); del thing; go_on()",
    "__del__": "thing = Deleted(); del thing; go_on()",
    "a generator that is abandoned": "thing = generator(); next(thing); del thing; go_on()",
    "the callback of a weak reference": "thing = Thing(); r = weakref.ref(thing, interrupt); del thing; go_on()",
    "the garbage collector": "gc.callbacks.append(interrupt); gc.collect(); gc.callbacks.clear(); go_on()",
    "a fork": "os.register_at_fork(before=interrupt)\n    if os.fork() == 0: os._exit(0)\n    go_on()",
    "__del__ before something that waits": "thing = Deleted(); del thing; wait()",
    "__del__, twice": "thing = [Deleted(), Deleted()]; del thing; go_on()",
    "__del__ while the command ends": "thing = Deleted(); del thing",
}


def program(tmp_path, body, *arguments):
    file = tmp_path / "program.py"
    file.write_text(HEAD + body)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-W", "ignore", file, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize("where", DROPPED)
def test_a_command_ends_with_the_first_interrupt(tmp_path, where):
    done = program(tmp_path, f"def job(cfg):\n    {DROPPED[where]}\n_command('submit', job)\n", "manifest=none")
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert "went on" not in done.stdout
    assert done.stderr == "interrupted\n"


def test_other_errors_in_finalizers_are_printed_as_before(tmp_path):
    body = "def wrong():\n    raise OSError('enough')\n"
    job = "def job(cfg):\n    thing = Thing(); weakref.finalize(thing, wrong); del thing; print('went on')\n"
    done = program(tmp_path, f"{body}{job}_command('submit', job)\n", "manifest=none")
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert "Exception ignored in" in done.stderr
    assert "OSError: enough" in done.stderr


def test_hook_and_handler_are_given_back():
    before = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    with deliver_interrupts():
        assert sys.unraisablehook is not before[0]
        assert signal.getsignal(signal.SIGINT) is not before[1]
    assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == before
    with pytest.raises(KeyboardInterrupt), deliver_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_another_handler_stays(handler):
    before = signal.signal(signal.SIGINT, handler)
    hook = sys.unraisablehook
    try:
        with deliver_interrupts():
            assert signal.getsignal(signal.SIGINT) is handler
            assert sys.unraisablehook is hook
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing():
    found, before = [], (sys.unraisablehook, signal.getsignal(signal.SIGINT))

    def work():
        with deliver_interrupts():
            found.append((sys.unraisablehook, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


# -- the package's own callbacks, also where no command runs


def python_calls(work):
    """Names of the Python functions that run while something is done."""
    names = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return [name for name in names if not name.startswith(("python_calls", "test_no_python"))]


def _batch():
    return Buffers().empty((SMALL,), np.uint8)


def _block():
    return SharedBlock(4096)


def _locks(path):
    locks = Locks(str(path))
    with locks.hold(1):
        return locks


@pytest.mark.parametrize("kind", ["batch", "block", "locks", "pool"])
def test_no_python_code_runs_when_an_object_is_gone(tmp_path, kind):
    things = [{
        "batch": _batch, "block": _block, "locks": lambda: _locks(tmp_path / "locks"), "pool": lambda: ReadPool(1),
    }[kind]()]  # fmt: skip
    assert python_calls(things.clear) == []


def test_descriptors_are_closed_when_their_owners_are_gone(tmp_path):
    def descriptors():
        return {path.name for path in Path("/proc/self/fd").iterdir()}

    before = descriptors()
    things = [_block(), _locks(tmp_path / "locks")]
    assert len(descriptors() - before) >= 2
    things.clear()
    assert descriptors() == before
    block = _block()
    block.close()
    block.close()
    del block
    assert descriptors() == before


class Item:
    pass


def test_a_group_forgets_what_is_gone():
    group, items = WeakGroup(), [Item() for _ in range(5)]
    for item in [*items, *items]:
        group.add(item)
    assert sorted(map(id, group)) == sorted(map(id, items))
    group.discard(items[0])
    group.discard(items[0])
    assert items[0] not in group
    assert items[1] in group
    del item, items[2:]
    assert list(group) == [items[1]]
    items.clear()
    assert list(group) == []


def test_a_group_can_be_iterated_while_the_garbage_collector_runs():
    group, before = WeakGroup(), gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(200):
            items = [Item() for _ in range(20)]
            for item in items:
                item.itself = item
                group.add(item)
            del items, item
            list(group)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert list(group) == []


def test_the_end_of_an_object_is_once():
    called, item = [], Item()
    end = at_end(item, called.append, "first")
    at_end(item, called.append, "second")
    assert called == []
    end()
    end()
    assert called == ["first"]
    del item
    assert called == ["first", "second"]


FORK = """
from cellmap_lightning.sampling.pool import FORK_GATE
reading, read_on = threading.Event(), threading.Event()

def read():
    with FORK_GATE:
        reading.set()
        read_on.wait(60)

def interrupt_the_fork():
    while not FORK_GATE._forking:
        time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

threading.Thread(target=read, daemon=True).start()
reading.wait(60)
threading.Thread(target=interrupt_the_fork).start()
try:
    if os.fork() == 0:
        os._exit(0)
    go_on()
except KeyboardInterrupt:
    print("ended", flush=True)
    read_on.set()
"""


def test_an_interrupt_while_a_fork_waits_for_reads_is_raised_after_it(tmp_path):
    done = program(tmp_path, FORK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "ended"
    assert "Exception ignored" not in done.stderr
