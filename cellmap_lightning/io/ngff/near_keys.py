"""Attributes whose names are nearly those of a voxel size, a unit or a position, such as ``unit`` for ``units``.

They are not read, so that a volume with them could have another size or lie elsewhere without an error.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import Vector
from cellmap_lightning.io.ngff.axes import UNITS_NM, is_unitless, unit_nm
from cellmap_lightning.io.store import StorePath

#: Similarity from which on a name is a misspelling of another; ``offsets`` and ``units_`` are.
CLOSE = 0.85
#: Units of length whose misspellings are recognized; abbreviations are too short for that.
_LONG_UNITS = [name for name in UNITS_NM if len(name) > 4]
#: Relative difference up to which two lengths are equal.
_TOLERANCE = 1e-3
#: A voxel size that HDF5 files have, compared with the others in `io.formats.hdf5`.
_OTHER = "element_size_um"


@dataclass(frozen=True)
class Key:
    """An attribute that is read, and other names for the same.

    Attributes:
        names: the names that are read; the first one is proposed.
        others: other names for it, in lower case without punctuation. Programs use some of them for other values, so
            that they count only if their value is that of such an attribute.

    Example:
        >>> [name for name, _ in UNITS.near({"unit": "um", "Units": "um", "shape": "um"})]
        ['unit', 'Units']
    """

    names: tuple[str, ...]
    others: frozenset[str]

    def near(self, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the attributes, and those in a ``transform`` as ``transform.translate``, that are nearly this one."""
        transform = attributes.get("transform")
        inside = transform if isinstance(transform, Mapping) else {}
        for name, value in (*attributes.items(), *((f"transform.{key}", value) for key, value in inside.items())):
            last = str(name).rpartition(".")[2]
            if value is None or (isinstance(value, str) and not value) or name in self.names or last == _OTHER:
                continue
            plain = _plain(_without_unit(last)[0])
            if plain in self.others:
                if self._fits(value):
                    yield str(name), value
            elif self is UNITS and not self._fits(value):
                continue  # the unit of intensities, such as HU
            elif any(_is_close(_plain(last), _plain(key)) or plain == _plain(key) for key in self.names):
                yield str(name), value

    def _fits(self, value: Any) -> bool:
        """Return whether a value may be one of this attribute: units, or a number for each axis."""
        values = [value] if isinstance(value, str) else _listed(value)
        if self is UNITS:
            return bool(values) and any(_is_length(unit) for unit in values)
        return len(values) > 1 and all(_is_number(number) for number in values)


UNITS = Key(
    ("units",),
    frozenset(
        ("voxelunit", "voxelunits", "voxelsizeunit", "voxelsizeunits", "spatialunit", "spatialunits",
         "lengthunit", "lengthunits", "resolutionunit", "resolutionunits", "offsetunit", "offsetunits", "scaleunits")
    ),
)  # fmt: skip
VOXEL_SIZE = Key(
    ("voxel_size", "resolution"),
    frozenset(
        ("voxelsizes", "voxelsize", "voxelspacing", "voxelresolution", "pixelsize", "pixelspacing", "pixelresolution",
         "spacing", "scale", "elementsize", "sampling")
    ),
)  # fmt: skip
OFFSET = Key(
    ("offset",),
    frozenset(
        ("translation", "translations", "translate", "origin", "position", "shift", "corner", "start", "voxeloffset",
         "roioffset", "worldoffset", "globaloffset")
    ),
)  # fmt: skip
#: The position in a ``transform`` of N5.
TRANSLATE = Key(("translate",), OFFSET.others - {"translate"} | {"offset"})


def check_units(path: StorePath, attributes: Mapping[str, Any], factors: Sequence[float], remedy: str) -> None:
    """Check that no attribute with nearly the name ``units`` has other units than those that are read.

    Args:
        path: the array, for messages.
        attributes: its attributes.
        factors: nm in the units that are read, of each axis.
        remedy: the setting that replaces the metadata, for messages.

    Raises:
        MetadataError: one has other units.
    """
    for name, value in UNITS.near(attributes):
        units = [unit_nm(unit) for unit in ([value] * 3 if isinstance(value, str) else _listed(value)[-3:])]
        if units != [*factors]:
            raise MetadataError(_message(path, name, value, UNITS, remedy))


def check_voxel_size(path: StorePath, attributes: Mapping[str, Any], sizes: Sequence[Vector], remedy: str) -> None:
    """Check that no attribute with nearly the name ``voxel_size`` has another voxel size than the one that is read.

    Args:
        path: the array, for messages.
        attributes: its attributes.
        sizes: the voxel size as it is stored, and in nm, in the order of the stored axes; empty without one.
        remedy: the setting that replaces the metadata, for messages.

    Raises:
        MetadataError: one has another voxel size.
    """
    for name, value in VOXEL_SIZE.near(attributes):
        if not any(_equal(number, size) for number in _in_nm(name, value) for size in sizes):
            raise MetadataError(_message(path, name, value, VOXEL_SIZE, remedy))


def check_offset(
    path: StorePath,
    attributes: Mapping[str, Any],
    corner: Vector,
    size: Vector,
    factors: Sequence[float],
    remedy: str,
    key: Key = OFFSET,
) -> None:
    """Check that no attribute with nearly the name ``offset`` has another position than the one that is read.

    The centre of voxel 0, and a position in voxels, are the same position.

    Args:
        path: the array, for messages.
        attributes: its attributes.
        corner: the position that is read, in the stored unit and the order of the stored axes.
        size: the voxel size, likewise.
        factors: nm in the stored unit, of each axis.
        remedy: the setting that replaces the metadata, for messages.
        key: the attribute that is read.

    Raises:
        MetadataError: one has another position.
    """
    half, nm = np.divide(size, 2), np.asarray(factors)
    # N5 stores the centre of voxel 0, and other formats its corner.
    places = [np.asarray(corner), np.add(corner, half), np.subtract(corner, half)]
    same = [*places, np.divide(corner, size), *(place * nm for place in places)]
    for name, value in key.near(attributes):
        if not any(_equal(number, place, np.asarray(size)) for number in _in_nm(name, value) for place in same):
            raise MetadataError(_message(path, name, value, key, remedy))


def _message(path: StorePath, name: str, value: Any, key: Key, remedy: str) -> str:
    return (
        f"{path}: the attribute {name}={value!r} is not read, and differs from what is; the right key is "
        f"{' or '.join(key.names)}: rename or remove {name}, or {remedy}"
    )


def unread_voxel_size(attributes: Mapping[str, Any]) -> str:
    """Return a sentence on the first attribute that is nearly a voxel size, for a message; empty without one."""
    for name, value in VOXEL_SIZE.near(attributes):
        return f"{name}={value!r} is not read: the right key is {' or '.join(VOXEL_SIZE.names)}"
    return ""


def unread_offset(attributes: Mapping[str, Any]) -> str:
    """Return a sentence on the first attribute that places voxel 0 elsewhere than at 0; empty without one."""
    stored = [(name, attributes[name]) for name in OFFSET.names if name in attributes]
    for name, value in (*stored, *OFFSET.near(attributes)):
        if any(_is_number(number) and number != 0 for number in _listed(value)):
            return f"its attribute {name}={value!r} is not read"
    return ""


def _in_nm(name: str, value: Any) -> Iterator[Sequence[float]]:
    """Yield the numbers of an attribute, and, if its name ends with a unit as ``offset_um`` does, the same in nm."""
    numbers = [float(number) for number in _listed(value) if _is_number(number)][-3:]
    if len(numbers) == 3:
        yield numbers
        factor = _without_unit(name)[1]
        if factor is not None:
            yield [number * factor for number in numbers]


def _equal(one: Sequence[float], other: Any, size: Any = 0.0) -> bool:
    return bool((np.abs(np.subtract(one, other)) <= _TOLERANCE * np.maximum(np.abs(other), size)).all())


def _without_unit(name: str) -> tuple[str, float | None]:
    """Return a name without a unit at its end, and the nm in the unit; None without one."""
    base, _, unit = name.rpartition("_")
    factor = unit_nm(unit) if base else None
    return (name, None) if factor is None else (base, factor)


def _is_length(unit: Any) -> bool:
    """Return whether a value is a unit of length, a misspelled one, or stands for voxels."""
    if unit_nm(unit) is not None:
        return True
    if not isinstance(unit, str):
        return False
    name = unit.strip().lower()
    return (is_unitless(unit) and name[:1] in ("p", "v")) or bool(
        difflib.get_close_matches(name, _LONG_UNITS, 1, CLOSE)
    )


def _plain(name: str) -> str:
    """Return a name in lower case without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_close(one: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, one, other).ratio() >= CLOSE


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
