"""N5 datasets and multiscale groups.

Specification: https://github.com/saalfeldlab/n5#file-system-specification. N5 lists axes with the fastest first (x, y,
z), so that shapes here are reversed. Voxel sizes: ``transform`` (COSEM), ``pixelResolution`` with
``downsamplingFactors`` (BigDataViewer, N5 Viewer), or ``resolution`` with ``offset`` in nm (Paintera).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.grids import touched_cells
from cellmap_lightning.geometry.lattice import AXES, Vector, to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.chunk_folders import check_blocks
from cellmap_lightning.io.formats.n5_blocks import N5Blocks
from cellmap_lightning.io.formats.volume import FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.ngff.arrays import axis_names
from cellmap_lightning.io.ngff.axes import unit_nm
from cellmap_lightning.io.ngff.near_keys import TRANSLATE, check_offset, check_units
from cellmap_lightning.io.store import StorePath, children, read_json

#: File that describes a dataset or group.
ATTRIBUTES = "attributes.json"
_MOST_LEVELS = 100
_REMEDY = f"correct the values in {ATTRIBUTES}"


class N5Format:
    """N5 datasets, and groups with the levels ``s0``, ``s1``, ... or a list in ``multiscales``."""

    name = "N5"
    suffixes: tuple[str, ...] = ()

    def matches(self, path: StorePath) -> bool:
        """Return whether a location is a dataset or a multiscale group."""
        attributes = read_json(path / ATTRIBUTES)
        if attributes is not None and ("dimensions" in attributes or _listed(attributes)):
            return True
        return "dimensions" in (read_json(path / "s0" / ATTRIBUTES) or {})

    def open(self, path: StorePath) -> FormatVolume:
        """Read the attributes of a group and of its levels.

        Raises:
            MetadataError: they are malformed, or a compressor is not supported.
        """
        group = read_json(path / ATTRIBUTES) or {}
        levels: list[tuple[str, StorePath, Mapping[str, Any], Mapping[str, Any]]] = []
        if "dimensions" in group:
            levels.append((path.name, path, group, {}))
        else:
            for name, transform in _listed(group) or [(f"s{number}", {}) for number in range(_MOST_LEVELS)]:
                level = read_json(path / name / ATTRIBUTES)
                if level is None or "dimensions" not in level:
                    break
                levels.append((name, path / name, level, transform))
        if not levels:
            raise MetadataError(f"{path}: none of the levels in {ATTRIBUTES} is a dataset")
        arrays = [_N5Array(place, attributes) for _, place, attributes, _ in levels]
        base = _base_size(path, group, levels[0][2])
        opened, known = [], True
        for number, ((name, place, attributes, listed), array) in enumerate(zip(levels, arrays, strict=True)):
            placed = listed or attributes.get("transform")
            if placed:
                axes, size, translation = _transform(place, placed, len(array.shape))
            else:
                axes = _plain_axes(place, attributes, array)
                factor = _factor(place, group, attributes, number)
                known = base is not None
                size = to_vector(np.multiply(base if base is not None else (1.0, 1.0, 1.0), factor))
                # Voxels of coarser levels are means, so that all levels share the lower edge of the first.
                shift = (np.asarray(factor) - 1) / 2 * np.divide(size, factor)
                translation = to_vector(shift + _corner(place, group, levels[0][2], base))
                # Lengths are listed as the axes are.
                order = [[axis for axis in axes if axis in AXES].index(axis) for axis in AXES]
                size, translation = (to_vector([values[i] for i in order]) for values in (size, translation))
            opened.append(FormatLevel(name, array, axes, size, translation))
        return FormatVolume(tuple(opened), known, attributes=group)

    def children(self, path: StorePath) -> list[str]:
        """Return the names of the groups and datasets in a group."""
        return children(path)


class _N5Array(FormatArray):
    """The blocks of a dataset."""

    def __init__(self, path: StorePath, attributes: Mapping[str, Any]) -> None:
        shape, blocks = (_reversed(path, attributes, key) for key in ("dimensions", "blockSize"))
        if len(blocks) != len(shape):
            raise MetadataError(f"{path / ATTRIBUTES}: blockSize should have {len(shape)} numbers, has {len(blocks)}")
        self.blocks = N5Blocks(path / ATTRIBUTES, attributes)
        super().__init__(
            path, shape, self.blocks.dtype, blocks, attributes=attributes, codec=self.blocks.name,
            details=self.blocks.settings,
        )  # fmt: skip
        check_blocks(path, [-(-n // size) for n, size in zip(shape, blocks, strict=True)][::-1])

    @property
    def metadata(self) -> StorePath:
        return self.path / ATTRIBUTES

    def key(self, index: Sequence[int]) -> str:
        return "/".join(map(str, reversed(index)))

    def file(self, index: Sequence[int]) -> str:
        return str(self.path / self.key(index))

    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        out = np.zeros(tuple(shape), self.dtype)  # blocks that are not stored are 0
        spans = touched_cells(start, shape, self.chunks)
        for index in np.ndindex(*map(len, spans)):
            place = [span[i] for span, i in zip(spans, index, strict=True)]
            corner = np.multiply(place, self.chunks)
            cut = np.minimum(self.chunks, self.shape - corner)
            block = self.blocks.read(self.path, self.key(place), cut[::-1].tolist())
            if block is None:
                continue
            low = np.maximum(corner, start)
            high = np.minimum(corner + block.shape, np.add(start, shape))
            if (high > low).all():
                source = tuple(map(slice, low - corner, high - corner))
                out[tuple(map(slice, low - start, high - start))] = block[source]
        return out


def _plain_axes(path: StorePath, attributes: Mapping[str, Any], array: FormatArray) -> str:
    """Return the names of the stored axes, slowest first, of a dataset without a transform.

    The attribute ``axes`` lists the fastest first, as all attributes of N5 do: x, y, z where it is missing.

    Raises:
        MetadataError: it lists x, y and z after other axes, so that the lengths of other attributes are not theirs.
    """
    ndim = len(array.shape)
    names = [name[:1] for name in axis_names(attributes.get("axes"), array)][::-1]
    if not set(AXES) <= set(names):
        return "zyx"[-ndim:].rjust(ndim, "c") if ndim < 5 else "tczyx"
    if not set(AXES) <= set(names[-3:]):
        raise MetadataError(
            f"{path / ATTRIBUTES}: axes should list x, y and z first, in any order, got {attributes['axes']}; store "
            "the other axes after them"
        )
    return "".join(names)


def _reversed(path: StorePath, attributes: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = attributes.get(key)
    if not isinstance(value, list) or not value or not all(type(n) is int and n > 0 for n in value):
        raise MetadataError(f"{path / ATTRIBUTES}: {key} should be positive whole numbers, got {value!r}")
    return tuple(reversed(value))


def _listed(group: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return names and transforms of the levels in COSEM's ``multiscales``."""
    images = group.get("multiscales")
    image = images[0] if isinstance(images, list) and images and isinstance(images[0], dict) else {}
    entries = [entry for entry in image.get("datasets") or () if isinstance(entry, dict) and "path" in entry]
    return [(str(entry["path"]), entry.get("transform") or {}) for entry in entries]


def _transform(path: StorePath, transform: Mapping[str, Any], ndim: int) -> tuple[str, Vector, Vector]:
    """Return axes, voxel size and centre of voxel 0 in nm, by COSEM's ``transform``, which lists the slowest first."""
    try:
        axes = "".join(str(axis).lower() for axis in transform["axes"])
        units = [unit_nm(unit) for unit in transform.get("units") or ["nm"] * ndim]
        sizes = [float(scale) * (unit or math.nan) for scale, unit in zip(transform["scale"], units, strict=True)]
        starts = transform.get("translate") or [0.0] * ndim
        places = [float(start) * (unit or math.nan) for start, unit in zip(starts, units, strict=True)]
        order = [axes.index(axis) for axis in AXES]
        size, place = to_vector([sizes[i] for i in order]), to_vector([places[i] for i in order])
    except (KeyError, TypeError, ValueError) as e:
        raise MetadataError(f"{path}: transform needs axes z, y, x, with scale, translate and units ({e!r})") from e
    factors = [1.0 if unit is None else unit for unit in units]
    check_units(path, transform, factors[-3:], _REMEDY)
    spans = [[float(value) for value in values][-3:] for values in (starts, transform["scale"])]
    check_offset(path, transform, to_vector(spans[0]), to_vector(spans[1]), factors[-3:], _REMEDY, TRANSLATE)
    if len(axes) != ndim or not all(map(math.isfinite, (*size, *place))) or min(size) <= 0:
        raise MetadataError(f"{path}: transform should have a positive scale for each axis, got {dict(transform)}")
    return axes, size, place


def _numbers(path: StorePath, key: str, value: Any) -> Vector:
    """Return three numbers that are stored in the order x, y, z, in the order z, y, x.

    Raises:
        MetadataError: they are something else, or not positive though they are lengths.
    """
    good = isinstance(value, list) and len(value) >= len(AXES) and all(isinstance(v, int | float) for v in value)
    if not good or (key != "offset" and min(value[:3]) <= 0):
        raise MetadataError(f"{path}: {key} should be three positive numbers (x, y, z), got {value!r}")
    return to_vector([float(v) for v in reversed(value[:3])])


def _base_size(path: StorePath, group: Mapping[str, Any], first: Mapping[str, Any]) -> Vector | None:
    """Return the voxel size of the first level in nm; None where no attribute has it."""
    for attributes in (first, group):
        sizes = {}
        for key in ("pixelResolution", "resolution"):
            stored = attributes.get(key)
            if isinstance(stored, dict):
                unit = unit_nm(stored.get("unit", "nm"))
                if unit is None:
                    raise MetadataError(f"{path}: {key} has the unit {stored.get('unit')!r}, not a length")
                sizes[key] = to_vector(np.multiply(_numbers(path, key, stored.get("dimensions")), unit))
                _check_unit(path, key, stored)
            elif stored is not None:
                sizes[key] = to_vector(np.multiply(_numbers(path, key, stored), _units(path, attributes)))
        values = list(sizes.values())
        if len(values) > 1 and not np.allclose(values[0], values[1], rtol=1e-3, atol=0):
            raise MetadataError(
                f"{path}: pixelResolution is {list(values[0])} nm and resolution {list(values[1])} nm (z, y, x), which "
                "contradict each other; correct one of them"
            )
        if values:
            return values[0]
    return None


def _check_unit(path: StorePath, key: str, stored: Mapping[str, Any]) -> None:
    """Check that a voxel size has no unit under another name than ``unit``.

    Raises:
        MetadataError: it has, and that unit is another one.
    """
    unit = unit_nm(stored.get("unit", "nm"))
    for name, value in stored.items():
        if name != "unit" and name.lower().rstrip("s") == "unit" and unit_nm(value) != unit:
            raise MetadataError(
                f"{path}: {key} has {name}={value!r}, which is not read; the right key is unit: rename it, or {_REMEDY}"
            )


def _units(path: StorePath, attributes: Mapping[str, Any]) -> Vector:
    """Return the nm in the attribute ``units`` of a dataset, along z, y and x; 1 without it.

    Raises:
        MetadataError: it has no lengths, or an attribute with nearly its name has others.
    """
    stored = attributes.get("units") or ["nm"] * 3
    units = [unit_nm(unit) for unit in ([stored] * 3 if isinstance(stored, str) else stored)[: len(AXES)]]
    factors = [unit for unit in units if unit is not None]
    if len(factors) != len(AXES):
        raise MetadataError(f"{path}: units should be three lengths such as nm (x, y, z), got {stored!r}; {_REMEDY}")
    check_units(path, attributes, factors, _REMEDY)
    return to_vector(factors[::-1])


def _factor(path: StorePath, group: Mapping[str, Any], attributes: Mapping[str, Any], number: int) -> Vector:
    """Return the factors by which the voxels of a level are larger than those of the first one (z, y, x)."""
    scales = group.get("scales") or group.get("downsamplingFactors")
    factor = attributes.get("downsamplingFactors")
    if factor is None and isinstance(scales, list) and number < len(scales):
        factor = scales[number]
    if factor is not None:
        return _numbers(path, "downsamplingFactors", factor)
    if number:
        raise MetadataError(f"{path}: level {number} has no downsamplingFactors, so its voxel size is not known")
    return (1.0, 1.0, 1.0)


def _corner(path: StorePath, group: Mapping[str, Any], first: Mapping[str, Any], base: Vector | None) -> Any:
    """Return the centre of voxel 0 of the first level by Paintera's ``offset``, which is a centre too; else 0."""
    attributes = first if "offset" in first else group
    stored = attributes.get("offset")
    if base is None:
        return np.zeros(3)
    nm = _units(path, attributes)
    place = np.zeros(3) if stored is None else np.multiply(_numbers(path, "offset", stored), nm)
    size = to_vector(np.asarray(base)[::-1])
    for entry in (first, group):
        check_offset(path, entry, to_vector(place[::-1]), size, [1.0] * 3, _REMEDY)
    return place
