"""What a thread does while its owner goes on: one task at a time, and none waiting."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """A thread that does what it is given, while the owner prepares the next.

    Tasks are done in the order in which they are given; one is taken when the one before has ended, so that no more
    than two of them hold memory: one that is done, and one that the owner prepares. The thread begins with the first.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "cellmap-write")
        self._task: Future[None] | None = None

    def give(self, task: Callable[[], None]) -> None:
        """Have a task done, after the one before has ended.

        Raises:
            Exception: that of the task before; this one is not taken then.
        """
        self.wait()
        self._task = self._pool.submit(task)

    def check(self) -> None:
        """Raise the error of a task that has ended with one; wait for nothing."""
        if self._task is not None and self._task.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            Exception: that of the task, once.
        """
        task = self._task
        if task is not None:
            try:
                task.result()
            finally:
                if task.done():  # Ctrl-C may have ended the waiting
                    self._task = None

    def close(self) -> None:
        """End the thread, after the task that it has begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)
