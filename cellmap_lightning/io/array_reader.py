"""Base class of the readers of arrays: boxes in the order z, y, x, and messages about them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cellmap_lightning.geometry.lattice import AXES, Box, Shape, to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.chunk_files import ChunkFiles
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.store import Remote

#: Treatment of chunk files of 0 bytes: an error, or missing chunks, which hold the fill value.
Empty = Literal["error", "missing"]
#: Voxels along an axis that are decoded together at least.
LEAST_CHUNK = 64


class ArrayReader(ChunkFiles, ABC):
    """A reader of boxes of one stored array, in the order z, y, x; thread-safe, and valid in a forked process.

    Args:
        level: the array.
        label: name of the array in error messages, such as ``crop12/mito``.

    Attributes:
        shape: voxels (z, y, x).
        chunks: voxels of the smallest part that can be read by itself (z, y, x).
        dtype: type of the voxels; booleans are read as 0 and 1.

    Example:
        >>> reader: ArrayReader = open_reader(image.finest)
        >>> reader.read((0, 0, 0), (64, 64, 64)).shape
        (64, 64, 64)
    """

    def __init__(self, level: Level, label: str = "") -> None:
        super().__init__(level)
        info = level.array
        self.label = label
        self.shape: Shape = level.zyx(info.shape)
        self.chunks: Shape = level.zyx(info.chunks)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8) if info.dtype == np.bool_ else info.dtype

    @abstractmethod
    def read(self, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
        """Return the decoded voxels of a box inside the array, in native byte order.

        Args:
            start: first voxel.
            shape: voxels.
            begun: the handle that `begin` returned for the same box.

        Raises:
            EmptyChunkError: a chunk file has 0 bytes, and ``empty`` is ``error``.
            ChunkError: the store or the codec failed; the message names the array and the box.
        """

    @abstractmethod
    def missing_chunks(
        self, start: tuple[int, int, int], shape: Shape, voxels: AnyArray | None = None
    ) -> list[tuple[int, ...]]:
        """Return the chunks or shards that hold part of a box and were missing when it was read last.

        Args:
            start: first voxel.
            shape: voxels.
            voxels: the voxels that were read; a chunk with two different values exists, and is not requested.
        """

    @abstractmethod
    def has_chunk(self, index: tuple[int, ...]) -> bool:
        """Return whether a chunk or shard exists and has any bytes; a remote store is asked.

        Raises:
            ChunkError: the store does not answer.
        """

    @abstractmethod
    def is_empty(self, index: tuple[int, ...]) -> bool:
        """Return whether the file of a chunk or shard has 0 bytes.

        Raises:
            ObjectError: a remote store does not answer.
        """

    def begin(self, start: tuple[int, int, int], shape: Shape) -> Any:
        """Start to read a box in the background; return a handle for `read`, or None where the reader cannot do so."""
        return None

    def _box(self, start: tuple[int, int, int], shape: Shape) -> tuple[slice | int, ...]:
        """Return the index of a box along the stored axes."""
        box: list[slice | int] = [self.level.channel or 0] * self.level.ndim
        for axis, first, count in zip(self.level.axes, start, shape, strict=True):
            box[axis] = slice(first, first + count)
        return tuple(box)

    def _in_order(self, stored: AnyArray) -> AnyArray:
        """Return voxels along the stored spatial axes in the order z, y, x."""
        order = sorted(self.level.axes)
        out = stored.transpose([order.index(a) for a in self.level.axes])
        return np.ascontiguousarray(out, dtype=self.dtype)

    @property
    def name(self) -> str:
        """Label and path of the array, for messages."""
        return f"{self.label}: {self.level.path}" if self.label else str(self.level.path)

    def _hide(self, text: str) -> str:
        """Return a text without the credentials of a remote array."""
        return self.level.path.hide(text) if isinstance(self.level.path, Remote) else text

    def where(self, start: tuple[int, int, int], shape: Shape) -> str:
        """Return label, array and voxels of a box, for messages."""
        voxels = ", ".join(f"{a}[{o}:{o + n}]" for a, o, n in zip(AXES, start, shape, strict=True))
        return f"{self.name}: voxels {voxels}"

    def box(self, start: tuple[int, int, int], shape: Shape) -> str:
        """Return level and physical box of some voxels, for messages."""
        lattice = self.level.lattice
        if lattice.turn is None:
            low = np.add(lattice.box.lower, np.multiply(start, self.level.scale))
            high = low + np.multiply(shape, self.level.scale)
        else:
            box = replace(lattice, origin=to_vector(lattice.points(start)), shape=shape).box
            low, high = np.asarray(box.lower), np.asarray(box.upper)
        box = Box(to_vector(low), to_vector(high))
        return f"level {self.level.name}, {box}"


def chunk_shape(readers: Sequence[ArrayReader]) -> Shape:
    """Return the shape that is decoded at a time from arrays of one shape: whole chunks, and at least `LEAST_CHUNK`."""
    chunks = np.max([reader.chunks for reader in readers], axis=0)
    # Each read has a fixed overhead, so tiny chunks are read several at a time.
    chunks = chunks * -(-LEAST_CHUNK // np.minimum(chunks, LEAST_CHUNK))
    z, y, x = np.minimum(chunks, readers[0].shape).tolist()
    return z, y, x
