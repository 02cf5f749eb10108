"""The voxels of a region on a device, uploaded chunk by chunk."""

import numpy as np
import torch

from cellmap_lightning.cache.region import Region
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import Shape

#: Types as which voxels are moved, by their bytes: torch copies and indexes few operations on unsigned types.
ITEMS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_ITEMS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}


class DeviceRegion:
    """The cached box of a region on a device; see docs/device.md.

    Args:
        region: the region, which decodes and caches its voxels on the host.
        device: the device.

    Attributes:
        low: first voxel of the box in the region.
        nbytes: bytes of its voxels.
        item: the type as which a voxel is moved: of its bytes, or uint8 for each byte of a voxel of another size.

    Raises:
        RuntimeError: torch's, if the memory of the device is exhausted.
    """

    def __init__(self, region: Region, device: torch.device) -> None:
        self.region, self.nbytes = region, region.extent_bytes
        self.low, shape = region.extent
        self.item = ITEMS.get(region.item_bytes, torch.uint8)
        rest = () if region.item_bytes in ITEMS else (region.item_bytes,)
        self._voxels: torch.Tensor | None = torch.empty((*shape, *rest), dtype=self.item, device=device)
        self._ready = np.zeros(region.layout.grid, np.bool_)

    @property
    def voxels(self) -> torch.Tensor:
        """The box ``[z, y, x]``, with a last axis of bytes where a voxel has another size than an item.

        Raises:
            CellMapError: the memory was released.
        """
        if self._voxels is None:
            raise CellMapError(
                f"{self.region.name}: the batch was described before the device cache was closed; begin a new pass"
            )
        return self._voxels

    def holds(self, start: Shape, shape: Shape) -> bool:
        """Return True if a box of the region lies inside the box on the device."""
        low, (z, y, x) = self.region.extent
        bounds = zip(start, shape, low, (z, y, x), strict=True)
        return all(a >= lo and a + n <= lo + count for a, n, lo, count in bounds)

    def missing(self, start: Shape, shape: Shape) -> list[Shape]:
        """Return the chunks of a box that were not uploaded."""
        return self.region.chunks_not_in(self._ready, start, shape)

    def stage(self, chunk: Shape, pin: bool) -> torch.Tensor:
        """Return the voxels of a chunk, decoded if they are not cached, in new memory of the host."""
        voxels = self.region.read(*self.region.chunk_box(chunk))
        size = self.region.item_bytes
        items = np.array(voxels, order="C").view(_NUMPY_ITEMS.get(size, np.uint8))
        staged = torch.from_numpy(items[..., 0] if self.region.depth in ITEMS else items)
        return staged.pin_memory() if pin else staged

    def upload(self, chunk: Shape, staged: torch.Tensor) -> None:
        """Copy the voxels of a chunk to the device; asynchronously from page-locked memory."""
        if self._ready[chunk]:
            return  # staged twice, by batches that were read before the first of them was gathered
        start, shape = self.region.chunk_box(chunk)
        box = tuple(slice(a - lo, a - lo + n) for a, n, lo in zip(start, shape, self.low, strict=True))
        self.voxels[box].copy_(staged, non_blocking=True)
        self._ready[chunk] = True

    def release(self) -> None:
        """Drop the voxels."""
        self._voxels = None
        self._ready[...] = False
