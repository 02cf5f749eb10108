"""Encodings of label arrays, from CellMap's annotation attributes.

Attributes: https://github.com/janelia-cellmap/cellmap-schemas.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.label_ids import LabelIds
from cellmap_lightning.io.ngff.levels import Level, Multiscale

#: Code of unannotated voxels in arrays whose encoding has none; smaller than any stored label.
UNKNOWN_CODE = -(1 << 62)


@dataclass(frozen=True)
class Encoding:
    """The meaning of the stored integers of a label array.

    Attributes:
        absent: value of background voxels.
        unknown: value of unannotated voxels; None where all voxels are annotated.
        ambiguous: ``unknown`` could also be an instance's id, by the metadata.
        assumed: the assumption about values that no metadata describes: ``mask`` (0 and 255) or ``ids`` (without 255);
            a value that contradicts it is an error when it is read. Empty without an assumption.
        missing: voxels of missing chunks: ``absent`` (the fill value); ``empty``, the same except that files of 0 bytes
            hold unannotated voxels; or ``unknown``, unannotated voxels.
        ids: meaning of the ids of a label map; its decoded voxels have the codes above. None for any other array.

    Example:
        >>> Encoding(absent=0, unknown=255).present(np.array([0, 1, 255]))
        array([False,  True, False])
    """

    absent: int
    unknown: int | None
    ambiguous: bool = False
    assumed: Literal["", "mask", "ids"] = ""
    missing: Literal["absent", "empty", "unknown"] = "absent"
    ids: LabelIds | None = None

    @property
    def empty(self) -> Literal["error", "missing"]:
        """Treatment of chunk files of 0 bytes; see `ChunkReader`."""
        return "error" if self.missing == "absent" else "missing"

    def present(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return a mask of the voxels where the class is present, from stored values."""
        present: npt.NDArray[np.bool_] = stored != self.absent
        if self.unknown is not None:
            present &= stored != self.unknown
        return present


def annotation_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return CellMap's annotation block in the attributes of a group or an array; empty without one."""
    block = attributes.get("cellmap")
    block = block.get("annotation") if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}


def complement_counts(level: Level, image: Multiscale | None = None) -> Mapping[str, Any] | None:
    """Return the numbers of voxels of a level that are not foreground (``absent``, ``unknown``), by its attributes.

    Args:
        level: the level.
        image: its image, whose group may have the counts of the finest level instead.

    Source: https://github.com/janelia-cellmap/cellmap-schemas (``complement_counts``).
    """
    # Counts do not tell the classes of a label map apart, and are those of the whole array.
    if level.ids is not None or level.whole is not None:
        return None
    counts = annotation_of(level.array.attributes).get("complement_counts")
    if counts is None and image is not None and level == image.finest:
        counts = annotation_of(image.attributes).get("complement_counts")
    if not isinstance(counts, Mapping):
        return None
    return {name: int(n) if isinstance(n, float) and n.is_integer() else n for name, n in counts.items()}


def _whole(value: Any) -> int:
    number = int(value)
    if number != value:
        raise ValueError(f"{value!r} is not a whole number")
    return number


def read_encoding(image: Multiscale, level: Level) -> Encoding | None:
    """Read the encoding of a label level, from the attributes of the array, its finest level, or the class group.

    In an instance segmentation, ``complement_counts.unknown`` determines the meaning of the code of ``unknown``: with 0
    it is an instance, with more it is unannotated, and without counts it is ambiguous.

    Returns:
        None where no attributes have an encoding.

    Raises:
        MetadataError: the encoding is malformed.
    """
    kind = _kind(image, level)
    if "encoding" not in kind:
        return None
    codes = kind["encoding"]
    try:
        absent, unknown = _whole(codes["absent"]), codes.get("unknown")
        unknown = None if unknown is None else _whole(unknown)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise MetadataError(
            f"{image.path}: the annotation's encoding needs whole numbers for 'absent' and 'unknown', got {codes!r}"
        ) from e
    # Only the count of the finest level proves that no voxel is unannotated: coarser levels may have lost them.
    if kind.get("type") == "instance_segmentation":
        number = (complement_counts(image.finest, image) or {}).get("unknown")
        if isinstance(number, int) and not isinstance(number, bool):
            return Encoding(absent, None if number == 0 else unknown)
    return Encoding(absent, unknown, ambiguous=unknown is not None and kind.get("type") != "semantic_segmentation")


def is_semantic(image: Multiscale, level: Level) -> bool:
    """Return True if the metadata declare a mask, whose objects have no ids."""
    return _kind(image, level).get("type") == "semantic_segmentation"


def declared_present(image: Multiscale, level: Level) -> int | None:
    """Return the value of present voxels by the encoding in the metadata; None without one, or if it is no number."""
    codes = _kind(image, level).get("encoding")
    try:
        return _whole(codes["present"]) if isinstance(codes, Mapping) else None
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None


def _kind(image: Multiscale, level: Level) -> dict[str, Any]:
    """Return the type of an annotation, of the array, its finest level, or the class group."""
    blocks = [
        annotation_of(attributes)
        for attributes in (level.array.attributes, image.finest.array.attributes, image.attributes)
    ]
    return next((b["annotation_type"] for b in blocks if isinstance(b.get("annotation_type"), dict)), {})
