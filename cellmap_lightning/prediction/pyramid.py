"""The coarser levels of a volume that is written block by block, and their chunks that a single block determines."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Shape, Vector
from cellmap_lightning.prediction.blocks import BlockGrid

Units = tuple[slice, slice, slice]
#: Voxels that are downsampled at a time, so that they fit the processor's cache.
_VOXELS = 1 << 18
#: A pyramid ends before its longest axis has fewer voxels than this.
LEAST_LENGTH = 32


@dataclass(frozen=True)
class Pyramid:
    """The levels of a volume; see docs/prediction.md.

    Attributes:
        shape: voxels of level 0.
        steps: for each level except the last, the downsampling factors to the next, along each axis.
    """

    shape: Shape
    steps: tuple[Shape, ...] = ()

    @property
    def levels(self) -> int:
        """The number of levels, including level 0."""
        return 1 + len(self.steps)

    def factors(self, level: int) -> Shape:
        """Return the downsampling factors from level 0 to a level."""
        z, y, x = (math.prod(along) for along in zip((1, 1, 1), *self.steps[:level], strict=True))
        return z, y, x

    def level_shape(self, level: int) -> Shape:
        """Return the voxels of a level. Remaining planes at the end that do not fill one of its voxels are dropped."""
        z, y, x = (n // f for n, f in zip(self.shape, self.factors(level), strict=True))
        return z, y, x


def plan_pyramid(
    shape: Shape, voxel_size: Sequence[float], levels: int | None = None, raw: Sequence[Sequence[float]] = ()
) -> Pyramid:
    """Return the levels of a prediction.

    They have the voxel sizes of raw's own coarser levels, as long as these are whole multiples of those of the level
    before. After those, each level halves the axes along which voxels are less than twice as long as along the finest
    axis, so that voxels become isotropic. An axis with too few voxels to be divided keeps them.

    Args:
        shape: voxels of level 0.
        voxel_size: size of a voxel of level 0, nm.
        levels: number of levels; None for as many as leave the longest axis 32 voxels.
        raw: voxel sizes of raw's levels, finest first, nm.

    Raises:
        CellMapValueError: the volume cannot have that many levels.
    """
    size = (voxel_size[0], voxel_size[1], voxel_size[2])
    steps: tuple[Shape, ...] = ()
    for step in _steps(shape, size, raw):
        longer = Pyramid(shape, (*steps, step))
        if levels is None and max(longer.level_shape(longer.levels - 1)) < LEAST_LENGTH:
            break
        steps = longer.steps
    if levels is None:
        return Pyramid(shape, steps)
    if not 1 <= levels <= 1 + len(steps):
        raise CellMapValueError(
            f"levels must be from 1 to {1 + len(steps)} for {list(shape)} voxels of {[round(s, 4) for s in size]} nm, "
            f"got {levels}"
        )
    return Pyramid(shape, steps[: levels - 1])


def _steps(shape: Shape, voxel_size: Vector, raw: Sequence[Sequence[float]]) -> Iterator[Shape]:
    """Yield the steps from one level to the next, until no axis can be divided."""
    counts, size = list(shape), np.array(voxel_size)
    raw_sizes = iter(raw)
    while True:
        coarser_size = next(raw_sizes, None)
        # Levels of raw whose voxel size is no multiple of the last one are skipped.
        along = _halved(counts, size) if coarser_size is None else _multiples(np.array(coarser_size) / size)
        z, y, x = (f if n >= f else 1 for n, f in zip(counts, along, strict=True))
        if (z, y, x) != (1, 1, 1):
            yield z, y, x
            counts = [n // f for n, f in zip(counts, (z, y, x), strict=True)]
            size = size * (z, y, x)
        elif coarser_size is None:
            return


def _multiples(ratios: npt.NDArray[np.float64]) -> list[int]:
    """Return ratios of voxel sizes, rounded; 1 along all axes if they are not whole numbers."""
    whole = np.rint(ratios)
    if (whole < 1).any() or (np.abs(ratios - whole) > SCALE_TOLERANCE).any():
        return [1, 1, 1]
    return [int(f) for f in whole]


def _halved(counts: Sequence[int], size: npt.NDArray[np.float64]) -> list[int]:
    """Return 2 for the axes that the next level halves, and 1 for the others."""
    finest = min((s for n, s in zip(counts, size, strict=True) if n > 1), default=0.0)
    return [2 if s < (2 - SCALE_TOLERANCE) * finest else 1 for s in size]


def units_within(grid: BlockGrid, number: int, factors: Shape, unit: Shape) -> Units | None:
    """Return the indices of the chunks of a level that a single block determines; None if there are no such chunks.

    Args:
        grid: the blocks.
        number: number of the block.
        factors: downsampling factors from the block to the level, along each axis.
        unit: voxels of a chunk or shard, the same at every level.
    """
    units = []
    for start, length, whole, factor, size in zip(*grid[number], grid.shape, factors, unit, strict=True):
        if start % factor:  # the first voxel of the level needs voxels of another block
            return None
        first, end = math.ceil(start // factor / size), (start + length) // factor
        # The last chunk of the volume may be incomplete.
        last = math.ceil(end / size) if start + length == whole else end // size
        if first >= last:
            return None
        units.append(slice(first, last))
    return units[0], units[1], units[2]


def units_left(grid: BlockGrid, factors: Shape, unit: Shape) -> list[Shape]:
    """Return the indices of the chunks of a level that several blocks determine."""
    shape = [math.ceil(n // factor / size) for n, factor, size in zip(grid.shape, factors, unit, strict=True)]
    left = np.ones(shape, bool)
    for number in range(len(grid)):
        units = units_within(grid, number, factors, unit)
        if units is not None:
            left[units] = False
    return [(z, y, x) for z, y, x in np.argwhere(left).tolist()]


def coarser(
    data: npt.NDArray[np.generic], mean: Callable[..., npt.NDArray[np.generic]], step: Shape = (2, 2, 2)
) -> npt.NDArray[np.generic]:
    """Return the next level of some voxels, computed a few planes at a time.

    Args:
        data: voxels ``[z, y, x]``.
        mean: the downsampling function, such as `downsample_mean`.
        step: downsampling factors, along each axis.
    """
    z, y, x = (n // f for n, f in zip(data.shape, step, strict=True))
    out = np.empty((z, y, x), data.dtype)
    deep = step[0]
    planes = deep * max(1, _VOXELS // (deep * data[0].size))
    for first in range(0, deep * z, planes):
        end = min(first + planes, deep * z)
        out[first // deep : end // deep] = mean(data[first:end], step)
    return out
