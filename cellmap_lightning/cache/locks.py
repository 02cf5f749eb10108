"""Locks between processes, and single-flight execution among the threads of one."""

import contextlib
import errno
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from cellmap_lightning.errors import CacheError

if sys.platform != "win32":
    import fcntl

_T = TypeVar("_T")

#: Number of the first lock on a whole region in use; smaller numbers lock chunks.
IN_USE = 1 << 61
#: Message of a read that is still running when its dataset is closed.
CLOSED = "the dataset was closed while it was read"


class NoRoomError(CacheError):
    """Disk space for a region, or a lock on it, is not available."""


def inode_of(status: os.stat_result) -> tuple[int, int]:
    """Return device and inode number, which identify a file on this machine."""
    return status.st_dev, status.st_ino


def reopen(path: str, inode: tuple[int, int]) -> int:
    """Open the shared memory behind a file descriptor of this or another process.

    Args:
        path: path of the descriptor below ``/proc``.
        inode: device and inode of the memory. A closed descriptor's number may since have been reused for another file.

    Raises:
        CacheError: the descriptor was closed.
    """
    with contextlib.suppress(OSError):
        if inode_of(os.stat(path)) == inode:  # noqa: PTH116  checked before opening: opening a device has effects
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if inode_of(os.fstat(fd)) == inode:
                return fd
            os.close(fd)
    raise CacheError(CLOSED)


class Locks:
    """Advisory locks on the bytes of one file, between processes and between the threads of each.

    Each process has one file descriptor, which stays open until `close` was called and no thread uses it any more.

    Args:
        path: the file.
        inode: device and inode, if the path is that of a descriptor; see `reopen`.
    """

    def __init__(self, path: str, inode: tuple[int, int] | None = None) -> None:
        self.path, self._inode = path, inode
        self._opened: tuple[int, int] | None = None
        self._closed = False
        self.after_fork()
        _all_locks.add(self)

    def after_fork(self) -> None:
        """Reset the state of the threads, as needed in a forked child, where they do not exist."""
        #: Guards the next three, and is notified when a lock is released.
        self._changed = threading.Condition(threading.Lock())
        self._held: set[int] = set()
        self._users = 0
        self._used: Counter[int] = Counter()

    def __del__(self) -> None:
        self._closed = True
        self._close_unused()

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Yield the open file, which stays open meanwhile even if another thread closes the locks."""
        pid = os.getpid()
        with self._changed:
            if self._closed:
                raise CacheError(CLOSED)
            if self._opened is None or self._opened[0] != pid:
                # A forked child opens the file again: closing any descriptor of a file in a process releases all POSIX
                # locks that the process holds on it, so descriptors must not be shared.
                self._opened = pid, self._open()
            fd = self._opened[1]
            self._users += 1
        changed = self._changed
        try:
            yield fd
        finally:
            with changed:
                if changed is self._changed:  # not in a child that was forked meanwhile
                    self._users -= 1
                    self._close_unused()

    def _open(self) -> int:
        if self._inode is not None:
            return reopen(self.path, self._inode)
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise NoRoomError(e.errno, e.strerror, self.path) from e

    def _close_unused(self) -> None:
        opened = self._opened
        if self._closed and self._users <= 0 and opened is not None:
            self._opened = None
            if opened[0] == os.getpid():
                os.close(opened[1])

    @contextlib.contextmanager
    def hold(self, number: int) -> Iterator[None]:
        """Hold one lock, waiting for other threads and processes.

        Raises:
            CacheError: the locks were closed before it was free.
        """
        with self._descriptor() as fd, self._alone(number):
            self._wait(fd, fcntl.LOCK_EX, number)
            try:
                yield
            finally:
                self._lock(fd, fcntl.LOCK_UN, number)

    @contextlib.contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        """Exclude the other threads of this process, which POSIX locks do not."""
        with self._changed:
            while number in self._held:
                self._changed.wait()
                if self._closed:
                    raise CacheError(CLOSED)
            self._held.add(number)
        held = self._held
        try:
            yield
        finally:
            with self._changed:
                held.discard(number)
                self._changed.notify_all()

    def _wait(self, fd: int, command: int, number: int) -> None:
        """Lock a byte, waiting with exponential backoff while another process holds it."""
        pause = 0.0005
        # Polling instead of F_SETLKW: the kernel would report threads that wait for each other's chunks as a deadlock.
        while not self._lock(fd, command | fcntl.LOCK_NB, number):
            if self._closed:
                raise CacheError(CLOSED)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _lock(self, fd: int, command: int, number: int) -> bool:
        """Lock or release a byte; return False if another process holds it."""
        try:
            fcntl.lockf(fd, command, 1, number)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise NoRoomError(e.errno, e.strerror, self.path) from e
        return True

    def use(self, number: int) -> None:
        """Mark a region as used by this process, until `drop` was called as often or the process ends."""
        with self._descriptor() as fd:
            self._wait(fd, fcntl.LOCK_SH, IN_USE + number)
            with self._changed:
                self._used[number] += 1

    def drop(self, number: int) -> None:
        """Undo one call of `use`."""
        with self._changed:
            if self._used[number] <= 0:  # marked by the parent of a forked process
                del self._used[number]
                return
        with self._descriptor() as fd, self._changed:
            self._used[number] -= 1
            if self._used[number] <= 0:
                del self._used[number]
                self._lock(fd, fcntl.LOCK_UN, IN_USE + number)

    @contextlib.contextmanager
    def unused(self, number: int) -> Iterator[bool]:
        """Yield True if no process uses a region, and prevent others from starting to use it meanwhile."""
        if number in self._used:  # POSIX locks do not exclude the process that holds them
            yield False
            return
        with self._descriptor() as fd:
            free = self._lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, IN_USE + number)
            try:
                yield free
            finally:
                if free:
                    self._lock(fd, fcntl.LOCK_UN, IN_USE + number)

    def close(self) -> None:
        """Refuse further locks and close the file once no thread uses it; may be called repeatedly."""
        with self._changed:
            self._closed = True
            self._close_unused()
            self._changed.notify_all()


_all_locks: "weakref.WeakSet[Locks]" = weakref.WeakSet()


def _after_fork() -> None:
    for locks in list(_all_locks):
        locks.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class SingleFlight:
    """Single-flight execution: one thread does a piece of work while others that need it wait for the result.

    Example:
        >>> result = once.begin(key, lambda: cache.get(key))
        >>> if result is None:
        ...     try:
        ...         result = cache[key] = compute()
        ...     finally:
        ...         once.end(key)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._coming: dict[Hashable, threading.Event] = {}

    def begin(self, key: Hashable, lookup: Callable[[], _T | None]) -> _T | None:
        """Return the result of ``lookup``; None makes the caller responsible for the work and for calling `end`.

        Args:
            key: identity of the work.
            lookup: returns the result if it exists, else None; called with the lock held, so it must not block.
        """
        while True:
            with self.lock:
                result = lookup()
                if result is not None:
                    return result
                coming = self._coming.get(key)
                if coming is None:
                    self._coming[key] = threading.Event()
                    return None
            coming.wait()

    def end(self, key: Hashable) -> None:
        """Report that the work is done or has failed, and release the threads that wait for it."""
        with self.lock:
            done = self._coming.pop(key)
        done.set()
