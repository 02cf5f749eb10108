"""Resampling of patches: each output voxel is evaluated once, from the stored voxels.

The map selects one of four code paths. An affine map of step 1 onto the lattice (shifts, flips, axis permutations) is a
copy of slices, bit for bit. A map along the axes is a weighted sum of few neighbours per axis. Any other affine map
gathers points, and so does a smooth displacement. Displaced sections are boxes of the patch, each with its map.

Raw is the linear interpolant of the stored voxels. Where the patch is coarser than the array, it is the mean of that
interpolant over the output voxel's box: antialiased, and still exact on linear functions. Within half a voxel of the
array's border the interpolant continues its last slope. Labels are the nearest stored voxel, the lower one on a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.geometry.interpolation import nearest_index, weighted_sums
from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE, AffineMap, FloatArray, Shape
from cellmap_lightning.geometry.rotation import gather, gather_about_axis
from cellmap_lightning.geometry.sample_map import SampleMap, VoxelMap
from cellmap_lightning.geometry.source import AnyArray, Method, Source, read_box
from cellmap_lightning.geometry.spline_gather import gather_spline
from cellmap_lightning.geometry.spline_map import SplineMap

__all__ = ["AnyArray", "Method", "Slices", "Source", "copy_slices", "evaluate", "slices"]


def evaluate(source: Source, amap: VoxelMap, out: AnyArray, *, method: Method, fill: float) -> None:
    """Write the patch of ``amap`` to ``out``.

    Args:
        source: the array; one that is evaluated linearly has no last axis.
        amap: from voxels of ``out`` to indices of ``source``.
        out: ``[z, y, x, ...]``, the patch's shape; integers are rounded, and bounded by their type.
        method: ``linear`` for raw, ``nearest`` for labels.
        fill: value of the voxels whose centre lies outside the array.
    """
    if isinstance(amap, SampleMap):
        for box, piece in amap.pieces():
            if isinstance(piece, SplineMap):
                gather_spline(source, piece, out[box], method, fill)
            else:
                evaluate(source, piece, out[box], method=method, fill=fill)
        return
    along_axes = amap.separable()
    if along_axes is None:
        if not gather_about_axis(source, amap, out, method, fill):
            gather(source, amap, out, method, fill)
        return
    # The test for a copy depends on the shape of the box (see `slices`), so that two boxes of one lattice could take
    # different paths. Boxes of a lattice (`first`) must agree to the last bit, and never take this one.
    cut = slices(amap, along_axes) if amap.first is None else None
    if cut is not None:
        copy_slices(source, cut, cut.start, out, fill)
        return
    axes, steps = along_axes
    # A view of the output in the array's order of axes: nothing is permuted afterwards.
    order = np.argsort(axes).tolist()
    view = out.transpose(*order, *range(3, out.ndim))
    points = [amap.offset[i] + steps[axis] * amap.along(axis) for i, axis in enumerate(order)]
    if method == "nearest":
        _pick(source, points, view, fill)
    else:
        weighted_sums(source, points, np.abs(steps[order]).tolist(), view, fill)


@dataclass(frozen=True)
class Slices:
    """A patch that is a box of the array, possibly with its axes permuted and flipped.

    Attributes:
        start: first voxel of the box in the array; outside the array where the patch is.
        order: for each axis of the array, the axis of the patch.
        flips: for each axis of the array, the slice that flips it, or the whole axis.
        plain: no axis is permuted or flipped.

    Example:
        >>> Slices((0, 0, 8), (0, 1, 2), (slice(None), slice(None), slice(None)), True).start
        (0, 0, 8)
    """

    start: tuple[int, int, int]
    order: tuple[int, int, int]
    flips: tuple[slice, slice, slice]
    plain: bool

    def shape(self, patch: Shape) -> Shape:
        """Return the shape of the box from that of the patch."""
        a, b, c = self.order
        return patch[a], patch[b], patch[c]

    def view(self, out: AnyArray) -> AnyArray:
        """Return a view of the patch with the axes of the array."""
        return out if self.plain else out.transpose(*self.order, *range(3, out.ndim))[self.flips]


def slices(amap: AffineMap, along_axes: tuple[tuple[int, int, int], FloatArray] | None = None) -> Slices | None:
    """Return the box that a map of step 1 copies, or None where voxels have to be computed."""
    along_axes = along_axes if along_axes is not None else amap.separable()
    if along_axes is None:
        return None
    order = np.argsort(along_axes[0])
    steps = along_axes[1][order]
    counts = np.asarray(amap.shape)[order]
    first = np.rint(amap.offset)
    # The error of the step adds up over the patch. Multiplying by the number of voxels, and not of steps, also rejects
    # a single coarse voxel, which is a mean of several.
    miss = np.abs(amap.offset - first) + np.abs(np.abs(steps) - 1) * counts
    if not (miss < LATTICE_TOLERANCE).all():
        return None
    z, y, x = np.where(steps < 0, first - (counts - 1), first).astype(np.int64).tolist()
    a, b, c = order.tolist()
    flips = tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)
    plain = (a, b, c) == (0, 1, 2) and bool((steps > 0).all())
    return Slices((z, y, x), (a, b, c), (flips[0], flips[1], flips[2]), plain)


def copy_slices(source: Source, cut: Slices, start: tuple[int, int, int], out: AnyArray, fill: float) -> None:
    """Copy the box at ``start``; voxels outside the array are filled."""
    view = cut.view(out)
    if all(a >= 0 and a + n <= count for a, n, count in zip(start, view.shape, source.shape, strict=False)):
        source.read_into(start, view)
        return
    out[...] = fill
    lo = [max(a, 0) for a in start]
    hi = [min(a + n, count) for a, n, count in zip(start, view.shape, source.shape, strict=False)]
    if all(a < b for a, b in zip(lo, hi, strict=True)):
        part = view[tuple(slice(a - s, b - s) for a, b, s in zip(lo, hi, start, strict=True))]
        source.read_into((lo[0], lo[1], lo[2]), part)


def _pick(source: Source, points: Sequence[FloatArray], out: AnyArray, fill: float) -> None:
    """Write the voxel that is nearest to the points along each axis."""
    hits, index = [], []
    for axis in range(3):
        nearest = nearest_index(points[axis], source.shape[axis])
        hits.append(np.flatnonzero(nearest >= 0))
        index.append(nearest[nearest >= 0])
    if any(len(h) < n for h, n in zip(hits, out.shape, strict=False)):
        out[...] = fill
    if any(len(i) == 0 for i in index):
        return
    low, high = [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]
    box = read_box(source, low, high)
    # Each axis enters and leaves the array once, so the voxels inside are one box of the output.
    inside = tuple(slice(int(h[0]), int(h[-1]) + 1) for h in hits)
    out[inside] = box[np.ix_(*(i - a for i, a in zip(index, low, strict=True)))]
