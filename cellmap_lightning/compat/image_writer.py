"""`cellmap_data.image_writer`."""

from cellmap_lightning.dataset_writer import ImageWriter

__all__ = ["ImageWriter"]
