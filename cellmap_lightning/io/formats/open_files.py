"""Open files of this process, shared by the arrays in them, and closed when there are too many or they change."""

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cellmap_lightning.io.stamps import file_stamp

#: Files that are open at a time at most, apart from those in use.
MOST_OPEN = 32


@dataclass(eq=False)
class _File:
    """An open file, with the number of its users."""

    handle: Any
    stamp: bytes
    users: int = 0
    outdated: bool = False


class OpenFiles:
    """Open files by path; thread-safe. A forked child opens its files again.

    Args:
        most: files that remain open at most.

    Example:
        >>> with OPEN_FILES.use(h5py.File, "volume.h5") as file:
        ...     voxels = file["raw"][:64, :64, :64]
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self.most = most
        self.forget()

    def forget(self) -> None:
        """Drop all files without closing them, as a forked child must: it shares them with its parent."""
        self._dropped = getattr(self, "_files", None)  # referenced, so that nothing is closed by the collector
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[Callable[[str], Any], str], _File] = OrderedDict()

    @contextmanager
    def use(self, opener: Callable[[str], Any], path: str) -> Iterator[Any]:
        """Return the open file of a path, opened again if it has changed; it stays open in the context.

        Args:
            opener: opens it; the handle may have a method ``close``.
            path: the file.
        """
        file = self._acquire(opener, path)
        try:
            yield file.handle
        finally:
            self._release(file)

    def _acquire(self, opener: Callable[[str], Any], path: str) -> _File:
        key, stamp = (opener, path), file_stamp(path)
        with self._lock:
            file = self._files.get(key)
            if file is None or file.stamp != stamp:
                if file is not None:
                    self._remove(key)
                file = self._files[key] = _File(opener(path), stamp)
            self._files.move_to_end(key)
            file.users += 1
            for other in [k for k, f in self._files.items() if not f.users][: max(0, len(self._files) - self.most)]:
                self._remove(other)
        return file

    def _release(self, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if file.outdated and not file.users:
                _close(file.handle)

    def _remove(self, key: tuple[Callable[[str], Any], str]) -> None:
        file = self._files.pop(key)
        file.outdated = True
        if not file.users:
            _close(file.handle)

    def close(self) -> None:
        """Close all files, those in use once they are released."""
        with self._lock:
            for key in list(self._files):
                self._remove(key)


def _close(handle: Any) -> None:
    close = getattr(handle, "close", None)
    if close is not None:
        with suppress(Exception):  # an error of closing a file that was read has no consequence
            close()


#: The open files of this process.
OPEN_FILES = OpenFiles()
atexit.register(OPEN_FILES.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OPEN_FILES.forget)
