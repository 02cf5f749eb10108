"""Coarser levels of a volume that is written block by block: what of them follows from one block alone."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cellmap_lightning.volumes.blocks import BlockGrid
from cellmap_lightning.volumes.geometry import Shape

Units = tuple[slice, slice, slice]
#: Voxels that are made coarser at a time: what they are made of stays in the processor's cache.
_VOXELS = 1 << 18


def units_within(grid: BlockGrid, number: int, level: int, unit: Shape) -> Units | None:
    """The chunks of a level that are made of the voxels of one block, by their indices; None where there are none.

    Args:
        grid: the blocks.
        number: the block.
        level: 0 for the block itself; a voxel of level ``k`` is made of ``2**k`` along each axis.
        unit: voxels of a chunk or shard, the same at every level.
    """
    found = []
    for start, length, whole, size in zip(*grid[number], grid.shape, unit, strict=True):
        if start % (1 << level):
            return None
        first, end = -(-(start >> level) // size), (start + length) >> level
        last = -(-end // size) if start + length == whole else end // size
        if first >= last:
            return None
        found.append(slice(first, last))
    return found[0], found[1], found[2]


def units_left(grid: BlockGrid, level: int, unit: Shape) -> list[Shape]:
    """The chunks of a level that no block makes, by their indices: those that are made of several."""
    shape = [-(-(n >> level) // size) for n, size in zip(grid.shape, unit, strict=True)]
    left = np.ones(shape, bool)
    for number in range(len(grid)):
        units = units_within(grid, number, level, unit)
        if units is not None:
            left[units] = False
    return [(z, y, x) for z, y, x in np.argwhere(left).tolist()]


def coarser(data: npt.NDArray[np.generic], mean: Callable[..., npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    """The next level of some voxels, a few planes after the other.

    Args:
        data: voxels ``[z, y, x]``.
        mean: what makes one voxel of each eight, such as `downsample_mean`.
    """
    z, y, x = (n // 2 for n in data.shape)
    out = np.empty((z, y, x), data.dtype)
    planes = 2 * max(1, _VOXELS // (2 * data[0].size))
    for first in range(0, 2 * z, planes):
        end = min(first + planes, 2 * z)
        out[first // 2 : end // 2] = mean(data[first:end])
    return out
