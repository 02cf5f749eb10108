"""Resampling under rotations: every output voxel centre is evaluated by itself, in slabs of bounded size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.interpolation import Band, is_inside, nearest_index
from cellmap_lightning.geometry.lattice import (
    EDGE_TOLERANCE,
    LATTICE_TOLERANCE,
    SCALE_TOLERANCE,
    AffineMap,
    FloatArray,
)
from cellmap_lightning.geometry.source import AnyArray, Method, Source, compute_type, read_box, store_values

#: Integer types as which voxels of several bytes are moved.
_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: Points gathered at a time: bounds the temporary memory to about 20 MB per thread.
_SLAB_POINTS = 1 << 18


def sub_points(matrix: FloatArray, method: Method) -> npt.NDArray[np.int64]:
    """Return the sub-points per axis over which an output voxel is averaged; 1 unless it is coarser than the array."""
    extent = np.linalg.norm(matrix, axis=0)  # of an output voxel along its own axes, in array voxels
    return np.where((extent > 1 + SCALE_TOLERANCE) & (method == "linear"), np.ceil(extent), 1).astype(int)


# ------------------------------------------------------------------------------- rotations about one axis


def moved_as_one(box: AnyArray, out: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Return voxels and output with the bytes of a voxel as one number, if there is such an integer."""
    item = _ITEMS.get(box.shape[3]) if box.ndim == 4 else None
    return (box, out) if item is None else (box.view(item)[..., 0], out.view(item)[..., 0])


def gather_about_axis(source: Source, amap: AffineMap, out: AnyArray, method: Method, fill: float) -> bool:
    """Write a patch that is rotated about one of its axes.

    All voxels along that axis share their neighbours in the plane and the weights of these.

    Returns:
        False where the map is no such rotation, or where a stored value is not finite; nothing is written then.
    """
    axes = _axis_of_rotation(amap)
    if axes is None:
        return False
    patch_axis, array_axis, step = axes
    line = _sample_line(
        amap.offset[array_axis] + step * np.arange(out.shape[patch_axis]), step, source.shape[array_axis], method
    )
    plane = _Plane.of(amap, patch_axis, array_axis, source)
    if line is None or 0 in plane.size:
        out[...] = fill
        return True
    low, high = [0, 0, 0], [0, 0, 0]
    low[array_axis], high[array_axis] = line.low, line.high
    for i, axis in enumerate(a for a in range(3) if a != array_axis):
        low[axis], high[axis] = plane.first[i], plane.first[i] + plane.size[i]
    box = read_box(source, low, high)
    if box.dtype.kind == "f" and not np.isfinite(box).all():
        return False
    view = np.moveaxis(out, patch_axis, 2)
    if view.shape[2] != line.inside.stop - line.inside.start:
        out[...] = fill
        view = view[:, :, line.inside]
    box, view = moved_as_one(box, view)
    # With the axis of rotation last, whole runs of voxels are gathered instead of single ones.
    box = np.ascontiguousarray(np.moveaxis(box, array_axis, 2))
    rows = box.reshape(box.shape[0] * box.shape[1], *box.shape[2:])
    if line.index is not None:
        index = line.index
        if len(index) > 1 and index[0] > index[-1]:  # reversed in the output, so that rows need not be
            index, view = index[::-1], view[:, :, ::-1]
        if not np.array_equal(index, np.arange(line.low, line.high)):
            rows = rows[:, index - line.low]
    _fill_plane(plane, rows, line, view, method, fill, source.dtype)
    return True


def _axis_of_rotation(amap: AffineMap) -> tuple[int, int, float] | None:
    """Return the patch axis and the array axis that a rotation leaves in place, and the step along them."""
    size = np.asarray(amap.shape, float)
    for patch_axis in range(3):
        array_axis = int(np.abs(amap.matrix[:, patch_axis]).argmax())
        rest = np.abs(amap.matrix)
        step = float(amap.matrix[array_axis, patch_axis])
        rest[array_axis, patch_axis] = 0
        in_row, in_column = rest[array_axis] @ size, rest[:, patch_axis].max() * size[patch_axis]
        if in_row < LATTICE_TOLERANCE and in_column < LATTICE_TOLERANCE:
            return patch_axis, array_axis, step
    return None


@dataclass(frozen=True)
class _Line:
    """Sampling along the axis of rotation.

    Attributes:
        inside: the patch's voxels whose centres lie in the array.
        low: first voxel of the array that is read.
        high: the voxel after the last.
        index: the array's voxel of each of them, where voxels are copied.
        band: their weights, where they are interpolated.
    """

    inside: slice
    low: int
    high: int
    index: npt.NDArray[np.int64] | None = None
    band: Band | None = None


def _sample_line(points: FloatArray, step: float, count: int, method: Method) -> _Line | None:
    """Return the sampling at some points of an axis of ``count`` voxels; None where none lies in the array."""
    nearest = nearest_index(points, count)
    hits = np.flatnonzero(nearest >= 0 if method == "nearest" else is_inside(points, count))
    if not len(hits):
        return None
    inside = slice(int(hits[0]), int(hits[-1]) + 1)
    index: npt.NDArray[np.int64] | None = nearest[hits]
    if method == "linear":
        band = Band.of(np.clip(points[hits], -0.5, count - 0.5), abs(step), count)
        index = band.copies
        if index is None:
            return _Line(inside, *band.used, band=band)
    assert index is not None
    return _Line(inside, int(index.min()), int(index.max()) + 1, index)


@dataclass(frozen=True)
class _Plane:
    """The map of a rotation across its axis, and the part of the array that it needs.

    Attributes:
        matrix: ``[2, 2]``, array voxels per patch voxel.
        offset: ``[2]``, array index of the centre of the patch's voxel (0, 0).
        counts: voxels of the array along the two axes.
        first: first voxel that is read.
        size: voxels that are read.
    """

    matrix: FloatArray
    offset: FloatArray
    counts: tuple[int, ...]
    first: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def of(cls, amap: AffineMap, patch_axis: int, array_axis: int, source: Source) -> "_Plane":
        """Return the plane across an axis of rotation."""
        patch_axes = [i for i in range(3) if i != patch_axis]
        array_axes = [i for i in range(3) if i != array_axis]
        matrix, offset = amap.matrix[np.ix_(array_axes, patch_axes)], amap.offset[array_axes]
        rows, columns = (amap.shape[i] for i in patch_axes)
        corners = np.array([(-0.5, -0.5), (-0.5, columns), (rows, -0.5), (rows, columns)]).T
        first, size = [], []
        counts = tuple(source.shape[i] for i in array_axes)
        for reached, count in zip(matrix @ corners + offset[:, None], counts, strict=True):
            low = min(max(math.floor(reached.min()) - 1, 0), count)
            high = min(max(math.ceil(reached.max()) + 2, 0), count)
            first.append(low)
            size.append(max(0, high - low))
        return cls(matrix, offset, counts, tuple(first), tuple(size))

    def points(self, shape: tuple[int, ...], row: int, shift: Sequence[float] = (0.0, 0.0)) -> FloatArray:
        """Return array indices ``[2, q, r]`` of the (shifted) centres of a slab that starts at row ``row``."""
        q = np.arange(row, row + shape[0]) + shift[0]
        r = np.arange(shape[1]) + shift[1]
        matrix, offset = self.matrix, self.offset
        points: FloatArray = (
            matrix[:, 0, None, None] * q[:, None] + matrix[:, 1, None, None] * r + offset[:, None, None]
        )
        return points

    def outside(self, centres: FloatArray) -> npt.NDArray[np.bool_]:
        """Return which centres lie outside of the array."""
        inside = is_inside(centres[0], self.counts[0]) & is_inside(centres[1], self.counts[1])
        return ~inside

    def nearest_rows(self, centres: FloatArray) -> npt.NDArray[np.int64]:
        """Return the number of the row that is nearest to each centre."""
        rows = np.zeros(centres[0].shape, np.int64)
        for axis in range(2):
            nearest = np.ceil(centres[axis] - 0.5 - EDGE_TOLERANCE).astype(np.int64) - self.first[axis]
            rows = rows * self.size[axis] + np.clip(nearest, 0, self.size[axis] - 1)
        return rows

    def bilinear(self, rows: AnyArray, points: FloatArray, dtype: type[np.floating[Any]]) -> AnyArray:
        """Return values ``[points, row]``, interpolated between the rows of four neighbours each."""
        base = np.zeros(points[0].size, np.int64)
        parts, strides = [], []
        for axis, size in enumerate(self.size):
            at = np.clip(points[axis].ravel(), -0.5, self.counts[axis] - 0.5)
            left = np.clip(np.floor(at), 0, max(self.counts[axis] - 2, 0))
            # Beyond the part that was read lie only points outside the array, which are filled afterwards.
            left = np.clip(left, self.first[axis], max(self.first[axis] + size - 2, self.first[axis]))
            parts.append((at - left).astype(dtype) if size > 1 else np.zeros(at.shape, dtype))
            stride = self.size[1] if axis == 0 else 1
            strides.append(stride if size > 1 else 0)
            base += (left.astype(np.int64) - self.first[axis]) * stride
        u, v = parts
        total: AnyArray | None = None
        for step, weight in (
            (0, (1 - u) * (1 - v)),
            (strides[1], (1 - u) * v),
            (strides[0], u * (1 - v)),
            (strides[0] + strides[1], u * v),
        ):
            values = np.multiply(rows.take(base + step, axis=0), weight[:, None], dtype=dtype)
            total = values if total is None else np.add(total, values, out=total)
        assert total is not None
        return total


def _fill_plane(
    plane: _Plane, rows: AnyArray, line: _Line, out: AnyArray, method: Method, fill: float, stored: np.dtype[Any]
) -> None:
    """Write the patch slab by slab from rows of voxels along the axis of rotation, which is the last of ``out``."""
    parts = sub_points(plane.matrix, method)
    dtype = compute_type(stored)
    height = max(1, _SLAB_POINTS // 4 // (out.shape[1] * out.shape[2]))
    for row in range(0, out.shape[0], height):
        slab = out[row : row + height]
        centres = plane.points(slab.shape, row)
        if method == "nearest":
            slab[...] = rows.take(plane.nearest_rows(centres).ravel(), axis=0).reshape(slab.shape)
        else:
            total: AnyArray | None = None
            for part in np.ndindex(*parts):
                shift = [(p + 0.5) / n - 0.5 for p, n in zip(part, parts, strict=True)]
                values = plane.bilinear(rows, plane.points(slab.shape, row, shift), dtype)
                total = values if total is None else np.add(total, values, out=total)
            assert total is not None
            if parts.prod() > 1:
                total /= dtype(parts.prod())
            if line.band is not None:
                total = line.band(total, 1, line.low)
            store_values(total.reshape(slab.shape), slab, stored)
        outside = plane.outside(centres)
        if outside.any():
            slab[outside] = fill


# ------------------------------------------------------------------------------------------- any rotation


def gather(source: Source, amap: AffineMap, out: AnyArray, method: Method, fill: float) -> None:
    """Write a patch under any map, slab by slab."""
    shape = np.asarray(out.shape[:3])
    parts = sub_points(amap.matrix, method)
    low, high = gathered_box(amap, source.shape)
    if any(a >= b for a, b in zip(low, high, strict=True)):
        out[...] = fill
        return
    box = read_box(source, low, high)
    offset = amap.offset - low
    # The array's edges, in indices of the box that was read.
    limits = np.stack([-0.5 - np.asarray(low), np.subtract(source.shape, 0.5) - low])
    limits += np.array([[-EDGE_TOLERANCE], [EDGE_TOLERANCE]])
    planes = max(1, _SLAB_POINTS // int(shape[1] * shape[2]))
    for z in range(0, int(shape[0]), planes):
        slab = out[z : z + planes]
        centres = _points(amap.matrix, offset, slab.shape, z, np.zeros(3))
        if method == "nearest":
            slab[...] = _nearest(box, centres)
        else:
            total: AnyArray | None = None
            for part in np.ndindex(*parts):
                shift = (np.asarray(part) + 0.5) / parts - 0.5
                values = _trilinear(box, _points(amap.matrix, offset, slab.shape, z, shift), source.dtype)
                total = values if total is None else total + values
            assert total is not None
            store_values(total / np.prod(parts).astype(total.dtype), slab, source.dtype)
        edges = limits[:, :, None, None, None]
        slab[((centres < edges[0]) | (centres > edges[1])).any(axis=0)] = fill


def _points(matrix: FloatArray, offset: FloatArray, shape: tuple[int, ...], z: int, shift: FloatArray) -> FloatArray:
    """Return array indices ``[3, z, y, x]`` of the (shifted) centres of a slab that starts at plane ``z``."""
    axes = [np.arange(n) + s for n, s in zip(shape, shift, strict=False)]
    axes[0] = axes[0] + z
    points = np.empty((3, *shape[:3]))
    for i in range(3):
        along = matrix[i, 0] * axes[0][:, None] + matrix[i, 1] * axes[1] + offset[i]
        points[i] = along[:, :, None] + matrix[i, 2] * axes[2]
    return points


def _trilinear(box: AnyArray, points: FloatArray, stored: np.dtype[Any]) -> AnyArray:
    """Return the trilinear interpolant of a box at some points.

    Points outside are evaluated too, at the border; the caller fills them.
    """
    dtype = compute_type(stored)
    flat = box.reshape(-1)
    base = np.zeros(points.shape[1:], np.int64)
    parts, strides = [], []
    for axis, count in enumerate(box.shape):
        at = np.clip(points[axis], -0.5, count - 0.5)
        left = np.clip(np.floor(at), 0, max(count - 2, 0)).astype(np.int64)
        parts.append((at - left).astype(dtype) if count > 1 else np.zeros(at.shape, dtype))
        stride = int(np.prod(box.shape[axis + 1 :]))
        strides.append(stride if count > 1 else 0)
        base += left * stride
    total = np.zeros(base.shape, dtype)
    all_finite = stored.kind != "f" or np.isfinite(flat).all()
    for corner in np.ndindex(2, 2, 2):
        weight = np.ones((), dtype)
        for bit, part in zip(corner, parts, strict=True):
            weight = weight * (part if bit else 1 - part)
        step = sum(bit * stride for bit, stride in zip(corner, strides, strict=True))
        values = flat[base + step].astype(dtype)
        if not all_finite:  # a neighbour of weight 0 must not turn the sum to NaN
            values = np.where(np.isfinite(values), values, np.where(weight == 0, 0, np.nan).astype(dtype))
        total += weight * values
    return total


def _nearest(box: AnyArray, points: FloatArray) -> AnyArray:
    """Return the voxel of a box that is nearest to each point, the lower one on a tie; outside, one at the border."""
    flat = box.reshape(-1, *box.shape[3:])
    base = np.zeros(points.shape[1:], np.int64)
    for axis in range(3):
        index = np.ceil(points[axis] - 0.5 - EDGE_TOLERANCE).astype(np.int64)
        base = base * box.shape[axis] + np.clip(index, 0, box.shape[axis] - 1)
    voxels: AnyArray = flat[base]
    return voxels


def is_gathered(amap: AffineMap, method: Method) -> bool:
    """Return True if `gather` computes the patch of a map, up to rounding; False where another path averages exactly.

    Maps along the axes and rotations about an axis have the exact mean over an output voxel, `gather` that of points.
    """
    averages = bool((sub_points(amap.matrix, method) > 1).any())
    return not averages or is_general(amap)


def is_general(amap: AffineMap) -> bool:
    """Return True if a map is neither along the axes nor a rotation about one, so that `gather` computes its patch."""
    return amap.separable() is None and _axis_of_rotation(amap) is None


def gathered_box(amap: AffineMap, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the first voxel, and the one after the last, that a patch needs of an array; equal where it needs none.

    Args:
        amap: from the patch's voxels to those of the array.
        shape: voxels of the array.
    """
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in amap.shape], indexing="ij")).reshape(3, -1)
    reached = amap.matrix @ corners + amap.offset[:, None]
    low = np.clip(np.floor(reached.min(axis=1)).astype(int) - 1, 0, shape)
    high = np.clip(np.ceil(reached.max(axis=1)).astype(int) + 2, 0, shape)
    return low.tolist(), np.maximum(low, high).tolist()
