"""Exit of a command after Ctrl-C or SIGTERM, the same in every phase."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from cellmap_lightning.commands.messages import Stopped, stop

log = logging.getLogger(__name__)


class Terminated(SystemExit):
    """Exit after SIGTERM outside of the loops of a Trainer."""


class ExitOnSignal:
    """A context that exits with the status 130 after Ctrl-C and 143 after SIGTERM, and prints how to continue.

    In its loops a Trainer handles SIGTERM itself and ends between two batches; elsewhere the body ends at once.
    A handler of another library is not replaced.

    Args:
        advice: returns the end of the message, how to continue; None where another process prints it.

    Attributes:
        received: True after SIGTERM.

    Example:
        >>> with ExitOnSignal(lambda: "the same command continues") as exit_:
        ...     trainer.fit(task)
        ...     exit_.check()
    """

    def __init__(self, advice: Callable[[], str | None] = lambda: "") -> None:
        self._advice = advice
        self._previous: Any = None
        self.received = False

    def __enter__(self) -> Self:
        previous = signal.getsignal(signal.SIGTERM)
        replaceable = previous == signal.SIG_DFL or isinstance(getattr(previous, "__self__", None), ExitOnSignal)
        if replaceable and threading.current_thread() is threading.main_thread():
            self._previous = previous
            signal.signal(signal.SIGTERM, self._terminate)
        return self

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if signal.getsignal(signal.SIGTERM) == self._terminate:  # a Trainer in its loops replaces it
            raise Terminated(143)

    def check(self) -> None:
        """Exit if SIGTERM arrived too late in a Trainer's loop to end it.

        Raises:
            Terminated: SIGTERM has arrived.
        """
        if self.received:
            raise Terminated(143)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        if isinstance(error, Stopped):
            return
        reason = _reason(error) or ("terminated" if self.received else None)
        if reason is None:
            return
        if isinstance(error, Exception):  # such as that of a worker process that received the signal too
            log.warning("%s: %s", type(error).__name__, error)
        advice = self._advice()
        message = None if advice is None else f"{reason}{'; ' if advice else ''}{advice}"
        stop(message, 130 if reason == "interrupted" else 143)


def _reason(error: BaseException | None) -> str | None:
    """Return the signal that caused an error, if any; Lightning exits while it handles the exception of either one."""
    # The whole chain: libraries raise other exceptions, such as SystemExit, from or while handling the first one.
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return "interrupted"
        if isinstance(error, Terminated) or type(error).__name__ == "SIGTERMException":
            return "terminated"
        error = error.__cause__ or error.__context__
    return None
