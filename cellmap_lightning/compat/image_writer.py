"""`cellmap_data.image_writer`."""

from cellmap_lightning.prediction.image_writer import ImageWriter

__all__ = ["ImageWriter"]
