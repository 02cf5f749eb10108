"""Measures of numbered objects that add up over blocks: voxels, sums of positions, boxes and faces at the border.

They are computed from runs of equal numbers along x, which are far fewer than voxels.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import Shape

Ints = npt.NDArray[np.int64]
_FAR = np.iinfo(np.int64).max
#: Voxels that are measured at a time.
_VOXELS = 1 << 20


@dataclass(frozen=True, eq=False)
class Measures:
    """The measures of objects, one row for each; positions are voxels of the volume (z, y, x).

    Attributes:
        voxels: number of voxels.
        sums: sums of the positions of voxels, ``[N, 3]``.
        low: smallest positions, ``[N, 3]``.
        high: largest positions, ``[N, 3]``.
        first: index of the first voxel in the flattened volume.
        border: faces of voxels at the border of the volume, across each axis, ``[N, 3]``.
    """

    voxels: Ints
    sums: Ints
    low: Ints
    high: Ints
    first: Ints
    border: Ints

    def __len__(self) -> int:
        return len(self.voxels)

    def __getitem__(self, rows: npt.NDArray[Any] | slice) -> "Measures":
        """Return some rows."""
        return Measures(
            self.voxels[rows], self.sums[rows], self.low[rows], self.high[rows], self.first[rows], self.border[rows]
        )

    def as_arrays(self) -> dict[str, Ints]:
        """Return the arrays by name, as the constructor takes them."""
        return dict(self.__dict__)

    @classmethod
    def empty(cls, count: int) -> "Measures":
        """Return the measures of objects without voxels, to which others are added."""
        zeros, far = np.zeros((count, 3), np.int64), np.full((count, 3), _FAR)
        return cls(np.zeros(count, np.int64), zeros, far, np.full((count, 3), -1), np.full(count, _FAR), zeros.copy())

    def add(self, rows: npt.NDArray[Any], parts: "Measures") -> None:
        """Add the measures of parts of objects.

        Args:
            rows: the row of the object of each part.
            parts: the measures.
        """
        np.add.at(self.voxels, rows, parts.voxels)
        np.add.at(self.sums, rows, parts.sums)
        np.add.at(self.border, rows, parts.border)
        np.minimum.at(self.low, rows, parts.low)
        np.maximum.at(self.high, rows, parts.high)
        np.minimum.at(self.first, rows, parts.first)


#: The names of the measures.
MEASURES = tuple(field.name for field in fields(Measures))


def measure(labels: npt.NDArray[Any], count: int, start: Shape, volume: Shape) -> Measures:
    """Return the measures of the numbers 1 to ``count`` in a block.

    Args:
        labels: numbers ``[z, y, x]``; 0 is ignored.
        count: the largest number.
        start: first voxel of the block in the volume.
        volume: voxels of the volume.
    """
    total = Measures.empty(count)
    planes = max(1, _VOXELS // math.prod(labels.shape[1:]))
    for z in range(0, labels.shape[0], planes):
        _add_runs(total, labels[z : z + planes], (start[0] + z, start[1], start[2]), volume)
    for axis, (size, extent) in enumerate(zip(labels.shape, volume, strict=True)):
        ends = [0] if start[axis] == 0 else []
        ends += [size - 1] if start[axis] + size == extent else []
        for end in ends:  # both of a single plane
            plane = np.take(labels, end, axis).reshape(-1)
            total.border[:, axis] += np.bincount(plane, minlength=count + 1)[1 : count + 1]
    return total


def _add_runs(total: Measures, labels: npt.NDArray[Any], start: Shape, volume: Shape) -> None:
    """Add the measures of some planes, but for the border; the arguments are those of `measure`."""
    flat, width, count = np.ascontiguousarray(labels).reshape(-1), labels.shape[2], len(total)
    begins = np.empty(flat.shape, bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[::width] = True
    first = np.flatnonzero(begins)
    length = np.diff(first, append=flat.size)
    number = flat[first]
    run = np.flatnonzero(number)
    first, length, row = first[run], length[run], number[run].astype(np.int64) - 1
    z, y, x = np.unravel_index(first, labels.shape)
    z, y, x = (p + s for p, s in zip((z, y, x), start, strict=True))
    total.voxels[:] += _sums(row, length, count)
    for axis, weights in enumerate((length * z, length * y, length * x + length * (length - 1) // 2)):
        total.sums[:, axis] += _sums(row, weights, count)
    for axis, (low, high) in enumerate(((z, z), (y, y), (x, x + length - 1))):
        np.minimum.at(total.low[:, axis], row, low)
        np.maximum.at(total.high[:, axis], row, high)
    np.minimum.at(total.first, row, (z * volume[1] + y) * volume[2] + x)


def _sums(row: Ints, weights: npt.NDArray[Any], count: int) -> Ints:
    """Return the sums of whole weights of each row; exact below 2^53."""
    return np.bincount(row, weights, minlength=count).astype(np.int64)
