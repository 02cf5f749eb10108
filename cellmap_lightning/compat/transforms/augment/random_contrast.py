"""`cellmap_data.transforms.augment.random_contrast`."""

from cellmap_lightning.compat.transforms.augment.values import RandomContrast as RandomContrast
