"""Evaluate a patch: each output voxel once, straight from stored voxels.

Three roads, chosen by the affine map alone. A lattice map of step 1 (shifts, flips, axis permutations) is a copy of
slices, bit for bit. A map along the axes is a few weighted neighbours per axis. Anything else gathers points.

Raw is the linear interpolant of the stored voxels. Where the patch is coarser than the array, it is the mean of that
interpolant over the output voxel's box: antialiased, and still exact on linear functions. Within half a voxel of the
array's border the interpolant continues its last slope. Labels are the nearest stored voxel, the lower one on a tie.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import (
    EDGE_TOLERANCE,
    LATTICE_TOLERANCE,
    SCALE_TOLERANCE,
    AffineMap,
    FloatArray,
    Shape,
)

AnyArray = npt.NDArray[Any]
Method = Literal["linear", "nearest"]
#: Types that are moved as one where voxels have several bytes.
_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SLAB_POINTS = 1 << 18  # points gathered at a time: bounds the temporary memory to about 20 MB a thread


class Source(Protocol):
    """An array of voxels that can be read by boxes inside it, perhaps with a last axis of bytes per voxel."""

    @property
    def shape(self) -> Shape:
        """Voxels along z, y, x."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type."""

    def read_into(self, start: tuple[int, int, int], out: AnyArray) -> None:
        """Copy the box at ``start`` with the shape of ``out`` into ``out``, a view of any strides."""

    def read(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """The box at ``start``; perhaps the array itself, so it is never written to."""


def evaluate(source: Source, amap: AffineMap, out: AnyArray, *, method: Method, fill: float) -> None:
    """Write the patch of ``amap`` to ``out``.

    Args:
        source: the array; one that is evaluated linearly has no last axis.
        amap: from voxels of ``out`` to indices of ``source``.
        out: ``[z, y, x, ...]``, the patch's shape; integers are rounded, and bounded by their type.
        method: ``linear`` for raw, ``nearest`` for labels.
        fill: value of the voxels whose centre lies outside the array.
    """
    along_axes = amap.separable()
    if along_axes is None:
        if not _gather_about(source, amap, out, method, fill):
            _gather(source, amap, out, method, fill)
        return
    # Whether a map is a copy is a matter of tolerance, and of its shape: boxes of one lattice could differ in it.
    cut = slices(amap, along_axes) if amap.first is None else None
    if cut is not None:
        copy_slices(source, cut, cut.start, out, fill)
        return
    axes, steps = along_axes
    # Seen in the array's order of axes, the output is a view: nothing is permuted afterwards.
    order = np.argsort(axes).tolist()
    view = out.transpose(*order, *range(3, out.ndim))
    points = [amap.offset[i] + steps[axis] * amap.along(axis) for i, axis in enumerate(order)]
    if method == "nearest":
        _pick(source, points, view, fill)
    else:
        _weigh(source, points, np.abs(steps[order]).tolist(), view, fill)


@dataclass(frozen=True)
class Slices:
    """A patch that is a box of the array, perhaps seen in another order of axes and from other ends.

    Attributes:
        start: first voxel of the box in the array; outside it where the patch is.
        order: which axis of the patch each axis of the array is.
        flips: per axis of the array, the slice that turns it round, or not.
        plain: neither order nor ends differ.
    """

    start: tuple[int, int, int]
    order: tuple[int, int, int]
    flips: tuple[slice, slice, slice]
    plain: bool

    def shape(self, patch: Shape) -> Shape:
        """The shape of the box for that of the patch."""
        a, b, c = self.order
        return patch[a], patch[b], patch[c]

    def view(self, out: AnyArray) -> AnyArray:
        """The patch as the array sees it."""
        return out if self.plain else out.transpose(*self.order, *range(3, out.ndim))[self.flips]


def slices(amap: AffineMap, along_axes: tuple[tuple[int, int, int], FloatArray] | None = None) -> Slices | None:
    """The box that a map of step 1 copies, or None where voxels would have to be computed."""
    along_axes = along_axes if along_axes is not None else amap.separable()
    if along_axes is None:
        return None
    order = np.argsort(along_axes[0])
    steps = along_axes[1][order]
    counts = np.asarray(amap.shape)[order]
    first = np.rint(amap.offset)
    # A single voxel has no next one to miss, but a coarse one is still the mean of several.
    miss = np.abs(amap.offset - first) + np.abs(np.abs(steps) - 1) * counts
    if not (miss < LATTICE_TOLERANCE).all():
        return None
    z, y, x = np.where(steps < 0, first - (counts - 1), first).astype(np.int64).tolist()
    a, b, c = order.tolist()
    flips = tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)
    plain = (a, b, c) == (0, 1, 2) and bool((steps > 0).all())
    return Slices((z, y, x), (a, b, c), (flips[0], flips[1], flips[2]), plain)


def copy_slices(source: Source, cut: Slices, start: tuple[int, int, int], out: AnyArray, fill: float) -> None:
    """Copy the box at ``start``, with what lies outside the array filled."""
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


def _read(source: Source, lo: list[int], hi: list[int]) -> AnyArray:
    return source.read((lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2]))


def nearest_index(points: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Index of the voxel that holds each point, -1 outside the array; the lower voxel where a point is on an edge."""
    index = np.ceil(points - 0.5 - EDGE_TOLERANCE).astype(np.int64)
    index[(index == -1) & (points >= -0.5 - EDGE_TOLERANCE)] = 0
    index[(index < 0) | (index >= count)] = -1
    return index


def _pick(source: Source, points: Sequence[FloatArray], out: AnyArray, fill: float) -> None:
    """The nearest voxel to each of the points along each axis."""
    where, index = [], []
    for axis in range(3):
        found = nearest_index(points[axis], source.shape[axis])
        where.append(np.flatnonzero(found >= 0))
        index.append(found[found >= 0])
    complete = all(len(w) == n for w, n in zip(where, out.shape, strict=False))
    if not complete:
        out[...] = fill
    if any(len(i) == 0 for i in index):
        return
    lo, hi = [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]
    box = _read(source, lo, hi)
    picked = box[np.ix_(*(i - a for i, a in zip(index, lo, strict=True)))]
    # Each axis enters and leaves the array once, so what is inside is one box of the output.
    inside = tuple(slice(int(w[0]), int(w[-1]) + 1) for w in where)
    out[inside] = picked


def linear_weights(points: FloatArray, width: float, count: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Neighbours and weights of the linear interpolant of ``count`` voxels, along one axis.

    Args:
        points: positions in voxels, each inside ``[-0.5, count - 0.5]``.
        width: voxels over which the interpolant is averaged around each point; up to 1.01 it is taken at the point.
        count: voxels of the array.

    Returns:
        Indices and weights, both ``[points, neighbours]``.
    """
    if width <= 1 + SCALE_TOLERANCE:
        middles, lengths = points[:, None], np.ones((len(points), 1))
    else:
        # Between two voxel centres the interpolant is a line, whose mean is its value in the middle of the piece.
        a = np.maximum(points - width / 2, -0.5)
        b = np.minimum(points + width / 2, count - 0.5)
        knots = np.floor(a)[:, None] + np.arange(int(np.ceil(width)) + 2)
        knots = np.clip(knots, a[:, None], b[:, None])
        knots[:, -1] = b
        lengths = np.diff(knots) / (b - a)[:, None]
        middles = (knots[:, 1:] + knots[:, :-1]) / 2
    if count == 1:
        return np.zeros((len(points), 1), np.int64), np.ones((len(points), 1))
    left = np.clip(np.floor(middles), 0, count - 2).astype(np.int64)
    part = middles - left
    index = np.concatenate([left, left + 1], axis=1)
    weight = np.concatenate([lengths * (1 - part), lengths * part], axis=1)
    return index, weight


def _store(values: AnyArray, out: AnyArray, stored: np.dtype[Any]) -> None:
    """Assign, with what comes from stored integers rounded to them."""
    if stored.kind in "iu" and out.dtype.kind in "iu":
        info = np.iinfo(out.dtype)
        highest = values.dtype.type(info.max)
        if int(highest) > info.max:  # 2**63 - 1 is no float64: what it rounds to would wrap around
            highest = np.nextafter(highest, values.dtype.type(0))
        values = np.clip(np.rint(values, out=values), info.min, highest, out=values)
    out[...] = values


def _compute_type(stored: np.dtype[Any]) -> type[np.floating[Any]]:
    """float32 where it holds the stored values exactly, else float64."""
    return np.float32 if stored.itemsize <= 2 or stored == np.float32 else np.float64


@dataclass(frozen=True)
class _Band:
    """Weighted sums along one axis, each in the order of its neighbours.

    So, to the last bit, a voxel does not depend on the patch or block that it is part of. A product of matrices adds up
    in an order that follows from its shape, and from the number of threads.

    Attributes:
        low: ``[points]``, the first neighbour of each point.
        weights: ``[points, neighbours]``, of that and of those after it.
    """

    low: npt.NDArray[np.int64]
    weights: FloatArray

    @classmethod
    def of(cls, points: FloatArray, width: float, count: int) -> "_Band":
        """See `linear_weights`."""
        index, weight = linear_weights(points, width, count)
        low = index.min(axis=1)
        weights = np.zeros((len(low), int((index - low[:, None]).max()) + 1))
        np.add.at(weights, (np.arange(len(low))[:, None], index - low[:, None]), weight)
        return cls(low, weights)

    @property
    def used(self) -> tuple[int, int]:
        """The first neighbour with a weight, and the one after the last."""
        neighbours = (self.low[:, None] + np.arange(self.weights.shape[1]))[self.weights != 0]
        return int(neighbours.min()), int(neighbours.max()) + 1

    @property
    def copies(self) -> npt.NDArray[np.int64] | None:
        """The one neighbour of each point, where none has several."""
        one = ((self.weights == 0) | (self.weights == 1)).all()
        return self.low + self.weights.argmax(axis=1) if one else None

    def __call__(self, values: AnyArray, axis: int, first: int) -> AnyArray:
        """The sums along an axis of ``values``, which begins with the array's voxel ``first``; of booleans, any."""
        shape = list(values.shape)
        shape[axis] = len(self.low)
        total = np.zeros(shape, values.dtype)
        along = [1] * values.ndim
        along[axis] = -1
        part = np.empty_like(total)
        for number in range(self.weights.shape[1]):
            weights = self.weights[:, number]
            if not weights.any():
                continue
            # What lies outside has no weight.
            np.take(values, self.low + number - first, axis, out=part, mode="clip")
            if values.dtype == bool:
                total |= part & (weights != 0).reshape(along)
            else:
                part *= weights.astype(values.dtype).reshape(along)
                total += part
        return total


def _weigh(source: Source, points: Sequence[FloatArray], widths: Sequence[float], out: AnyArray, fill: float) -> None:
    """A weighted sum along each axis in turn: the trilinear interpolant, or its mean, is a product over the axes."""
    inside, bands, lo, hi = [], [], [], []
    for axis in range(3):
        count = source.shape[axis]
        at = points[axis]
        ok = np.flatnonzero((at >= -0.5 - EDGE_TOLERANCE) & (at <= count - 0.5 + EDGE_TOLERANCE))
        if len(ok) == 0:
            out[...] = fill
            return
        band = _Band.of(np.clip(at[ok], -0.5, count - 0.5), widths[axis], count)
        first, last = band.used
        inside.append(slice(int(ok[0]), int(ok[-1]) + 1))
        bands.append(band)
        lo.append(first)
        hi.append(last)
    target = out[tuple(inside)]
    if target.shape != out.shape:
        out[...] = fill
    kind = _compute_type(source.dtype)
    values = _read(source, lo, hi).astype(kind)
    # A weight of zero does not silence a NaN.
    holes = ~np.isfinite(values) if source.dtype.kind == "f" else None
    if holes is not None and holes.any():
        values[holes] = 0
    else:
        holes = None
    # The axis that shrinks most goes first, so that the later sums are small.
    for axis in sorted(range(3), key=lambda a: -widths[a]):
        band = bands[axis]
        kept = band.copies
        if kept is not None and np.array_equal(kept, np.arange(lo[axis], hi[axis])):
            continue
        values = band(values, axis, lo[axis])
        if holes is not None:
            holes = band(holes, axis, lo[axis])
    if holes is not None:
        values[holes] = np.nan
    values += 0  # a sum is never -0, and what is copied should not be either
    _store(values, target, source.dtype)


def _gather_about(source: Source, amap: AffineMap, out: AnyArray, method: Method, fill: float) -> bool:
    """A rotation about one axis of the patch: all that lies along that axis shares its neighbours and their weights.

    Returns:
        False where the map is none, or where what is stored is not finite; nothing is written then.
    """
    found = _axis_of_rotation(amap)
    if found is None:
        return False
    mine, theirs, step = found
    plane, across = [i for i in range(3) if i != mine], [i for i in range(3) if i != theirs]
    matrix, offset = amap.matrix[np.ix_(across, plane)], amap.offset[across]
    shape = [out.shape[i] for i in plane]
    counts = [source.shape[i] for i in across]
    reach = np.linalg.norm(matrix, axis=0)
    parts = np.where((reach > 1 + SCALE_TOLERANCE) & (method == "linear"), np.ceil(reach), 1).astype(int)
    corners = np.array([(-0.5, -0.5), (-0.5, shape[1]), (shape[0], -0.5), (shape[0], shape[1])]).T
    reached = matrix @ corners + offset[:, None]
    lo, hi = [0, 0, 0], [0, 0, 0]
    for axis, values, count in zip(across, reached, counts, strict=True):
        lo[axis] = min(max(math.floor(values.min()) - 1, 0), count)
        hi[axis] = min(max(math.ceil(values.max()) + 2, 0), count)
    along = amap.offset[theirs] + step * np.arange(out.shape[mine])
    count = source.shape[theirs]
    kind = _compute_type(source.dtype)
    band: _Band | None = None
    if method == "nearest":
        pick = nearest_index(along, count)
        seen = np.flatnonzero(pick >= 0)
        pick = pick[seen]
    else:
        seen = np.flatnonzero((along >= -0.5 - EDGE_TOLERANCE) & (along <= count - 0.5 + EDGE_TOLERANCE))
        if len(seen):
            band = _Band.of(np.clip(along[seen], -0.5, count - 0.5), abs(step), count)
    if len(seen) == 0 or any(a >= b for i, (a, b) in enumerate(zip(lo, hi, strict=True)) if i != theirs):
        out[...] = fill
        return True
    if band is not None:
        lo[theirs], hi[theirs] = band.used
        copies = band.copies
        if copies is not None:
            pick, band = copies, None
    else:
        lo[theirs], hi[theirs] = int(pick.min()), int(pick.max()) + 1
    box = _read(source, lo, hi)
    if box.dtype.kind == "f" and not np.isfinite(box).all():
        return False
    item = _ITEMS.get(box.shape[3]) if box.ndim == 4 else box.dtype
    if item is not None and box.ndim == 4:  # a voxel of several bytes is moved as one number
        box = box.view(item)[..., 0]
    # The axis of rotation last: what is gathered then are runs of voxels, and not single ones.
    box = np.ascontiguousarray(np.moveaxis(box, theirs, 2))
    rows = box.reshape(box.shape[0] * box.shape[1], *box.shape[2:])
    flip = False
    if band is None:
        # Voxels as they are: in their order, from the other end, or some of them.
        flip = len(pick) > 1 and pick[0] > pick[-1]
        order = pick[::-1] if flip else pick
        if not np.array_equal(order, np.arange(lo[theirs], hi[theirs])):
            rows = rows[:, order - lo[theirs]]
    view = np.moveaxis(out, mine, 2)
    if view.shape[2] != len(seen):
        out[...] = fill
        view = view[:, :, int(seen[0]) : int(seen[-1]) + 1]
    if flip:
        view = view[:, :, ::-1]
    if item is not None and out.ndim == 4:
        view = view.view(item)[..., 0]
    low = np.array([-0.5 - EDGE_TOLERANCE] * 2)
    high = np.array(counts) - 0.5 + EDGE_TOLERANCE
    first = np.array([lo[i] for i in across])
    per = max(1, _SLAB_POINTS // 4 // (shape[1] * len(seen)))
    for q in range(0, shape[0], per):
        slab = view[q : q + per]
        centres = _plane_points(matrix, offset, slab.shape, q, (0.0, 0.0))
        outside = ((centres < low[:, None, None]) | (centres > high[:, None, None])).any(axis=0)
        if method == "nearest":
            base = np.zeros(outside.shape, np.int64)
            for i in range(2):
                nearest = np.ceil(centres[i] - 0.5 - EDGE_TOLERANCE).astype(np.int64)
                inside = np.clip(nearest, first[i], first[i] + box.shape[i] - 1)
                base = base * box.shape[i] + inside - first[i]
            slab[...] = rows.take(base.ravel(), axis=0).reshape(slab.shape)
        else:
            total: AnyArray | None = None
            for part in np.ndindex(*parts):
                shift = [(p + 0.5) / n - 0.5 for p, n in zip(part, parts, strict=True)]
                points = _plane_points(matrix, offset, slab.shape, q, (shift[0], shift[1]))
                values = _bilinear(rows, box.shape[:2], points, first, counts, kind)
                total = values if total is None else np.add(total, values, out=total)
            assert total is not None
            if len(parts) and parts.prod() > 1:
                total /= kind(parts.prod())
            if band is not None:
                total = band(total, 1, lo[theirs])
            _store(total.reshape(slab.shape), slab, source.dtype)
        if outside.any():
            slab[outside] = fill
    return True


def _axis_of_rotation(amap: AffineMap) -> tuple[int, int, float] | None:
    """Patch axis and array axis that a rotation leaves in place, and the step along them."""
    size = np.asarray(amap.shape, float)
    for mine in range(3):
        theirs = int(np.abs(amap.matrix[:, mine]).argmax())
        rest = np.abs(amap.matrix)
        step = float(amap.matrix[theirs, mine])
        rest[theirs, mine] = 0
        if (rest[theirs] @ size) < LATTICE_TOLERANCE and rest[:, mine].max() * size[mine] < LATTICE_TOLERANCE:
            return mine, theirs, step
    return None


def _plane_points(
    matrix: FloatArray, offset: FloatArray, shape: tuple[int, ...], first: int, shift: tuple[float, float]
) -> FloatArray:
    """Array indices ``[2, q, r]`` of the (shifted) centres of a slab that starts at row ``first``."""
    q = np.arange(first, first + shape[0]) + shift[0]
    r = np.arange(shape[1]) + shift[1]
    points: FloatArray = matrix[:, 0, None, None] * q[:, None] + matrix[:, 1, None, None] * r + offset[:, None, None]
    return points


def _bilinear(
    rows: AnyArray,
    size: tuple[int, ...],
    points: FloatArray,
    first: npt.NDArray[np.int64],
    counts: Sequence[int],
    kind: type[np.floating[Any]],
) -> AnyArray:
    """Values ``[points, row]`` between the rows of four neighbours each."""
    base = np.zeros(points[0].size, np.int64)
    parts, strides = [], []
    for i in range(2):
        at = np.clip(points[i].ravel(), -0.5, counts[i] - 0.5)
        left = np.clip(np.floor(at), 0, max(counts[i] - 2, 0))
        # Where the box was cut, only points outside the array could reach further.
        left = np.clip(left, first[i], max(first[i] + size[i] - 2, first[i]))
        parts.append((at - left).astype(kind) if size[i] > 1 else np.zeros(at.shape, kind))
        stride = size[1] if i == 0 else 1
        strides.append(stride if size[i] > 1 else 0)
        base += (left.astype(np.int64) - first[i]) * stride
    u, v = parts
    total: AnyArray | None = None
    for step, weight in (
        (0, (1 - u) * (1 - v)),
        (strides[1], (1 - u) * v),
        (strides[0], u * (1 - v)),
        (strides[0] + strides[1], u * v),
    ):
        values = np.multiply(rows.take(base + step, axis=0), weight[:, None], dtype=kind)
        total = values if total is None else np.add(total, values, out=total)
    assert total is not None
    return total


def _gather(source: Source, amap: AffineMap, out: AnyArray, method: Method, fill: float) -> None:
    """Any rotation: every output voxel centre by itself, in slabs."""
    shape = np.asarray(out.shape[:3])
    # What an output voxel covers along its own axes, in array voxels: sub-points average over it when it is coarser.
    reach = np.linalg.norm(amap.matrix, axis=0)
    parts = np.where((reach > 1 + SCALE_TOLERANCE) & (method == "linear"), np.ceil(reach), 1).astype(int)
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij")).reshape(3, -1)
    reached = amap.matrix @ corners + amap.offset[:, None]
    lo = np.clip(np.floor(reached.min(axis=1)).astype(int) - 1, 0, source.shape)
    hi = np.clip(np.ceil(reached.max(axis=1)).astype(int) + 2, 0, source.shape)
    if (hi <= lo).any():
        out[...] = fill
        return
    box = _read(source, lo.tolist(), hi.tolist())
    planes = max(1, _SLAB_POINTS // int(shape[1] * shape[2]))
    offset = amap.offset - lo
    limits = np.stack([-0.5 - lo, np.asarray(source.shape) - 0.5 - lo])
    for z in range(0, int(shape[0]), planes):
        slab = out[z : z + planes]
        if method == "nearest":
            _gather_nearest(box, _points(amap.matrix, offset, slab.shape, z, np.zeros(3)), limits, slab, fill)
            continue
        total: AnyArray | None = None
        outside: npt.NDArray[np.bool_] | None = None
        for part in np.ndindex(*parts):
            shift = (np.asarray(part) + 0.5) / parts - 0.5
            points = _points(amap.matrix, offset, slab.shape, z, shift)
            values = _trilinear(box, points, source.dtype)
            total = values if total is None else total + values
        centres = _points(amap.matrix, offset, slab.shape, z, np.zeros(3))
        low, high = limits[0] - EDGE_TOLERANCE, limits[1] + EDGE_TOLERANCE
        for axis in range(3):
            beyond = (centres[axis] < low[axis]) | (centres[axis] > high[axis])
            outside = beyond if outside is None else outside | beyond
        assert total is not None
        assert outside is not None
        _store(total / np.prod(parts).astype(total.dtype), slab, source.dtype)
        slab[outside] = fill


def _points(matrix: FloatArray, offset: FloatArray, shape: tuple[int, ...], z: int, shift: FloatArray) -> FloatArray:
    """Array indices ``[3, z, y, x]`` of the (shifted) centres of a slab that starts at plane ``z``."""
    axes = [np.arange(n) + s for n, s in zip(shape, shift, strict=False)]
    axes[0] = axes[0] + z
    points = np.empty((3, *shape[:3]))
    for i in range(3):
        along = matrix[i, 0] * axes[0][:, None] + matrix[i, 1] * axes[1] + offset[i]
        points[i] = along[:, :, None] + matrix[i, 2] * axes[2]
    return points


def _trilinear(box: AnyArray, points: FloatArray, stored: np.dtype[Any]) -> AnyArray:
    kind = _compute_type(stored)
    flat = box.reshape(-1)
    base: npt.NDArray[np.int64] | None = None
    parts, strides = [], []
    for axis, count in enumerate(box.shape):
        # Points outside are evaluated too, at the border, and filled by the caller.
        at = np.clip(points[axis], -0.5, count - 0.5)
        left = np.clip(np.floor(at), 0, max(count - 2, 0)).astype(np.int64)
        parts.append((at - left).astype(kind) if count > 1 else np.zeros(at.shape, kind))
        stride = int(np.prod(box.shape[axis + 1 :]))
        strides.append(stride if count > 1 else 0)
        base = left * stride if base is None else base + left * stride
    assert base is not None
    total = np.zeros(base.shape, kind)
    whole = stored.kind != "f" or np.isfinite(flat).all()
    for corner in np.ndindex(2, 2, 2):
        weight = np.ones((), kind)
        for bit, part in zip(corner, parts, strict=True):
            weight = weight * (part if bit else 1 - part)
        step = sum(bit * stride for bit, stride in zip(corner, strides, strict=True))
        values = flat[base + step].astype(kind)
        if not whole:  # what has no weight has no say, not even as NaN
            values = np.where(np.isfinite(values), values, np.where(weight == 0, 0, np.nan).astype(kind))
        total += weight * values
    return total


def _gather_nearest(box: AnyArray, points: FloatArray, limits: FloatArray, out: AnyArray, fill: float) -> None:
    flat = box.reshape(-1, *box.shape[3:])
    base: npt.NDArray[np.int64] | None = None
    ok: npt.NDArray[np.bool_] | None = None
    for axis in range(3):
        stride = int(np.prod(box.shape[axis + 1 : 3]))
        index = np.ceil(points[axis] - 0.5 - EDGE_TOLERANCE).astype(np.int64)
        inside = (points[axis] >= limits[0][axis] - EDGE_TOLERANCE) & (points[axis] <= limits[1][axis] + EDGE_TOLERANCE)
        index = np.clip(index, 0, box.shape[axis] - 1) * stride
        base = index if base is None else base + index
        ok = inside if ok is None else ok & inside
    assert base is not None
    assert ok is not None
    out[...] = flat[base]
    out[~ok] = fill
