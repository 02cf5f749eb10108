"""`cellmap_data.image_writer`."""

from cellmap_lightning.prediction.dataset_writer import ImageWriter

__all__ = ["ImageWriter"]
