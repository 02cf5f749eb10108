"""Shared memory: anonymous blocks, and the folder of memory-mapped region files."""

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

#: One per folder and process: closing one of two descriptors of a file would release the POSIX locks of both.
_locks: dict[str, Locks] = {}


def boot() -> str:
    """Return the id of the machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SharedBlock:
    """Anonymous shared memory; see docs/reliability.md.

    On Linux it is a memfd, which is freed when the last process that uses it has exited, even if it was killed.
    Elsewhere it is shared with forked processes only.

    Args:
        nbytes: size; pages that are never written take no memory.
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
            raise CacheError("shared memory cannot be sent to processes that were not forked, except on Linux")
        self.nbytes, self.path, self.inode, self._fd = state["nbytes"], state["path"], state["inode"], -1
        fd = reopen(self.path, self.inode)
        try:
            self.buffer = mmap.mmap(fd, self.nbytes)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Release the memory once the last reference is gone."""
        self.buffer = None
        if self._fd >= 0:
            self._end()


class Arena:
    """Regions of a collection in one block of shared memory; see docs/reliability.md.

    Args:
        nbytes: size of the block.
    """

    def __init__(self, nbytes: int) -> None:
        self._block = SharedBlock(nbytes)
        self._locked = SharedBlock(1) if self._block.path else None
        self._open_locks()

    def _open_locks(self) -> None:
        self._locks = Locks(self._locked.path, self._locked.inode) if self._locked is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_block": self._block, "_locked": self._locked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_locks()

    def attach(self, key: str, layout: Layout, offset: int, name: str = "") -> Mapped:
        """Return the region that begins at a byte of the arena."""
        return Mapped(self._block.buffer, offset, layout, None, key, self._locks, name)

    def close(self) -> None:
        """Release the memory once the last reference is gone; running reads raise a `CacheError`."""
        if self._locks is not None and self._locked is not None:
            self._locks.close()
            self._locked.close()
        self._block.close()


class RegionFolder:
    """Regions on disk, each in a memory-mapped file named by the digest of its content; see docs/reliability.md.

    Args:
        folder: folder of the files, private to this user.
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
        """Return the file of a region."""
        return self.folder / f"{key}{_SUFFIX}"

    def attach(self, key: str, layout: Layout, name: str = "") -> Mapped:
        """Map a region, and create its file if needed.

        Args:
            key: digest of the content.
            layout: layout in the file.
            name: human-readable description, stored in the header.

        Raises:
            CacheError: the file belongs to another user.
            NoRoomError: the file cannot be created.
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
            if isinstance(e, CacheError):  # including NoRoomError
                raise
            with contextlib.suppress(OSError):
                if path.stat().st_size != layout.nbytes:
                    path.unlink()  # no chunk was written yet
            raise NoRoomError(e.errno, e.strerror, str(path)) from e
        return Mapped(buffer, 0, layout, str(path), key, self.locks, name, inode)

    def complain(self, error: OSError) -> None:
        """Log once that the disk is full."""
        complain(self.folder, error)

    def _open(self, path: Path, key: str, layout: Layout, name: str) -> tuple[mmap.mmap, tuple[int, int]]:
        """Return the mapping of a region's file, created or replaced if needed, and its device and inode."""
        _raise_file_limit()
        header = {"format": FORMAT, "key": key, "shape": layout.shape, "grid": layout.grid, "bytes": layout.itemsize}
        expected = json.loads(json.dumps(header))
        for attempt in range(2):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                status = os.fstat(fd)
                if status.st_uid != os.getuid() or status.st_mode & 0o077:
                    raise CacheError(
                        f"{path} belongs to another user, or others may read or write it; remove it, or set "
                        "CELLMAP_CACHE_DIR to a private folder"
                    )
                stored = _read_header(os.pread(fd, HEADER, 0))
                matches = stored is not None and {k: stored.get(k) for k in expected} == expected
                other_size = status.st_size not in (0, layout.nbytes)
                if attempt == 0 and (other_size or (stored is not None and not matches)):
                    path.unlink()  # never truncated: another process may have it mapped
                    continue
                os.utime(fd)  # the time of the last use, by which files are evicted
                now = {"boot": boot(), "inode": status.st_ino}
                current = matches and stored is not None and {k: stored.get(k) for k in now} == now
                if not current:
                    # Everything before the voxels must have disk space, and a copied file may be sparse.
                    os.posix_fallocate(fd, 0, layout.parts.voxels)
                    os.ftruncate(fd, layout.nbytes)
                buffer = mmap.mmap(fd, layout.nbytes)
            finally:
                os.close(fd)
            if not current:
                # After a restart, only synced chunks are sure to have reached the disk.
                self._reset(buffer, layout, keep=SYNCED if matches else EMPTY)
                text = json.dumps(header | now | {"name": name[:200]}).encode()
                buffer[:HEADER] = text.ljust(HEADER, b"\0")
            return buffer, inode_of(status)
        raise CacheError(f"{path} was not written by this version and cannot be replaced; remove it")

    @staticmethod
    def _reset(buffer: mmap.mmap, layout: Layout, keep: int) -> None:
        """Clear all flags but one value, and all marks of reserved space."""
        parts = layout.parts
        flags = np.frombuffer(buffer, np.uint8, parts.stamps - parts.flags, parts.flags)
        flags[flags != keep] = EMPTY
        np.frombuffer(buffer, np.uint8, parts.voxels - parts.reserved, parts.reserved)[:] = 0

    def release(self, key: str) -> None:
        """Mark a region as no longer used by this process."""
        self.locks.drop(number_of(key))

    def files(self) -> list[tuple[Path, int, float]]:
        """Return path, bytes on disk and time of the last use of each region, least recently used first."""
        files = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if _KEY.fullmatch(path.stem) and stat.S_ISREG(status.st_mode):
                    files.append((path, status.st_blocks * 512, status.st_mtime))
        return sorted(files, key=lambda entry: entry[2])

    def name(self, path: Path) -> str:
        """Return the human-readable description in a region's header; empty without one."""
        try:
            with path.open("rb") as file:
                header = _read_header(file.read(HEADER))
        except OSError:
            return ""
        return str(header.get("name", "")) if header is not None else ""

    def evict(self, need: int, keep: set[str]) -> int:
        """Remove regions that no process uses, least recently used first, until enough bytes are free.

        Args:
            need: bytes to free.
            keep: keys of regions that must stay.

        Returns:
            The bytes that were freed.
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
    """Return the header of a region file; None if it is not one."""
    try:
        header = json.loads(buffer[:HEADER].rstrip(b"\0"))
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) and "boot" in header else None


_mappings = itertools.count(1)


def _raise_file_limit() -> None:
    """Raise the limit of open files: each mapping holds a descriptor, and hundreds of crops exceed the usual 1024."""
    needed = 2 * next(_mappings) + 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed and soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (2 * needed if hard == resource.RLIM_INFINITY else hard, hard))
