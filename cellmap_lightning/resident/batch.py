"""A batch as descriptions: it is gathered from the regions on a device, and finished there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.crops.pieces import Description, Piece
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.resident.gather import gather
from cellmap_lightning.resident.region import DeviceRegion
from cellmap_lightning.runtime.buffers import BUFFERS


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """One array of the samples of a batch.

    Attributes:
        shape: of one sample in the compact form.
        dtype: type of the compact form.
        described: for each sample that is gathered, its row, its description, and the region of each piece.
        read: rows of the samples that were read on the host.
        voxels: these samples in the compact form, on the host.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    described: Sequence[tuple[int, Description, Sequence[DeviceRegion]]]
    read: Sequence[int]
    voxels: torch.Tensor


class ResidentBatch(CompactBatch):
    """A compact batch whose voxels are gathered on a device when it is transferred or finished; see docs/device.md.

    Args:
        tensors: ``idx`` and ``sample``, as in every compact batch.
        arrays: the arrays, as descriptions.
        staged: chunks to upload first, on the host.
        cache: the regions on the device.
    """

    __slots__ = ("_arrays", "_cache", "_staged")

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        arrays: Mapping[str, ArrayRows],
        staged: Sequence[tuple[DeviceRegion, Shape, torch.Tensor]],
        cache: DeviceCache,
    ) -> None:
        super().__init__(tensors)
        self._arrays, self._staged, self._cache = dict(arrays), list(staged), cache

    def gathered(self) -> CompactBatch:
        """Return the batch with its voxels on the device, gathered once.

        Raises:
            CellMapError: the device cache was closed since the batch was read.
        """
        if self._arrays:
            cache = self._cache
            tensors = {name: tensor.to(cache.device, non_blocking=True) for name, tensor in self.tensors.items()}
            with cache.queueing():
                cache.upload(self._staged)
                arrays = {name: _gathered(rows, len(tensors["idx"]), cache) for name, rows in self._arrays.items()}
            self.tensors, self._arrays, self._staged = arrays | tensors, {}, []
        return self

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the finished batch, on the device of the cache."""
        self.gathered()
        return super().finish()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> CompactBatch:
        """Return a compact batch of ``function(tensor)`` for each tensor, gathered before."""
        self.gathered()
        return super().map(function)

    def pin_memory(self) -> CompactBatch:
        """Return the batch: chunks are staged in page-locked memory when it is read."""
        return self

    def __getstate__(self) -> NoReturn:
        raise CellMapError("a batch of the device cache cannot be sent to another process; use num_workers=0")

    def __repr__(self) -> str:
        if not self._arrays:
            return super().__repr__()
        shapes = {name: [len(self.tensors["idx"]), *rows.shape] for name, rows in self._arrays.items()}
        return f"ResidentBatch({shapes})"


def _gathered(rows: ArrayRows, count: int, cache: DeviceCache) -> torch.Tensor:
    """Return one array of a batch on the device."""
    if not rows.described:
        return rows.voxels.to(cache.device, non_blocking=True)
    out = _empty((count, *rows.shape), rows.dtype, cache.device)
    voxels = rows.voxels.to(cache.device, non_blocking=True)
    for number, row in enumerate(rows.read):
        out[row].copy_(voxels[number])
    for row, description, regions in rows.described:
        sample = out[row]
        if description.unknown is not None and len({piece.channel for piece in description.pieces}) < len(sample):
            sample.fill_(description.unknown)
        for piece, held in zip(description.pieces, regions, strict=True):
            _write(piece, held, sample if piece.channel is None else sample[piece.channel])
        if description.before:
            assert description.kind is not None
            description.kind.forget(sample, description.before)
    return out


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return uninitialized memory: of the device's allocator, or on a CPU of earlier batches."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(BUFFERS.empty(shape, torch.empty((), dtype=dtype, device="cpu").numpy().dtype))


def _write(piece: Piece, held: DeviceRegion, out: torch.Tensor) -> None:
    """Write a patch to ``out``, in the type of the batch."""
    stored: Any = np.uint8 if held.region.depth else held.region.dtype
    dtype = getattr(torch, np.dtype(stored).name)
    if out.ndim > 3 and not held.region.depth:
        out = out[0]  # an input has one channel
    if out.dtype == dtype:
        gather(piece, held, out)
        return
    # Crops of different stored types: rounded as in the stored type.
    part = torch.empty(out.shape, dtype=dtype, device=out.device)
    gather(piece, held, part)
    out.copy_(part)
