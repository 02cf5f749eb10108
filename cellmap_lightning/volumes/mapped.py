"""The parts of one region in memory that processes share: flags, stamps, voxels, and how they are written.

A region lies in its mapping as ``header | flags | stamps | reserved | voxels``, each part on pages of its own. A
chunk's flag is set after its voxels are in place. Its stamp says what was read, so that a source that changed is
noticed. Flag 1 counts on the machine and boot that wrote it, while the pages are in its memory; flag 2 was written to
disk before, and counts ever after.

Whoever fills a chunk holds a lock on one byte of a lock file, which the system gives back when a process dies.
"""

import contextlib
import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CacheError
from cellmap_lightning.volumes.geometry import Shape
from cellmap_lightning.volumes.locks import IN_USE, Locks, Once

log = logging.getLogger(__name__)

_PAGE = mmap.PAGESIZE
HEADER = 4096
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
        count, at, ends = int(np.prod(self.grid)), HEADER, []
        for size in (count, 8 * count, self.grid[0], int(np.prod(self.room)) * self.itemsize):
            ends.append(at)
            at = -(-(at + size) // _PAGE) * _PAGE
        return ends[0], ends[1], ends[2], ends[3], at

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.parts[-1]


def number_of(key: str) -> int:
    """The number of a region's lock."""
    return int(key[:14], 16)


_complained: set[Path] = set()


def complain(folder: Path, error: OSError) -> None:
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
        return self.locks.hold((number_of(self.key) + 1_000_003 * flat) % IN_USE)

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
        with self.locks.reserving, self.locks.hold((number_of(self.key) + 7 * row + 3) % IN_USE):
            if self._reserved[row]:
                return True
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    os.posix_fallocate(fd, self._first + planes[0] * size, (planes[1] - planes[0]) * size)
                finally:
                    os.close(fd)
            except OSError as e:
                complain(Path(self.path).parent, e)
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
