"""Delivery of Ctrl-C where Python would drop it.

Python prints and drops an exception that is raised in ``__del__``, in the callback of a weak reference or of the
garbage collector, or in a fork hook. A KeyboardInterrupt that arrives there does not end the program, which the
finalizers of threads and buffers make likely. It is sent again once the callback has returned.
"""

import _thread
import os
import signal
import sys
import threading
import time
from typing import Any

#: Seconds after which a dropped interrupt is sent again.
PAUSE = 0.05


class _State:
    """State of the hook, for the whole process.

    Attributes:
        installed: whether the hook was installed.
        in_hook: whether the main thread is inside the hook.
        pending: whether an interrupt is about to be sent again; those dropped meanwhile are merged with it.
        previous: the hook that was installed before.
    """

    installed = in_hook = pending = False
    previous: Any = None


def install() -> None:
    """Install the hook that sends dropped KeyboardInterrupts of the main thread again, once per process.

    It replaces ``sys.unraisablehook``; all other exceptions are passed to the hook before it.
    """
    if not _State.installed and hasattr(signal, "pthread_kill"):
        _State.installed, _State.previous, sys.unraisablehook = True, sys.unraisablehook, _report
        os.register_at_fork(after_in_child=_reset_after_fork)


def _reset_after_fork() -> None:
    _State.pending = False  # the thread that would send it is not in the child


def settle() -> None:
    """Wait until an interrupt that was dropped has been sent again.

    Raises:
        KeyboardInterrupt: an interrupt was dropped.
    """
    waited = False
    while _State.pending:
        waited = True
        time.sleep(PAUSE)
    if waited:
        time.sleep(PAUSE)  # the flag is cleared just before the signal is sent


def _report(unraisable: Any) -> None:
    error = unraisable.exc_type
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or error is None or not issubclass(error, KeyboardInterrupt):
        _State.previous(unraisable)
        return
    _State.in_hook = True
    try:
        if not _State.pending:
            _State.pending = True
            # Not threading.Thread: this thread may hold the locks that starting one takes.
            _thread.start_new_thread(_send, ())
    finally:
        _State.in_hook = False  # last: Python handles no signal between this and the return


def _send() -> None:
    time.sleep(PAUSE)
    while _State.in_hook:
        time.sleep(PAUSE)
    _State.pending = False  # before the signal, so that an interrupt that is dropped again is also sent again
    ident = threading.main_thread().ident
    if ident is not None:
        signal.pthread_kill(ident, signal.SIGINT)  # unlike raise_signal, it also interrupts blocking calls
