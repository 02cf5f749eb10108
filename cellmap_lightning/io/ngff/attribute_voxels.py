"""Voxel size and position from the attributes of an array, as gunpowder, funlib and CREMI write them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import Vector, to_vector
from cellmap_lightning.io.ngff.axes import unit_nm
from cellmap_lightning.io.ngff.near_keys import check_offset, check_units, check_voxel_size
from cellmap_lightning.io.ngff.notes import FOR_ENTRY
from cellmap_lightning.io.store import StorePath

_REMEDY = f"set voxel_size=[z, y, x] in nm and translation{FOR_ENTRY}"


def attribute_voxels(
    path: StorePath,
    attributes: Mapping[str, Any],
    ndim: int,
    axes: tuple[int, int, int],
    unit: str | None = None,
    is_placed: bool = False,
) -> tuple[Vector, Vector] | None:
    """Return voxel size and centre of voxel 0 in nm (z, y, x), or None where the attributes have no voxel size.

    The attributes are ``voxel_size`` or ``resolution``, ``offset`` (the corner of voxel 0) and ``units``, in the order
    of the stored axes; without units they are nm. Sources: https://github.com/funkelab/funlib.persistence,
    https://cremi.org/data.

    Args:
        path: the array, for messages.
        attributes: its attributes.
        ndim: number of stored axes.
        axes: the stored axes that are z, y, x.
        unit: unit in place of the stored one.
        is_placed: whether a setting replaces the position, so that other names of ``offset`` do not matter.

    Raises:
        MetadataError: the values are not a positive number for each axis, their unit is not a length, ``voxel_size``
            and ``resolution`` contradict each other, or an attribute with nearly one of the names has another value.
    """
    key = next((key for key in ("voxel_size", "resolution") if key in attributes), None)
    if key is None:
        return None
    order = [sorted(axes).index(axis) for axis in axes]
    size = _three(path, key, attributes[key], ndim, order)
    corner = _three(path, "offset", attributes.get("offset", [0, 0, 0]), ndim, order)
    if key == "voxel_size" and "resolution" in attributes:
        other = _three(path, "resolution", attributes["resolution"], ndim, order)
        if not np.allclose(size, other, rtol=1e-3, atol=0):
            raise MetadataError(
                f"{path}: voxel_size is {list(size)} and resolution {list(other)} (z, y, x), which contradict each "
                f"other; {_REMEDY}"
            )
    if min(size) <= 0:
        raise MetadataError(f"{path}: {key} must be positive, got {list(size)} (z, y, x); {_REMEDY}")
    stored = attributes.get("units", ["nm"] * 3)
    units = [unit] * 3 if unit is not None else [stored] * 3 if isinstance(stored, str) else list(stored)[-3:]
    factors = [factor for factor in map(unit_nm, units) if factor is not None]
    if len(factors) != 3:
        raise MetadataError(f"{path}: units should be three lengths such as nm, got {stored!r}; {_REMEDY}")
    nm = [factors[i] for i in order]
    if unit is None:
        check_units(path, attributes, factors, _REMEDY)
    plain = _three(path, key, attributes[key], ndim, [0, 1, 2])
    check_voxel_size(path, attributes, [plain, to_vector(np.multiply(plain, factors))], _REMEDY)
    if not is_placed:
        place = _three(path, "offset", attributes.get("offset", [0, 0, 0]), ndim, [0, 1, 2])
        check_offset(path, attributes, place, plain, factors, _REMEDY)
    scale = to_vector(np.multiply(size, nm))
    return scale, to_vector(np.multiply(corner, nm) + np.divide(scale, 2))


def element_size(path: StorePath, value: Any, ndim: int) -> Vector:
    """Return the voxel size in nm of HDF5's attribute ``element_size_um``, which is z, y, x whatever the axes.

    Args:
        path: the dataset, for messages.
        value: the attribute, in micrometers.
        ndim: number of stored axes.

    Raises:
        MetadataError: it is not a positive number for each axis.
    """
    size = _three(path, "element_size_um", value, ndim, [0, 1, 2])
    if min(size) <= 0:
        raise MetadataError(f"{path}: element_size_um must be positive, got {list(size)} (z, y, x); {_REMEDY}")
    return to_vector(np.multiply(size, 1000.0))


def _three(path: StorePath, key: str, value: Any, ndim: int, order: list[int]) -> Vector:
    """Return an attribute with a number for each spatial or each stored axis, in the order z, y, x."""
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else []
    numbers = [float(v) for v in values if isinstance(v, int | float | np.number) and math.isfinite(v)]
    if len(numbers) != len(values) or len(values) not in (3, ndim):
        raise MetadataError(f"{path}: {key} should be three numbers, got {value!r}; {_REMEDY}")
    z, y, x = (numbers[len(numbers) - 3 + i] for i in order)
    return z, y, x
