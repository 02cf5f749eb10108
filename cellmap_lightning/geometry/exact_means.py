"""Plans of patches that are sums along axes: of maps along the axes of the array, and of rotations about one of them.

They hold the small arrays of neighbours and weights, so that voxels can be summed elsewhere, such as on a device, as
`interpolation.weighted_sums` and `rotation.gather_about_axis` do here.
"""

from dataclasses import dataclass

import numpy as np

from cellmap_lightning.geometry.interpolation import Band, is_inside
from cellmap_lightning.geometry.lattice import AffineMap, Shape
from cellmap_lightning.geometry.rotation import Line, Plane, axis_of_rotation, sample_line


@dataclass(frozen=True, eq=False)
class AlongAxes:
    """A patch whose axes run along those of the array.

    Attributes:
        order: for each axis of the array, the axis of the patch.
        inside: along each axis of the array, the patch's voxels whose centres lie in it.
        bands: the weights along each axis of the array.
        widths: array voxels over which each axis is averaged.
        low: first voxel of the array that is read.
        high: the voxel after the last.
    """

    order: tuple[int, ...]
    inside: tuple[slice, ...]
    bands: tuple[Band, ...]
    widths: tuple[float, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AboutAxis:
    """A patch that is rotated about one of its axes.

    Attributes:
        patch_axis: this axis of the patch.
        array_axis: the same of the array.
        line: the sampling along it.
        plane: the map across it.
        low: first voxel of the array that is read.
        high: the voxel after the last.
    """

    patch_axis: int
    array_axis: int
    line: Line
    plane: Plane
    low: tuple[int, ...]
    high: tuple[int, ...]


#: A plan of interpolated voxels, or of exact means over output voxels where these are coarser than the array.
Means = AlongAxes | AboutAxis


def plan_means(amap: AffineMap, shape: Shape) -> Means | None:
    """Return the plan of a linearly interpolated patch; None where no voxel of it lies in the array.

    Args:
        amap: a map along the axes, or a rotation about one of them.
        shape: voxels of the array.
    """
    along_axes = amap.separable()
    if along_axes is None:
        return _about_axis(amap, shape)
    axes, steps = along_axes
    order = np.argsort(axes).tolist()
    inside, bands, low, high = [], [], [], []
    widths = np.abs(steps[order]).tolist()
    for i, axis in enumerate(order):
        points = amap.offset[i] + steps[axis] * amap.along(axis)
        hits = np.flatnonzero(is_inside(points, shape[i]))
        if not len(hits):
            return None
        inside.append(slice(int(hits[0]), int(hits[-1]) + 1))
        bands.append(Band.of(np.clip(points[hits], -0.5, shape[i] - 0.5), widths[i], shape[i]))
        first, stop = bands[i].used
        low.append(first)
        high.append(stop)
    return AlongAxes(tuple(order), tuple(inside), tuple(bands), tuple(widths), tuple(low), tuple(high))


def _about_axis(amap: AffineMap, shape: Shape) -> AboutAxis | None:
    """Return the plan of a rotation about one axis."""
    axes = axis_of_rotation(amap)
    assert axes is not None
    patch_axis, array_axis, step = axes
    line = sample_line(
        amap.offset[array_axis] + step * np.arange(amap.shape[patch_axis]), step, shape[array_axis], "linear"
    )
    plane = Plane.of(amap, patch_axis, array_axis, shape)
    if line is None or 0 in plane.size:
        return None
    low, high = [0, 0, 0], [0, 0, 0]
    low[array_axis], high[array_axis] = line.low, line.high
    for i, axis in enumerate(a for a in range(3) if a != array_axis):
        low[axis], high[axis] = plane.first[i], plane.first[i] + plane.size[i]
    return AboutAxis(patch_axis, array_axis, line, plane, tuple(low), tuple(high))
