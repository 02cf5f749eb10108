"""`cellmap_data.transforms.augment.gaussian_blur`."""

from cellmap_lightning.compat.transforms.augment.values import GaussianBlur

__all__ = ["GaussianBlur"]
