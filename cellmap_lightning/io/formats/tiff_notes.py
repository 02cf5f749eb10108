"""Assumptions about TIFF files: tags and descriptions beside those of voxels and voxel size, which are not applied."""

from typing import Any
from xml.etree import ElementTree as ET

from cellmap_lightning.geometry.lattice import AXES, Vector
from cellmap_lightning.io.formats.tiff_pages import TiffPages
from cellmap_lightning.io.ngff import Note
from cellmap_lightning.io.ngff.axes import unit_nm
from cellmap_lightning.io.ngff.notes import FOR_ENTRY

_WHITE = Note(
    "white",
    "its TIFF pages mark 0 as white (MINISWHITE), so that viewers show it inverted; it is read as stored: where 0 "
    "should be bright, set invert: true in the entry of raw, and store labels with 0 for absent",
)
#: The first row and the first column by the tag Orientation.
_ORIENTATIONS = {
    2: "top-right", 3: "bottom-right", 4: "bottom-left", 5: "left-top", 6: "right-top", 7: "right-bottom",
    8: "left-bottom",
}  # fmt: skip


def page_notes(file: TiffPages) -> tuple[Note, ...]:
    """Return the notes on how the pages of a file are read."""
    notes = [_WHITE] if file.is_white else []
    if file.orientation != 1:
        name = _ORIENTATIONS.get(file.orientation, "not defined")
        text = (
            f"its TIFF pages have Orientation {file.orientation} ({name}), which is not applied: rows and columns are "
            "read in the order in which they are stored, and some viewers show them flipped or turned; where raw and "
            "labels differ in it, store both alike"
        )
        notes.append(Note("orientation", text))
    if file.thumbnail is not None:
        text = (
            f"its last page ({file.thumbnail.index}), of {file.thumbnail.shape} voxels, is taken for a thumbnail of "
            f"the pages before it, of {list(file.levels[0].shape[-2:])}, and left out; remove it from the file"
        )
        notes.append(Note("thumbnail", text))
    return tuple(notes)


def position_notes(tiff: Any, voxel_size: Vector | None) -> tuple[Note, ...]:
    """Return a note on a position other than 0 that a file stores, and that is not read.

    Args:
        tiff: the file, of tifffile.
        voxel_size: the stored voxel size in nm (z, y, x), or None.
    """
    if tiff.is_ome:
        source, position = "OME-XML (Plane PositionZ, PositionY, PositionX)", _ome_position(tiff.ome_metadata)
    elif tiff.is_imagej:
        source, position = "ImageJ description (origin)", _imagej_position(tiff.imagej_metadata or {}, voxel_size)
    else:
        return ()
    if not any(value for value, _ in position):
        return ()
    if all(unit == "nm" for _, unit in position):
        numbers = ", ".join(f"{value:.10g}" for value, _ in position)
        text = (
            f"its {source} stores the position [{numbers}] nm (z, y, x), which is not applied: voxel 0 is placed at 0; "
            f"set translation=[{numbers}]{FOR_ENTRY} if raw and labels are placed by it, else translation=[0, 0, 0]"
        )
    else:
        numbers = ", ".join(f"{value:.10g} {unit}".strip() for value, unit in position)
        text = (
            f"its {source} stores the position [{numbers}] (z, y, x), which is not applied: voxel 0 is placed at 0; "
            f"set translation=[z, y, x] in nm{FOR_ENTRY} if raw and labels are placed by it, else translation=[0, 0, 0]"
        )
    return (Note("position", text),)


def _ome_position(text: str) -> list[tuple[float, str]]:
    """Return the position of the first plane of the first image, z, y, x, with its units."""
    planes = [node for node in ET.fromstring(text).iter() if node.tag.rpartition("}")[2] in ("Pixels", "Plane")]
    planes = planes[1:] if planes else []
    after = next((n for n, node in enumerate(planes) if node.tag.endswith("Pixels")), len(planes))
    planes = planes[:after]  # those of other images
    if not planes:
        return []
    plane = min(planes, key=lambda node: [_number(node.get(f"The{axis}")) for axis in "TCZ"])
    position = []
    for axis in AXES:
        value = _number(plane.get(f"Position{axis.upper()}"))
        unit = plane.get(f"Position{axis.upper()}Unit", "reference frame")
        factor = unit_nm(unit) if value else 1.0
        position.append((value, unit) if factor is None else (value * factor, "nm"))
    return position


def _imagej_position(metadata: Any, voxel_size: Vector | None) -> list[tuple[float, str]]:
    """Return the position of voxel 0 (z, y, x); ImageJ stores the pixel that lies at 0."""
    origins = [_number(metadata.get(f"{axis}origin")) for axis in AXES]
    if voxel_size is None:
        return [(0.0 - origin, "pixels") for origin in origins]
    return [(0.0 - origin * size, "nm") for origin, size in zip(origins, voxel_size, strict=True)]


def _number(text: Any) -> float:
    """Return a number, 0 for none and for what is no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return 0.0
