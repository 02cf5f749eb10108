"""`cellmap_data.transforms.augment.random_contrast`."""

from cellmap_lightning.compat.transforms.augment.values import RandomContrast as RandomContrast
from cellmap_lightning.compat.utils.misc import torch_max_value as torch_max_value
