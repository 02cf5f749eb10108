"""Reading of boxes of arrays as arrays, through the reader of the whole array."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.stamps import ABSENT, file_stamp, stamped_size

Start = tuple[int, int, int]


class WindowReader(ArrayReader):
    """A reader of a box of an array, whose voxel 0 is the first voxel of the box; thread-safe.

    Messages name the voxels of the whole array, and files have their indices there.

    Args:
        level: the box; see `Level.part`.
        reader: the reader of the whole array.

    Example:
        >>> reader = open_reader(image.finest.part((64, 0, 0), (64, 64, 64)))
        >>> reader.read((0, 0, 0), (1, 64, 64)).shape  # section 64 of the array
        (1, 64, 64)
    """

    def __init__(self, level: Level, reader: ArrayReader) -> None:
        super().__init__(level, reader.label)
        assert level.window is not None
        self.whole = reader
        self.first: Start = level.window[0]

    def _shifted(self, start: Start) -> Start:
        """Return a voxel of the box as one of the whole array."""
        z, y, x = (a + b for a, b in zip(start, self.first, strict=True))
        return z, y, x

    def read(self, start: Start, shape: Shape, begun: Any = None) -> AnyArray:
        """Return the voxels of a part of the box; see `ArrayReader.read`."""
        return self.whole.read(self._shifted(start), shape, begun)

    def begin(self, start: Start, shape: Shape) -> Any:
        """Start to read a part of the box in the background; see `ArrayReader.begin`."""
        return self.whole.begin(self._shifted(start), shape)

    def missing_chunks(self, start: Start, shape: Shape, voxels: AnyArray | None = None) -> list[tuple[int, ...]]:
        """Return the missing files of a part of the box; see `ArrayReader.missing_chunks`."""
        return self.whole.missing_chunks(self._shifted(start), shape, voxels)

    def has_chunk(self, index: tuple[int, ...]) -> bool:
        """Return whether a file of the array exists and has any bytes."""
        return self.whole.has_chunk(index)

    def is_empty(self, index: tuple[int, ...]) -> bool:
        """Return whether a file of the array has 0 bytes."""
        return self.whole.is_empty(index)

    def identity(self) -> tuple[object, ...]:
        """Return the identity of the whole array's reader, and the voxels of the box."""
        return *self.whole.identity(), self.level.window

    def files(self, start: Start, shape: Shape) -> Iterator[tuple[int, ...]]:
        """Return the indices of the files that hold a part of the box."""
        return self.whole.files(self._shifted(start), shape)

    def common(self, index: tuple[int, ...], start: Start, shape: Shape) -> tuple[Start, Shape]:
        """Return start and shape of the intersection of a file and a part of the box."""
        (z, y, x), common = self.whole.common(index, self._shifted(start), shape)
        return (z - self.first[0], y - self.first[1], x - self.first[2]), common

    def file_start(self, file: Sequence[int]) -> Start:
        """Return the first voxel of a file, which is negative where the file begins before the box."""
        z, y, x = np.subtract(self.whole.file_start(file), self.first).tolist()
        return z, y, x

    def chunks_of(self, file: Sequence[int]) -> Iterator[tuple[Start, Shape]]:
        """Yield start and shape of each chunk of a file, cut at the edges of the box."""
        for start, shape in self.whole.chunks_of(file):
            low = np.subtract(start, self.first)
            high = np.minimum(low + shape, self.shape)
            low = np.maximum(low, 0)
            if (low < high).all():
                (z, y, x), (dz, dy, dx) = low.tolist(), (high - low).tolist()
                yield (z, y, x), (dz, dy, dx)

    def stored(self) -> dict[Start, bytes]:
        """Return the stamps of the files that hold a part of the box; see `ChunkFiles.stored`."""
        indices = list(self.files((0, 0, 0), self.shape))
        if not self.local:
            return dict.fromkeys(map(self.level.zyx, indices), self.archive_stamp)
        # Not those of `whole.stored`, which examines all files of a volume.
        stamps = {file: file_stamp(file) for file in dict.fromkeys(map(self.level.array.file, indices))}
        present = ((index, stamps[self.level.array.file(index)]) for index in indices)
        return {
            self.level.zyx(index): stamp for index, stamp in present if stamp != ABSENT and stamped_size(stamp) != 0
        }

    def absent(self, start: Start, shape: Shape, most: int = 2000) -> tuple[int, int]:
        """Return the missing and all files of a part of the box; see `ChunkFiles.absent`."""
        return self.whole.absent(self._shifted(start), shape, most)

    def stamp(self, start: Start, shape: Shape) -> int:
        """Return the stamp of the files that hold a part of the box; see `ChunkFiles.stamp`."""
        return self.whole.stamp(self._shifted(start), shape)
