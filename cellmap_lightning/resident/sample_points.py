"""Source coordinates of the voxels of a patch, on a device: the only module there that evaluates sample maps."""

import torch

from cellmap_lightning.geometry.lattice import AffineMap, Shape
from cellmap_lightning.geometry.spline_map import SplineMap


def affine_points(
    amap: AffineMap, low: Shape, planes: range, shift: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """Return the source coordinates of a slab under an affine map, in voxels of a box.

    Args:
        amap: the map, from the patch's voxels to those of the region.
        low: first voxel of the box in the region.
        planes: planes of the patch.
        shift: sub-point of the output voxel, in voxels from its centre.
        device: device of the result.

    Returns:
        float64 ``[3, planes, y, x]``.
    """
    matrix, offset = amap.matrix.tolist(), (amap.offset - low).tolist()
    z, y, x = (
        torch.arange(first, stop, dtype=torch.float64, device=device) + moved
        for (first, stop), moved in zip(
            ((planes.start, planes.stop), (0, amap.shape[1]), (0, amap.shape[2])), shift, strict=True
        )
    )
    points = torch.empty((3, len(planes), *amap.shape[1:]), dtype=torch.float64, device=device)
    for i in range(3):
        along = matrix[i][0] * z[:, None] + matrix[i][1] * y + offset[i]
        torch.add(along[:, :, None], matrix[i][2] * x, out=points[i])
    return points


class SplinePoints:
    """The coordinates of a smoothly displaced patch, in the order of operations of `geometry.spline_map.Planes`.

    Products and sums are separate operations, since a fused one would round otherwise than the host.

    Args:
        smap: the map, from the patch's voxels to those of the region.
        low: first voxel of the box in the region, from which coordinates are counted.
        device: device of the results.
    """

    def __init__(self, smap: SplineMap, low: Shape, device: torch.device) -> None:
        grid = smap.control_grid(low)
        values = torch.from_numpy(grid.values).to(device, non_blocking=True)
        cells = [torch.from_numpy(cells).to(device, non_blocking=True) for cells in grid.cells]
        weights = [torch.from_numpy(weights).to(device, non_blocking=True) for weights in grid.weights]
        # One axis after another; z, along which slabs are computed, is left to the end.
        for axis in (2, 1):
            values = _spline(values, axis + 1, cells[axis], weights[axis])
        self._values, self._cells, self._weights = values, cells[0], weights[0]

    def slab(self, planes: range) -> torch.Tensor:
        """Return the coordinates of the voxel centres of some planes, float32 ``[3, planes, y, x]``."""
        part = slice(planes.start, planes.stop)
        return _spline(self._values, 0, self._cells[part], self._weights[:, part]).movedim(0, 1).contiguous()


def _spline(values: torch.Tensor, axis: int, cells: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the cubic spline along one axis of control points.

    Args:
        values: control points ``[z, 3, y, x]``.
        axis: the axis.
        cells: first of the four control points of each result, ``[n]``.
        weights: their weights, ``[4, n]``.
    """
    shape = [1] * values.ndim
    shape[axis] = -1
    total = values.index_select(axis, cells).mul_(weights[0].reshape(shape))
    for tap in range(1, 4):
        total += values.index_select(axis, cells + tap).mul_(weights[tap].reshape(shape))
    return total
