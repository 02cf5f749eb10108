"""`cellmap_data.transforms.augment.binarize`."""

from cellmap_lightning.compat.transforms.augment.values import Binarize

__all__ = ["Binarize"]
