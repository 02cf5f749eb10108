"""`cellmap_data.transforms.augment.gaussian_blur`."""

from cellmap_lightning.compat.transforms.augment.values import GaussianBlur as GaussianBlur
