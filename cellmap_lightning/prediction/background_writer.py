"""What a thread does while its owner goes on: one task at a time, and few waiting."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class BackgroundWriter:
    """A thread that does what it is given, while the owner prepares the next.

    Tasks are done in the order in which they are given; after one that has failed none is done, until its error was
    met. The thread begins with the first.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "cellmap-write")
        self._tasks: deque[Future[None]] = deque()
        self._failed = False

    def give(self, task: Callable[[], None], most: int = 1) -> Future[None]:
        """Have a task done.

        Args:
            task: what to do.
            most: so many tasks may be under way afterwards, this one too; until then it waits. They hold memory.

        Returns:
            The task, for `until`.

        Raises:
            Exception: that of a task before; this one is not taken then.
        """
        while len(self._tasks) >= most:
            self._end_first()
        given = self._pool.submit(self._do, task)
        self._tasks.append(given)
        return given

    def _do(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise

    def _end_first(self) -> None:
        first = self._tasks[0]
        try:
            first.result()
        except Exception:
            if first.done():
                self._drop()
            raise
        self._tasks.popleft()

    def _drop(self) -> None:
        """Forget everything: what came after an error was not done."""
        for task in self._tasks:
            task.cancel()
        for task in list(self._tasks)[1:]:
            if not task.cancelled():
                task.exception()
        self._tasks.clear()
        self._failed = False

    def check(self) -> None:
        """Raise the error of a task that has ended with one; wait for nothing."""
        while self._tasks and self._tasks[0].done():
            self._end_first()

    def until(self, task: Future[None]) -> None:
        """Wait until a task has ended.

        Raises:
            Exception: that of this task, or of one before it.
        """
        while task in self._tasks:
            self._end_first()

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            Exception: that of a task, once.
        """
        while self._tasks:
            self._end_first()

    def close(self) -> None:
        """End the thread, after it has done what it was given. An error that nobody has met is logged."""
        self._pool.shutdown(wait=True)
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("while the run ended: %s: %s", type(error).__name__, error)
        self._tasks.clear()
