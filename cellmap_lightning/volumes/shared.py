"""Decoded voxels that threads and processes share: a memory-mapped file for each region, or one anonymous block.

A region lies in its mapping as ``header | flags | stamps | reserved | voxels``, each part on pages of its own. A
chunk's flag is set after its voxels are in place. Its stamp says what was read, so that a source that changed is
noticed. Flag 1 counts on the machine and boot that wrote it, while the pages are in its memory; flag 2 was written to
disk before, and counts ever after.

Whoever fills a chunk holds a lock on one byte of a lock file, which the system gives back when a process dies.
"""

import contextlib
import errno
import itertools
import json
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CacheError
from cellmap_lightning.volumes.geometry import Shape

if sys.platform != "win32":
    import fcntl
    import resource

log = logging.getLogger(__name__)

FORMAT = 1
_PAGE = mmap.PAGESIZE
_HEADER = 4096
#: Where the locks on whole regions that are in use begin; chunks have those below.
_IN_USE = 1 << 61
_SUFFIX = ".region"
EMPTY, FILLED, SYNCED = 0, 1, 2


class NoRoomError(CacheError):
    """There is no room for a region."""


@dataclass(frozen=True)
class Layout:
    """How a region lies in its mapping.

    Attributes:
        shape: voxels.
        grid: chunks along z, y, x.
        itemsize: bytes of a voxel.
    """

    shape: Shape
    grid: Shape
    itemsize: int

    @property
    def room(self) -> Shape:
        """Voxels along each axis that memory is laid out for.

        Rows, or planes, a power of two apart would fall on the same few lines of the processor's cache.
        """
        z, y, x = self.shape
        if x * self.itemsize % 256 == 0:
            x += max(1, 64 // self.itemsize)
        if y * x * self.itemsize % 4096 == 0:
            y += 1
        return z, y, x

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """First byte of the flags, stamps, reserved planes and voxels, and the number of bytes of all."""
        count, at, ends = int(np.prod(self.grid)), _HEADER, []
        for size in (count, 8 * count, self.grid[0], int(np.prod(self.room)) * self.itemsize):
            ends.append(at)
            at = -(-(at + size) // _PAGE) * _PAGE
        return ends[0], ends[1], ends[2], ends[3], at

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.parts[-1]


def boot() -> str:
    """Names this machine since it was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


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
        fcntl.lockf(self._fd(), fcntl.LOCK_SH, 1, _IN_USE + number)
        self._used[number] += 1

    def drop(self, number: int) -> None:
        """Say that it does not any more."""
        self._used[number] -= 1
        if self._used[number] <= 0:
            del self._used[number]
            fcntl.lockf(self._fd(), fcntl.LOCK_UN, 1, _IN_USE + number)

    @contextlib.contextmanager
    def unused(self, number: int) -> Iterator[bool]:
        """Whether no process uses a region; none begins to meanwhile."""
        if number in self._used:  # the system does not keep a process from its own locks
            yield False
            return
        try:
            fcntl.lockf(self._fd(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _IN_USE + number)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._fd(), fcntl.LOCK_UN, 1, _IN_USE + number)

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


#: One for each folder and process: closing one of two descriptors would give back the locks of both.
_locks: dict[str, Locks] = {}
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


def _number(key: str) -> int:
    """The number of a region's lock."""
    return int(key[:14], 16)


_complained: set[Path] = set()


def _complain(folder: Path, error: OSError) -> None:
    """Say once that there is no room."""
    if folder not in _complained:
        _complained.add(folder)
        log.warning(
            "no room for decoded voxels in %s (%s): what does not fit is read again each time; free some space, or set "
            "cache_bytes or CELLMAP_CACHE_DIR",
            folder, error.strerror or error,
        )  # fmt: skip


class Mapped:
    """A region's chunks and voxels, as this process sees them.

    Attributes:
        flags: uint8 ``[grid]``; see the module.
        stamps: uint64 ``[grid]``.
        voxels: uint8 ``[z, y, x, bytes]``.
        ready: bool ``[grid]``, chunks that this process knows to be filled and current.
        complete: whether all are.
        full: whether there was no room for a chunk.
        decoded: chunks that this process filled.
        once: keeps its threads from filling a chunk twice.
    """

    def __init__(self, buffer: Any, at: int, layout: Layout, path: str | None, key: str, locks: Locks | None) -> None:
        flags, stamps, reserved, voxels, _ = (at + part for part in layout.parts)
        count = int(np.prod(layout.grid))
        self.layout, self.path, self.key, self.locks = layout, path, key, locks
        self.flags = np.frombuffer(buffer, np.uint8, count, flags).reshape(layout.grid)
        self.stamps = np.frombuffer(buffer, np.uint64, count, stamps).reshape(layout.grid)
        self._reserved = np.frombuffer(buffer, np.uint8, layout.grid[0], reserved)
        size = int(np.prod(layout.room)) * layout.itemsize
        whole = np.frombuffer(buffer, np.uint8, size, voxels).reshape(*layout.room, layout.itemsize)
        self.voxels = whole[:, : layout.shape[1], : layout.shape[2]]
        self.ready: npt.NDArray[np.bool_] = np.zeros(layout.grid, np.bool_)
        self.complete = False
        self.full = False
        self.decoded = 0
        self.once = Once()
        self._buffer, self._first = buffer, voxels

    def lock(self, index: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of a chunk."""
        if self.locks is None:
            return contextlib.nullcontext()
        flat = int(np.ravel_multi_index(tuple(index), self.layout.grid))
        return self.locks.hold((_number(self.key) + 1_000_003 * flat) % _IN_USE)

    def reserve(self, planes: tuple[int, int], row: int) -> bool:
        """Make sure that there is room for some planes of chunks before they are written to.

        A full disk would otherwise end the process in the middle of a write.

        Args:
            planes: first and last plane of voxels.
            row: which plane of chunks this is.
        """
        if self.path is None or self.locks is None or self._reserved[row]:
            return True
        size = int(np.prod(self.layout.room[1:])) * self.layout.itemsize
        # Held so that what a file system without reservations does instead, writing zeros, meets no voxels.
        with self.locks.reserving, self.locks.hold((_number(self.key) + 7 * row + 3) % _IN_USE):
            if self._reserved[row]:
                return True
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.posix_fallocate(fd, self._first + planes[0] * size, (planes[1] - planes[0]) * size)
                finally:
                    os.close(fd)
            except OSError as e:
                _complain(Path(self.path).parent, e)
                self.full = True
                return False
            self._reserved[row] = 1
        return True

    def sync(self) -> None:
        """Write to disk what is filled, so that it counts after a restart of the machine."""
        if self.path is None:
            return
        done = self.flags == FILLED
        if done.any():
            self._buffer.flush()
            self.flags[done & (self.flags == FILLED)] = SYNCED
            self._buffer.flush(0, self._first)


class SharedBlock:
    """Memory without a file that worker processes see too.

    On Linux it is an anonymous file, whose memory is given back when the last process that uses it has ended, however
    it ended. Elsewhere it is shared with forked processes alone.

    Args:
        nbytes: bytes; those that are never written take no memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.path = ""
        self._fd = -1
        if sys.platform.startswith("linux"):
            self._fd = os.memfd_create("cellmap")
            os.ftruncate(self._fd, nbytes)
            self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
            self._end = weakref.finalize(self, os.close, self._fd)
        self.buffer: mmap.mmap | None = mmap.mmap(self._fd, nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"nbytes": self.nbytes, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state["path"]:
            raise CacheError("shared memory travels to processes that were not forked on Linux only")
        self.nbytes, self.path, self._fd = state["nbytes"], state["path"], -1
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.buffer = mmap.mmap(fd, self.nbytes)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give the memory back, as soon as nobody looks at it any more."""
        self.buffer = None
        if self._fd >= 0:
            self._end()


class Arena:
    """The regions of a collection in one shared block of memory.

    Args:
        nbytes: bytes.
    """

    def __init__(self, nbytes: int) -> None:
        self._block = SharedBlock(nbytes)
        self._locked = SharedBlock(1) if self._block.path else None
        self._begin()

    def _begin(self) -> None:
        self._locks = Locks(self._locked.path) if self._locked is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_block": self._block, "_locked": self._locked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def attach(self, key: str, layout: Layout, at: int) -> Mapped:
        """The region that begins at a byte of the arena."""
        return Mapped(self._block.buffer, at, layout, None, key, self._locks)

    def close(self) -> None:
        """Give the memory back, as soon as nobody looks at it any more."""
        if self._locks is not None and self._locked is not None:
            self._locks.close()
            self._locked.close()
        self._block.close()


class RegionFolder:
    """The regions on disk, each a file named by what it holds.

    Args:
        folder: where they are; it belongs to this user.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = str(folder.resolve() / "locks")
        self.locks = _locks.setdefault(path, Locks(path))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def path(self, key: str) -> Path:
        """The file of a region."""
        return self.folder / f"{key}{_SUFFIX}"

    def attach(self, key: str, layout: Layout, name: str = "") -> Mapped:
        """Map a region, made if it is not there.

        Args:
            key: names what it holds, for good.
            layout: how it lies in the file.
            name: says to people what it holds.

        Raises:
            CacheError: the file belongs to another user.
            NoRoomError: it cannot be made.
        """
        path, used = self.path(key), False
        try:
            self.locks.use(_number(key))
            used = True
            with self.locks.hold(_number(key) % _IN_USE + _IN_USE // 2):
                buffer = self._open(path, key, layout, name)
        except OSError as e:
            if used:
                self.locks.drop(_number(key))
            if isinstance(e, CacheError):
                raise
            with contextlib.suppress(OSError):
                if path.stat().st_size != layout.nbytes:
                    path.unlink()  # nothing is in it yet
            raise NoRoomError(e.errno, e.strerror, str(path)) from e
        return Mapped(buffer, 0, layout, str(path), key, self.locks)

    def complain(self, error: OSError) -> None:
        """Say once that there is no room."""
        _complain(self.folder, error)

    def _open(self, path: Path, key: str, layout: Layout, name: str) -> mmap.mmap:
        _allow_files()
        header = {"format": FORMAT, "key": key, "shape": layout.shape, "grid": layout.grid, "bytes": layout.itemsize}
        for attempt in range(2):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                stat = os.fstat(fd)
                if stat.st_uid != os.getuid() or stat.st_mode & 0o077:
                    raise CacheError(
                        f"{path} belongs to another user, or others may read or write it; remove it, or set "
                        "CELLMAP_CACHE_DIR to a folder of your own"
                    )
                fresh = stat.st_size == 0
                if fresh:
                    # All but the voxels is written at once, whatever is read first.
                    os.posix_fallocate(fd, 0, layout.parts[3])
                    os.ftruncate(fd, layout.nbytes)
                elif stat.st_size != layout.nbytes and attempt == 0:
                    path.unlink()  # never cut short: somebody may have it mapped
                    continue
                os.utime(fd)
                buffer = mmap.mmap(fd, layout.nbytes)
            finally:
                os.close(fd)
            known = _read_header(buffer)
            if known is None or {k: known.get(k) for k in header} != json.loads(json.dumps(header)):
                if not fresh and known is not None and attempt == 0:
                    path.unlink()
                    continue
                self._reset(buffer, layout, keep=EMPTY)
            elif known["boot"] != boot():
                # What was in the memory of a machine that stopped may or may not have reached the disk.
                self._reset(buffer, layout, keep=SYNCED)
            else:
                return buffer
            text = json.dumps(header | {"boot": boot(), "name": name[:200]}).encode()
            buffer[:_HEADER] = text.ljust(_HEADER, b"\0")
            return buffer
        raise CacheError(f"{path} is not what this version writes, and cannot be replaced")

    @staticmethod
    def _reset(buffer: mmap.mmap, layout: Layout, keep: int) -> None:
        at, stamps, reserved, voxels, _ = layout.parts
        flags = np.frombuffer(buffer, np.uint8, stamps - at, at)
        flags[flags != keep] = EMPTY
        np.frombuffer(buffer, np.uint8, voxels - reserved, reserved)[:] = 0

    def release(self, key: str) -> None:
        """This process does not use a region any more."""
        self.locks.drop(_number(key))

    def files(self) -> list[tuple[Path, int, float]]:
        """Path, bytes on disk and time of the last use of each region, the longest unused first."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((path, stat.st_blocks * 512, stat.st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def name(self, path: Path) -> str:
        """What a region holds, for people; empty where it does not say."""
        try:
            with path.open("rb") as file:
                known = _read_header(file.read(_HEADER))
        except OSError:
            return ""
        return str(known.get("name", "")) if known is not None else ""

    def evict(self, need: int, keep: set[str]) -> int:
        """Remove regions that no process uses, the longest unused first, until so many bytes are free.

        Args:
            need: bytes.
            keep: keys of those that stay.

        Returns:
            The bytes that were removed.
        """
        removed = 0
        for path, size, _ in self.files():
            if removed >= need:
                break
            if path.stem in keep:
                continue
            with self.locks.unused(_number(path.stem)) as free:
                if free:
                    path.unlink(missing_ok=True)
                    removed += size
        return removed


def _read_header(buffer: mmap.mmap | bytes) -> dict[str, Any] | None:
    try:
        known = json.loads(buffer[:_HEADER].rstrip(b"\0"))
    except ValueError:
        return None
    return known if isinstance(known, dict) and "boot" in known else None


_mapped = itertools.count(1)


def _allow_files() -> None:
    """Each mapping holds a file descriptor: hundreds of crops need more than the usual 1024."""
    wanted = 2 * next(_mapped) + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (2 * wanted if hard == resource.RLIM_INFINITY else hard, hard))
