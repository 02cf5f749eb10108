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
#: The error of a read that goes on after its dataset was closed.
CLOSED = "the dataset was closed while it was read"


class NoRoomError(CacheError):
    """There is no room for a region, or no way to lock it."""


def inode_of(status: os.stat_result) -> tuple[int, int]:
    """Return device and number of a file, which tell it from every other file of this machine."""
    return status.st_dev, status.st_ino


def reopen(path: str, inode: tuple[int, int]) -> int:
    """Open the memory behind the descriptor of a process, which may be another one.

    Args:
        path: of the descriptor, below ``/proc``.
        inode: of the memory; the number of a descriptor that was closed may belong to another file now.

    Raises:
        CacheError: the descriptor was closed.
    """
    with contextlib.suppress(OSError):
        if inode_of(os.stat(path)) == inode:  # noqa: PTH116  asked before opening: a device may be behind it
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if inode_of(os.fstat(fd)) == inode:
                return fd
            os.close(fd)
    raise CacheError(CLOSED)


class Locks:
    """Locks on the bytes of one file, between processes and the threads of each; one file descriptor per process.

    The descriptor stays open until `close` was called and no thread uses it any more.

    Args:
        path: the file.
        inode: of the file, if it is the memory behind a descriptor, see `reopen`.
    """

    def __init__(self, path: str, inode: tuple[int, int] | None = None) -> None:
        self.path, self._inode = path, inode
        self._opened: tuple[int, int] | None = None
        self._closed = False
        self.after_fork()
        _all_locks.add(self)

    def after_fork(self) -> None:
        """Begin without users, as in a forked child: the threads that held something are gone."""
        #: Guards what follows, and tells of locks that are free.
        self._changed = threading.Condition(threading.Lock())
        self._held: set[int] = set()
        self._users = 0
        self._used: Counter[int] = Counter()

    def __del__(self) -> None:
        self._closed = True
        self._close_unused()

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Open the file, and keep it open meanwhile, also when another thread closes the locks."""
        pid = os.getpid()
        with self._changed:
            if self._closed:
                raise CacheError(CLOSED)
            if self._opened is None or self._opened[0] != pid:
                # Not shared with the parent: its locks are gone when any descriptor of the file is closed in a process.
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
        """Keep the other threads of this process out, which the system does not."""
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
        """Lock a byte as soon as no other process holds it."""
        pause = 0.0005
        # Not the waiting kind: the kernel would take threads that wait for each other's chunks for a deadlock.
        while not self._lock(fd, command | fcntl.LOCK_NB, number):
            if self._closed:
                raise CacheError(CLOSED)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _lock(self, fd: int, command: int, number: int) -> bool:
        """Lock or release a byte; return False where another process holds it."""
        try:
            fcntl.lockf(fd, command, 1, number)
        except OSError as e:
            if e.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise NoRoomError(e.errno, e.strerror, self.path) from e
        return True

    def use(self, number: int) -> None:
        """Mark a region as used by this process, until as many calls of `drop`, or the end of the process."""
        with self._descriptor() as fd:
            self._wait(fd, fcntl.LOCK_SH, IN_USE + number)
            with self._changed:
                self._used[number] += 1

    def drop(self, number: int) -> None:
        """Take back one call of `use`."""
        with self._changed:
            if self._used[number] <= 0:  # the parent of a forked process uses it
                del self._used[number]
                return
        with self._descriptor() as fd, self._changed:
            self._used[number] -= 1
            if self._used[number] <= 0:
                del self._used[number]
                self._lock(fd, fcntl.LOCK_UN, IN_USE + number)

    @contextlib.contextmanager
    def unused(self, number: int) -> Iterator[bool]:
        """Yield whether no process uses a region; none begins to meanwhile."""
        if number in self._used:  # the system does not keep a process from its own locks
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
        """Refuse further locks, and close the file once no thread uses it; may be called again."""
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
    """Single-flight execution: the first thread does a piece of work, and others that need it wait for the result."""

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
