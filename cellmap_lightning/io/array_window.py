"""Boxes of stored arrays, presented as arrays: what reads a level reads a box of it as it reads a smaller volume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.io.store import StorePath
from cellmap_lightning.io.stored_array import StoredArray


@dataclass(frozen=True)
class ArrayWindow:
    """A box of a stored array as a `StoredArray`; its files are those of the array, with their indices there.

    Attributes:
        array: the whole array.
        shape: voxels of the box along the stored axes.

    Example:
        >>> level.part((0, 0, 0), (64, 64, 64)).array.shape
        (64, 64, 64)
    """

    array: StoredArray
    shape: tuple[int, ...]

    @property
    def path(self) -> StorePath:
        """Location of the whole array."""
        return self.array.path

    @property
    def chunks(self) -> tuple[int, ...]:
        """Voxels of the smallest part of the array that can be read by itself."""
        return self.array.chunks

    @property
    def files(self) -> tuple[int, ...]:
        """Voxels in one file of the array."""
        return self.array.files

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored type, in native byte order."""
        return self.array.dtype

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes of the whole array; its counts do not hold for the box, see `complement_counts`."""
        return self.array.attributes

    @property
    def codec(self) -> str:
        """Compressor of a chunk."""
        return self.array.codec

    @property
    def checksum(self) -> str:
        """Checksum of the metadata of the whole array."""
        return self.array.checksum

    @property
    def version(self) -> str:
        """Version of the metadata on a server."""
        return self.array.version

    @property
    def metadata(self) -> StorePath:
        """File that describes the whole array."""
        return self.array.metadata

    def key(self, index: Sequence[int]) -> str:
        """Return the name of a file of the array, by its index in the array."""
        return self.array.key(index)

    def file(self, index: Sequence[int]) -> str:
        """Return the path of a file of the array, by its index in the array."""
        return self.array.file(index)
