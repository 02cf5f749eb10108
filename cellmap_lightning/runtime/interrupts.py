"""Delivery of Ctrl-C where Python would drop it.

Python prints and drops an exception that is raised in ``__del__``, in the callback of a weak reference or of the
garbage collector, or in a fork hook. A KeyboardInterrupt that arrives there does not end the program: with threads that
start and end, and memory that is reused, that happens. It is sent again once the callback has returned.
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

_installed = _in_hook = False
#: True while an interrupt waits to be sent; those that are dropped meanwhile are the same one.
_waiting = False
_previous: Any = None


def install() -> None:
    """Have KeyboardInterrupts that Python drops in the main thread sent again.

    ``sys.unraisablehook`` is replaced, once in a process; what it receives besides is handed to the hook before it.
    """
    global _installed, _previous
    if not _installed and hasattr(signal, "pthread_kill"):
        _installed, _previous, sys.unraisablehook = True, sys.unraisablehook, _report
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    # The child does not have the thread that sends it.
    global _waiting
    _waiting = False


def settle() -> None:
    """Wait until an interrupt that was dropped has been sent again.

    Raises:
        KeyboardInterrupt: there was one.
    """
    waited = False
    while _waiting:
        waited = True
        time.sleep(PAUSE)
    if waited:
        time.sleep(PAUSE)  # it may be sent only now


def _report(unraisable: Any) -> None:
    global _in_hook, _waiting
    kind = unraisable.exc_type
    main = threading.current_thread() is threading.main_thread()
    if not main or kind is None or not issubclass(kind, KeyboardInterrupt):
        _previous(unraisable)
        return
    _in_hook = True
    try:
        if not _waiting:
            _waiting = True
            # Not threading.Thread: this thread may hold the locks that starting one takes.
            _thread.start_new_thread(_send, ())
    finally:
        _in_hook = False  # no instruction follows before which Python handles signals


def _send() -> None:
    global _waiting
    time.sleep(PAUSE)
    while _in_hook:
        time.sleep(PAUSE)
    _waiting = False  # before it is sent, so that it is sent again if it is dropped again
    ident = threading.main_thread().ident
    if ident is not None:
        signal.pthread_kill(ident, signal.SIGINT)  # unlike raise_signal, it also ends what the thread waits for
