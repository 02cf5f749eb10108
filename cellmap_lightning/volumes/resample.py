"""Evaluate a patch: each output voxel once, straight from stored voxels.

Three roads, chosen by the affine map alone. A lattice map of step 1 (shifts, flips, axis permutations) is a copy of
slices, bit for bit. A map along the axes is a few weighted neighbours per axis. Anything else gathers points.

Raw is the linear interpolant of the stored voxels. Where the patch is coarser than the array, it is the mean of that
interpolant over the output voxel's box: antialiased, and still exact on linear functions. Within half a voxel of the
array's border the interpolant continues its last slope. Labels are the nearest stored voxel, the lower one on a tie.
"""

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cellmap_lightning.volumes.geometry import (
    EDGE_TOLERANCE,
    LATTICE_TOLERANCE,
    SCALE_TOLERANCE,
    AffineMap,
    FloatArray,
    Shape,
)

AnyArray = npt.NDArray[Any]
Method = Literal["linear", "nearest"]
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
        _gather(source, amap, out, method, fill)
        return
    axes, steps = along_axes
    # Seen in the array's order of axes, the output is a view: nothing is permuted afterwards.
    order = np.argsort(axes)
    view = out.transpose(*order, *range(3, out.ndim))
    steps, offset = steps[order], amap.offset
    counts = np.asarray(view.shape[:3])
    first = np.rint(offset)
    # A single voxel has no next one to miss, but a coarse one is still the mean of several.
    miss = np.abs(offset - first) + np.abs(np.abs(steps) - 1) * counts
    if (miss < LATTICE_TOLERANCE).all():
        flips = tuple(slice(None, None, -1 if s < 0 else 1) for s in steps)
        start = np.where(steps < 0, first - (counts - 1), first).astype(np.int64)
        _copy(source, start, view[flips], fill)
        return
    if method == "nearest":
        _pick(source, offset, steps, view, fill)
    else:
        _weigh(source, offset, steps, view, fill)


def _copy(source: Source, start: npt.NDArray[np.int64], out: AnyArray, fill: float) -> None:
    """Slices of step 1, with what lies outside the array filled."""
    size = np.asarray(out.shape[:3])
    lo = np.clip(start, 0, source.shape)
    hi = np.clip(start + size, 0, source.shape)
    if (hi - lo != size).any():
        out[...] = fill
        if (hi <= lo).any():
            return
    inside = tuple(slice(int(a), int(b)) for a, b in zip(lo - start, hi - start, strict=True))
    z, y, x = lo.tolist()
    source.read_into((z, y, x), out[inside])


def _read(source: Source, lo: list[int], hi: list[int], like: AnyArray) -> AnyArray:
    box = np.empty([b - a for a, b in zip(lo, hi, strict=True)] + list(like.shape[3:]), source.dtype)
    source.read_into((lo[0], lo[1], lo[2]), box)
    return box


def nearest_index(points: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Index of the voxel that holds each point, -1 outside the array; the lower voxel where a point is on an edge."""
    index = np.ceil(points - 0.5 - EDGE_TOLERANCE).astype(np.int64)
    index[(index == -1) & (points >= -0.5 - EDGE_TOLERANCE)] = 0
    index[(index < 0) | (index >= count)] = -1
    return index


def _pick(source: Source, offset: FloatArray, steps: FloatArray, out: AnyArray, fill: float) -> None:
    """The nearest voxel along each axis."""
    where, index = [], []
    for axis in range(3):
        found = nearest_index(offset[axis] + steps[axis] * np.arange(out.shape[axis]), source.shape[axis])
        where.append(np.flatnonzero(found >= 0))
        index.append(found[found >= 0])
    complete = all(len(w) == n for w, n in zip(where, out.shape, strict=False))
    if not complete:
        out[...] = fill
    if any(len(i) == 0 for i in index):
        return
    lo, hi = [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]
    box = _read(source, lo, hi, out)
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


def _weigh(source: Source, offset: FloatArray, steps: FloatArray, out: AnyArray, fill: float) -> None:
    """A weighted sum along each axis in turn: the trilinear interpolant, or its mean, is a product over the axes."""
    inside, matrices, lo, hi = [], [], [], []
    for axis in range(3):
        count = source.shape[axis]
        points = offset[axis] + steps[axis] * np.arange(out.shape[axis])
        ok = np.flatnonzero((points >= -0.5 - EDGE_TOLERANCE) & (points <= count - 0.5 + EDGE_TOLERANCE))
        if len(ok) == 0:
            out[...] = fill
            return
        index, weight = linear_weights(np.clip(points[ok], -0.5, count - 0.5), abs(steps[axis]), count)
        used = index[weight != 0]
        first, last = int(used.min()), int(used.max()) + 1
        matrix = np.zeros((len(ok), last - first))
        rows = np.broadcast_to(np.arange(len(ok))[:, None], index.shape)
        np.add.at(matrix, (rows, np.clip(index - first, 0, last - first - 1)), weight)
        inside.append(slice(int(ok[0]), int(ok[-1]) + 1))
        matrices.append(matrix)
        lo.append(first)
        hi.append(last)
    target = out[tuple(inside)]
    if target.shape != out.shape:
        out[...] = fill
    kind = _compute_type(source.dtype)
    values = _read(source, lo, hi, out).astype(kind)
    # A weight of zero does not silence a NaN in a product of matrices: it would spread over the whole patch.
    holes = ~np.isfinite(values) if source.dtype.kind == "f" else None
    if holes is not None and holes.any():
        values[holes] = 0
    else:
        holes = None
    # The axis that shrinks most goes first, so that the later products are small.
    for axis in sorted(range(3), key=lambda a: matrices[a].shape[0] / matrices[a].shape[1]):
        matrix = matrices[axis].astype(kind)
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
            continue
        values = _along(matrix, values, axis)
        if holes is not None:
            holes = _along((matrix != 0).astype(np.float32), holes.astype(np.float32), axis) > 0
    if holes is not None:
        values[holes] = np.nan
    _store(values, target, source.dtype)


def _along(matrix: AnyArray, values: AnyArray, axis: int) -> AnyArray:
    return np.moveaxis(np.tensordot(matrix, values, axes=(1, axis)), 0, axis)


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
    box = _read(source, lo.tolist(), hi.tolist(), out)
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
