"""`cellmap_data.transforms.augment.gaussian_noise`."""

from cellmap_lightning.compat.transforms.augment.values import GaussianNoise

__all__ = ["GaussianNoise"]
