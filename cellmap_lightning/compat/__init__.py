"""The names and the module paths of cellmap-data, its API of 2026, on top of this package.

A program changes its imports from ``cellmap_data`` to ``cellmap_lightning.compat`` and reads the same crops, at the
places and with the values that docs/migration.md describes. What a class here adds to the one of the same name in
`cellmap_lightning` is its older constructor, attributes and methods; new programs have no use for it.
"""

from cellmap_lightning.compat.dataloader import CellMapDataLoader
from cellmap_lightning.compat.dataset import CellMapDataset
from cellmap_lightning.compat.dataset_writer import CellMapDatasetWriter
from cellmap_lightning.compat.datasplit import CellMapDataSplit
from cellmap_lightning.compat.empty_image import EmptyImage
from cellmap_lightning.compat.image import CellMapImage
from cellmap_lightning.compat.image_writer import ImageWriter
from cellmap_lightning.compat.multidataset import CellMapMultiDataset
from cellmap_lightning.compat.mutable_sampler import MutableSubsetRandomSampler
from cellmap_lightning.compat.sampler import ClassBalancedSampler
from cellmap_lightning.compat.subdataset import CellMapSubset

__all__ = [
    "CellMapDataLoader",
    "CellMapDataSplit",
    "CellMapDataset",
    "CellMapDatasetWriter",
    "CellMapImage",
    "CellMapMultiDataset",
    "CellMapSubset",
    "ClassBalancedSampler",
    "EmptyImage",
    "ImageWriter",
    "MutableSubsetRandomSampler",
]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
