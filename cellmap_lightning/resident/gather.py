"""Patches gathered from voxels on a device: copies of boxes, and resampling, as `geometry.resample` does on the host.

All of it is torch operations, so that the same code runs on every device. Coordinates have the type of the host's, and
sums are added in its order, so that results agree up to rounding.
"""

import itertools

import numpy as np
import torch

from cellmap_lightning.crops.pieces import Piece
from cellmap_lightning.geometry.lattice import EDGE_TOLERANCE, AffineMap, Shape
from cellmap_lightning.geometry.rotation import sub_points
from cellmap_lightning.geometry.source import Method
from cellmap_lightning.geometry.spline_map import SplineMap
from cellmap_lightning.resident.means import write_means
from cellmap_lightning.resident.region import DeviceRegion
from cellmap_lightning.resident.sample_points import affine_points
from cellmap_lightning.resident.source_box import SLAB_POINTS, SourceBox, slabs
from cellmap_lightning.resident.spline_gather import gather_spline

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
    if piece.box is not None:
        items = items[piece.box]
    if piece.amap is None:
        _copy(piece, held, items, fill)
    elif 0 in piece.shape:
        items.fill_(fill)
    elif piece.means is not None:
        source = SourceBox.of(piece, held)
        box = held.voxels[_inside(piece.low, piece.shape, held)].view(getattr(torch, source.stored.name))
        values = torch.empty(items.shape, dtype=source.real, device=items.device)
        write_means(box, piece.means, values, piece.fill, source.real)
        source.write_mean(values, 1, items)
    elif isinstance(piece.amap, SplineMap):
        gather_spline(SourceBox.of(piece, held), piece.amap, piece.method, items, fill)
    else:
        _gather_affine(SourceBox.of(piece, held), piece.amap, piece.method, items, fill)


def _as_item(value: float, held: DeviceRegion) -> int:
    """Return the number of the item's type with the bits of a value of the region's type."""
    if held.region.depth or held.item.itemsize != held.region.dtype.itemsize:
        return 0  # packed labels are filled by 0
    bits = np.array([value], held.region.dtype).view(torch.empty((), dtype=held.item, device="cpu").numpy().dtype)
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


def _gather_affine(box: SourceBox, amap: AffineMap, method: Method, out: torch.Tensor, fill: int) -> None:
    """Write the patch of an affine map slab by slab; see `geometry.rotation.gather`.

    Args:
        box: the voxels that it needs.
        amap: the map to the voxels of the region.
        method: ``linear`` for raw, ``nearest`` for labels.
        out: items of the patch.
        fill: item of the voxels outside the region.
    """
    parts = sub_points(amap.matrix, method)
    shifts = [tuple((p + 0.5) / n - 0.5 for p, n in zip(part, parts, strict=True)) for part in np.ndindex(*parts)]
    for planes in slabs(amap.shape, out.device):
        slab = out[planes.start : planes.stop]
        centres = affine_points(amap, box.low, planes, (0.0, 0.0, 0.0), out.device)
        if method == "nearest":
            box.write_nearest((centres - 0.5 - EDGE_TOLERANCE).ceil_(), slab)
        else:
            total: torch.Tensor | None = None
            for shift in shifts:
                values = _trilinear(box, affine_points(amap, box.low, planes, shift, out.device))
                total = values if total is None else total.add_(values)
            assert total is not None
            box.write_mean(total, len(shifts), slab)
        box.fill_outside(centres, EDGE_TOLERANCE, slab, fill)


def _trilinear(box: SourceBox, points: torch.Tensor) -> torch.Tensor:
    """Return the trilinear interpolant of a box at some points; see `geometry.rotation`.

    Args:
        box: the voxels.
        points: float64 ``[3, z, y, x]`` in voxels of the box; may be overwritten.
    """
    real, weights = box.real, []
    left = torch.empty_like(points)
    for axis, count in enumerate(box.shape):
        at = points[axis].clamp_(-0.5, count - 0.5)
        torch.floor(at, out=left[axis]).clamp_(0, max(count - 2, 0))
        part = (at - left[axis]).to(real) if count > 1 else torch.zeros_like(at, dtype=real)
        weights.append((1 - part, part))
    total = torch.zeros(points.shape[1:], dtype=real, device=points.device)
    base = box.index(left)
    for corner in itertools.product((0, 1), repeat=3):
        step = sum(bit * stride for bit, stride in zip(corner, box.neighbours, strict=True))
        weight = weights[0][corner[0]] * weights[1][corner[1]] * weights[2][corner[2]]
        total += weight * box.values(base, step).reshape(total.shape)
    return total
