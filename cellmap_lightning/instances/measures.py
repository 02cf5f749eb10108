"""Measures of numbered objects that add up over blocks: voxels, sums of positions, boxes and faces at the border.

They are computed from runs of equal numbers along x, which are far fewer than voxels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import Shape

Ints = npt.NDArray[np.int64]
_FAR = np.iinfo(np.int64).max


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

    def grouped(self, groups: npt.NDArray[Any], count: int) -> "Measures":
        """Return the measures of groups of rows.

        Args:
            groups: the group of each row, from 0 on.
            count: number of groups.
        """
        total = _empty(count)
        np.add.at(total.voxels, groups, self.voxels)
        np.add.at(total.sums, groups, self.sums)
        np.add.at(total.border, groups, self.border)
        np.minimum.at(total.low, groups, self.low)
        np.maximum.at(total.high, groups, self.high)
        np.minimum.at(total.first, groups, self.first)
        return total


def _empty(count: int) -> Measures:
    zeros, far = np.zeros((count, 3), np.int64), np.full((count, 3), _FAR)
    return Measures(np.zeros(count, np.int64), zeros, far, far * 0 - 1, np.full(count, _FAR), zeros.copy())


def measure(labels: npt.NDArray[Any], count: int, start: Shape, volume: Shape) -> Measures:
    """Return the measures of the numbers 1 to ``count`` in a block.

    Args:
        labels: numbers ``[z, y, x]``; 0 is ignored.
        count: the largest number.
        start: first voxel of the block in the volume.
        volume: voxels of the volume.
    """
    flat, width = np.ascontiguousarray(labels).reshape(-1), labels.shape[2]
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
    total = _empty(count)
    total.voxels[:] = _sums(row, length, count)
    total.sums[:, 0], total.sums[:, 1] = _sums(row, length * z, count), _sums(row, length * y, count)
    total.sums[:, 2] = _sums(row, length * x + length * (length - 1) // 2, count)
    for axis, (low, high) in enumerate(((z, z), (y, y), (x, x + length - 1))):
        np.minimum.at(total.low[:, axis], row, low)
        np.maximum.at(total.high[:, axis], row, high)
    np.minimum.at(total.first, row, (z * volume[1] + y) * volume[2] + x)
    for axis, (size, extent) in enumerate(zip(labels.shape, volume, strict=True)):
        ends = [0] if start[axis] == 0 else []
        ends += [size - 1] if start[axis] + size == extent else []
        for end in ends:  # both of a single plane
            plane = np.take(labels, end, axis).reshape(-1)
            total.border[:, axis] += np.bincount(plane, minlength=count + 1)[1 : count + 1]
    return total


def _sums(row: Ints, weights: npt.NDArray[Any], count: int) -> Ints:
    """Return the sums of whole weights of each row; exact below 2^53."""
    return np.bincount(row, weights, minlength=count).astype(np.int64)


def joined(parts: list[Measures]) -> Measures:
    """Return the rows of several measures, one after the other."""
    if not parts:
        return _empty(0)
    names = parts[0].as_arrays()
    return Measures(**{name: np.concatenate([part.as_arrays()[name] for part in parts]) for name in names})
