"""`cellmap_data.transforms.augment.random_contrast`."""

from cellmap_lightning.compat.transforms.augment.values import RandomContrast
from cellmap_lightning.compat.utils.misc import torch_max_value

__all__ = ["RandomContrast", "torch_max_value"]
