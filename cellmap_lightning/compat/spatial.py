"""The forms of spatial transforms in cellmap-data of 2026, as the ones of this package."""

from collections.abc import Mapping
from typing import Any

from cellmap_lightning.geometry.lattice import AXES

Arrays = Mapping[str, Mapping[str, Any]]


def spatial_transforms(given: Mapping[str, Any] | None, arrays: Arrays) -> dict[str, Any] | None:
    """Return mirrors, transpositions and rotations in the form ``{name: {"axes": ...}}``.

    Besides that form there are ``mirror: {axis: probability or bool}``, ``transpose: bool`` for all axes along which
    every array has several voxels, and ``rotate: {axis: degrees or [lowest, highest]}``, where a number stands for
    ``[-degrees, degrees]``. Everything else is left for the dataset to check.

    Args:
        given: the transforms; None for none.
        arrays: ``{name: {"shape": voxels, "scale": nm}}`` of all inputs and targets.
    """
    if given is None:
        return None
    found = dict(given)
    for name, convert in (("mirror", _probability), ("rotate", _range)):
        axes = found.get(name)
        if isinstance(axes, Mapping):
            axes = axes["axes"] if set(axes) == {"axes"} else axes
            if isinstance(axes, Mapping):
                found[name] = {"axes": {axis: convert(value) for axis, value in axes.items()}}
    if isinstance(found.get("transpose"), bool):
        found["transpose"] = {"axes": _deep(arrays)} if found["transpose"] else None
    return found


def _probability(value: Any) -> Any:
    return float(value) if isinstance(value, bool) else value


def _range(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return [-abs(value), abs(value)] if number else value


def _deep(arrays: Arrays) -> list[str]:
    """Axes along which every array has several voxels; a shape of two numbers has one along z."""
    shapes = [([1] * 3 + list(spec["shape"]))[-3:] for spec in arrays.values()]
    return [axis for axis, sizes in zip(AXES, zip(*shapes, strict=True), strict=True) if min(sizes) > 1]
