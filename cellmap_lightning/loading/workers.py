"""Worker processes of a loader: how they start, how they end, and whether they are alive."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.io.store import Remote

#: Seconds after which workers that deliver nothing are checked.
CHECK_INTERVAL = 5.0
#: The beginning of torch's error where no worker has delivered anything.
TIMED_OUT = "DataLoader timed out after"


def begin_worker(worker: int) -> None:
    """In a new worker process: one thread for torch, as `DataLoader` itself sets."""


def start_method(sources: Sequence[SampleSource], given: Any) -> Any:
    """How worker processes are started.

    Raises:
        CellMapValueError: by a fork, with a reader whose threads would be missing in the child.
    """
    crops = [crop for source in sources for crop in source.crops]
    unsafe = any(crop.reader == "tensorstore" for crop in crops)
    if given is None and not unsafe and not any(isinstance(crop.raw_at, Remote) for crop in crops):
        return None  # connections to elsewhere stay behind in a fork, and the child opens new ones
    context = multiprocessing.get_context("forkserver") if given is None else given
    if isinstance(context, str):
        context = multiprocessing.get_context(context)
    method = context.get_start_method()
    if unsafe and method == "fork":
        raise CellMapValueError(
            "reader='tensorstore' does not work in forked processes; leave multiprocessing_context out, or say "
            "'forkserver' or 'spawn'"
        )
    if method == "forkserver":
        # Imported once, in the process that workers are forked from.
        context.set_forkserver_preload(["cellmap_lightning.datasets.dataset"])
    return context


def end_workers(iterator: Iterator[Any]) -> None:
    """End the worker processes of an iterator of torch's, if it has any."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


def watched(iterator: Iterator[Any], timeout: float) -> Iterator[Any]:
    """Return the iterator, with its worker processes checked every few seconds during the wait for a batch.

    With a timeout torch checks them once, when it has passed, and depends on a signal handler otherwise: an exception
    that this raises while Python runs a finalizer is lost.

    Args:
        iterator: of a `torch.utils.data.DataLoader`.
        timeout: seconds after which a worker that delivers nothing is an error; 0 waits without limit.

    Raises:
        RuntimeError: torch's, where a worker has ended or the timeout has passed.
    """
    if not timeout or not hasattr(iterator, "_workers"):
        return iterator
    iterator._timeout = min(timeout, CHECK_INTERVAL)  # type: ignore[attr-defined]
    return _Watched(iterator, timeout)


class _Watched:
    """An iterator that repeats waits that have timed out early; it keeps no batch that it has returned."""

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
                # Errors of the worker's own begin with "Caught", whatever they say of timeouts.
                if not str(error).startswith(TIMED_OUT) or time.monotonic() >= end:
                    raise
