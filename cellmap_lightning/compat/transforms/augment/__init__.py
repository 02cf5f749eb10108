"""`cellmap_data.transforms.augment`: value transforms as modules, without torchvision."""

from cellmap_lightning.compat.transforms.augment.values import (
    Binarize,
    GaussianBlur,
    GaussianNoise,
    NaNtoNum,
    Normalize,
    RandomContrast,
    RandomGamma,
)

__all__ = [
    "Binarize",
    "GaussianBlur",
    "GaussianNoise",
    "NaNtoNum",
    "Normalize",
    "RandomContrast",
    "RandomGamma",
]
