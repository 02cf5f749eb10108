"""Grids of chunks and blocks: the cells that a box touches, and boxes cut at the borders of cells."""

import itertools
from collections.abc import Iterator, Sequence

from cellmap_lightning.geometry.lattice import Shape

#: First voxel and shape of a box.
StartShape = tuple[Shape, Shape]


def touched_cells(start: Sequence[int], shape: Sequence[int], cell: Sequence[int]) -> list[range]:
    """Return the indices of the cells that a box touches, along each axis.

    Args:
        start: first voxel of the box, for any number of axes.
        shape: voxels of the box.
        cell: voxels of a cell; cell 0 begins at voxel 0.

    Example:
        >>> touched_cells((0, 30), (64, 4), (32, 32))
        [range(0, 2), range(0, 2)]
    """
    return [range(a // c, -(-(a + n) // c)) for a, n, c in zip(start, shape, cell, strict=True)]


def cell_parts(start: Sequence[int], shape: Sequence[int], cell: Sequence[int]) -> Iterator[StartShape]:
    """Yield first voxel and shape of the parts of a box that lie in one cell each, x fastest.

    Args:
        start: first voxel of the box (z, y, x).
        shape: voxels of the box.
        cell: voxels of a cell; cell 0 begins at voxel 0.
    """
    axes = []
    for first, count, size, cells in zip(start, shape, cell, touched_cells(start, shape, cell), strict=True):
        cuts = [(max(first, i * size), min(first + count, (i + 1) * size)) for i in cells]
        axes.append([(a, b - a) for a, b in cuts])
    for z, y, x in itertools.product(*axes):
        yield (z[0], y[0], x[0]), (z[1], y[1], x[1])


def covering_boxes(shape: Sequence[int], cell: Sequence[int]) -> Iterator[StartShape]:
    """Yield first voxel and shape of the cells that cover an array, smaller at its end, x fastest."""
    return cell_parts((0, 0, 0), shape, cell)
