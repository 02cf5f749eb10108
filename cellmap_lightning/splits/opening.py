"""Concurrent opening of crops: each reads many small files and, on network file systems, mostly waits."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from cellmap_lightning.io.ngff import shared_metadata
from cellmap_lightning.runtime.thread_pool import REMOTE_WORKERS

#: Number of crops that are opened at a time.
OPENERS = 8
_E = TypeVar("_E")
_T = TypeVar("_T")


def for_all(work: Callable[[_E], _T], entries: Sequence[_E], what: str, unit: str = "crop") -> list[_T]:
    """Apply a function to each entry in several threads, with a progress bar; return the results in order."""
    if not entries:
        return []
    with (
        ThreadPoolExecutor(min(_openers(entries), len(entries)), "cellmap-open") as pool,
        shared_metadata(),
        tqdm(total=len(entries), desc=what, unit=unit, disable=None, leave=False, delay=1) as bar,
    ):
        futures = [pool.submit(work, entry) for entry in entries]
        try:
            results = []
            for future in futures:
                results.append(future.result())
                bar.update()
            return results
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _openers(entries: Sequence[Any]) -> int:
    """Return the number of crops that are opened at a time; more for remote ones, whose threads only wait."""
    return REMOTE_WORKERS if any("://" in getattr(entry, "input_path", "") for entry in entries) else OPENERS
