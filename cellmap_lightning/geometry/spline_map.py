"""The map of a smoothly displaced patch, and its evaluation plane by plane."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.displacement import Displacement, spline_weights
from cellmap_lightning.geometry.lattice import AffineMap, FloatArray, Shape
from cellmap_lightning.geometry.source import AnyArray


class ControlGrid(NamedTuple):
    """The control points of a patch: a cubic B-spline with three components, to be evaluated on its voxels.

    Attributes:
        values: control points ``[z, 3, y, x]``, float32.
        cells: first of the four control points of each voxel, along each axis.
        weights: ``[4, n]`` along each axis, float32.
    """

    values: AnyArray
    cells: list[npt.NDArray[np.int64]]
    weights: list[AnyArray]


@dataclass(frozen=True, eq=False)
class SplineMap:
    """A map from the voxels of a patch to the indices of an array: affine, after a smooth displacement ``u``.

    ``index = matrix @ (voxel + u(start + scale * voxel) / scale) + offset``.

    Attributes:
        affine: the affine map.
        displacement: the displacement.
        start: centre of voxel (0, 0, 0) from the centre of the sample, nm.
        scale: voxel size of the patch, nm.
    """

    affine: AffineMap
    displacement: Displacement
    start: FloatArray
    scale: FloatArray

    @cached_property
    def _along(self) -> list[tuple[npt.NDArray[np.int64], FloatArray]]:
        """Cell of the control grid, and position in it, of the voxels along each axis."""
        along = []
        for axis, count in enumerate(self.affine.shape):
            at = (self.start[axis] + self.scale[axis] * np.arange(count)) / self.displacement.spacing[axis]
            cell = np.floor(at)
            along.append((cell.astype(np.int64), at - cell))
        return along

    @cached_property
    def _grid(self) -> tuple[Shape, Shape]:
        """First control point that the patch needs, and their number along each axis."""
        (z, y, x) = (int(cell[0]) - 1 for cell, _ in self._along)
        dz, dy, dx = (int(cell[-1] - cell[0]) + 4 for cell, _ in self._along)
        return (z, y, x), (dz, dy, dx)

    @cached_property
    def _moved(self) -> FloatArray:
        """Displacements of the control points, ``[z, y, x, 3]`` in voxels of the array."""
        return self.displacement.controls(*self._grid) @ (self.affine.matrix / self.scale).T

    def bounds(self, margin: float = 0.0) -> tuple[FloatArray, FloatArray]:
        """Return bounds of the indices: those of the affine map, and the largest displacements of control points."""
        low, high = self.affine.bounds(margin)
        return low + self._moved.min(axis=(0, 1, 2)), high + self._moved.max(axis=(0, 1, 2))

    def control_grid(self, corner: Sequence[int]) -> ControlGrid:
        """Return the control points of the indices, relative to a voxel of the array."""
        first, counts = self._grid
        # In voxels of the patch. A spline reproduces linear functions from their values at the control points
        # (sum_k k B(t - k) = t), so that the affine map costs nothing.
        grid = [
            (h * (f + np.arange(n)) - s) / scale
            for h, f, n, s, scale in zip(self.displacement.spacing, first, counts, self.start, self.scale, strict=True)
        ]
        points = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1) @ self.affine.matrix.T + self.affine.offset
        values = np.moveaxis(points + self._moved - corner, -1, 1).astype(np.float32)
        cells = [cell - f - 1 for (cell, _), f in zip(self._along, first, strict=True)]
        return ControlGrid(values, cells, [spline_weights(part).astype(np.float32) for _, part in self._along])

    def points(self) -> FloatArray:
        """Return the indices of the voxel centres, ``[z, y, x, 3]``."""
        corner = np.floor(self.bounds()[0])
        indices = Planes(self.control_grid(corner.tolist())).indices(0, self.affine.shape[0])
        return np.moveaxis(indices, 0, -1) + corner


class Planes:
    """A cubic B-spline with three components, evaluated on the voxels of a patch plane by plane.

    Args:
        grid: its control points.
    """

    def __init__(self, grid: ControlGrid) -> None:
        values, cells, weights = grid
        self._cells, self._weights = cells[0], weights[0]
        # One axis after another; z, along which planes are computed, is left to the end.
        for axis in (2, 1):
            shape = [1] * 4
            shape[axis + 1] = -1
            parts = (
                values.take(cells[axis] + tap, axis=axis + 1) * weights[axis][tap].reshape(shape) for tap in range(4)
            )
            total = next(parts)
            for part in parts:
                total += part
            values = total
        self._values = values

    def indices(self, first: int, stop: int) -> AnyArray:
        """Return the values at the voxels of some planes, ``[3, planes, y, x]`` as float32."""
        _, components, *plane = self._values.shape
        out = np.empty((components, stop - first, *plane), np.float32)
        part = np.empty((components, *plane), np.float32)
        for z in range(first, stop):
            controls, weights = self._values[self._cells[z] :], self._weights[:, z]
            total = out[:, z - first]
            np.multiply(controls[0], weights[0], out=total)
            for tap in range(1, 4):
                np.multiply(controls[tap], weights[tap], out=part)
                total += part
        return out
