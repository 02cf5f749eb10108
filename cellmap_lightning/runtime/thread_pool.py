"""Thread pools for reading: one per process and collection of datasets, started lazily and alive until closed."""

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
#: Shutdown timeout for running reads, in seconds.
PATIENCE = 10.0
#: Default number of reading threads for remote data: each waits for one object, and waiting costs nothing.
REMOTE_WORKERS = 32
#: In place of the id of the waiting thread, for tasks that no thread waits for.
_AHEAD = 0


class Closeable(Protocol):
    """An object with a ``close`` method."""

    def close(self) -> None:
        """Release all resources."""


def default_workers(max_workers: int | None = None, remote: bool = False) -> int:
    """Return ``max_workers``, else the environment's ``CELLMAP_MAX_WORKERS``, else ``min(4, cpu_count)``.

    The last is `REMOTE_WORKERS` for remote data.

    Raises:
        CellMapValueError: the number is not a positive whole number.
    """
    value: Any = max_workers
    name = "max_workers"
    if value is None and os.environ.get("CELLMAP_MAX_WORKERS"):
        value, name = os.environ["CELLMAP_MAX_WORKERS"], "the environment's CELLMAP_MAX_WORKERS"
    if value is None:
        return REMOTE_WORKERS if remote else min(4, os.cpu_count() or 1)
    try:
        workers = int(value)
        if workers != float(value) or workers < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise CellMapValueError(f"{name} must be a positive whole number, got {value!r}") from None
    return workers


def _register_thread(threads: "weakref.WeakSet[threading.Thread]") -> None:
    # A function, and not a method: a reference to the pool would keep it from being garbage-collected.
    threads.add(threading.current_thread())


def end_threads(threads: Iterable[threading.Thread], doing: str) -> None:
    """Join threads that are about to end; one with a hanging read is abandoned after `PATIENCE` seconds.

    Args:
        threads: the threads; the calling thread is skipped, since finalizers may run in any.
        doing: their activity, for the log.
    """
    deadline = time.monotonic() + PATIENCE
    others = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    hanging = [thread.name for thread in others if thread.is_alive()]
    if hanging:
        log.warning("%s for more than %g s and cannot be interrupted: %s", doing, PATIENCE, ", ".join(hanging))


def _run_all(tasks: list[Callable[[], None]]) -> None:
    for task in tasks:
        task()


class ReadPool:
    """A `ThreadPoolExecutor` that is created at first use and reused until `close`; thread-safe.

    Threads are never shared between processes: a forked or unpickled copy starts new ones.

    Args:
        workers: number of threads.

    Example:
        >>> pool = ReadPool(4)
        >>> pool.run([lambda: None, lambda: None])
        >>> pool.close()
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.reset()
        _POOLS.add(self)
        interrupts.install()  # here, and not on import, since threads that end run callbacks in the main thread

    def reset(self) -> None:
        """Forget executor, locks and tasks without touching them, as a forked child must."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        # Unfinished tasks, and the id of the thread that waits for each, or _AHEAD.
        self._queued: dict[Future[Any], int] = {}
        self._readers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"workers": self.workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def executor(self) -> ThreadPoolExecutor:
        """Executor of this process."""
        with self._lock:
            return self._executor_locked()

    def _executor_locked(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                self.workers, THREAD_PREFIX, initializer=_register_thread, initargs=(self._threads,)
            )
        return self._executor

    def run(self, tasks: Iterable[Callable[[], None]], threads: int | None = None) -> None:
        """Run tasks in the pool and wait for them; no task may itself wait for the pool.

        The first error is raised unchanged, after pending tasks are cancelled and running ones have finished: no task
        writes to memory that its caller has released.

        Args:
            tasks: the tasks.
            threads: number of threads that share the tasks; with 1, the calling thread runs them. By default all.

        Raises:
            CellMapError: the pool was closed meanwhile.
        """
        tasks = list(tasks)
        # A caller that is one of the pool's threads would wait for itself.
        if threads == 1 or threading.current_thread() in self._threads:
            _run_all(tasks)
            return
        if threads is not None and threads < self.workers:
            tasks = [partial(_run_all, tasks[first::threads]) for first in range(threads)]
        futures: list[Future[Any]] = []
        try:
            with self._lock:
                executor = self._executor_locked()
                futures.extend(executor.submit(task) for task in tasks)  # keeps those submitted so far if one fails
                self._queued.update(dict.fromkeys(futures, threading.get_ident()))
            for future in futures:
                future.result()
        except CancelledError:
            raise CellMapError("reading was cancelled: the dataset was closed while it was read") from None
        finally:
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():  # `wait` would wait for cancelled ones too, until a thread dequeues them
                    future.exception()
            for future in futures:
                self._queued.pop(future, None)

    def ahead(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks in the background.

        Errors are ignored; the read is repeated (and raises) when its result is needed.
        """
        with self._lock:
            executor = self._executor_locked()
            for task in tasks:
                future = executor.submit(task)
                self._queued[future] = _AHEAD
                future.add_done_callback(self._dequeue)

    def _dequeue(self, future: Future[Any]) -> None:
        self._queued.pop(future, None)

    def cancel_ahead(self) -> None:
        """Cancel pending tasks of `ahead`, and wait for running ones, for `PATIENCE` seconds at most."""
        futures = [future for future, thread in list(self._queued.items()) if thread == _AHEAD]
        for future in futures:
            future.cancel()
        wait(futures, PATIENCE)

    def follow(self, reader: Closeable) -> None:
        """Register an object that reads with the pool's threads, to be closed before the pool is."""
        with self._lock:  # `close` may be iterating over them
            self._readers.add(reader)

    def cancel(self, waiting: int | None = None) -> None:
        """Cancel all pending tasks; a `run` that waits for one raises a `CellMapError`.

        Args:
            waiting: id of a thread, to cancel only the tasks that it waits for.
        """
        for future, thread in list(self._queued.items()):
            if waiting is None or waiting == thread:
                future.cancel()

    def close(self) -> None:
        """Cancel pending tasks, wait for running ones, close registered readers and end the threads.

        A later use starts new threads. Each wait ends after `PATIENCE` seconds, also when a read hangs.
        """
        self.cancel()
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.close()
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
            end_threads(list(self._threads), "a read has been under way")


class ForkGate:
    """A lock that keeps a process from forking in the middle of a read.

    The child would inherit the locks of libraries as held by the reading threads, but not the threads that release
    them: with two threads reading, forked workers of zarr-python 3.1 hang. Reads share the lock, and may nest.

    Example:
        >>> with FORK_GATE:
        ...     pass  # read
    """

    #: Timeout of a fork that waits for reads, in seconds.
    PATIENCE = 60.0

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Replace all locks and counters, as a forked child must."""
        self._changed = threading.Condition()
        self._reading = 0
        self._forking = False
        self._mine = threading.local()

    def __enter__(self) -> None:
        with self._changed:
            # A nested read must not wait: the fork waits for the outer one.
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
        """Wait until no other thread reads."""
        with self._changed:
            self._forking = True
            mine: int = getattr(self._mine, "depth", 0)
            self._changed.wait_for(lambda: self._reading <= mine, self.PATIENCE)

    def after_fork(self) -> None:
        """Let reads continue in the parent."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()


#: The gate of this process; all reads happen inside it.
FORK_GATE = ForkGate()

_POOLS: "weakref.WeakSet[ReadPool]" = weakref.WeakSet()


def _forget_after_fork() -> None:
    # The threads that held the locks do not exist in the child.
    FORK_GATE.reset()
    for pool in list(_POOLS):
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=FORK_GATE.before_fork, after_in_parent=FORK_GATE.after_fork, after_in_child=_forget_after_fork
    )
