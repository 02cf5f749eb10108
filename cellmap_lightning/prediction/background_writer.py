"""A single-threaded background task queue with bounded backlog."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class BackgroundWriter:
    """A thread that runs submitted tasks in their order.

    After a task that has failed no other runs, until its error was raised by a method of this class. The thread starts
    with the first task. `PredictionWriter` writes its blocks with it, see docs/prediction.md.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "cellmap-write")
        self._tasks: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, task: Callable[[], None], limit: int = 1) -> Future[None]:
        """Submit a task, and wait while too many are unfinished.

        Args:
            task: the task.
            limit: largest number of unfinished tasks, including this one: they hold memory.

        Returns:
            The task, for `wait_for`.

        Raises:
            Exception: the error of an earlier task; this one is not submitted then.
        """
        while len(self._tasks) >= limit:
            self._end_first()
        future = self._pool.submit(self._run, task)
        self._tasks.append(future)
        return future

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise

    def _end_first(self) -> None:
        """Wait for the first task, and raise its error."""
        first = self._tasks[0]
        try:
            first.result()
        except Exception:
            if first.done():  # otherwise the wait itself was interrupted
                self._drop()
            raise
        self._tasks.popleft()

    def _drop(self) -> None:
        """Drop all tasks: those after one that has failed do not run."""
        for task in self._tasks:
            task.cancel()
        for task in list(self._tasks)[1:]:
            if not task.cancelled():
                task.exception()  # waits for a task that has begun
        self._tasks.clear()
        self._failed = False

    def check(self) -> None:
        """Raise the error of a finished task that has failed, without waiting."""
        while self._tasks and self._tasks[0].done():
            self._end_first()

    def wait_for(self, task: Future[None]) -> None:
        """Wait until a task has ended.

        Raises:
            Exception: the error of this task, or of an earlier one.
        """
        while task in self._tasks:
            self._end_first()

    def wait(self) -> None:
        """Wait until all tasks have ended.

        Raises:
            Exception: the error of a task, once.
        """
        while self._tasks:
            self._end_first()

    def close(self) -> None:
        """End the thread after the submitted tasks. An error that was not raised yet is logged."""
        self._pool.shutdown(wait=True)
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("while the run ended: %s: %s", type(error).__name__, error)
        self._tasks.clear()
