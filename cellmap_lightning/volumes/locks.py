"""Locks between processes, and work that the threads of one process do once."""

import contextlib
import errno
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from cellmap_lightning.errors import CacheError

if sys.platform != "win32":
    import fcntl

#: Where the locks on whole regions that are in use begin; chunks have those below.
IN_USE = 1 << 61


class Locks:
    """Locks on the bytes of one file, between processes; one file descriptor for each process.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._opened: tuple[int, int] | None = None
        self._used: Counter[int] = Counter()
        self._closed = False
        #: Keeps the threads of this process apart while they reserve room.
        self.reserving = threading.Lock()
        _all_locks.add(self)

    def __del__(self) -> None:
        opened = self._opened
        if opened is not None and opened[0] == os.getpid():
            os.close(opened[1])

    def _fd(self) -> int:
        pid = os.getpid()
        with self._lock:
            if self._closed:
                raise CacheError("the dataset was closed while it was read")
            if self._opened is None or self._opened[0] != pid:
                # Not shared with the parent: its locks are gone when any descriptor of the file is closed in a process.
                self._opened = pid, os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            return self._opened[1]

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold one lock, waiting for other processes; threads of one process are not kept apart."""
        fd, pause = self._fd(), 0.0005
        while True:
            # Not the waiting kind: the kernel would take threads that wait for each other's chunks for a deadlock.
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
                break
            except OSError as e:
                if e.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
        try:
            yield
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, number)

    def use(self, number: int) -> None:
        """Say that this process uses a region, until as many calls of `drop`, or its end."""
        fcntl.lockf(self._fd(), fcntl.LOCK_SH, 1, IN_USE + number)
        self._used[number] += 1

    def drop(self, number: int) -> None:
        """Say that it does not any more."""
        self._used[number] -= 1
        if self._used[number] <= 0:
            del self._used[number]
            fcntl.lockf(self._fd(), fcntl.LOCK_UN, 1, IN_USE + number)

    @contextlib.contextmanager
    def unused(self, number: int) -> Iterator[bool]:
        """Whether no process uses a region; none begins to meanwhile."""
        if number in self._used:  # the system does not keep a process from its own locks
            yield False
            return
        try:
            fcntl.lockf(self._fd(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, IN_USE + number)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._fd(), fcntl.LOCK_UN, 1, IN_USE + number)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            opened, self._opened, self._closed = self._opened, None, True
        if opened is not None and opened[0] == os.getpid():
            os.close(opened[1])

    def after_fork(self) -> None:
        """In a forked child: the lock may be held by a thread that is gone, and the child uses nothing yet."""
        self._lock, self.reserving = threading.Lock(), threading.Lock()
        self._used = Counter()


_all_locks: "weakref.WeakSet[Locks]" = weakref.WeakSet()


def _after_fork() -> None:
    for locks in list(_all_locks):
        locks.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Once:
    """Work of which threads do each piece once: who comes second waits for the one that came first, which runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: dict[Hashable, threading.Event] = {}

    def begin(self, key: Hashable, found: Callable[[], Any]) -> Any:
        """What was found, or None, after which the caller must do the work and call `end`.

        Args:
            key: the piece.
            found: looks whether it is done, and may not wait.
        """
        while True:
            with self._lock:
                result = found()
                if result is not None:
                    return result
                coming = self._coming.get(key)
                if coming is None:
                    self._coming[key] = threading.Event()
                    return None
            coming.wait()

    def end(self, key: Hashable) -> None:
        """The work is done, or has failed: the next one may try."""
        with self._lock:
            done = self._coming.pop(key)
        done.set()
