"""`cellmap_data.transforms.augment.random_gamma`."""

from cellmap_lightning.compat.transforms.augment.values import RandomGamma

__all__ = ["RandomGamma"]
