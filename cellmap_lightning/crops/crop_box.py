"""Restriction of a crop to a box: labels outside of it are outside the crop, as if the annotation ended there."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np

from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, LATTICE_TOLERANCE, Box, Lattice, Shape, Vector, to_vector
from cellmap_lightning.io.ngff import Level, Multiscale
from cellmap_lightning.validation import did_you_mean

Unit = Literal["nm", "voxels"]
#: Voxels by which an edge may miss the edges of the annotation's voxels, as it does where nm were rounded.
EDGE_SLACK = 0.01
_KEYS = ("min_nm", "max_nm", "min_voxels", "max_voxels")
_GRAMMAR = "{min_nm: [z, y, x], max_nm: [z, y, x]}, the same with min_voxels and max_voxels, or '0:800 0:400 0:400 nm'"
_RANGE = re.compile(r"([^:\s]+):([^:\s]+)")


@dataclass(frozen=True)
class CropBox:
    """A box to which a crop is restricted; see docs/data.md.

    Attributes:
        lower: its lower corner (z, y, x): world coordinates of the edge of its first voxel in nm, or that voxel.
        upper: its upper corner, the edge after its last voxel.
        unit: ``nm``, or ``voxels`` of the finest level of the annotation (of raw without labels).

    Raises:
        CellMapValueError: the box is empty, or voxels are not whole numbers.

    Example:
        >>> CropBox.parse({"min_nm": [0, 0, 0], "max_nm": [800, 400, 400]})
        CropBox(lower=(0.0, 0.0, 0.0), upper=(800.0, 400.0, 400.0), unit='nm')
        >>> str(CropBox.parse("0:100 0:50 0:50 voxels"))
        '0:100 0:50 0:50 voxels'
    """

    lower: Vector
    upper: Vector
    unit: Unit = "nm"

    def __post_init__(self) -> None:
        for axis, low, high in zip(AXES, self.lower, self.upper, strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise CellMapValueError(f"box: {axis} must be two finite numbers, got {low:g} and {high:g}")
            if low >= high:
                raise CellMapValueError(
                    f"box: the minimum must be below the maximum, got {low:g} and {high:g} {self.unit} along {axis}"
                )
            if self.unit == "voxels" and (low % 1 or high % 1):
                raise CellMapValueError(f"box: voxels are whole numbers, got {low:g} and {high:g} along {axis}")

    @classmethod
    def parse(cls, value: Any) -> "CropBox":
        """Create a box from a mapping or from text.

        Args:
            value: ``{min_nm: [z, y, x], max_nm: [z, y, x]}``, the same with ``min_voxels`` and ``max_voxels``, or text:
                ``min:max`` along z, y and x and the unit, as in ``0:800 0:400 0:400 nm``.

        Raises:
            CellMapTypeError: another type.
            CellMapKeyError: a key is unknown or missing, or the units differ.
            CellMapValueError: the numbers are not a box.
        """
        if isinstance(value, CropBox):
            return value
        if isinstance(value, str):
            return _from_text(value)
        if not isinstance(value, Mapping):
            raise CellMapTypeError(f"box must be {_GRAMMAR}, got {value!r}")
        unknown = [key for key in value if key not in _KEYS]
        if unknown:
            hint = did_you_mean(str(unknown[0]), _KEYS, f"; it has {', '.join(_KEYS)}")
            raise CellMapKeyError(f"box has no {unknown[0]!r}{hint}")
        unit: Unit = "nm" if any(key.endswith("_nm") for key in value) else "voxels"
        if set(value) != {f"min_{unit}", f"max_{unit}"}:
            raise CellMapKeyError(
                f"box needs a minimum and a maximum in one unit, min_{unit} and max_{unit}, got {', '.join(value)}"
            )
        return cls(_corner(value, f"min_{unit}"), _corner(value, f"max_{unit}"), unit)

    def __str__(self) -> str:
        spans = (f"{_plain(low)}:{_plain(high)}" for low, high in zip(self.lower, self.upper, strict=True))
        return f"{' '.join(spans)} {self.unit}"

    @classmethod
    def of(cls, box: Box) -> "CropBox":
        """Return a physical box as one in nm."""
        return cls(box.lower, box.upper)

    def physical(self, lattice: Lattice) -> Box:
        """Return the box in nm.

        Args:
            lattice: the voxels that it counts, if its unit is voxels.
        """
        if self.unit == "nm":
            return Box(self.lower, self.upper)
        first = np.asarray(lattice.box.lower)
        return Box(*(to_vector(first + np.multiply(corner, lattice.step)) for corner in (self.lower, self.upper)))


def _plain(number: float) -> str:
    return f"{number:.12g}"


def _corner(value: Mapping[str, Any], key: str) -> Vector:
    """Return three numbers of a mapping."""
    numbers = value[key]
    if isinstance(numbers, str | Mapping) or not isinstance(numbers, Sequence) or len(numbers) != 3:
        raise CellMapValueError(f"box: {key} must be three numbers (z, y, x), got {numbers!r}")
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise CellMapValueError(f"box: {key} must be three numbers (z, y, x), got {list(numbers)!r}")
    z, y, x = map(float, numbers)
    return z, y, x


def _from_text(text: str) -> CropBox:
    """Return the box of a text such as ``0:800 0:400 0:400 nm``."""
    *spans, unit = text.split() or [""]
    ranges = [_RANGE.fullmatch(span) for span in spans]
    if unit not in ("nm", "voxels") or len(spans) != 3 or not all(ranges):
        raise CellMapValueError(
            f"box must be min:max along z, y and x and the unit, as in '0:800 0:400 0:400 nm' or '0:100 0:50 0:50 "
            f"voxels', got {text!r}"
        )
    try:
        pairs = [(float(found[1]), float(found[2])) for found in ranges if found is not None]
    except ValueError:
        raise CellMapValueError(f"box: min and max must be numbers, got {text!r}") from None
    lower, upper = (to_vector(corner) for corner in zip(*pairs, strict=True))
    return CropBox(lower, upper, "nm" if unit == "nm" else "voxels")


def restricted(
    label: str, images: Mapping[str, Multiscale], box: CropBox
) -> tuple[dict[str, Multiscale], dict[str, Multiscale], Box]:
    """Return images as if they ended at a box.

    The box consists of whole voxels of each finest level. Coarser levels have the voxels that lie inside as a whole,
    since the others also show what lies outside.

    Args:
        label: name of the crop, for messages.
        images: the label image of each class, or raw.
        box: the box.

    Returns:
        The images that reach into the box, those that do not, and the box in nm.

    Raises:
        CellMapValueError: the box reaches outside the images, or its edges lie inside voxels.
    """
    finest = min((image.finest.lattice for image in images.values()), key=lambda lattice: float(np.prod(lattice.step)))
    physical = box.physical(finest)
    whole = reduce(Box.union, (image.finest.lattice.box for image in images.values()))
    slack = EDGE_SLACK * np.asarray(finest.step)
    beyond = np.less(physical.lower, np.subtract(whole.lower, slack)) | np.greater(physical.upper, whole.upper + slack)
    if beyond.any():
        voxels = f" (voxels 0:{' 0:'.join(map(str, finest.shape))})" if box.unit == "voxels" else ""
        axis = int(beyond.argmax())
        raise CellMapValueError(
            f"{label}: the box {box} reaches outside the crop along {AXES[axis]}, which covers {whole}{voxels}; choose "
            "a box inside it"
        )
    inside: dict[str, Multiscale] = {}
    outside: dict[str, Multiscale] = {}
    for name, image in images.items():
        try:
            part = image_part(image, physical)
        except CellMapError as e:
            e.args = (f"{label}/{name}: the box {box} {e}",)
            raise
        if part is None:
            outside[name] = image
        else:
            inside[name] = part
    if not inside:
        raise CellMapValueError(f"{label}: the box {box} holds no voxel of {', '.join(images)}; choose a larger one")
    return inside, outside, physical


def image_part(image: Multiscale, box: Box) -> Multiscale | None:
    """Return an image as if it ended at a box; None where its finest level has no voxel in it.

    Raises:
        CellMapValueError: an edge of the box lies inside a voxel of the finest level, or the array is turned.
    """
    first = image.finest
    if first.turn is not None:
        raise CellMapValueError(
            "cannot cut an array whose axes are turned in space; convert it to one along z, y and x, or leave the box "
            "out"
        )
    voxels = _whole_voxels(first, box)
    if voxels is None:
        return None
    _check_edges(first, box)
    if voxels == ((0, 0, 0), first.lattice.shape):
        return image
    parts = [(level, _whole_voxels(level, box)) for level in image.present]
    levels = tuple(level.part(*part) for level, part in parts if part is not None)
    return replace(image, levels=levels, whole=image)


def _edges(level: Level, box: Box) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the edges of a box, counted in voxels from the lower edge of a level."""
    lattice = level.lattice
    lower, upper = (np.subtract(corner, lattice.box.lower) / lattice.step for corner in (box.lower, box.upper))
    return lower, upper


def _whole_voxels(level: Level, box: Box) -> tuple[Shape, Shape] | None:
    """Return first voxel and number of the voxels of a level that lie inside a box as a whole; None without any."""
    lower, upper = _edges(level, box)
    first = np.maximum(np.ceil(lower - EDGE_SLACK), 0).astype(int)
    end = np.minimum(np.floor(upper + EDGE_SLACK), level.lattice.shape).astype(int)
    if (end <= first).any():
        return None
    (a, b, c), (z, y, x) = first.tolist(), (end - first).tolist()
    return (a, b, c), (z, y, x)


def _check_edges(level: Level, box: Box) -> None:
    """Check that a box consists of whole voxels of a level.

    Raises:
        CellMapValueError: an edge lies inside a voxel; the message has the nearest edges.
    """
    lattice = level.lattice
    for edges, side in zip(_edges(level, box), ("minimum", "maximum"), strict=True):
        inner = (edges > 0) & (edges < lattice.shape)
        off = inner & (np.abs(edges - np.rint(edges)) > EDGE_SLACK + LATTICE_TOLERANCE)
        if off.any():
            axis = int(off.argmax())
            low, step = lattice.box.lower[axis], lattice.step[axis]
            near = [_plain(low + step * n) for n in (math.floor(edges[axis]), math.ceil(edges[axis]))]
            raise CellMapValueError(
                f"cuts voxels of {step:g} nm: its {side} along {AXES[axis]} is {_plain(low + step * edges[axis])} nm; "
                f"the nearest edges are {near[0]} and {near[1]} nm"
            )
