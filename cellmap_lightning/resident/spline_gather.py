"""Smoothly displaced patches from voxels on a device, as `geometry.spline_gather` computes them on the host."""

import torch

from cellmap_lightning.geometry.source import Method
from cellmap_lightning.geometry.spline_gather import SPLINE_TOLERANCE, sub_shifts
from cellmap_lightning.geometry.spline_map import SplineMap
from cellmap_lightning.resident.sample_points import SplinePoints
from cellmap_lightning.resident.source_box import SourceBox, slabs


def gather_spline(box: SourceBox, smap: SplineMap, method: Method, out: torch.Tensor, fill: int) -> None:
    """Write a smoothly displaced patch slab by slab; see `geometry.spline_gather.gather_spline`.

    Args:
        box: the voxels that it needs.
        smap: the map to the voxels of the region.
        method: ``linear`` for raw, ``nearest`` for labels.
        out: items of the patch.
        fill: item of the voxels outside the region.
    """
    points = SplinePoints(smap, box.low, out.device)
    shifts = (
        [torch.from_numpy(shift).to(out.device, non_blocking=True) for shift in sub_shifts(smap.affine.matrix)]
        if method == "linear"
        else []
    )
    for planes in slabs(smap.affine.shape, out.device):
        slab = out[planes.start : planes.stop]
        centres = points.slab(planes)
        if method == "nearest":
            box.write_nearest((centres - (0.5 + SPLINE_TOLERANCE)).ceil_(), slab)
        else:
            total = _linear(box, centres + shifts[0])
            for shift in shifts[1:]:
                total += _linear(box, centres + shift)
            box.write_mean(total, len(shifts), slab)
        box.fill_outside(centres, SPLINE_TOLERANCE, slab, fill)


def _linear(box: SourceBox, points: torch.Tensor) -> torch.Tensor:
    """Return the trilinear interpolant of a box at some points; near its border the last slope continues.

    Args:
        box: the voxels.
        points: float32 ``[3, z, y, x]`` in voxels of the box; overwritten.
    """
    left = points.floor()
    if not box.is_inner:
        for axis, count in enumerate(box.shape):
            points[axis].clamp_(-0.5, count - 0.5)
            left[axis].clamp_(0, max(count - 2, 0))
    base = box.index(left)
    parts = points.sub_(left).to(box.real).reshape(3, -1)
    z, y, x = box.neighbours
    values = [box.values(base, step) for step in (0, x, y, y + x, z, z + x, z + y, z + y + x)]
    for axis in (2, 1, 0):
        # Lerp: a moved towards b by the part, as on the host.
        values = [b.sub_(a).mul_(parts[axis]).add_(a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0].reshape(points.shape[1:])
