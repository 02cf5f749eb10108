"""The volumes to predict, their output patches, and the caching of raw during a prediction."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.store import parts_of
from cellmap_lightning.runtime.location import on_network
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.transforms.normalization import Scaling
from cellmap_lightning.transforms.spatial import SpatialTransforms

#: Smallest size of the cache of decoded raw chunks while blocks are predicted.
LEAST_CHUNK_BYTES = 64 << 20


def volumes_of(crops: Sequence[Crop]) -> dict[str, list[Crop]]:
    """Return each volume, once for each plane, by its name.

    Raises:
        CellMapValueError: a volume occurs twice, or two volumes have the same name.
    """
    volumes: dict[str, list[Crop]] = {}
    for crop in crops:
        volumes.setdefault(crop.input_path, []).append(crop)
    for path, planes in volumes.items():
        names = [crop.plane.name for crop in planes]
        if len(set(names)) < len(names):
            raise CellMapValueError(f"'predict' has {path} more than once; list each volume once")
    named = {path: volume_name(path) for path in volumes}
    twice = sorted(path for path, name in named.items() if list(named.values()).count(name) > 1)
    if twice:
        raise CellMapValueError(
            f"{', '.join(twice)} would all be written to {named[twice[0]]!r}; predict one at a time"
        )
    return {named[path]: planes for path, planes in volumes.items()}


def volume_name(path: str) -> str:
    """Return the name of a volume: that of its Zarr container, without the suffix."""
    parts = parts_of(path).parts
    return next((Path(part).stem for part in parts if part.endswith((".zarr", ".n5"))), parts[-1])


def output_windows(window: Window, flat: bool, crops: Sequence[Crop]) -> list[Window]:
    """Return a patch of the output in each plane, along the axes of the volume.

    Args:
        window: the patch along its own axes.
        flat: True for a slice.
        crops: the volume, once for each plane.

    Raises:
        CellMapValueError: the voxel sizes in the planes differ, so that their mean is undefined.
    """
    windows = [crop.in_volume(window, flat) for crop in crops]
    if any(np.abs(w.scale / windows[0].scale - 1).max() > 1e-9 for w in windows):
        sizes = "; ".join(
            f"{crop.plane.name} has {[round(float(s), 4) for s in w.scale]} nm"
            for crop, w in zip(crops, windows, strict=True)
        )
        raise CellMapValueError(
            f"several planes are averaged voxel by voxel, and their voxel sizes differ (z, y, x): {sizes}. Give a "
            "scale that is the same along both axes and no finer than the volume's coarsest axis, or one plane"
        )
    return windows


def passes_by(crop: Crop) -> bool:
    """Return True if it is cheaper to decode some chunks of raw twice than to cache all of them.

    Each chunk is needed for a few patches, and then never again. Chunks from another machine are always cached.
    """
    raw = crop.raw_at
    return crop.store.mode == "auto" and isinstance(raw, Path) and not on_network(raw)


def passing_bytes(crops: Sequence[Crop], block: FloatArray, patches: int) -> int:
    """Return the size of the cache of recently decoded chunks, in bytes.

    It holds those of the patches side by side in a block, and of the patches whose chunks are decoded ahead.

    Args:
        crops: a volume, once for each plane.
        block: extent of a block, nm.
        patches: number of patches decoded ahead.
    """
    budget = crops[0].store.budget
    extents = [
        (crop, crop.in_volume(spec.window, spec.flat).extent) for crop in crops for spec in crop.arrays.inputs.values()
    ]
    # Patches come in the order z, y, x: chunks above them are not needed again.
    around = [c.raw.bytes_under(block * (0, 1, 1) + patch) + patches * c.raw.bytes_under(patch) for c, patch in extents]
    return min(max(LEAST_CHUNK_BYTES, *around), budget if budget is not None else sys.maxsize)


def volumes_source(crops: Sequence[Crop], layout: BatchLayout, seed: int) -> SampleSource:
    """Return a source of samples of volumes that were placed for a prediction; see `Crop.placed`.

    Args:
        crops: the volumes.
        layout: layout of the batches; targets are removed.
        seed: seed of random value transforms.
    """
    if len(crops) == 1:
        pool, store = crops[0].pool, crops[0].store
    else:
        pool = ReadPool(max(crop.pool.workers for crop in crops))
        store = RegionStore(crops[0].store.mode, max(crop.store.budget or 0 for crop in crops) or None)
        for crop in crops:
            crop.share(pool, store)
    source = SampleSource(crops, layout, seed, False, SpatialTransforms(None), pool, store)
    offsets, affine = source.first_positions, [crop.raw.affine for crop in crops]
    source.layout = dataclasses.replace(layout, targets={}, scaling=Scaling.of(offsets, affine))
    return source
