"""Opening many crops at a time: each comes from many small files, and on network file systems most of it is waiting."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from cellmap_lightning.io.ngff import shared_metadata
from cellmap_lightning.runtime.thread_pool import REMOTE_WORKERS

#: Crops that are opened at a time.
OPENERS = 8
_E = TypeVar("_E")
_T = TypeVar("_T")


def for_all(work: Callable[[_E], _T], entries: Sequence[_E], what: str, unit: str = "crop") -> list[_T]:
    """Return the result for each entry, several of them computed at a time."""
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
    """Number of crops that are opened at a time; remote ones only cost a thread that waits."""
    return REMOTE_WORKERS if any("://" in getattr(entry, "input_path", "") for entry in entries) else OPENERS
