"""Coordinate transformations of OME-NGFF 0.4 and 0.5: voxel sizes and translations of levels.

Specification: https://ngff.openmicroscopy.org/0.4/#trafo-md. A level has one scale and then at most one translation;
the transformations of the image are applied after them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Vector
from cellmap_lightning.io.ngff.limits import MOST_TRANSFORMATIONS, check_length
from cellmap_lightning.io.ngff.notes import FOR_ENTRIES, Note
from cellmap_lightning.io.store import StorePath

#: Plausible voxel sizes, nm: smallest, largest, and largest ratio between axes. A warning is logged for others.
SMALLEST_VOXEL, LARGEST_VOXEL, MOST_ANISOTROPIC = 0.1, 2e4, 100.0
#: Longest side, nm, of a voxel size that is set: up to here it is more likely one of microscopes in micrometers.
LARGEST_IN_UM = 0.1
#: Resolutions of screens and printers, which programs store for images without a voxel size; nm in an inch, and the
#: relative deviation up to which a voxel size is one of them.
DOTS_PER_INCH, INCH, DOTS_TOLERANCE = (72, 96, 100, 150, 200, 300, 400, 600, 1200), 2.54e7, 2e-3
#: Voxels of the first level by which translations may differ and still count as the same.
SAME_PLACE = 1e-3


def level_transformation(
    where: str, entry: dict[str, Any], image: dict[str, Any], ndim: int, order: list[int]
) -> tuple[Vector, Vector]:
    """Return scale and translation (z, y, x) of a level: its transformations, then those of the image.

    Raises:
        MetadataError: they are not one scale and then at most one translation, or not of one number per axis.
    """
    scale, translation = [1.0] * ndim, [0.0] * ndim
    steps = _transformations(where, entry)
    if not any(isinstance(step, dict) and step.get("type") == "scale" for step in steps):
        raise MetadataError(f"{where}: its coordinateTransformations have no scale, so its voxels have no size")
    for step in steps + _transformations(where, image):
        scale, translation = _compose(where, step, scale, translation)
    z, y, x = order
    size, center = (scale[z], scale[y], scale[x]), (translation[z], translation[y], translation[x])
    if not (all(map(math.isfinite, size + center)) and min(size) > 0):
        raise MetadataError(
            f"{where}: scale must be positive and finite, got scale {list(size)}, translation {list(center)} (z, y, x)"
        )
    return size, center


def _transformations(where: str, node: dict[str, Any]) -> list[Any]:
    """Return the transformations of a level or an image, in the order that OME-NGFF 0.4 and 0.5 allow."""
    steps = node.get("coordinateTransformations") or []
    if not isinstance(steps, list):
        raise MetadataError(f"{where}: 'coordinateTransformations' should be a list, got {steps!r}")
    check_length(where, "coordinateTransformations", steps, MOST_TRANSFORMATIONS)
    kinds = [step.get("type") for step in steps if isinstance(step, dict) and step.get("type") != "identity"]
    if kinds.count("scale") > 1 or kinds.count("translation") > 1 or kinds == ["translation", "scale"]:
        raise MetadataError(
            f"{where}: its coordinateTransformations are {', then '.join(map(str, kinds))}; OME-NGFF 0.4 and 0.5 allow "
            "one scale, then at most one translation, which is in units of the axis and not scaled"
        )
    return steps


def _compose(where: str, step: Any, scale: list[float], translation: list[float]) -> tuple[list[float], list[float]]:
    """Return scale and translation followed by one more transformation."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "identity":
        return scale, translation
    value = step.get(kind) if kind in ("scale", "translation") else None
    good = isinstance(value, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )
    if value is None or not good or len(value) != len(scale):
        raise MetadataError(f"{where}: needs a scale or translation of {len(scale)} numbers, got {step!r}")
    if kind == "scale":
        return [a * v for a, v in zip(scale, value, strict=True)], [
            a * v for a, v in zip(translation, value, strict=True)
        ]
    return scale, [a + v for a, v in zip(translation, value, strict=True)]


def times(a: Vector, b: Vector) -> Vector:
    """Return the product axis by axis."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def check_finest_first(file: StorePath, names: Sequence[str], scales: Sequence[Vector]) -> None:
    """Check that levels are listed finest first.

    Raises:
        MetadataError: a level is finer than the one before it.
    """
    for number in range(1, len(scales)):
        if math.prod(scales[number]) < math.prod(scales[number - 1]) * (1 - SCALE_TOLERANCE):
            raise MetadataError(
                f"{file}, level {names[number]!r}: its voxels {list(scales[number])} nm are finer than those of level "
                f"{names[number - 1]!r} before it ({list(scales[number - 1])} nm); levels are listed finest first"
            )


def translations_missing(scales: Sequence[Vector], translations: Sequence[Vector]) -> bool:
    """Return whether all levels have the same translation, or none, although their voxel sizes differ."""
    grow = len(scales) > 1 and any(max(np.divide(scale, scales[0])) > 1 + SCALE_TOLERANCE for scale in scales[1:])
    return grow and all(
        (np.abs(np.subtract(t, translations[0])) <= SAME_PLACE * np.asarray(scales[0])).all() for t in translations
    )


def implausible_setting(size: Vector) -> list[Note]:
    """Return a note on a voxel size that is set in place of the stored one and probably not in nm, if it is.

    Args:
        size: the setting, taken for nm.
    """
    text = ",".join(f"{s:g}" for s in size)
    if max(size) > MOST_ANISOTROPIC * min(size):
        ratio = f"{max(size) / min(size):.3g}"
        why = f"differs {ratio}-fold between axes: is each in nm? If not, set voxel_size=[z, y, x] in nm{FOR_ENTRIES}"
    elif min(size) < SMALLEST_VOXEL or max(size) <= LARGEST_IN_UM:
        meant = ",".join(f"{1000 * s:g}" for s in size)
        why = f"is implausible; if it is in micrometers, set voxel_size=[{meant}]{FOR_ENTRIES}"
    elif max(size) > LARGEST_VOXEL:
        why = f"is implausible: lengths are nm; set voxel_size=[z, y, x] in nm{FOR_ENTRIES}"
    else:
        return []
    return [Note("scale", f"voxel_size=[{text}] (nm, z, y, x) {why}")]


def implausible_voxel_size(scale: Vector, units: Vector) -> list[Note]:
    """Return a note on a voxel size that is probably wrong, if it is.

    Args:
        scale: voxel size of the first level, nm.
        units: nm in one unit of the axes.
    """
    size = " x ".join(f"{s:g}" for s in scale)
    dots = next((n for n in DOTS_PER_INCH if any(abs(INCH / n - s) < DOTS_TOLERANCE * s for s in scale)), None)
    if scale == units:
        why = f"its voxel size is 1 x 1 x 1 ({size} nm), as programs write that know none;"
    elif dots is not None:
        text = (
            f"its voxel size of {size} nm is {dots} dots per inch, the resolution of a screen or a printer and not "
            f"of a microscope; set voxel_size=[z, y, x] in nm{FOR_ENTRIES}"
        )
        return [Note("scale", text)]
    elif min(scale) < SMALLEST_VOXEL or max(scale) > LARGEST_VOXEL:
        why = f"its voxel size of {size} nm is implausible: is the unit right? If not,"
    elif max(scale) > MOST_ANISOTROPIC * min(scale):
        ratio = f"{max(scale) / min(scale):.3g}"
        why = f"its voxel size of {size} nm differs {ratio}-fold between axes: are the units right? If not,"
    else:
        return []
    return [Note("scale", f"{why} set unit=... or voxel_size=[z, y, x] in nm{FOR_ENTRIES}")]


def suspected_unit(scale: Vector, owner: str = "its") -> str:
    """Return a sentence on the unit that a voxel size far too small probably has, and the setting that corrects it.

    Args:
        scale: voxel size, taken for nm.
        owner: the image, as a possessive.

    Returns:
        Text for a message; empty where the voxel size is plausible.
    """
    if min(scale) >= SMALLEST_VOXEL:
        return ""
    size = " x ".join(f"{s:g}" for s in scale)
    for unit, factor in (("micrometers", 1e3), ("millimeters", 1e6), ("meters", 1e9)):
        meant = [s * factor for s in scale]
        if min(meant) >= 1 and max(meant) <= LARGEST_VOXEL:
            text = ", ".join(f"{s:g}" for s in meant)
            return f"{owner} voxel size of {size} nm is probably one in {unit}: set voxel_size=[{text}]"
    return f"{owner} voxel size of {size} nm is implausible: set voxel_size=[z, y, x] in nm"
