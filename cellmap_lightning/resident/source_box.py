"""Boxes of resident voxels as flat items, and the storing of values that were interpolated from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellmap_lightning.crops.pieces import Piece
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.source import compute_type
from cellmap_lightning.resident.region import DeviceRegion

#: Points that are resampled at a time on a device, and on a CPU, where they stay in its cache.
SLAB_POINTS, CPU_SLAB_POINTS = 1 << 21, 1 << 16


@dataclass(frozen=True, eq=False)
class SourceBox:
    """The box of a region that a patch needs, on a device.

    Attributes:
        items: all voxels of the region on the device, along one axis; a last axis of bytes for voxels of several.
        first: item of the first voxel of the box.
        strides: items from one voxel to the next along each axis.
        low: first voxel of the box in the region.
        shape: voxels of the box.
        limits: voxels of the region.
        stored: type of the voxels, or of their bytes.
    """

    items: torch.Tensor
    first: int
    strides: Shape
    low: Shape
    shape: Shape
    limits: Shape
    stored: np.dtype[Any]

    @classmethod
    def of(cls, piece: Piece, held: DeviceRegion) -> "SourceBox":
        """Return the box of a patch."""
        _, height, width = held.voxels.shape[:3]
        strides = (height * width, width, 1)
        first = sum((a - lo) * stride for a, lo, stride in zip(piece.low, held.low, strides, strict=True))
        items = held.voxels.reshape(-1, *held.voxels.shape[3:])
        return cls(items, first, strides, piece.low, piece.shape, held.region.shape, held.region.dtype)

    @property
    def is_inner(self) -> bool:
        """True if the box does not reach the border of the region: it has a margin of a voxel around all points."""
        return all(a > 0 and a + n < m for a, n, m in zip(self.low, self.shape, self.limits, strict=True))

    @property
    def real(self) -> torch.dtype:
        """Type to interpolate in."""
        return torch.float32 if compute_type(self.stored) is np.float32 else torch.float64

    @property
    def neighbours(self) -> Shape:
        """Items from a voxel to its neighbour along each axis; 0 where the box has a single voxel."""
        z, y, x = (stride if count > 1 else 0 for stride, count in zip(self.strides, self.shape, strict=True))
        return z, y, x

    def index(self, voxels: torch.Tensor) -> torch.Tensor:
        """Return the items ``[n]`` of voxels of the box, ``[3, z, y, x]`` whole numbers of a floating-point type."""
        base = torch.full(voxels.shape[1:], self.first, dtype=torch.int64, device=voxels.device)
        for axis, stride in enumerate(self.strides):
            base += voxels[axis].to(torch.int64).mul_(stride)
        return base.reshape(-1)

    def values(self, index: torch.Tensor, step: int) -> torch.Tensor:
        """Return the values of the items that follow some others by ``step``, in the type to interpolate in."""
        return self.items[step:].index_select(0, index).view(getattr(torch, self.stored.name)).to(self.real)

    def write_nearest(self, voxels: torch.Tensor, slab: torch.Tensor) -> None:
        """Write voxels of the box.

        Args:
            voxels: ``[3, z, y, x]`` whole numbers of a floating-point type, clipped to the box in place.
            slab: items ``[z, y, x]``, with a last axis of bytes for voxels of several.
        """
        for axis, count in enumerate(self.shape):
            voxels[axis].clamp_(0, count - 1)
        slab.copy_(self.items.index_select(0, self.index(voxels)).reshape(slab.shape))

    def write_mean(self, total: torch.Tensor, count: int, slab: torch.Tensor) -> None:
        """Write the mean of interpolated values, rounded to the stored integers.

        Args:
            total: their sum; may be overwritten.
            count: number of values in the sum.
            slab: items of the same shape.
        """
        info = np.iinfo(self.stored)
        if count > 1:
            total.div_(count)
        total = total.round_().clamp_(info.min, info.max)
        # Through a wider signed type, whose lowest bits are those of the stored type.
        slab.copy_(total.to(torch.int64 if self.stored.itemsize > 2 else torch.int32))

    def fill_outside(self, points: torch.Tensor, tolerance: float, slab: torch.Tensor, value: int) -> None:
        """Set the voxels whose centres lie outside of the region.

        Args:
            points: their centres ``[3, z, y, x]``, in voxels of the box.
            tolerance: voxels by which they may be beyond its edge.
            slab: items ``[z, y, x]``, with a last axis of bytes for voxels of several.
            value: item that is written.
        """
        if self.is_inner:
            return
        beyond = torch.zeros(points.shape[1:], dtype=torch.bool, device=points.device)
        for axis, (low, limit) in enumerate(zip(self.low, self.limits, strict=True)):
            # As on the host, where points of float32 are compared with limits of float64.
            along = points[axis].double()
            beyond |= (along < -0.5 - low - tolerance) | (along > limit - 0.5 - low + tolerance)
        slab.masked_fill_(beyond.reshape(*beyond.shape, *[1] * (slab.ndim - 3)), value)


def slabs(shape: Shape, device: torch.device) -> Iterator[range]:
    """Yield ranges of the planes of a patch that are resampled at a time."""
    limit = CPU_SLAB_POINTS if device.type == "cpu" else SLAB_POINTS
    height = max(1, limit // (shape[1] * shape[2]))
    for z in range(0, shape[0], height):
        yield range(z, min(z + height, shape[0]))
