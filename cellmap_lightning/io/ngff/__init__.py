"""OME-NGFF images, the Zarr arrays in them, and CellMap annotation attributes, read from their JSON."""

from cellmap_lightning.io.ngff.arrays import ArrayInfo, fetch_versions, read_array, read_attributes
from cellmap_lightning.io.ngff.axes import UNITS_NM
from cellmap_lightning.io.ngff.labels import (
    UNKNOWN_CODE,
    Encoding,
    complement_counts,
    declared_present,
    is_semantic,
    read_encoding,
)
from cellmap_lightning.io.ngff.levels import Level, Multiscale
from cellmap_lightning.io.ngff.multiscale import (
    NoImageError,
    read_multiscale,
    shared_image,
    shared_metadata,
)
from cellmap_lightning.io.ngff.notes import Note, first_time, report, volume_of
from cellmap_lightning.io.ngff.overrides import NO_OVERRIDES, OVERRIDE_KEYS, LevelTranslations, Overrides

__all__ = [
    "NO_OVERRIDES",
    "OVERRIDE_KEYS",
    "UNITS_NM",
    "UNKNOWN_CODE",
    "ArrayInfo",
    "Encoding",
    "Level",
    "LevelTranslations",
    "Multiscale",
    "NoImageError",
    "Note",
    "Overrides",
    "complement_counts",
    "declared_present",
    "fetch_versions",
    "first_time",
    "is_semantic",
    "read_array",
    "read_attributes",
    "read_encoding",
    "read_multiscale",
    "report",
    "shared_image",
    "shared_metadata",
    "volume_of",
]  # fmt: skip
