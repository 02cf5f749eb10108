"""Worker processes of a loader: start method, monitoring, failures and shutdown."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.store import Remote
from cellmap_lightning.loading.options import WORKER_TIMEOUT, TorchOptions
from cellmap_lightning.loading.samples import NumberedSamples, collate

#: Interval at which silent workers are checked, in seconds.
CHECK_INTERVAL = 5.0
#: The beginning of torch's error if no worker has delivered anything.
TIMED_OUT = "DataLoader timed out after"
#: Parts of torch's errors about workers that have ended.
_DEAD = ("exited unexpectedly", "is killed by signal")


def begin_worker(worker: int) -> None:
    """Do nothing in a new worker process: `DataLoader` itself limits torch to one thread there."""


def torch_arguments(samples: NumberedSamples, num_workers: int, slots: bool, given: TorchOptions) -> dict[str, Any]:
    """Return the arguments of `torch.utils.data.DataLoader` apart from the order of samples.

    Args:
        samples: the samples to read.
        num_workers: number of worker processes.
        slots: whether workers deliver batches in shared slots.
        given: the arguments of the loader.

    Raises:
        CellMapValueError: see `start_method`.
    """
    persistent, timeout = given.get("persistent_workers"), given.get("timeout", WORKER_TIMEOUT)
    start, context = given.get("worker_init_fn"), given.get("multiprocessing_context")
    return {
        "num_workers": num_workers,
        "collate_fn": collate,
        # Otherwise batches are read, or copied out of a slot, into page-locked memory.
        "pin_memory": samples.pin and num_workers > 0 and not slots,
        # Without it each pass would draw a number from the global generator, which is the user's.
        "generator": torch.Generator("cpu").manual_seed(samples.seed & 0x7FFFFFFFFFFFFFFF),
        "prefetch_factor": given.get("prefetch_factor"),
        "persistent_workers": num_workers > 0 if persistent is None else persistent,
        **_worker_options(num_workers, samples.sources, timeout, start, context),
    }


def _worker_options(
    num_workers: int, sources: Sequence[SampleSource], timeout: float, worker_init_fn: Any, context: Any
) -> dict[str, Any]:
    """Return the arguments of `torch.utils.data.DataLoader` that concern worker processes.

    Args:
        num_workers: number of worker processes.
        sources: the datasets that they read.
        timeout: seconds after which a worker that delivers nothing is an error.
        worker_init_fn: called in each worker process.
        context: the requested start method or context; None for one that is safe.

    Raises:
        CellMapValueError: see `start_method`.
    """
    if num_workers > 0:
        # Not None: Lightning would add one that makes every worker import Lightning.
        worker_init_fn = worker_init_fn or begin_worker
        context = start_method(sources, context)
    return {
        "timeout": timeout if num_workers else 0,
        "worker_init_fn": worker_init_fn,
        "multiprocessing_context": context,
    }


def start_method(sources: Sequence[SampleSource], context: Any) -> Any:
    """Return the multiprocessing context for worker processes; None for the default of the platform.

    Raises:
        CellMapValueError: ``context`` forks, with a reader whose threads would be missing in the child.
    """
    crops = [crop for source in sources for crop in source.crops]
    has_threads = any(crop.reader == "tensorstore" or not all(map(_forks, crop.read_levels)) for crop in crops)
    if context is None:
        if not has_threads and not any(isinstance(crop.raw_at, Remote) for crop in crops):
            return None
        context = "forkserver"  # connections do not survive a fork
    if isinstance(context, str):
        context = multiprocessing.get_context(context)
    method = context.get_start_method()
    if has_threads and method == "fork":
        raise CellMapValueError(
            "TensorStore (reader='tensorstore', precomputed volumes) does not work in forked processes; leave "
            "multiprocessing_context out, or use 'forkserver' or 'spawn'"
        )
    if method == "forkserver":
        # Imported once, in the process that workers are forked from.
        context.set_forkserver_preload(["cellmap_lightning.datasets.dataset"])
    return context


def _forks(level: Level) -> bool:
    """Return whether an array can be read in a process that was forked after an earlier read."""
    return level.source is None or level.source.forks


def end_workers(iterator: Iterator[Any]) -> None:
    """End the worker processes of an iterator of torch's, if it has any."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


def describe_failure(error: RuntimeError, timeout: float) -> tuple[str, str] | None:
    """Return the failure of a worker process and advice, from an error of torch's; None for any other error.

    Args:
        error: the error.
        timeout: seconds that a worker was waited for.
    """
    text = str(error)
    if isinstance(error, CellMapError) or text.startswith("Caught "):  # raised by user code in a worker
        return None
    if TIMED_OUT in text:
        return f"delivered nothing for {timeout:g} s", "set timeout to wait longer"
    if any(words in text for words in _DEAD):
        return (
            "ended unexpectedly: it was killed, perhaps for memory,",
            f"fewer workers or a smaller batch_size need less ({text.splitlines()[0]})",
        )
    return None


def watched(iterator: Iterator[Any], timeout: float) -> Iterator[Any]:
    """Return the iterator, with its worker processes checked every few seconds during the wait for a batch.

    With a timeout torch checks them once, when it has passed, and depends on a signal handler otherwise: an exception
    that this raises while Python runs a finalizer is lost.

    Args:
        iterator: of a `torch.utils.data.DataLoader`.
        timeout: seconds after which a worker that delivers nothing is an error; 0 waits without limit.

    Raises:
        RuntimeError: torch's, if a worker has ended or the timeout has passed.
    """
    if not timeout or not hasattr(iterator, "_workers"):
        return iterator
    vars(iterator)["_timeout"] = min(timeout, CHECK_INTERVAL)  # torch has no public way to shorten it
    return _Watched(iterator, timeout)


class _Watched:
    """An iterator that repeats waits that have timed out early; it references no batch that it has returned."""

    def __init__(self, iterator: Iterator[Any], timeout: float) -> None:
        self._iterator, self._timeout = iterator, timeout

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> Any:
        end = time.monotonic() + self._timeout
        while True:
            try:
                return next(self._iterator)
            except RuntimeError as error:
                # Errors raised by the worker's own code begin with "Caught", even if they mention a timeout.
                if not str(error).startswith(TIMED_OUT) or time.monotonic() >= end:
                    raise
