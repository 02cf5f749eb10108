"""The layout of one region in shared memory, and how its chunks are written, verified and synced.

A region is stored as ``header | flags | stamps | checksums | reserved | voxels``, each part on separate pages. A chunk
is written in this order: clear its flag, write its voxels, stamp and checksum, set its flag. The writer holds a lock
(see `locks`), which the operating system releases when a process dies.

- The *stamp* identifies the version of the files that the voxels were decoded from, so that stale chunks are detected.
- The *checksum* covers the region's key, the chunk's index, its stamp and its voxels. A process verifies it before it
  uses a chunk that it has not decoded itself, which detects damaged pages and mixtures of pages of different ages.
- The *flag* is `FILLED` once the chunk is complete, which is valid until the machine restarts, while pages are in
  memory. It becomes `SYNCED` after everything else was flushed to disk, which is valid after a restart as well.
"""

import contextlib
import errno
import logging
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.locks import IN_USE, Locks, NoRoomError, SingleFlight, inode_of
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.retrying import power_of_two

log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
HEADER = 4096
EMPTY, FILLED, SYNCED = 0, 1, 2
#: Mark of a plane of chunks whose space on disk is reserved: an arbitrary value that damage rarely produces.
_RESERVED = 0xA5
#: Bytes per checksum call: small enough for the CPU cache, large enough to release the GIL.
_SLAB = 1 << 20


class Parts(NamedTuple):
    """First byte of each part of a region, and the number of bytes of all."""

    flags: int
    stamps: int
    checksums: int
    reserved: int
    voxels: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Layout of a region in its mapping.

    Attributes:
        shape: voxels along z, y, x.
        grid: chunks along z, y, x.
        itemsize: bytes of a voxel.
    """

    shape: Shape
    grid: Shape
    itemsize: int

    @property
    def room(self) -> Shape:
        """Allocated voxels along z, y, x: the shape, padded against cache-line conflicts."""
        # Rows or planes a power of two apart would compete for the same few lines of the CPU cache.
        z, y, x = self.shape
        if x * self.itemsize % 256 == 0:
            x += max(1, 64 // self.itemsize)
        if y * x * self.itemsize % 4096 == 0:
            y += 1
        return z, y, x

    @property
    def parts(self) -> Parts:
        """Offsets of the parts, each rounded up to a page."""
        count, starts = int(np.prod(self.grid)), [HEADER]
        for size in (count, 8 * count, 4 * count, self.grid[0], int(np.prod(self.room)) * self.itemsize):
            starts.append(-(-(starts[-1] + size) // _PAGE) * _PAGE)
        return Parts(*starts)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.parts.end


def number_of(key: str) -> int:
    """Return the lock number of a region."""
    return int(key[:14], 16)


_complained: set[Path] = set()


def complain(folder: Path, error: OSError) -> None:
    """Log once per folder that the disk is full."""
    if folder not in _complained:
        _complained.add(folder)
        log.warning(
            "no room for decoded voxels in %s (%s): what does not fit is read again each time; free some space, or set "
            "cache_bytes or CELLMAP_CACHE_DIR",
            folder, error.strerror or error,
        )  # fmt: skip


class Mapped:
    """Chunks and voxels of a region, mapped into the memory of this process; see docs/reliability.md.

    Attributes:
        flags: uint8 ``[grid]``; see the module's docstring.
        stamps: uint64 ``[grid]``.
        checksums: uint32 ``[grid]``.
        voxels: uint8 ``[z, y, x, bytes]``.
        ready: bool ``[grid]``, True for chunks that this process has filled or verified.
        complete: True if all are ready.
        full: True once a chunk did not fit on the disk.
        decoded: number of chunks that this process filled.
        once: prevents two threads from filling the same chunk.

    Args:
        buffer: the mapped memory.
        at: first byte of the region.
        layout: shape of the region and its chunks.
        path: the mapped file; None for shared memory.
        key: digest that identifies the content.
        locks: exclude other processes while a chunk is written.
        name: name of the content, for log lines.
        inode: device and inode of the file.
    """

    def __init__(
        self,
        buffer: Any,
        at: int,
        layout: Layout,
        path: str | None,
        key: str,
        locks: Locks | None,
        name: str = "",
        inode: tuple[int, int] | None = None,
    ) -> None:
        parts = Parts(*(at + part for part in layout.parts))
        count = int(np.prod(layout.grid))
        self.layout, self.path, self.key, self.locks, self.name = layout, path, key, locks, name
        self.flags = np.frombuffer(buffer, np.uint8, count, parts.flags).reshape(layout.grid)
        self.stamps = np.frombuffer(buffer, np.uint64, count, parts.stamps).reshape(layout.grid)
        self.checksums = np.frombuffer(buffer, np.uint32, count, parts.checksums).reshape(layout.grid)
        self._reserved = np.frombuffer(buffer, np.uint8, layout.grid[0], parts.reserved)
        size = int(np.prod(layout.room)) * layout.itemsize
        whole = np.frombuffer(buffer, np.uint8, size, parts.voxels).reshape(*layout.room, layout.itemsize)
        self.voxels = whole[:, : layout.shape[1], : layout.shape[2]]
        self.ready: npt.NDArray[np.bool_] = np.zeros(layout.grid, np.bool_)
        self.complete = False
        self.full = False
        self.decoded = 0
        self.once = SingleFlight()
        self._buffer, self._first, self._inode = buffer, parts.voxels, inode
        self._damaged = 0

    def fill(self, index: Shape, start: Sequence[int], shape: Shape, stamp: int, decode: Callable[[], Any]) -> bool:
        """Fill a chunk with the voxels of a stamp, unless it holds them already; return False if the disk is full.

        Args:
            index: the chunk.
            start: its first voxel in the mapping.
            shape: its voxels.
            stamp: stamp of the source, taken before ``decode`` is called.
            decode: function that returns the voxels.
        """
        place = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        # First without a lock: most chunks are filled already, by another process or an earlier run.
        if not (self._claimed(index, stamp) and self._intact(index, place, stamp)):
            try:
                with self.lock(index):
                    # Checked again: another process may have filled it, or was writing during the first check.
                    claimed = self._claimed(index, stamp)
                    if not (claimed and self._intact(index, place, stamp)):
                        if claimed:
                            self._report_damage(index)
                        self.reserve((start[0], start[0] + shape[0]), index[0])
                        self.flags[index] = EMPTY
                        self._write(index, place, stamp, decode())
                        self.flags[index] = FILLED
                        self.decoded += 1
            except NoRoomError as e:
                complain(Path(e.filename).parent, e)
                self.full = True
                return False
        self.ready[index] = True
        self.complete = bool(self.ready.all())
        return True

    def _claimed(self, index: Shape, stamp: int) -> bool:
        """Return True if a chunk is marked as filled from a source with this stamp."""
        return int(self.flags[index]) in (FILLED, SYNCED) and int(self.stamps[index]) == stamp

    def _intact(self, index: Shape, place: tuple[slice, ...], stamp: int) -> bool:
        """Return True if the checksum of a chunk matches its voxels and stamp."""
        target, checksum = self.voxels[place], self._seed(index, stamp)
        for part in _slabs(target):
            checksum = zlib.crc32(np.ascontiguousarray(target[part]).data, checksum)
        return int(self.checksums[index]) == checksum

    def _write(self, index: Shape, place: tuple[slice, ...], stamp: int, voxels: npt.NDArray[Any]) -> None:
        """Write a chunk's voxels, stamp and checksum.

        The checksum is computed from the argument and not from the mapping, so that a failed write is detected.
        """
        target, checksum = self.voxels[place], self._seed(index, stamp)
        for part in _slabs(target):
            block = np.ascontiguousarray(voxels[part])
            target[part] = block.view(np.uint8).reshape(target[part].shape)
            checksum = zlib.crc32(block.data, checksum)
        self.stamps[index] = stamp
        self.checksums[index] = checksum

    def _seed(self, index: Shape, stamp: int) -> int:
        """Return the start value of a chunk's checksum: that of its key, index and stamp."""
        return zlib.crc32(f"{self.key} {index[0]} {index[1]} {index[2]} {stamp}".encode())

    def _report_damage(self, index: Shape) -> None:
        """Log the 1st, 2nd, 4th, 8th, ... damaged chunk of the region."""
        self._damaged += 1
        if power_of_two(self._damaged):
            log.warning(
                "%s: chunk %s is damaged in %s (%d so far); it is decoded again, check the disk of this machine",
                self.name or self.key, tuple(index), self.path or "shared memory", self._damaged,
            )  # fmt: skip

    def lock(self, index: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that holds the lock of a chunk."""
        if self.locks is None:
            return contextlib.nullcontext()
        flat = int(np.ravel_multi_index(tuple(index), self.layout.grid))
        return self.locks.hold((number_of(self.key) + 1_000_003 * flat) % IN_USE)

    def reserve(self, planes: tuple[int, int], row: int) -> None:
        """Reserve disk space for a plane of chunks before it is written to.

        On a full disk, writing to unreserved space of a mapping would kill the process (SIGBUS).

        Args:
            planes: first plane of voxels, and the one after the last.
            row: index of the plane of chunks.

        Raises:
            NoRoomError: the disk is full, or the file was removed.
        """
        if self.path is None or self.locks is None or self._reserved[row] == _RESERVED:
            return
        size = int(np.prod(self.layout.room[1:])) * self.layout.itemsize
        # Locked, since file systems without reservations write zeros instead, which must not overwrite voxels.
        with self.locks.hold((number_of(self.key) + 7 * row + 3) % IN_USE):
            if self._reserved[row] == _RESERVED:
                return
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if inode_of(os.fstat(fd)) != self._inode:
                        raise OSError(errno.ESTALE, "the file of a region was removed while it was in use", self.path)
                    os.posix_fallocate(fd, self._first + planes[0] * size, (planes[1] - planes[0]) * size)
                finally:
                    os.close(fd)
            except OSError as e:
                raise NoRoomError(e.errno, e.strerror, self.path) from e
            self._reserved[row] = _RESERVED

    def sync(self) -> None:
        """Flush filled chunks to disk, so that they are valid after a restart of the machine."""
        if self.path is None:
            return
        filled = self.flags == FILLED
        if not filled.any():
            return
        try:
            # The voxels must reach the disk before the flags that declare them valid.
            self._buffer.flush()
            self.flags[filled & (self.flags == FILLED)] = SYNCED
            self._buffer.flush(0, self._first)
        except OSError as e:
            log.warning(
                "%s: cannot be written to disk (%s); it is decoded again after a restart", self.path, e.strerror
            )


def _slabs(voxels: npt.NDArray[Any]) -> Iterator[slice]:
    """Return slices of consecutive planes of an array, about `_SLAB` bytes each."""
    step = max(1, _SLAB // max(1, voxels[0].nbytes))
    return (slice(first, first + step) for first in range(0, len(voxels), step))
