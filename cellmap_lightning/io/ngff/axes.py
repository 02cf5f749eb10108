"""The axes of an OME-NGFF image and their units."""

from typing import Any

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES, Vector
from cellmap_lightning.io.ngff.limits import MOST_AXES, check_length
from cellmap_lightning.io.ngff.notes import FOR_ENTRIES, Note
from cellmap_lightning.io.store import StorePath

#: Prefixes of the metre, as powers of ten: all that UDUNITS-2 has, from which OME-NGFF takes its units.
_PREFIXES = {
    "yocto": -24, "zepto": -21, "atto": -18, "femto": -15, "pico": -12, "nano": -9, "micro": -6, "milli": -3,
    "centi": -2, "deci": -1, "": 0, "deca": 1, "hecto": 2, "kilo": 3, "mega": 6, "giga": 9, "tera": 12, "peta": 15,
    "exa": 18, "zetta": 21, "yotta": 24,
}  # fmt: skip
#: Nanometres in one unit. Lengths that OME-NGFF allows (UDUNITS-2 names), other spellings, and abbreviations.
UNITS_NM: dict[str, float] = {
    **{f"{prefix}met{end}{plural}": 10.0 ** (power + 9) for prefix, power in _PREFIXES.items()
       for end in ("er", "re") for plural in ("", "s")},
    **dict.fromkeys(("angstrom", "angstroms", "ångström", "ångstrom", "angström", "å"), 0.1),
    # The micro sign, the Greek letter, and what ImageJ writes for it.
    **dict.fromkeys(("micron", "microns", "um", "UM", "µm", "μm", "\\u00b5m"), 1000.0),
    "fm": 1e-6, "pm": 1e-3, "nm": 1.0, "NM": 1.0, "mm": 1e6, "cm": 1e7, "dm": 1e8, "m": 1e9, "km": 1e12,
    "inch": 2.54e7, "inches": 2.54e7, "foot": 3.048e8, "feet": 3.048e8, "yard": 9.144e8, "yards": 9.144e8,
    "mile": 1.609344e12, "miles": 1.609344e12, "parsec": 3.0856775814913673e25, "parsecs": 3.0856775814913673e25,
}  # fmt: skip
#: Values that stand for a missing unit.
_UNITLESS = {"", "pixel", "pixels", "px", "voxel", "voxels", "none", "null", "unitless", "dimensionless", "arbitrary"}


def unit_nm(unit: Any) -> float | None:
    """Return the nanometres in a unit of length; None where it is not one.

    Long names are compared without regard to case (``NANOMETER``); abbreviations are not, since ``Mm`` is not ``mm``.
    """
    if not isinstance(unit, str):
        return None
    name = unit.strip().replace("\u212b", "å").replace("\u00c5", "å")  # Angstrom sign, and A with ring
    if name in ("A", "A."):  # as MRC and NRRD files spell it
        return 0.1
    return UNITS_NM.get(name) if len(name) < 4 else UNITS_NM.get(name.lower())


def read_axes(
    file: StorePath, image: dict[str, Any], unit: str | None = None, needed: bool = True
) -> tuple[list[str], Vector, list[Note]]:
    """Read the axes of an image.

    Args:
        file: the metadata file, for messages.
        image: an entry of ``multiscales``.
        unit: unit of the spatial axes, in place of the stored ones.
        needed: whether the unit matters; otherwise any other unit is taken for nm.

    Returns:
        Names of the stored axes in lower case; the nm in one unit of z, y, x; assumptions.

    Raises:
        MetadataError: the axes are malformed, or a unit is not a length.
    """
    names, stored_units = _names_and_units(file, image)
    units = dict.fromkeys(AXES, unit) if unit is not None else stored_units
    known: dict[str, float] = {}
    for name, value in units.items():
        factor = unit_nm(value)
        if factor is not None:
            known[name] = factor
        elif needed and not is_unitless(value):
            raise MetadataError(
                f"{file}: axis {name!r} has the unit {value!r}, which is not a length such as nanometer or micrometer; "
                "set unit=..., or voxel_size=[z, y, x] in nm, for this entry"
            )
    # Axes without a unit are read in the unit of the others, if these agree.
    default = next(iter(known.values())) if len(set(known.values())) == 1 else 1.0
    z, y, x = (known.get(name, default) for name in AXES)
    return names, (z, y, x), _missing_units(units, known, default)


def _names_and_units(file: StorePath, image: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the stored axes, and the stored units of z, y and x."""
    axes = image.get("axes")
    if isinstance(axes, list):
        check_length(file, "axes", axes, MOST_AXES)
    if not isinstance(axes, list) or not all(isinstance(a, dict) and isinstance(a.get("name"), str) for a in axes):
        raise MetadataError(f"{file}: 'axes' should be a list of objects with a name, got {axes!r}")
    names = [a["name"].lower() for a in axes]
    if len(set(names)) != len(names) or not set(AXES) <= set(names):
        raise MetadataError(f"{file}: the axes z, y and x are needed once each, got {[a['name'] for a in axes]}")
    return names, {name: axes[names.index(name)].get("unit") for name in AXES}


def is_unitless(unit: Any) -> bool:
    """Return whether a value stands for a missing unit, or counts voxels."""
    return unit is None or (isinstance(unit, str) and unit.strip().lower() in _UNITLESS)


def _missing_units(units: dict[str, Any], known: dict[str, float], default: float) -> list[Note]:
    """Return a note on the axes without a unit of length, if any.

    Args:
        units: the unit of each axis.
        known: nm in the units of length among them.
        default: nm in the unit that is assumed for the other axes.
    """
    bare = [name for name in AXES if name not in known]
    if not bare:
        return []
    names = f"{'axis' if len(bare) == 1 else 'the axes'} {', '.join(bare)}"
    spelt = sorted({repr(units[name]) for name in bare if units[name] is not None})
    label = f"{default:g} nm, the unit of the other axes," if known and default != 1 else "nanometre"
    text = (
        f"no unit of length for {names}{' (' + ', '.join(spelt) + ')' if spelt else ''}: {label} is assumed; "
        f"set unit=... or voxel_size=[z, y, x] in nm{FOR_ENTRIES}"
    )
    return [Note("unit", text)]
