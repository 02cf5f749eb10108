"""TIFF stacks in one file, with the pyramids and voxel sizes of OME-TIFF and ImageJ.

Formats: https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/,
https://imagej.net/ij/developer/source/ij/io/TiffDecoder.java.html. Resolution tags of other programs are ignored: most
have 72 or 96 dots per inch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES, FloatArray, Vector, to_vector
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.tiff_notes import page_notes, position_notes
from cellmap_lightning.io.formats.tiff_pages import TiffArray, TiffPages
from cellmap_lightning.io.formats.volume import FormatLevel, FormatVolume
from cellmap_lightning.io.ngff import Note
from cellmap_lightning.io.ngff.axes import unit_nm
from cellmap_lightning.io.store import StorePath

#: Bytes of a compressed page in one piece from which slow access is reported.
_LARGE_PAGE = 1 << 22
#: Nm of the largest unit in which a calibration counts as one: mm.
_LARGEST_UNIT = 1e6


class TiffFormat:
    """TIFF files that hold a whole volume."""

    name = "TIFF"
    suffixes = (".tif", ".tiff", ".btf", ".tf8")

    def matches(self, path: StorePath) -> bool:
        """Return whether a location is a TIFF file."""
        return isinstance(path, Path) and path.suffix.lower() in self.suffixes and path.is_file()

    def open(self, path: StorePath) -> FormatVolume:
        """Read the pages of a file.

        Raises:
            MissingExtraError: tifffile is not installed.
            MetadataError: it is not a whole TIFF file, or an image with colours or of one page.
        """
        assert isinstance(path, Path)
        with OPEN_FILES.use(TiffPages, str(path)) as file:
            axes = _named(path, file.levels[0])
            arrays = [TiffArray(path, file, number) for number in range(len(file.levels))]
            size, unit = _voxel_size(file.tiff)
            known = _known_size(file.tiff) if size is None else (None, None, None)
            notes = [*page_notes(file), *position_notes(file.tiff, size)]
        first = _extent(arrays[0].shape, axes)
        base = np.array(size if size is not None else (1.0, 1.0, 1.0))
        levels = []
        for number, array in enumerate(arrays):
            # Pyramids have whole factors, with partial voxels at the end cut or rounded up.
            factor = np.rint(first / _extent(array.shape, axes))
            shift = (factor - 1) / 2 * base  # voxels are means of those of the first level
            levels.append(FormatLevel(str(number), array, axes, to_vector(base * factor), to_vector(shift)))
        chunk = math.prod(arrays[0].chunks) * arrays[0].dtype.itemsize
        if arrays[0].offset is None and chunk >= _LARGE_PAGE:
            text = (
                f"its compressed pieces have {chunk >> 20} MiB, and are decoded whole for each patch in them: "
                "convert it with cellmap-convert, or store it in tiles"
            )
            notes.append(Note("access", text))
        return FormatVolume(tuple(levels), size is not None, unit, notes=tuple(notes), known_voxel_size=known)

    def children(self, path: StorePath) -> list[str]:
        """Return no names: a file holds one volume."""
        return []


def _named(path: Path, series: Any) -> str:
    """Return the names of the axes of a series, with that of the pages as z.

    Raises:
        MetadataError: colours, or no pages.
    """
    axes = str(series.axes).lower()
    if "s" in axes:
        count = series.shape[axes.index("s")]
        raise MetadataError(f"{path}: has {count} colours a voxel (RGB); store it in gray values")
    if "z" not in axes:
        # Pages without a meaning ("I", "Q"): planes of a stack.
        for name in "iq":
            if name in axes:
                return axes.replace(name, "z")
        if "t" in axes or "c" in axes:
            return axes  # time or channels, unless the setting axes names them z
        raise MetadataError(f"{path}: holds one page of shape {list(series.shape)}; a volume has several")
    return axes


def _extent(shape: Sequence[int], axes: str) -> FloatArray:
    """Return the voxels along z, y and x; 1 for an axis without that name."""
    return np.array([float(shape[axes.index(axis)]) if axis in axes else 1.0 for axis in AXES])


def _voxel_size(tiff: Any) -> tuple[Vector | None, float]:
    """Return voxel size in nm (z, y, x; None without one), and nm in its unit."""
    if tiff.is_ome:
        return _ome_size(tiff.ome_metadata)
    return _imagej_size(tiff) if tiff.is_imagej else (None, 1.0)


def _ome_size(text: str) -> tuple[Vector | None, float]:
    """Return the physical size of a voxel in OME-XML, and nm in its unit."""
    root = ET.fromstring(text)
    pixels = next((node for node in root.iter() if node.tag.endswith("Pixels")), None)
    if pixels is None:
        return None, 1.0
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    units = [unit_nm(pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "ZYX"]
    if None in sizes or None in units:
        return None, 1.0
    values = np.array([float(size or 0) * (unit or 0) for size, unit in zip(sizes, units, strict=True)])
    return (to_vector(values), units[2] or 1.0) if values.min() > 0 else (None, 1.0)


def _imagej_size(tiff: Any) -> tuple[Vector | None, float]:
    """Return the calibration of ImageJ, and nm in its unit along x."""
    metadata, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    spacing, named = metadata.get("spacing"), metadata.get("unit", "")
    # ImageJ writes the units along y and z where they are not that along x.
    x_unit, y_unit, z_unit = (unit_nm(str(metadata.get(key, named))) for key in ("unit", "yunit", "zunit"))
    if x_unit is None or y_unit is None or z_unit is None:
        return None, 1.0
    plane = _plane_size(tags)
    if not spacing or plane is None:
        return None, 1.0
    y, x = plane
    return (abs(float(spacing)) * z_unit, y * y_unit, x * x_unit), x_unit


def _plane_size(tags: Any) -> tuple[float, float] | None:
    """Return the stored size of a pixel along y and x, in the unit of ImageJ; None without it."""
    if "XResolution" not in tags or "YResolution" not in tags:
        return None
    ratios = [tags[name].value for name in ("YResolution", "XResolution")]
    if any(0 in ratio for ratio in ratios):
        return None
    y, x = (denominator / numerator for numerator, denominator in ratios)
    return y, x


def _known_size(tiff: Any) -> tuple[float | None, float | None, float | None]:
    """Return the nm along y and x of a calibration of ImageJ without the distance of the sections, else None."""
    metadata = (tiff.imagej_metadata or {}) if tiff.is_imagej else {}
    unit = unit_nm(str(metadata.get("unit", "")))
    plane = _plane_size(tiff.pages[0].tags)
    # Inches and cm are the default of printers, and no calibration of a microscope.
    if metadata.get("spacing") or unit is None or unit > _LARGEST_UNIT or plane is None or "yunit" in metadata:
        return None, None, None
    return None, plane[0] * unit, plane[1] * unit
