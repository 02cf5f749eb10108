"""Sections of a crop without a voxel of a class whose objects continue on both sides, and its unknown voxels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.labels import stored_labels
from cellmap_lightning.io.label_ids import UNKNOWN
from cellmap_lightning.io.ngff import Encoding, Level
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.validation import first_few

Plane = npt.NDArray[np.bool_]

#: Part of the smaller of two sections that has foreground in both, from which objects continue from one to the other.
_CONTINUES = 0.5
#: Voxels of a row of chunks up to which a command reads sections for a warning alone.
_MOST_VOXELS = 1 << 30
#: Values that the remedy proposes for unknown voxels: the first that is no id yet.
_CODES = (128, 255, *range(1, 255))
#: Runs that a message lists.
_LISTED = 8


@dataclass(frozen=True)
class SectionFacts:
    """The stored sections of a class along z.

    Attributes:
        gaps: first and last index of each run of sections without a voxel of the class, although all of them are
            annotated and its objects lie at the same place on both sides.
        unknown: unannotated part of the voxels.
        present: foreground voxels.
        missing: unannotated voxels.

    Example:
        >>> section_facts(image.finest, encoding, "crop1, mito").gaps  # doctest: +SKIP
        ((7, 7),)
    """

    gaps: tuple[tuple[int, int], ...]
    unknown: float
    present: int
    missing: int


def section_facts(level: Level, encoding: Encoding, label: str) -> SectionFacts:
    """Read a level of labels section by section.

    Args:
        level: the level.
        encoding: meaning of its values.
        label: name in messages.

    Raises:
        CellMapError: it cannot be read.
    """
    gaps: list[tuple[int, int]] = []
    before: Plane | None = None  # the last section with foreground
    first = 0  # of the empty sections since then
    broken = True  # an unknown section since then, which explains them
    foreground = unknown = total = 0
    for z, (present, missing) in enumerate(_sections(level, encoding, label)):
        foreground += int(np.count_nonzero(present))
        unknown += int(np.count_nonzero(missing))
        total += missing.size
        if not present.any():
            broken |= bool(missing.all())
            continue
        if before is not None and z > first and not broken and _continues(before, present):
            gaps.append((first, z - 1))
        before, first, broken = present, z + 1, False
    return SectionFacts(tuple(gaps), unknown / max(total, 1), foreground, unknown)


def fits_memory(level: Level) -> bool:
    """Return whether the chunks of a section, which are read at a time, are few enough for a warning alone."""
    reader = open_reader(level)
    return reader.chunks[0] * reader.shape[1] * reader.shape[2] <= _MOST_VOXELS


def _sections(level: Level, encoding: Encoding, label: str) -> Iterator[tuple[Plane, Plane]]:
    """Yield the masks of foreground and of unknown voxels of each section."""
    reader = open_reader(level, label, empty=encoding.empty)
    depth, height, width = reader.shape
    step = reader.chunks[0]
    for start in range(0, depth, step):
        stored = stored_labels(reader, encoding, (start, 0, 0), (min(step, depth - start), height, width))
        missing = stored == encoding.unknown if encoding.unknown is not None else np.zeros(stored.shape, bool)
        yield from zip(encoding.present(stored), missing, strict=True)


def _continues(one: Plane, other: Plane) -> bool:
    both = int(np.count_nonzero(one & other))
    return both >= _CONTINUES * min(int(np.count_nonzero(one)), int(np.count_nonzero(other)))


def gaps_text(gaps: Sequence[tuple[int, int]], lower: float, thickness: float) -> str:
    """Return sections by their numbers, counted from 0, and in nm.

    Args:
        gaps: first and last section of each run; see `SectionFacts`.
        lower: lower edge of section 0, nm.
        thickness: of a section, nm.

    Example:
        >>> gaps_text([(1, 1), (4, 6)], -25, 50)
        '1 (z 25..75 nm), 4 to 6 (z 175..325 nm)'
    """
    runs = []
    for first, last in gaps:
        ends = f"z {lower + first * thickness:g}..{lower + (last + 1) * thickness:g} nm"
        runs.append(f"{first} ({ends})" if first == last else f"{first} to {last} ({ends})")
    return first_few(runs, _LISTED)


def unknown_setting(label_map: Mapping[int, str]) -> tuple[int, str]:
    """Return a value for unknown voxels, and the setting ``classes`` of ``cellmap-convert`` that reads it as such.

    Args:
        label_map: ids and names; an id that is ``unknown`` already is returned.

    Example:
        >>> unknown_setting({255: "mito"})
        (128, "'classes={255:mito,128:unknown}'")
    """
    code = next((i for i, name in label_map.items() if name == UNKNOWN), None)
    code = code if code is not None else next(i for i in _CODES if i not in label_map)
    pairs = ",".join(f"{i}:{name}" for i, name in ({**label_map, code: UNKNOWN}).items())
    return code, f"'classes={{{pairs}}}'"
