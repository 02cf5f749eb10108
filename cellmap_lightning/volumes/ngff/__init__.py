"""OME-NGFF images, the Zarr arrays in them, and CellMap annotation attributes, read from their JSON."""

from cellmap_lightning.volumes.ngff.arrays import ArrayInfo, read_array, read_attributes
from cellmap_lightning.volumes.ngff.axes import UNITS_NM
from cellmap_lightning.volumes.ngff.labels import Encoding, read_encoding
from cellmap_lightning.volumes.ngff.multiscale import Level, Multiscale, read_multiscale, shared_metadata

__all__ = [
    "UNITS_NM", "ArrayInfo", "Encoding", "Level", "Multiscale", "read_array", "read_attributes", "read_encoding",
    "read_multiscale", "shared_metadata",
]  # fmt: skip
