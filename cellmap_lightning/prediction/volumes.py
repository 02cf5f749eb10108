"""Which volumes are predicted, what a patch of the output is there, and what is kept of raw meanwhile."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.store import parts_of
from cellmap_lightning.runtime.location import on_network

#: Of decoded chunks of raw, what is kept at least while blocks are predicted.
LEAST_CHUNK_BYTES = 64 << 20


def volumes_of(datasets: Sequence[CellMapDataset]) -> dict[str, list[CellMapDataset]]:
    """The datasets of each volume, one for each plane, by a name.

    Raises:
        CellMapValueError: a volume is there twice, or two have one name.
    """
    found: dict[str, list[CellMapDataset]] = {}
    for dataset in datasets:
        found.setdefault(dataset.input_path, []).append(dataset)
    for path, planes in found.items():
        names = [dataset.plane.name for dataset in planes]
        if len(set(names)) < len(names):
            raise CellMapValueError(f"'predict' has {path} more than once; give each volume one time")
    named = {path: volume_name(path) for path in found}
    twice = sorted(path for path, name in named.items() if list(named.values()).count(name) > 1)
    if twice:
        raise CellMapValueError(
            f"{', '.join(twice)} would all be written to {named[twice[0]]!r}; predict one at a time"
        )
    return {named[path]: planes for path, planes in found.items()}


def volume_name(path: str) -> str:
    """What a volume is called: the Zarr container that holds it, without its ending."""
    parts = parts_of(path).parts
    return next((Path(part).stem for part in parts if part.endswith((".zarr", ".n5"))), parts[-1])


def output_windows(window: Window, flat: bool, datasets: Sequence[CellMapDataset]) -> list[Window]:
    """A patch of the output in each plane, along the axes of the volume.

    Args:
        window: the patch along its own axes.
        flat: whether it is a slice.
        datasets: the volume, in its planes.

    Raises:
        CellMapValueError: the voxels of the planes are not the same, so that there is no mean of them.
    """
    windows = [dataset.in_volume(window, flat) for dataset in datasets]
    if any(np.abs(w.scale / windows[0].scale - 1).max() > 1e-9 for w in windows):
        said = "; ".join(
            f"{d.plane.name} has {[round(float(s), 4) for s in w.scale]} nm"
            for d, w in zip(datasets, windows, strict=True)
        )
        raise CellMapValueError(
            f"several planes are averaged voxel by voxel, and theirs differ (z, y, x): {said}. Give a scale that is "
            "the same along both axes and no finer than the volume's coarsest axis, or one plane"
        )
    return windows


def passes_by(dataset: CellMapDataset) -> bool:
    """Whether it is cheaper to decode some chunks of raw twice than to keep all of them.

    Each is needed for a few patches, and then never again. But what comes from another machine is kept.
    """
    raw = dataset.raw_at
    return dataset.cache == "auto" and isinstance(raw, Path) and not on_network(raw)


def passing_bytes(datasets: Sequence[CellMapDataset], block: FloatArray, patches: int) -> int:
    """What to keep of the chunks that were decoded last, in bytes.

    Those of the patches side by side in a block, and of the patches whose chunks are decoded ahead.

    Args:
        datasets: a volume, in its planes.
        block: extent of a block, nm.
        patches: how many are decoded ahead.
    """
    budget = datasets[0].cache_bytes
    extents = [
        (dataset, dataset.in_volume(spec.window, spec.flat).extent)
        for dataset in datasets
        for spec in dataset.layout.inputs.values()
    ]
    # Patches come in the order z, y, x: what is above them is not needed again.
    around = [d.bytes_under(block * (0, 1, 1) + patch) + patches * d.bytes_under(patch) for d, patch in extents]
    return min(max(LEAST_CHUNK_BYTES, *around), budget if budget is not None else sys.maxsize)
