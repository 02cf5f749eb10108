"""Exact, fast data loading of volume electron microscopy for PyTorch Lightning.

The public names are imported at their first use, so that a worker process starts without importing Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cellmap_lightning.batches.layout import batch_memory
    from cellmap_lightning.crops.image import CellMapImage
    from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
    from cellmap_lightning.datamodule import CellMapDataModule
    from cellmap_lightning.datasets.dataset import CellMapDataset
    from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
    from cellmap_lightning.errors import CellMapError
    from cellmap_lightning.loading.dataloader import CellMapDataLoader
    from cellmap_lightning.loading.options import LoaderOptions
    from cellmap_lightning.sampling.torch_samplers import ClassBalancedSampler
    from cellmap_lightning.splits.datasplit import CellMapDataSplit
    from cellmap_lightning.splits.options import SplitOptions

#: The modules of the public names.
_MODULES = {
    "CellMapDataModule": "datamodule",
    "CellMapDataLoader": "loading.dataloader",
    "CellMapDataSplit": "splits.datasplit",
    "CellMapDataset": "datasets.dataset",
    "CellMapError": "errors",
    "CellMapImage": "crops.image",
    "CellMapMultiDataset": "datasets.multidataset",
    "ClassBalancedSampler": "sampling.torch_samplers",
    "IntensityOptions": "crops.options",
    "LabelOptions": "crops.options",
    "LoaderOptions": "loading.options",
    "ReadOptions": "crops.options",
    "SplitOptions": "splits.options",
    "batch_memory": "batches.layout",
}

__all__ = [
    "CellMapDataLoader",
    "CellMapDataModule",
    "CellMapDataSplit",
    "CellMapDataset",
    "CellMapError",
    "CellMapImage",
    "CellMapMultiDataset",
    "ClassBalancedSampler",
    "IntensityOptions",
    "LabelOptions",
    "LoaderOptions",
    "ReadOptions",
    "SplitOptions",
    "batch_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_MODULES))}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
