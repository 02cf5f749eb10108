"""`cellmap_data.dataset_writer`."""

from cellmap_lightning.prediction.dataset_writer import CellMapDatasetWriter

__all__ = ["CellMapDatasetWriter"]
