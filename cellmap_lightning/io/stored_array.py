"""The description of a stored array that all volume formats share."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cellmap_lightning.io.store import StorePath


class StoredArray(Protocol):
    """Shape, type, chunk grid and identity of a stored array of any volume format.

    Example:
        >>> array: StoredArray = read_image("jrc_a.zarr/recon-1/em/fibsem-uint8").finest.array
        >>> array.shape
        (512, 512, 512)
    """

    @property
    def path(self) -> StorePath:
        """Location of the array, which differs for every other array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along the stored axes."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """Voxels of the smallest part that can be read by itself."""

    @property
    def files(self) -> tuple[int, ...]:
        """Voxels in one file of the chunk grid, whole chunks."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored type, in native byte order."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes of the array."""

    @property
    def codec(self) -> str:
        """Compressor of a chunk, such as ``blosc-zstd``; ``none`` without one."""

    @property
    def checksum(self) -> str:
        """Checksum of the metadata."""

    @property
    def version(self) -> str:
        """Version of the metadata on a server; empty for local arrays."""

    @property
    def metadata(self) -> StorePath:
        """File that describes the array."""

    def key(self, index: Sequence[int]) -> str:
        """Return the name of a file of the chunk grid, by its index along the stored axes."""

    def file(self, index: Sequence[int]) -> str:
        """Return the path of a file of the chunk grid, whether or not it exists."""


class ArraySource(StoredArray, Protocol):
    """A stored array of a volume format other than Zarr; thread-safe, and valid after a fork and after pickling.

    Example:
        >>> source.read((0, 0, 0), (64, 64, 64)).shape
        (64, 64, 64)
    """

    @property
    def forks(self) -> bool:
        """True if it can be read in a process that was forked after an earlier read."""

    def read(self, start: Sequence[int], shape: Sequence[int]) -> "np.ndarray[Any, Any]":
        """Return the voxels of a box inside the array, along the stored axes.

        Raises:
            Exception: the voxels cannot be read; the caller adds the array and the box.
        """
