"""Execution of the steps of blocks: in this process, in threads or processes of this machine, or on a Dask cluster.

A step is a function of a block's number that writes files and returns whole numbers. It may run twice, and gives the
same files each time; so a step whose process has ended is repeated, by Dask at once, and otherwise by the next run.
"""

import contextlib
import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cellmap_lightning.errors import CellMapValueError, OutputError, missing_extra
from cellmap_lightning.validation import int_at_least, one_of

Step = Callable[[int], list[int]]
SchedulerName = Literal["threads", "processes", "dask"]
#: Steps that are submitted per process, so that none waits for its next one.
_AHEAD = 2
#: Repetitions of a step on Dask whose worker has ended.
_RETRIES = 3
#: Seconds that a Dask scheduler has to answer.
_TIMEOUT = 20


@dataclass(frozen=True)
class SchedulerOptions:
    """The choice of a scheduler; see `open_scheduler`.

    Example:
        >>> SchedulerOptions("processes", 4).address is None
        True

    Attributes:
        scheduler: ``threads``, ``processes`` or ``dask``.
        processes: number of threads or processes on this machine, or of workers of a local Dask cluster.
        address: address of a Dask scheduler, ``tcp://host:port``; None for a local cluster.
    """

    scheduler: SchedulerName = "processes"
    processes: int = 1
    address: str | None = None


class Scheduler(Protocol):
    """Executes a step for several blocks."""

    def run(self, step: Step, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each number with the result of the step, in the order in which they end."""


class SerialScheduler:
    """Executes steps in this process."""

    def run(self, step: Step, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each number with the result of the step, in order."""
        for number in numbers:
            yield number, step(number)


class ThreadScheduler:
    """Executes steps in several threads of this process.

    Args:
        threads: number of threads.

    Example:
        >>> with open_scheduler("threads", 4) as scheduler:
        ...     list(scheduler.run(lambda number: [number], range(8)))
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "cellmap-blocks")

    def run(self, step: Step, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each number with the result of the step, in the order in which they end."""
        running = {self._pool.submit(step, number): number for number in numbers}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent has ended; by itself it would wait for the next step for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


class ProcessScheduler:
    """Executes steps in several processes on this machine.

    Args:
        processes: number of processes.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        # A fork would copy locks of threads that hold them.
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)

    def run(self, step: Step, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each number with the result of the step, in the order in which they end.

        Raises:
            OutputError: a process was killed.
        """
        left, running = list(reversed(numbers)), dict[Future[list[int]], int]()
        try:
            while left or running:
                while left and len(running) < _AHEAD * self._processes:
                    number = left.pop()
                    running[self._pool.submit(step, number)] = number
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as e:
            raise OutputError(
                f"one of {self._processes} processes has ended, perhaps for lack of memory; use fewer processes or "
                "smaller blocks. Finished blocks remain; run the same command again to resume"
            ) from e
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


class DaskScheduler:
    """Executes steps on a Dask cluster, whose workers see the same file system and have the same package.

    Args:
        processes: number of workers of a local cluster, where no address is given.
        address: address of a scheduler, ``tcp://host:port``.

    Raises:
        MissingExtraError: distributed is not installed.
        OutputError: no scheduler answers at the address.
    """

    def __init__(self, processes: int, address: str | None = None) -> None:
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError as e:
            raise missing_extra("dask", "scheduler=dask needs distributed") from e
        self._cluster: Any = None
        try:
            if address is None:
                self._cluster = distributed.LocalCluster(
                    n_workers=processes, threads_per_worker=1, dashboard_address=None
                )
            self._client = distributed.Client(address if address is not None else self._cluster, timeout=_TIMEOUT)
        except (OSError, ValueError) as e:
            raise OutputError(f"address={address}: no Dask scheduler answers ({e}); check that it runs") from e

    def run(self, step: Step, numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each number with the result of the step, in the order in which they end.

        Raises:
            OutputError: a step was repeated several times, and its workers have ended each time.
        """
        distributed: Any = importlib.import_module("distributed")
        left = list(reversed(numbers))
        running = distributed.as_completed()
        names: dict[Any, int] = {}

        def submit() -> None:
            number = left.pop()
            future = self._client.submit(step, number, pure=False, retries=_RETRIES)
            names[future.key] = number
            running.add(future)

        for _ in range(min(len(left), _AHEAD * max(1, sum(self._client.nthreads().values())))):
            submit()
        try:
            for future in running:
                result = list(future.result())
                if left:
                    submit()
                yield names[future.key], result
        except distributed.KilledWorker as e:
            raise OutputError(
                f"Dask workers have ended at the same block ({e}), perhaps for lack of memory; use smaller blocks. "
                "Finished blocks remain; run the same command again to resume"
            ) from e

    def close(self) -> None:
        """Disconnect from the cluster, and end a local one."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def check_scheduler(name: SchedulerName, address: str | None = None) -> None:
    """Check the name of a scheduler, and that only Dask has an address.

    Raises:
        CellMapValueError: a setting is invalid.
    """
    one_of("scheduler", name, ("threads", "processes", "dask"))
    if name != "dask" and address is not None:
        raise CellMapValueError(f"address={address}: only Dask has one; set scheduler=dask")


@contextlib.contextmanager
def open_scheduler(
    name: SchedulerName = "processes", processes: int = 1, address: str | None = None
) -> Iterator[Scheduler]:
    """Open a scheduler; its processes end with the context.

    Args:
        name: see the module.
        processes: number of threads or processes on this machine.
        address: address of a Dask scheduler; None for a local cluster.

    Raises:
        CellMapValueError: a setting is invalid; see `DaskScheduler`.
    """
    check_scheduler(name, address)
    int_at_least("processes", processes, 1)
    if name == "processes" and processes == 1:
        yield SerialScheduler()
        return
    opened: ThreadScheduler | ProcessScheduler | DaskScheduler
    if name == "dask":
        opened = DaskScheduler(processes, address)
    else:
        opened = ThreadScheduler(processes) if name == "threads" else ProcessScheduler(processes)
    try:
        yield opened
    finally:
        opened.close()
