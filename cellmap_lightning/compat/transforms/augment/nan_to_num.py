"""`cellmap_data.transforms.augment.nan_to_num`."""

from cellmap_lightning.compat.transforms.augment.values import NaNtoNum

__all__ = ["NaNtoNum"]
