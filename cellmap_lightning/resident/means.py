"""Exact means on a device: the sums of `geometry.exact_means`, in the order of the host's."""

import numpy as np
import torch

from cellmap_lightning.geometry.exact_means import AboutAxis, AlongAxes, Means
from cellmap_lightning.geometry.interpolation import Band
from cellmap_lightning.geometry.rotation import Plane, sub_points
from cellmap_lightning.resident.source_box import CPU_SLAB_POINTS, SLAB_POINTS


def write_means(box: torch.Tensor, plan: Means, out: torch.Tensor, fill: float, real: torch.dtype) -> None:
    """Write the means of a patch.

    Args:
        box: the voxels from ``plan.low`` to ``plan.high``, of their stored type.
        plan: the neighbours and weights.
        out: ``[z, y, x]`` of type ``real``, not rounded.
        fill: value of the voxels whose centre lies outside the array.
        real: type to sum in.
    """
    if isinstance(plan, AlongAxes):
        _along_axes(box.to(real), plan, out, fill)
    else:
        _about_axis(box, plan, out, fill, real)


def _along_axes(values: torch.Tensor, plan: AlongAxes, out: torch.Tensor, fill: float) -> None:
    """Sum along one axis after the other; that which shrinks most goes first, so that the later sums are small."""
    view = out.permute(*plan.order)
    target = view[plan.inside]
    if target.shape != view.shape:
        out.fill_(fill)
    for axis in sorted(range(3), key=lambda a: -plan.widths[a]):
        band, low = plan.bands[axis], plan.low[axis]
        copies = band.copies
        if copies is None or not np.array_equal(copies, np.arange(low, plan.high[axis])):
            values = _banded(values, band, axis, low)
    target.copy_(values)


def _banded(values: torch.Tensor, band: Band, axis: int, first: int) -> torch.Tensor:
    """Return the weighted sums along an axis of ``values``, whose first voxel is voxel ``first`` of the array."""
    along = [1] * values.ndim
    along[axis] = -1
    total: torch.Tensor | None = None
    for number in range(band.weights.shape[1]):
        weights = band.weights[:, number]
        if not weights.any():
            continue
        # Clipped neighbours have weight 0.
        index = np.clip(band.low + number - first, 0, values.shape[axis] - 1)
        part = values.index_select(axis, torch.from_numpy(index).to(values.device))
        part *= torch.from_numpy(weights).to(values.device, values.dtype).reshape(along)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _about_axis(box: torch.Tensor, plan: AboutAxis, out: torch.Tensor, fill: float, real: torch.dtype) -> None:
    """Interpolate between rows of voxels along the axis of rotation, then sum along it."""
    plane, line = plan.plane, plan.line
    view = out.movedim(plan.patch_axis, 2)
    if view.shape[2] != line.inside.stop - line.inside.start:
        out.fill_(fill)
        view = view[:, :, line.inside]
    box = box.movedim(plan.array_axis, 2)
    rows = box.reshape(box.shape[0] * box.shape[1], box.shape[2]).to(real)
    if line.index is not None:
        rows = rows.index_select(1, torch.from_numpy(line.index - line.low).to(box.device))
    parts = sub_points(plane.matrix, "linear")
    limit = CPU_SLAB_POINTS if box.device.type == "cpu" else SLAB_POINTS
    height = max(1, limit // (view.shape[1] * max(rows.shape[1], view.shape[2])))
    for row in range(0, view.shape[0], height):
        slab = view[row : row + height]
        shape = tuple(slab.shape)
        total: torch.Tensor | None = None
        for part in np.ndindex(*parts):
            shift = [(p + 0.5) / n - 0.5 for p, n in zip(part, parts, strict=True)]
            points = torch.from_numpy(plane.points(shape, row, shift)).to(box.device)
            values = _bilinear(plane, rows, points)
            total = values if total is None else total.add_(values)
        assert total is not None
        if parts.prod() > 1:
            total /= float(parts.prod())
        if line.band is not None:
            total = _banded(total, line.band, 1, line.low)
        slab.copy_(total.reshape(shape))
        outside = plane.outside(plane.points(shape, row))
        if outside.any():
            slab.masked_fill_(torch.from_numpy(outside).to(box.device)[:, :, None], fill)


def _bilinear(plane: Plane, rows: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return values ``[points, row]``, interpolated between the rows of four neighbours each; see `Plane.bilinear`."""
    base = torch.zeros(points[0].numel(), dtype=torch.int64, device=points.device)
    parts, strides = [], []
    for axis, size in enumerate(plane.size):
        at = points[axis].reshape(-1).clamp(-0.5, plane.counts[axis] - 0.5)
        left = at.floor().clamp_(0, max(plane.counts[axis] - 2, 0))
        left = left.clamp_(plane.first[axis], max(plane.first[axis] + size - 2, plane.first[axis]))
        parts.append((at - left).to(rows.dtype) if size > 1 else torch.zeros_like(at, dtype=rows.dtype))
        stride = plane.size[1] if axis == 0 else 1
        strides.append(stride if size > 1 else 0)
        base += (left.to(torch.int64) - plane.first[axis]) * stride
    u, v = parts
    total: torch.Tensor | None = None
    for step, weight in (
        (0, (1 - u) * (1 - v)),
        (strides[1], (1 - u) * v),
        (strides[0], u * (1 - v)),
        (strides[0] + strides[1], u * v),
    ):
        values = rows.index_select(0, base + step).mul_(weight[:, None])
        total = values if total is None else total.add_(values)
    assert total is not None
    return total
