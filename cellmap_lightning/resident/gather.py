"""Patches gathered from voxels on a device: copies of boxes, and resampling, as `geometry.resample` does on the host.

All of it is torch operations, so that the same code runs on every device. Coordinates are float64, and sums are added
in the order of the host's, so that results agree up to rounding.
"""

import itertools

import numpy as np
import torch

from cellmap_lightning.crops.pieces import Piece
from cellmap_lightning.geometry.lattice import EDGE_TOLERANCE, AffineMap, Shape
from cellmap_lightning.geometry.rotation import sub_points
from cellmap_lightning.geometry.source import compute_type
from cellmap_lightning.resident.region import DeviceRegion

#: Points that are resampled at a time on a device, and on a CPU, where they stay in its cache.
SLAB_POINTS, CPU_SLAB_POINTS = 1 << 21, 1 << 16
#: Limit of the temporary memory of a gather on a device: 192 bytes per point, of coordinates, neighbours, weights and
#: sums.
GATHER_BYTES = 192 * SLAB_POINTS


def gather(piece: Piece, held: DeviceRegion, out: torch.Tensor) -> None:
    """Write a patch to ``out``.

    Args:
        piece: the patch.
        held: its region on the device, with the chunks that the patch needs.
        out: ``[z, y, x]`` of the region's type on the same device, with a last axis of bytes for voxels of several.
    """
    if out.device.type != "cpu":
        # Without this, memory of a region that makes room would be reused by another stream while this one reads it.
        held.voxels.record_stream(torch.accelerator.current_stream(out.device))
    items = out.view(held.item)
    if held.region.depth and held.region.item_bytes == held.item.itemsize:
        items = items[..., 0]  # a voxel of several bytes is moved as one number
    fill = _as_item(piece.fill, held)
    if piece.amap is None:
        _copy(piece, held, items, fill)
    elif 0 in piece.shape:
        items.fill_(fill)
    else:
        _resample(piece, piece.amap, held, items, fill)


def _as_item(value: float, held: DeviceRegion) -> int:
    """Return the number of the item's type with the bits of a value of the region's type."""
    if held.region.depth or held.item.itemsize != held.region.dtype.itemsize:
        return 0  # packed labels are filled by 0
    bits = np.array([value], held.region.dtype).view(torch.empty((), dtype=held.item).numpy().dtype)
    return int(bits[0])


def _copy(piece: Piece, held: DeviceRegion, out: torch.Tensor, fill: int) -> None:
    """Copy the box of a lattice map, mirrored and permuted."""
    cut = piece.cut
    assert cut is not None
    view = out if cut.plain else out.permute(*cut.order, *range(3, out.ndim))
    if tuple(view.shape[:3]) != piece.shape:
        out.fill_(fill)
        if 0 in piece.shape:
            return
    box = held.voxels[_inside(piece.low, piece.shape, held)]
    mirrored, parts = [], []
    for axis, (low, count, start) in enumerate(zip(piece.low, piece.shape, piece.start, strict=True)):
        first = low - start
        if cut.flips[axis].step == -1:
            mirrored.append(axis)
            first = view.shape[axis] - first - count
        parts.append(slice(first, first + count))
    view[tuple(parts)].copy_(box.flip(mirrored) if mirrored else box)


def _inside(low: Shape, shape: Shape, held: DeviceRegion) -> tuple[slice, ...]:
    """Return the slices of a box of the region in the voxels on the device."""
    return tuple(slice(a - lo, a - lo + n) for a, n, lo in zip(low, shape, held.low, strict=True))


def sample_points(
    amap: AffineMap, low: Shape, planes: range, shift: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """Return the source coordinates of a slab, in voxels of a box: the only place that evaluates the sample map.

    Displacements and offsets of sections are added here, as float64 ``[3, planes, y, x]`` in voxels of the region.

    Args:
        amap: the affine part of the map, from the patch's voxels to those of the region.
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


def _resample(piece: Piece, amap: AffineMap, held: DeviceRegion, out: torch.Tensor, fill: int) -> None:
    """Evaluate a map slab by slab."""
    device, region = out.device, held.region
    parts = sub_points(amap.matrix, piece.method)
    limit = CPU_SLAB_POINTS if device.type == "cpu" else SLAB_POINTS
    height = max(1, limit // (amap.shape[1] * amap.shape[2]))
    low = np.asarray(piece.low)
    lower = (-0.5 - low - EDGE_TOLERANCE).tolist()
    upper = (np.subtract(region.shape, 0.5) - low + EDGE_TOLERANCE).tolist()
    rest = held.voxels.shape[3:]
    flat = held.voxels.reshape(-1, *rest)
    # The box, as the first item and the strides in items of its axes.
    _, height_of, width_of = held.voxels.shape[:3]
    strides = (height_of * width_of, width_of, 1)
    first = sum((a - lo) * stride for a, lo, stride in zip(piece.low, held.low, strides, strict=True))
    for z in range(0, amap.shape[0], height):
        planes = range(z, min(z + height, amap.shape[0]))
        slab = out[planes.start : planes.stop]
        centres = sample_points(amap, piece.low, planes, (0.0, 0.0, 0.0), device)
        if piece.method == "nearest":
            base = torch.full(centres.shape[1:], first, dtype=torch.int64, device=device)
            for axis, (count, stride) in enumerate(zip(piece.shape, strides, strict=True)):
                nearest = (centres[axis] - 0.5 - EDGE_TOLERANCE).ceil_().clamp_(0, count - 1)
                base += nearest.to(torch.int64).mul_(stride)
            slab.copy_(flat.index_select(0, base.reshape(-1)).reshape(slab.shape))
        else:
            _write_linear(piece, amap, held, flat, first, strides, planes, parts.tolist(), slab)
        outside = torch.zeros(centres.shape[1:], dtype=torch.bool, device=device)
        for axis in range(3):
            outside |= (centres[axis] < lower[axis]) | (centres[axis] > upper[axis])
        slab.masked_fill_(outside.reshape(*outside.shape, *[1] * len(rest)), fill)


def _write_linear(
    piece: Piece,
    amap: AffineMap,
    held: DeviceRegion,
    flat: torch.Tensor,
    first: int,
    strides: tuple[int, int, int],
    planes: range,
    parts: list[int],
    slab: torch.Tensor,
) -> None:
    """Write the mean of the interpolant over the sub-points of each output voxel, rounded to the stored type."""
    stored = held.region.dtype
    real = torch.float32 if compute_type(stored) is np.float32 else torch.float64
    total: torch.Tensor | None = None
    for part in np.ndindex(*parts):
        shift = tuple((p + 0.5) / n - 0.5 for p, n in zip(part, parts, strict=True))
        points = sample_points(amap, piece.low, planes, shift, slab.device)
        values = _trilinear(flat, first, strides, piece.shape, points, stored, real)
        total = values if total is None else total.add_(values)
    assert total is not None
    info = np.iinfo(stored)
    total = total.div_(float(np.prod(parts))).round_().clamp_(info.min, info.max)
    # Through a wider signed type, whose lowest bits are those of the stored type.
    slab.copy_(total.to(torch.int64 if stored.itemsize > 2 else torch.int32))


def _trilinear(
    flat: torch.Tensor,
    first: int,
    strides: tuple[int, int, int],
    shape: Shape,
    points: torch.Tensor,
    stored: "np.dtype[np.generic]",
    real: torch.dtype,
) -> torch.Tensor:
    """Return the trilinear interpolant of a box at some points; see `geometry.rotation`.

    Args:
        flat: the voxels on the device, as items.
        first: the item of the box's first voxel.
        strides: items from one voxel to the next along each axis.
        shape: voxels of the box.
        points: float64 ``[3, z, y, x]`` in voxels of the box.
        stored: type of the voxels.
        real: type to interpolate in.
    """
    base = torch.full(points.shape[1:], first, dtype=torch.int64, device=points.device)
    weights, steps = [], []
    for axis, count in enumerate(shape):
        at = points[axis].clamp(-0.5, count - 0.5)
        left = at.floor().clamp_(0, max(count - 2, 0))
        part = (at - left).to(real) if count > 1 else torch.zeros_like(at, dtype=real)
        weights.append((1 - part, part))
        steps.append(strides[axis] if count > 1 else 0)
        base += left.to(torch.int64).mul_(strides[axis])
    total = torch.zeros(points.shape[1:], dtype=real, device=points.device)
    base = base.reshape(-1)
    unsigned = getattr(torch, stored.name)
    for corner in itertools.product((0, 1), repeat=3):
        step = sum(bit * stride for bit, stride in zip(corner, steps, strict=True))
        values = flat.index_select(0, base + step).view(unsigned).to(real).reshape(total.shape)
        weight = weights[0][corner[0]] * weights[1][corner[1]] * weights[2][corner[2]]
        total += weight * values
    return total
