"""The interface of an array that is resampled, and helpers to read from it and to store results."""

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import Shape

AnyArray = npt.NDArray[Any]
Method = Literal["linear", "nearest"]


class Source(Protocol):
    """An array of voxels that can be read by boxes inside it, perhaps with a last axis of bytes per voxel.

    `Region` implements it with the cache.

    Example:
        >>> def whole(source: Source) -> AnyArray:
        ...     return source.read((0, 0, 0), source.shape)
    """

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type."""

    def read_into(self, start: tuple[int, int, int], out: AnyArray) -> None:
        """Copy the box at ``start`` with the shape of ``out`` into ``out``, a view of any strides."""

    def read(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """Return the box at ``start``; it may be a view of the array, so it must not be written to."""


def read_box(source: Source, low: list[int], high: list[int]) -> AnyArray:
    """Return the voxels from ``low`` to ``high`` (exclusive)."""
    return source.read((low[0], low[1], low[2]), (high[0] - low[0], high[1] - low[1], high[2] - low[2]))


def compute_type(stored: np.dtype[Any]) -> type[np.floating[Any]]:
    """Return the type to interpolate in: float32 where it holds the stored values exactly, else float64."""
    return np.float32 if stored.itemsize <= 2 or stored == np.float32 else np.float64


def store_values(values: AnyArray, out: AnyArray, stored: np.dtype[Any]) -> None:
    """Write values to ``out``; those interpolated from integers are rounded and clipped to its range.

    Args:
        values: computed values; may be overwritten.
        out: view that they are written to.
        stored: type of the voxels that they were computed from.
    """
    if stored.kind in "iu" and out.dtype.kind in "iu":
        info = np.iinfo(out.dtype)
        highest = values.dtype.type(info.max)
        if int(highest) > info.max:  # 2**63 - 1 is no float64: the next larger one would wrap around
            highest = np.nextafter(highest, values.dtype.type(0))
        values = np.clip(np.rint(values, out=values), info.min, highest, out=values)
    out[...] = values
