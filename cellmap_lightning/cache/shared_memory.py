"""Memory and files that processes share: anonymous blocks, and the folder of region files."""

import contextlib
import itertools
import json
import mmap
import os
import re
import stat
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.cache.locks import IN_USE, Locks, NoRoomError, inode_of, reopen
from cellmap_lightning.cache.mapped import EMPTY, HEADER, SYNCED, Layout, Mapped, complain, number_of
from cellmap_lightning.errors import CacheError

if sys.platform != "win32":
    import resource

FORMAT = 2
_SUFFIX = ".region"
_KEY = re.compile("[0-9a-f]{40}")

#: One for each folder and process: closing one of two descriptors would give back the locks of both.
_locks: dict[str, Locks] = {}


def boot() -> str:
    """Names this machine since it was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SharedBlock:
    """Memory without a file that worker processes see too.

    On Linux it is an anonymous file, whose memory is given back when the last process that uses it has ended, however
    it ended. Elsewhere it is shared with forked processes alone.

    Args:
        nbytes: bytes; those that are never written take no memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.path, self.inode = "", (0, 0)
        self._fd = -1
        if sys.platform.startswith("linux"):
            self._fd = os.memfd_create("cellmap")
            os.ftruncate(self._fd, nbytes)
            self.path, self.inode = f"/proc/{os.getpid()}/fd/{self._fd}", inode_of(os.fstat(self._fd))
            self._end = weakref.finalize(self, os.close, self._fd)
        self.buffer: mmap.mmap | None = mmap.mmap(self._fd, nbytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"nbytes": self.nbytes, "path": self.path, "inode": self.inode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state["path"]:
            raise CacheError("shared memory travels to processes that were not forked on Linux only")
        self.nbytes, self.path, self.inode, self._fd = state["nbytes"], state["path"], state["inode"], -1
        fd = reopen(self.path, self.inode)
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
        self._locks = Locks(self._locked.path, self._locked.inode) if self._locked is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_block": self._block, "_locked": self._locked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def attach(self, key: str, layout: Layout, at: int, name: str = "") -> Mapped:
        """Return the region that begins at a byte of the arena."""
        return Mapped(self._block.buffer, at, layout, None, key, self._locks, name)

    def close(self) -> None:
        """Release the memory once the last reference is gone; threads that still read get a `CacheError`."""
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
            self.locks.use(number_of(key))
            used = True
            with self.locks.hold(number_of(key) % IN_USE + IN_USE // 2):
                buffer, inode = self._open(path, key, layout, name)
        except OSError as e:
            if used:
                self.locks.drop(number_of(key))
            if isinstance(e, CacheError):  # also where there is no room
                raise
            with contextlib.suppress(OSError):
                if path.stat().st_size != layout.nbytes:
                    path.unlink()  # nothing is in it yet
            raise NoRoomError(e.errno, e.strerror, str(path)) from e
        return Mapped(buffer, 0, layout, str(path), key, self.locks, name, inode)

    def complain(self, error: OSError) -> None:
        """Say once that there is no room."""
        complain(self.folder, error)

    def _open(self, path: Path, key: str, layout: Layout, name: str) -> tuple[mmap.mmap, tuple[int, int]]:
        """Map a file, made or replaced where it does not hold this region; also its device and number."""
        _allow_files()
        header = {"format": FORMAT, "key": key, "shape": layout.shape, "grid": layout.grid, "bytes": layout.itemsize}
        expected = json.loads(json.dumps(header))
        for attempt in range(2):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                status = os.fstat(fd)
                if status.st_uid != os.getuid() or status.st_mode & 0o077:
                    raise CacheError(
                        f"{path} belongs to another user, or others may read or write it; remove it, or set "
                        "CELLMAP_CACHE_DIR to a folder of your own"
                    )
                known = _read_header(os.pread(fd, HEADER, 0))
                ours = known is not None and {k: known.get(k) for k in expected} == expected
                other_size = status.st_size not in (0, layout.nbytes)
                if attempt == 0 and (other_size or (known is not None and not ours)):
                    path.unlink()  # never cut short: another process may have it mapped
                    continue
                os.utime(fd)
                now = {"boot": boot(), "inode": status.st_ino}
                current = ours and known is not None and {k: known.get(k) for k in now} == now
                if not current:
                    # All but the voxels is written at once, and a copy of a file may have holes.
                    os.posix_fallocate(fd, 0, layout.parts.voxels)
                    os.ftruncate(fd, layout.nbytes)
                buffer = mmap.mmap(fd, layout.nbytes)
            finally:
                os.close(fd)
            if not current:
                # What was in the memory of a machine that stopped may or may not have reached the disk.
                self._reset(buffer, layout, keep=SYNCED if ours else EMPTY)
                text = json.dumps(header | now | {"name": name[:200]}).encode()
                buffer[:HEADER] = text.ljust(HEADER, b"\0")
            return buffer, inode_of(status)
        raise CacheError(f"{path} is not what this version writes, and cannot be replaced")

    @staticmethod
    def _reset(buffer: mmap.mmap, layout: Layout, keep: int) -> None:
        """Clear the flags that do not count any more, and what is known about reserved space."""
        parts = layout.parts
        flags = np.frombuffer(buffer, np.uint8, parts.stamps - parts.flags, parts.flags)
        flags[flags != keep] = EMPTY
        np.frombuffer(buffer, np.uint8, parts.voxels - parts.reserved, parts.reserved)[:] = 0

    def release(self, key: str) -> None:
        """This process does not use a region any more."""
        self.locks.drop(number_of(key))

    def files(self) -> list[tuple[Path, int, float]]:
        """Path, bytes on disk and time of the last use of each region, the longest unused first."""
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if _KEY.fullmatch(path.stem) and stat.S_ISREG(status.st_mode):
                    found.append((path, status.st_blocks * 512, status.st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def name(self, path: Path) -> str:
        """What a region holds, for people; empty where it does not say."""
        try:
            with path.open("rb") as file:
                known = _read_header(file.read(HEADER))
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
            with self.locks.unused(number_of(path.stem)) as free:
                if free:
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
                        removed += size
        return removed


def _read_header(buffer: mmap.mmap | bytes) -> dict[str, Any] | None:
    try:
        known = json.loads(buffer[:HEADER].rstrip(b"\0"))
    except (ValueError, RecursionError):
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
