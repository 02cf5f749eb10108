"""What the stored integers of a label array mean, from CellMap's annotation attributes.

Attributes: https://github.com/janelia-cellmap/cellmap-schemas.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.volumes.ngff.multiscale import Level, Multiscale


@dataclass(frozen=True)
class Encoding:
    """What the stored integers of a label array mean.

    Attributes:
        absent: value of voxels where the class is not.
        unknown: value of voxels that nobody annotated, or None where every value is meant.
        ambiguous: ``unknown`` could also be an instance's id, since nothing on disk rules it out.
    """

    absent: int
    unknown: int | None
    ambiguous: bool = False

    def present(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Whether each stored value says that the class is there."""
        there: npt.NDArray[np.bool_] = stored != self.absent
        if self.unknown is not None:
            there &= stored != self.unknown
        return there


def _annotation(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """CellMap's annotation block in the attributes of a group or an array, empty where there is none."""
    block = attributes.get("cellmap")
    block = block.get("annotation") if isinstance(block, dict) else None
    return block if isinstance(block, dict) else {}


def _whole(value: Any) -> int:
    number = int(value)
    if number != value:
        raise ValueError(f"{value!r} is not a whole number")
    return number


def read_encoding(image: Multiscale, level: Level) -> Encoding:
    """The encoding of a label level, from the array's own attributes, its finest level's, or the class group's.

    In an instance segmentation whose ``complement_counts.unknown`` is 0, the code of ``unknown`` is an instance.

    Raises:
        MetadataError: the encoding is malformed.
    """
    blocks = [
        _annotation(attributes)
        for attributes in (level.array.attributes, image.finest.array.attributes, image.attributes)
    ]
    kind: dict[str, Any] = next(
        (b["annotation_type"] for b in blocks if isinstance(b.get("annotation_type"), dict)), {}
    )
    codes = kind.get("encoding", {"absent": 0, "unknown": 255})
    try:
        absent, unknown = _whole(codes["absent"]), codes.get("unknown")
        unknown = None if unknown is None else _whole(unknown)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise MetadataError(
            f"{image.path}: the annotation's encoding needs whole numbers for 'absent' and 'unknown', got {codes!r}"
        ) from e
    # Only the finest level's count says that nothing is unknown: a coarser one may have lost it in the pyramid.
    counts = _annotation(image.finest.array.attributes).get("complement_counts")
    counts = counts if isinstance(counts, dict) else {}
    if kind.get("type") == "instance_segmentation" and counts.get("unknown") == 0:
        return Encoding(absent, None)
    return Encoding(absent, unknown, ambiguous=kind.get("type") != "semantic_segmentation")
