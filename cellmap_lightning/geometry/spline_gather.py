"""Resampling of smoothly displaced patches: every output voxel centre is evaluated by itself, in small slabs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.geometry.rotation import moved_as_one
from cellmap_lightning.geometry.source import AnyArray, Method, Source, compute_type, read_box, store_values
from cellmap_lightning.geometry.spline_map import Planes, SplineMap

#: Points computed at a time, so that temporary arrays stay in a processor's cache.
_SLAB_POINTS = 1 << 14
#: Voxels within which a point counts as lying on an edge: indices are computed in float32.
SPLINE_TOLERANCE = 1e-4
#: Whole numbers up to this one are exact in float32.
_EXACT = 1 << 24


def gather_spline(source: Source, smap: SplineMap, out: AnyArray, method: Method, fill: float) -> None:
    """Write a smoothly displaced patch to ``out``; see `resample.evaluate`.

    Where the patch is coarser than the array by half a voxel or more, raw is averaged over points in the output voxel.
    """
    lowest, highest = smap.bounds(0.5)
    low, high = spline_box(lowest, highest, source.shape)
    if any(b <= a for a, b in zip(low, high, strict=True)):
        out[...] = fill
        return
    box = np.ascontiguousarray(read_box(source, low, high))
    # Not near a border of the array, no index has to be clipped or compared with it.
    inner = bool(
        (lowest >= SPLINE_TOLERANCE).all() and (highest <= np.subtract(source.shape, 1 + SPLINE_TOLERANCE)).all()
    )
    finite = box.dtype.kind != "f" or bool(np.isfinite(box).all())
    if method == "nearest":
        box, out = moved_as_one(box, out)
    planes = Planes(smap.control_grid(low))
    shifts = sub_shifts(smap.affine.matrix) if method == "linear" else []
    height = max(1, _SLAB_POINTS // (out.shape[1] * out.shape[2]))
    for z in range(0, out.shape[0], height):
        slab = out[z : z + height]
        centres = planes.indices(z, z + len(slab))
        if method == "nearest":
            slab[...] = _nearest(box, centres, inner)
        else:
            total = _linear(box, centres + shifts[0], inner, finite)
            for shift in shifts[1:]:
                total += _linear(box, centres + shift, inner, finite)
            if len(shifts) > 1:
                total /= len(shifts)
            store_values(total, slab, source.dtype)
        if not inner:
            slab[_outside(centres, np.asarray(low), source.shape)] = fill


def spline_box(lowest: FloatArray, highest: FloatArray, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the corners of the box of an array, upper one exclusive, that a displaced patch needs.

    Args:
        lowest: lowest index along each axis; see `SplineMap.bounds`, with a margin of half a voxel.
        highest: highest index.
        shape: voxels of the array.
    """
    low = np.clip(np.floor(lowest).astype(int) - 1, 0, shape)
    high = np.clip(np.ceil(highest).astype(int) + 2, 0, shape)
    return low.tolist(), high.tolist()


def sub_shifts(matrix: FloatArray) -> list[AnyArray]:
    """Return the points over which an output voxel is averaged, from its centre in voxels of the array.

    Args:
        matrix: the affine part of the map.

    Returns:
        Shifts ``[3, 1, 1, 1]``, float32.
    """
    parts = np.maximum(np.rint(np.linalg.norm(matrix, axis=0)), 1).astype(int)
    shifts = [matrix @ ((np.asarray(part) + 0.5) / parts - 0.5) for part in np.ndindex(*parts)]
    return [shift.astype(np.float32).reshape(3, 1, 1, 1) for shift in shifts]


def _outside(centres: AnyArray, low: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which centres, counted from ``low``, lie outside of an array."""
    beyond = np.zeros(centres.shape[1:], np.bool_)
    for axis in range(3):
        beyond |= centres[axis] < -0.5 - low[axis] - SPLINE_TOLERANCE
        beyond |= centres[axis] > shape[axis] - 0.5 - low[axis] + SPLINE_TOLERANCE
    return beyond


def _flat_index(voxels: AnyArray, shape: Sequence[int]) -> npt.NDArray[np.intp]:
    """Return the index in a flat box of voxels ``[3, ...]``, whole numbers as float32."""
    z, y, x = voxels if shape[0] * shape[1] * shape[2] < _EXACT else voxels.astype(np.float64)
    flat = z * z.dtype.type(shape[1] * shape[2])
    flat += y * y.dtype.type(shape[2])
    flat += x
    index: npt.NDArray[np.intp] = flat.astype(np.intp)
    return index


def _nearest(box: AnyArray, centres: AnyArray, inner: bool) -> AnyArray:
    """Return the voxel of a box that is nearest to each centre, the lower one on a tie."""
    voxels = np.ceil(centres - np.float32(0.5 + SPLINE_TOLERANCE))
    if not inner:
        for axis in range(3):
            np.clip(voxels[axis], 0, box.shape[axis] - 1, out=voxels[axis])
    return box.reshape(-1, *box.shape[3:]).take(_flat_index(voxels, box.shape), axis=0)


def _linear(box: AnyArray, points: AnyArray, inner: bool, finite: bool) -> AnyArray:
    """Return the trilinear interpolant of a box at some points, which may be overwritten.

    Args:
        box: the voxels.
        points: indices ``[3, ...]``.
        inner: no point is closer to the border of the array than its outermost voxel centres; others continue the last
            slope.
        finite: all voxels are finite.
    """
    dtype = compute_type(box.dtype)
    left = np.floor(points)
    if not inner:
        for axis, count in enumerate(box.shape):
            np.clip(points[axis], -0.5, count - 0.5, out=points[axis])
            np.clip(left[axis], 0, max(count - 2, 0), out=left[axis])
    parts = (points - left).astype(dtype, copy=False)
    base = _flat_index(left, box.shape)
    # A box of a single voxel along an axis has no neighbour there.
    z, y, x = (
        stride if count > 1 else 0
        for stride, count in zip((box.shape[1] * box.shape[2], box.shape[2], 1), box.shape, strict=True)
    )
    flat = box.reshape(-1)
    values = [flat[step:].take(base).astype(dtype) for step in (0, x, y, y + x, z, z + x, z + y, z + y + x)]
    for axis in (2, 1, 0):
        mix = _between if finite else _between_finite
        values = [mix(a, b, parts[axis]) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _between(a: AnyArray, b: AnyArray, part: AnyArray) -> AnyArray:
    """Return ``a + part * (b - a)``, in place of ``b``."""
    b -= a
    b *= part
    b += a
    return b


def _between_finite(a: AnyArray, b: AnyArray, part: AnyArray) -> AnyArray:
    """Return ``(1 - part) * a + part * b``, where a neighbour of weight 0 may be infinite or NaN."""
    on_a, on_b = np.abs(part) < SPLINE_TOLERANCE, np.abs(1 - part) < SPLINE_TOLERANCE
    with np.errstate(invalid="ignore"):
        mixed = (1 - part) * a + part * b
    return np.where(on_a, a, np.where(on_b, b, mixed))
