"""Delivery of Ctrl-C where Python would lose it.

Python prints and drops an exception that is raised in ``__del__``, in the callback of a weak reference or of the
garbage collector, or in a fork hook; a KeyboardInterrupt that arrives there does not end the program.
"""

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

#: Seconds after which a lost interrupt is sent again: by then its callback has returned.
PAUSE = 0.02


def send_again() -> None:
    """Send SIGINT to the main thread in a moment, for a callback that has to return first."""
    _thread.start_new_thread(_send_again, ())


def _send_again() -> None:
    time.sleep(PAUSE)
    _send()


def _send() -> None:
    ident = threading.main_thread().ident
    if ident is not None:
        signal.pthread_kill(ident, signal.SIGINT)  # unlike raise_signal, it also ends what the thread waits for


class _Delivery:
    """The signal handler and the hook of `deliver_interrupts`."""

    def __init__(self) -> None:
        self.lost: object | None = None
        self._in_hook = False
        self._hook = sys.unraisablehook

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, but not inside the hook, where it would be lost."""
        if self._in_hook:
            self._lose()
            return
        self.lost = None
        raise KeyboardInterrupt

    def report(self, unraisable: Any) -> None:
        """Send an interrupt again that was dropped; everything else is reported as before."""
        if threading.current_thread() is not threading.main_thread():
            self._hook(unraisable)
            return
        self._in_hook = True
        try:
            if unraisable.exc_type is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
                self._lose()
            else:
                self._hook(unraisable)
        finally:
            self._in_hook = False  # no instruction follows before which a signal is handled

    def _lose(self) -> None:
        self.lost = token = object()
        # Not threading.Thread: this thread may hold the locks that starting one takes.
        _thread.start_new_thread(self._send_until_raised, (token,))

    def _send_until_raised(self, token: object) -> None:
        time.sleep(PAUSE)
        while self.lost is token:
            _send()
            time.sleep(PAUSE)


@contextlib.contextmanager
def deliver_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread also where it arrives inside a callback that would drop it.

    While it is active, ``sys.unraisablehook`` and Python's own handler of SIGINT are replaced. Another handler, or an
    ignored SIGINT, stays as it is; so does everything in another thread than the main one.

    Raises:
        KeyboardInterrupt: one arrived and has not been raised yet.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    delivery = _Delivery()
    handle, report, hook = delivery.handle, delivery.report, sys.unraisablehook
    signal.signal(signal.SIGINT, handle)
    sys.unraisablehook = report
    try:
        yield
        lost = delivery.lost is not None
    finally:
        delivery.lost = None
        if sys.unraisablehook is report:
            sys.unraisablehook = hook
        if signal.getsignal(signal.SIGINT) is handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if lost:
        raise KeyboardInterrupt
