"""Label maps: arrays in which each stored id is a class, such as 0 background, 1 mito, 2 er."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, MetadataError
from cellmap_lightning.validation import first_few

#: Names in a label map that are not classes: voxels without any of its classes, and unannotated voxels.
BACKGROUND, UNKNOWN = "background", "unknown"
#: Value of present and of unannotated voxels in decoded labels; absent ones are 0.
PRESENT, UNANNOTATED = 1, 255


@dataclass(frozen=True)
class LabelIds:
    """The meaning of the ids of a label map for one of its classes.

    Attributes:
        present: ids of the class.
        absent: ids of the other classes and of the background.
        unknown: ids of unannotated voxels.

    Example:
        >>> LabelIds((1,), (0, 2), (255,)).decode(np.array([0, 1, 2, 255], np.uint8), "crop1/mito")
        array([  0,   1,   0, 255], dtype=uint8)
    """

    present: tuple[int, ...]
    absent: tuple[int, ...]
    unknown: tuple[int, ...] = ()

    @cached_property
    def _codes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """The listed ids, sorted, and the decoded value of each."""
        codes = dict.fromkeys(self.absent, 0) | dict.fromkeys(self.present, PRESENT)
        codes |= dict.fromkeys(self.unknown, UNANNOTATED)
        ids = sorted(codes)
        return np.array(ids, np.int64), np.array([codes[i] for i in ids], np.uint8)

    def unlisted(self, values: npt.NDArray[Any]) -> list[int]:
        """Return the values that are not ids of the map, sorted."""
        ids, _ = self._codes
        return sorted(set(map(int, np.unique(values))) - set(ids.tolist()))

    def decode(self, stored: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
        """Return 1 where the class is present, 0 where it is absent, and 255 where it is unannotated.

        Args:
            stored: ids as stored, whole numbers.
            where: name and path of the array, for messages.

        Raises:
            MetadataError: an id is not listed in the map.
        """
        ids, codes = self._codes
        place = np.minimum(np.searchsorted(ids, stored), len(ids) - 1)
        if (ids[place] != stored).any():
            raise MetadataError(unlisted_text(where, self.unlisted(stored)))
        decoded: npt.NDArray[np.uint8] = codes[place]
        return decoded


def unlisted_text(where: str, values: list[int]) -> str:
    """Return the message for ids that a label map does not list."""
    return (
        f"{where} holds the id{'s' if len(values) > 1 else ''} {first_few(values, 12)}, which its label map does not "
        f"list; give each a class, {BACKGROUND!r} or {UNKNOWN!r} in the label map {{id: class}}"
    )


def parse_label_map(value: Any) -> tuple[tuple[int, str], ...]:
    """Check a label map ``{id: class}`` and return its ids and names, sorted by id.

    Raises:
        CellMapTypeError: it is not a mapping of whole numbers to names.
        CellMapKeyError: it names no class.
    """
    if not isinstance(value, Mapping):
        raise CellMapTypeError(f"a label map must be {{id: class}}, such as {{1: mito, 2: er}}, got {value!r}")
    ids: dict[int, str] = {}
    for key, name in value.items():
        digits = str(key).strip()
        if isinstance(key, bool) or not digits.removeprefix("-").isdigit():
            raise CellMapTypeError(
                f"a label map must be {{id: class}} with whole numbers as ids, got the id {key!r}{_swapped(value)}"
            )
        if not isinstance(name, str) or not name.strip() or set(name) & set("{}[],:/"):
            raise CellMapTypeError(f"a label map must be {{id: class}}, got {name!r} for the id {key}")
        ids[int(digits)] = name.strip()
    if not class_names(ids.items()):
        raise CellMapKeyError(f"a label map must name a class beside {BACKGROUND!r} and {UNKNOWN!r}, got {dict(ids)}")
    return tuple(sorted(ids.items()))


def _swapped(value: Mapping[Any, Any]) -> str:
    """Return the end of a message with the label map whose ids and classes were swapped; empty for another mistake."""
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in value.values()):
        return ""
    if len(set(value.values())) < len(value):  # one id cannot be two classes
        return ""
    return f"; swap ids and classes: {{{', '.join(f'{i}: {name}' for name, i in value.items())}}}"


def class_names(ids: Any) -> tuple[str, ...]:
    """Return the classes of a label map, each once, in the order of their ids."""
    return tuple(dict.fromkeys(name for _, name in ids if name not in (BACKGROUND, UNKNOWN)))


def ids_of(label_map: tuple[tuple[int, str], ...], name: str) -> LabelIds:
    """Return the meaning of the ids of a label map for one of its classes; id 0 is background if it is not listed."""
    listed = dict(label_map)
    listed.setdefault(0, BACKGROUND)
    return LabelIds(
        tuple(i for i, n in listed.items() if n == name),
        tuple(i for i, n in listed.items() if n not in (name, UNKNOWN)),
        tuple(i for i, n in listed.items() if n == UNKNOWN),
    )
