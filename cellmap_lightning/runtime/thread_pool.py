"""The threads that read: one pool per collection of datasets and process, made at first use, kept until closed."""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Protocol

from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.runtime import interrupts

log = logging.getLogger(__name__)

THREAD_PREFIX = "cellmap-read"
#: Seconds that somebody who closes waits for a read that cannot be cancelled any more.
PATIENCE = 10.0
#: Stands for the thread that waits for a task where none does.
AHEAD = 0


class Closeable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """End it."""


#: Reading threads of a dataset that lies elsewhere, unless somebody says how many.
REMOTE_WORKERS = 32


def default_workers(max_workers: int | None = None, remote: bool = False) -> int:
    """``max_workers``, else the environment's ``CELLMAP_MAX_WORKERS``, else ``min(4, cpu_count)``.

    Threads that wait for a store elsewhere cost nothing, and each waits for one object: there are 32 of them.

    Raises:
        CellMapValueError: the number is not a positive whole number.
    """
    given: Any = max_workers
    source = "max_workers"
    if given is None and os.environ.get("CELLMAP_MAX_WORKERS"):
        given, source = os.environ["CELLMAP_MAX_WORKERS"], "the environment's CELLMAP_MAX_WORKERS"
    if given is None:
        return REMOTE_WORKERS if remote else min(4, os.cpu_count() or 1)
    try:
        workers = int(given)
        if workers != float(given) or workers < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise CellMapValueError(f"{source} must be a positive whole number, got {given!r}") from None
    return workers


def _enter(threads: "weakref.WeakSet[threading.Thread]") -> None:
    """In each new thread of a pool; holds no reference to the pool, which could otherwise not be collected."""
    threads.add(threading.current_thread())


def end_threads(threads: Iterable[threading.Thread], doing: str) -> None:
    """Wait until threads that were told to end have ended; a read that hangs is left behind after `PATIENCE` seconds.

    Args:
        threads: the threads; the calling one is left out, since garbage may be collected in any.
        doing: what they do, for the log.
    """
    deadline = time.monotonic() + PATIENCE
    left = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    hanging = [thread.name for thread in left if thread.is_alive()]
    if hanging:
        log.warning("%s for more than %g s and cannot be interrupted: %s", doing, PATIENCE, ", ".join(hanging))


def _each(tasks: list[Callable[[], None]]) -> None:
    for task in tasks:
        task()


class ReadPool:
    """A `ThreadPoolExecutor` that appears at first use and is the same until `close`.

    It never travels: a copy in another process, forked or unpickled, makes its own.

    Args:
        workers: threads.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._reset()
        _POOLS.add(self)
        interrupts.install()  # here and not on import: the ends of threads run callbacks in the main thread

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        #: The tasks that are waited for, and the thread that waits.
        self._queued: dict[Future[Any], int] = {}
        self._followers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"workers": self.workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The pool of this process."""
        with self._lock:
            return self._executor_locked()

    def _executor_locked(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                self.workers, THREAD_PREFIX, initializer=_enter, initargs=(self._threads,)
            )
        return self._executor

    def run(self, tasks: Iterable[Callable[[], None]], threads: int | None = None) -> None:
        """Run the tasks in the pool and wait for them; none of them may itself wait for the pool.

        The first error is raised as it is, after what had not begun is cancelled and what had begun is finished, so
        that no task writes to memory that its caller has given up.

        Args:
            tasks: what to do.
            threads: how many threads share it: with one, it is the caller. By default all.
        """
        tasks = list(tasks)
        if threads == 1 or threading.current_thread() in self._threads:
            # A caller that is one of the pool's own threads would wait for itself.
            for task in tasks:
                task()
            return
        if threads is not None and threads < self.workers:
            tasks = [partial(_each, tasks[first::threads]) for first in range(threads)]
        futures: list[Future[Any]] = []
        try:
            with self._lock:
                executor = self._executor_locked()
                futures.extend(executor.submit(task) for task in tasks)  # keeps what was submitted if one fails
                self._queued.update(dict.fromkeys(futures, threading.get_ident()))
            for future in futures:
                future.result()
        except CancelledError:
            raise CellMapError("reading was cancelled: the dataset was closed while it was read") from None
        finally:
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()
            for future in futures:
                self._queued.pop(future, None)

    def ahead(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Have tasks done that nobody waits for.

        An error of theirs is not raised: whoever needs what they do does it again, and meets it.
        """
        with self._lock:
            executor = self._executor_locked()
            for task in tasks:
                future = executor.submit(task)
                self._queued[future] = AHEAD
                future.add_done_callback(self._ended)

    def _ended(self, future: Future[Any]) -> None:
        self._queued.pop(future, None)

    def cancel_ahead(self) -> None:
        """Cancel the tasks `ahead` that have not begun, and wait for the others, for `PATIENCE` seconds at most."""
        futures = [future for future, thread in list(self._queued.items()) if thread == AHEAD]
        for future in futures:
            future.cancel()
        wait(futures, PATIENCE)

    def follow(self, follower: Closeable) -> None:
        """Close this first, when the pool is closed: it reads with the pool's threads."""
        with self._lock:  # `close` may be going through them
            self._followers.add(follower)

    def cancel(self, waiting: int | None = None) -> None:
        """Cancel every task that has not begun; whoever waits for it in `run` gets a `CellMapError`.

        Args:
            waiting: only the tasks that this thread waits for.
        """
        for future, thread in list(self._queued.items()):
            if waiting is None or waiting == thread:
                future.cancel()

    def close(self) -> None:
        """Cancel what has not begun, finish what has, end the threads and who reads with them. A later use begins anew.

        Returns after `PATIENCE` seconds at the latest for each of them, also when a read hangs.
        """
        self.cancel()
        with self._lock:
            followers = list(self._followers)
        for follower in followers:
            follower.close()
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
            end_threads(list(self._threads), "a read has been under way")


class ForkGate:
    """Keeps a process from forking in the middle of a read.

    The child would inherit the locks of libraries as the reading threads held them, and not the threads: with two
    threads reading, forked workers of zarr-python 3.1 hang.
    """

    #: Seconds that a fork waits for reads to end.
    PATIENCE = 60.0

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._reading = 0
        self._forking = False
        self._mine = threading.local()

    def __enter__(self) -> None:
        with self._changed:
            while self._forking and not getattr(self._mine, "depth", 0):
                self._changed.wait()
            self._reading += 1
        self._mine.depth = getattr(self._mine, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._mine.depth -= 1
        with self._changed:
            self._reading -= 1
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Wait until nobody reads, but for the thread that forks."""
        with self._changed:
            self._forking = True
            mine: int = getattr(self._mine, "depth", 0)
            self._changed.wait_for(lambda: self._reading <= mine, self.PATIENCE)

    def after_fork(self) -> None:
        """In the parent: reads go on."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()


#: Whoever reads, does it inside.
FORK_GATE = ForkGate()

_POOLS: "weakref.WeakSet[ReadPool]" = weakref.WeakSet()


def _forget_after_fork() -> None:
    # The child has neither the threads nor whoever held the lock.
    FORK_GATE._reset()
    for pool in list(_POOLS):
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=FORK_GATE.before_fork, after_in_parent=FORK_GATE.after_fork, after_in_child=_forget_after_fork
    )
