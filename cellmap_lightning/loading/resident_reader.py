"""Reading of batches as descriptions of what is on a device; the rest is read on the host."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.pieces import Description, describe, described_regions
from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.resident.batch import ArrayRows, ResidentBatch
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.resident.region import DeviceRegion

Held = Mapping[int, DeviceRegion]
Staged = tuple[DeviceRegion, Shape, torch.Tensor]


class ResidentReader:
    """Reads batches of a dataset with the regions of a device; see docs/device.md.

    Args:
        source: the dataset.
        cache: the regions on the device.
        pin: stage chunks, and read what is read on the host, in page-locked memory.
    """

    def __init__(self, source: SampleSource, cache: DeviceCache, pin: bool = False) -> None:
        self.source, self.cache, self.pin = source, cache, pin
        self._regions: dict[int, list[Region]] = {}

    def regions(self, crop: int) -> list[Region]:
        """Return the regions of a crop, by its number in the dataset."""
        if crop not in self._regions:
            self._regions[crop] = described_regions(self.source.crops[crop])
        return self._regions[crop]

    def read(self, draws: Sequence[Draw]) -> ResidentBatch:
        """Read samples into a batch: chunks that were not uploaded are decoded, nothing is done on the device.

        Raises:
            ChunkError: a chunk cannot be read.
        """
        source, cache = self.source, self.cache
        source.prepare()
        numbers = [source.crop_number(draw.position) for draw in draws]
        shown = list(dict.fromkeys(numbers))
        held = dict(zip(shown, cache.admit([self.regions(number) for number in shown]), strict=True))
        arrays: dict[str, ArrayRows] = {}
        chunks: dict[tuple[int, Shape], tuple[DeviceRegion, Shape]] = {}
        for name, (shape, dtype) in source.layout.compact().items():
            described, read = [], []
            for row, (draw, number) in enumerate(zip(draws, numbers, strict=True)):
                part = self._describe(name, draw, number, held[number])
                if part is None:
                    read.append(row)
                    continue
                description, regions = part
                described.append((row, description, regions))
                for piece, region in zip(description.pieces, regions, strict=True):
                    if 0 not in piece.shape:
                        for chunk in region.missing(piece.low, piece.shape):
                            chunks[id(region), chunk] = region, chunk
            voxels = self._read(name, [draws[row] for row in read], shape, getattr(torch, dtype.name))
            arrays[name] = ArrayRows(shape, getattr(torch, dtype.name), described, read, voxels)
        staged: list[Staged] = []
        source.run([partial(self._stage, region, chunk, staged) for region, chunk in chunks.values()])
        tensors = {
            "idx": torch.tensor([d.position for d in draws], dtype=torch.int64, device="cpu"),
            "sample": torch.tensor([d.sample for d in draws], dtype=torch.int64, device="cpu"),
        }
        return ResidentBatch(tensors, arrays, staged, cache)

    def _describe(
        self, name: str, draw: Draw, number: int, held: Held | None
    ) -> tuple[Description, list[DeviceRegion]] | None:
        """Describe one array of a sample, with the region of each piece; None where it is read on the host."""
        if held is None:
            return None
        crop, local = self.source.locate(draw.position)
        place = crop.placement.grid_index(local)
        transform = self.source.layout.raw_transforms.get(name)
        description = describe(crop, name, place, draw.turn, transform, draw.advance, draw.warp)
        if description is None:
            return None
        regions = []
        for piece in description.pieces:
            region = held.get(id(piece.region))
            if region is None or not (0 in piece.shape or region.holds(piece.low, piece.shape)):
                return None
            regions.append(region)
        return description, regions

    def _read(self, name: str, draws: Sequence[Draw], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Read one array of some samples on the host."""
        voxels = torch.empty((len(draws), *shape), dtype=dtype, device="cpu", pin_memory=self.pin and bool(draws))
        if draws:
            self.source.read_into(draws, {name: voxels.numpy()})
        return voxels

    def _stage(self, region: DeviceRegion, chunk: Shape, staged: list[Staged]) -> None:
        staged.append((region, chunk, region.stage(chunk, self.pin)))
