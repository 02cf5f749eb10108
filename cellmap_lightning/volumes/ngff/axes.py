"""The axes of an OME-NGFF image and their units."""

import logging
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.volumes.geometry import AXES
from cellmap_lightning.volumes.store import StorePath

log = logging.getLogger(__name__)

#: Nanometres in one unit (UDUNITS-2 names, as OME-NGFF asks for, and the abbreviations seen in the wild).
UNITS_NM = {
    "angstrom": 0.1,
    "nanometer": 1.0,
    "nm": 1.0,
    "micrometer": 1e3,
    "um": 1e3,
    "µm": 1e3,
    "millimeter": 1e6,
    "mm": 1e6,
    "meter": 1e9,
    "picometer": 1e-3,
}


def read_axes(file: StorePath, image: dict[str, Any]) -> tuple[list[str], np.ndarray[Any, np.dtype[np.float64]]]:
    """Names of the stored axes, and the nm in one unit of z, y, x."""
    axes = image.get("axes")
    if not isinstance(axes, list) or not all(isinstance(a, dict) and isinstance(a.get("name"), str) for a in axes):
        raise MetadataError(f"{file}: 'axes' should be a list of objects with a name, got {axes!r}")
    names = [a["name"] for a in axes]
    if len(set(names)) != len(names) or not set(AXES) <= set(names):
        raise MetadataError(f"{file}: the axes z, y and x are needed once each, got {names}")
    units = []
    for name in AXES:
        unit = axes[names.index(name)].get("unit")
        if unit is None:
            log.warning("%s: axis %r has no unit; nanometre is assumed", file, name)
            unit = "nanometer"
        if not isinstance(unit, str) or unit not in UNITS_NM:
            raise MetadataError(f"{file}: axis {name!r} has the unit {unit!r}; one of {', '.join(UNITS_NM)} is needed")
        units.append(UNITS_NM[unit])
    return names, np.asarray(units)
