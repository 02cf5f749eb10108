"""Ctrl-C in callbacks whose exceptions Python prints and drops: it still ends the program."""

import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals cannot be sent to a thread here")

HEAD = """
import gc, os, signal, sys, threading, time, warnings, weakref
from cellmap_lightning.commands.program import run_command

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

def compute():
    print("dropped", flush=True)
    for _ in range(3000):  # half a minute, far more than the delay of the interrupt
        time.sleep(0.01)
    print("not interrupted", flush=True)

def wait():
    print("dropped", flush=True)
    threading.Event().wait(30)
    print("not interrupted", flush=True)
"""
#: Code by which the interrupt arrives inside a callback in the main thread.
DROPPED = {
    "a finalizer": "thing = Thing(); weakref.finalize(thing, interrupt); del thing; compute()",
    "__del__": "thing = Deleted(); del thing; compute()",
    "an abandoned generator": "thing = generator(); next(thing); del thing; compute()",
    "the callback of a weak reference": "thing = Thing(); r = weakref.ref(thing, interrupt); del thing; compute()",
    "the garbage collector": "gc.callbacks.append(interrupt); gc.collect(); gc.callbacks.clear(); compute()",
    "a fork": "os.register_at_fork(before=interrupt)\n    if os.fork() == 0: os._exit(0)\n    compute()",
    "__del__ before a blocking call": "thing = Deleted(); del thing; wait()",
    "__del__, twice": "thing = [Deleted(), Deleted()]; del thing; compute()",
    "__del__ while the command ends": "thing = Deleted(); del thing",
}


def program(tmp_path, body, *arguments):
    file = tmp_path / "program.py"
    file.write_text(HEAD + body)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return processes.run([sys.executable, "-W", "ignore", file, *arguments], 200, cwd=tmp_path, env=env)


@pytest.mark.parametrize("where", DROPPED)
def test_a_command_ends_with_the_first_interrupt(tmp_path, where):
    done = program(tmp_path, f"def job(cfg):\n    {DROPPED[where]}\nrun_command('submit', job)\n", "manifest=none")
    assert done.returncode == 130, (done.stdout, done.stderr)
    assert "not interrupted" not in done.stdout
    assert done.stderr == "interrupted\n"


def test_other_errors_in_finalizers_are_printed_as_before(tmp_path):
    body = "def wrong():\n    raise OSError('enough')\n"
    job = "def job(cfg):\n    thing = Thing(); weakref.finalize(thing, wrong); del thing; print('not interrupted')\n"
    done = program(tmp_path, f"{body}{job}run_command('submit', job)\n", "manifest=none")
    assert (done.returncode, done.stdout) == (0, "not interrupted\n")
    assert "Exception ignored in" in done.stderr
    assert "OSError: enough" in done.stderr


def test_the_hook_is_installed_once_and_not_by_an_import(tmp_path):
    code = """
    hooks = [sys.unraisablehook]
    import cellmap_lightning, cellmap_lightning.datasets.dataset, cellmap_lightning.commands.program
    from cellmap_lightning.runtime.thread_pool import ReadPool
    hooks.append(sys.unraisablehook)
    ReadPool(1)
    hooks.append(sys.unraisablehook)
    sys.unraisablehook = print
    ReadPool(1)
    assert hooks[0] is hooks[1] is not hooks[2]
    assert sys.unraisablehook is print
    """
    done = program(tmp_path, textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path):
    body = "thing = Deleted(); signal.signal(signal.SIGINT, signal.SIG_IGN); del thing; print('not interrupted')"
    done = program(tmp_path, f"def job(cfg):\n    {body}\nrun_command('submit', job)\n", "manifest=none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "not interrupted\n", "")


@pytest.mark.parametrize("where", [where for where in DROPPED if where != "__del__ while the command ends"])
def test_a_program_that_reads_data_ends_with_the_first_interrupt(tmp_path, where):
    body = "from cellmap_lightning.runtime.thread_pool import ReadPool\npool = ReadPool(1)\n"
    done = program(tmp_path, f"{body}if True:\n    {DROPPED[where]}\n")
    assert done.returncode == -signal.SIGINT, (done.stdout, done.stderr)
    assert "not interrupted" not in done.stdout
    assert "Exception ignored" not in done.stderr


FORK = """
from cellmap_lightning.runtime.thread_pool import FORK_GATE, ReadPool
pool = ReadPool(1)
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
    compute()
except KeyboardInterrupt:
    print("ended", flush=True)
    read_on.set()
"""


def test_an_interrupt_while_a_fork_waits_for_reads_is_raised_after_it(tmp_path):
    done = program(tmp_path, FORK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "ended"
    assert "Exception ignored" not in done.stderr
