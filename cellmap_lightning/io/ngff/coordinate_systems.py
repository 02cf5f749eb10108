"""Coordinate systems and transformations of OME-NGFF 0.6.

Specification: https://ngff.openmicroscopy.org/0.6/. Each level has one transformation from its array to a coordinate
system of the image. It is read as an affine matrix. Where that is a positive scale, a translation and an order of the
axes, voxels lie on a lattice along z, y and x; otherwise the array is turned, which only training reads (see
`Lattice.turn`). Displacements and coordinates are not read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import FloatArray, Turn, Vector, to_vector
from cellmap_lightning.io.ngff.limits import MOST_AXES, MOST_TRANSFORMATIONS, check_length
from cellmap_lightning.io.ngff.notes import Note
from cellmap_lightning.io.store import StorePath

#: Transformations that are matrices.
_LINEAR = ("identity", "scale", "translation", "mapAxis", "affine", "rotation", "sequence", "byDimension", "bijection")
#: Relative size of entries of a matrix that count as 0.
_ZERO = 1e-9
#: Volume spanned by the directions of the axes below which a matrix counts as singular.
_SINGULAR = 1e-3
#: Transformations inside of one another at most.
_DEEPEST = 8


def intrinsic_system(
    file: StorePath, image: Mapping[str, Any], levels: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[Note]]:
    """Return the coordinate system of an image that its levels are placed in, and a note on others.

    Args:
        file: the metadata file, for messages.
        image: an entry of ``multiscales``.
        levels: its levels.

    Raises:
        MetadataError: the levels are placed in different systems, or in one that is not listed.
    """
    systems = image["coordinateSystems"]
    if not isinstance(systems, list) or not all(
        isinstance(s, dict) and isinstance(s.get("name"), str) for s in systems
    ):
        raise MetadataError(f"{file}: 'coordinateSystems' should be a list of objects with a name, got {systems!r}")
    outputs = {_name(_transformation(file, entry).get("output")) for entry in levels}
    by_name = {system["name"]: system for system in systems}
    output = outputs.pop() if len(outputs) == 1 else None
    if output is None and len(systems) == 1:
        output = systems[0]["name"]
    if output not in by_name or outputs:
        raise MetadataError(
            f"{file}: all levels should be placed in one of the coordinate systems {', '.join(by_name) or '(none)'}, "
            f"got {', '.join(map(str, [output, *outputs]))}"
        )
    others = [name for name in by_name if name != output]
    if not others:
        return by_name[output], []
    text = (
        f"positions are those of the coordinate system {output!r}, in which the levels are placed; the image has also "
        f"{', '.join(map(repr, others))}, which are not used"
    )
    return by_name[output], [Note("systems", text)]


@dataclass(frozen=True)
class Placement:
    """The placement of a level in its coordinate system, in the units of the system.

    Attributes:
        scale: voxel size along the stored axes that are z, y, x.
        translation: centre of voxel 0.
        axes: the stored axes that are z, y, x, or nearest to them where the array is turned.
        ndim: number of stored axes.
        matrix: ``[z, y, x]`` of the system for a step along each of ``axes``, where the array is rotated, mirrored or
            sheared; None otherwise.
    """

    scale: Vector
    translation: Vector
    axes: tuple[int, int, int]
    ndim: int
    matrix: FloatArray | None = None


def place_level(file: StorePath, entry: Mapping[str, Any], spatial: tuple[int, int, int], ndim: int) -> Placement:
    """Return the placement of a level in its coordinate system.

    Args:
        file: the metadata file, for messages.
        entry: the level in ``datasets``.
        spatial: the axes of the system that are z, y, x.
        ndim: number of axes of the system.

    Raises:
        MetadataError: the transformation is malformed, is singular, or mixes spatial axes with others.
    """
    step = _transformation(file, entry)
    where = f"{file}, level {entry.get('path')!r}"
    matrix = _matrix(where, step, ndim, 0)
    linear, offset = matrix[:-1, :-1], matrix[:-1, -1]
    if len(linear) != ndim or not np.isfinite(matrix).all():
        raise MetadataError(f"{where}: its transformation has {len(linear)} outputs, its coordinate system {ndim} axes")
    rows = np.abs(linear) > _ZERO * np.abs(linear).max()
    index = list(spatial)
    axes, scales = rows.argmax(axis=1), linear[np.arange(ndim), rows.argmax(axis=1)]
    is_straight = (rows.sum(axis=1) == 1).all() and len(set(axes.tolist())) == ndim and (scales[index] > 0).all()
    if is_straight:
        z, y, x = (int(axes[axis]) for axis in spatial)
        return Placement(to_vector(scales[index]), to_vector(offset[index]), (z, y, x), linear.shape[1])
    stored = np.flatnonzero(rows[index].any(axis=0))
    others = np.setdiff1d(np.arange(ndim), index)
    if len(stored) != 3 or rows[np.ix_(others, stored)].any():
        raise MetadataError(
            f"{where}: its transformation ({step.get('type')}) depends on {len(stored)} stored axes along z, y and x, "
            "or mixes them with other axes; it should map three stored axes to z, y and x"
        )
    part = linear[index][:, stored]
    sizes = np.linalg.norm(part, axis=0)
    if abs(np.linalg.det(part / sizes)) < _SINGULAR:
        raise MetadataError(
            f"{where}: its transformation ({step.get('type')}) is singular: it maps the volume to a plane; correct it"
        )
    # The order in which the stored axes are nearest to z, y and x.
    order = list(max(permutations(range(3)), key=lambda order: float(np.abs((part / sizes)[range(3), order]).sum())))
    z, y, x = stored[order].tolist()
    turned = part[:, order]
    return Placement(
        to_vector(sizes[order]), to_vector(offset[index]), (z, y, x), linear.shape[1], turned
    )  # fmt: skip


def turned_axes(matrix: FloatArray | None, units: Vector) -> tuple[Vector, Turn] | tuple[None, None]:
    """Return voxel size, nm, and directions of the axes of a turned level; None for any other.

    Args:
        matrix: see `Placement`.
        units: nm in the unit of z, y, x.
    """
    if matrix is None:
        return None, None
    scaled = matrix * np.asarray(units)[:, None]
    sizes = np.linalg.norm(scaled, axis=0)
    z, y, x = (to_vector(row) for row in scaled / sizes)
    return to_vector(sizes), (z, y, x)


def _transformation(file: StorePath, entry: Any) -> dict[str, Any]:
    """Return the transformation of a level.

    Raises:
        MetadataError: it does not have exactly one.
    """
    steps = entry.get("coordinateTransformations") if isinstance(entry, dict) else None
    if not isinstance(steps, list) or len(steps) != 1 or not isinstance(steps[0], dict):
        raise MetadataError(f"{file}: each level should have one coordinateTransformation, got {steps!r}")
    return steps[0]


def _name(system: Any) -> str | None:
    """Return the name of a coordinate system, given as such or as an object."""
    name = system.get("name") if isinstance(system, dict) else system
    return name if isinstance(name, str) else None


def _matrix(where: str, step: Any, ndim: int, depth: int) -> FloatArray:
    """Return the homogeneous matrix of a transformation.

    Args:
        where: the level, for messages.
        step: the transformation.
        ndim: number of axes that it is applied to, for transformations that do not define it.
        depth: number of transformations around it.

    Raises:
        MetadataError: it is malformed, or not linear.
    """
    kind = step.get("type") if isinstance(step, dict) else None
    if kind not in _LINEAR or depth > _DEEPEST:
        raise MetadataError(
            f"{where}: the transformation {kind!r} cannot be read; {', '.join(_LINEAR)} can: resample the image"
        )
    try:
        if kind == "identity":
            return np.eye(ndim + 1)
        if kind == "bijection":
            return _matrix(where, step["forward"], ndim, depth + 1)
        if kind == "sequence":
            return _sequence(where, step["transformations"], ndim, depth)
        if kind == "byDimension":
            return _by_dimension(where, step["transformations"], ndim, depth)
        return _simple(kind, step[kind])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise MetadataError(f"{where}: the transformation {kind!r} is malformed ({e!r})") from e


def _simple(kind: str, value: Any) -> FloatArray:
    """Return the matrix of a transformation that consists of numbers."""
    check_length(kind, "axes", value, MOST_AXES)
    numbers = np.array(value, np.float64)
    if numbers.ndim != (2 if kind in ("affine", "rotation") else 1):
        raise ValueError(f"{value!r} has {numbers.ndim} dimensions")
    if kind == "affine":
        return np.vstack([numbers, [0.0] * (numbers.shape[1] - 1) + [1.0]])
    matrix = np.eye(len(numbers) + 1)
    if kind == "scale":
        matrix[:-1, :-1] = np.diag(numbers)
    elif kind == "translation":
        matrix[:-1, -1] = numbers
    elif kind == "rotation":
        matrix[:-1, :-1] = numbers
    else:  # mapAxis: output i is input mapAxis[i]
        if sorted(value) != list(range(len(value))):
            raise ValueError(f"{value!r} is not an order of {len(value)} axes")
        matrix[:-1, :-1] = np.eye(len(numbers))[numbers.astype(int)]
    return matrix


def _sequence(where: str, steps: Any, ndim: int, depth: int) -> FloatArray:
    check_length(where, "transformations", steps, MOST_TRANSFORMATIONS)
    matrix = np.eye(ndim + 1)
    for step in steps:
        matrix = _matrix(where, step, len(matrix) - 1, depth + 1) @ matrix
    return matrix


def _by_dimension(where: str, parts: Any, ndim: int, depth: int) -> FloatArray:
    check_length(where, "transformations", parts, MOST_TRANSFORMATIONS)
    outputs = [axis for part in parts for axis in part["output_axes"]]
    if sorted(outputs) != list(range(len(outputs))):
        raise ValueError(f"output_axes are {outputs}")
    matrix = np.zeros((len(outputs) + 1, ndim + 1))
    matrix[-1, -1] = 1.0
    for part in parts:
        inner = _matrix(where, part["transformation"], len(part["input_axes"]), depth + 1)
        rows, columns = part["output_axes"], [*part["input_axes"], ndim]
        matrix[np.ix_(rows, columns)] = inner[:-1]
    return matrix
