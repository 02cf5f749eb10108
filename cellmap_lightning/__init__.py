"""Exact, fast data loading of volume electron microscopy for PyTorch Lightning.

The public names are imported when they are first used, so that a data worker starts without importing Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cellmap_lightning.datamodule import CellMapDataModule
    from cellmap_lightning.dataset_writer import CellMapDatasetWriter, ImageWriter
    from cellmap_lightning.errors import CellMapError
    from cellmap_lightning.sampling.arrays import batch_memory
    from cellmap_lightning.sampling.dataloader import CellMapDataLoader
    from cellmap_lightning.sampling.dataset import CellMapDataset
    from cellmap_lightning.sampling.datasplit import CellMapDataSplit
    from cellmap_lightning.sampling.multidataset import CellMapMultiDataset
    from cellmap_lightning.sampling.positions import ClassBalancedSampler
    from cellmap_lightning.volumes.image import CellMapImage

_HOMES = {
    "CellMapDataModule": "datamodule",
    "CellMapDataLoader": "sampling.dataloader",
    "CellMapDataSplit": "sampling.datasplit",
    "CellMapDataset": "sampling.dataset",
    "CellMapDatasetWriter": "dataset_writer",
    "CellMapError": "errors",
    "CellMapImage": "volumes.image",
    "CellMapMultiDataset": "sampling.multidataset",
    "ClassBalancedSampler": "sampling.positions",
    "ImageWriter": "dataset_writer",
    "batch_memory": "sampling.arrays",
}

__all__ = [
    "CellMapDataLoader",
    "CellMapDataModule",
    "CellMapDataSplit",
    "CellMapDataset",
    "CellMapDatasetWriter",
    "CellMapError",
    "CellMapImage",
    "CellMapMultiDataset",
    "ClassBalancedSampler",
    "ImageWriter",
    "batch_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
