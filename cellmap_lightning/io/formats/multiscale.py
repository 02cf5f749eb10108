"""Conversion of volumes of any format to multiscale images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES, Vector, to_vector
from cellmap_lightning.io.formats.registry import find_format, images_named
from cellmap_lightning.io.formats.volume import AXIS_NAMES, FormatLevel, FormatVolume
from cellmap_lightning.io.ngff import Level, Multiscale, Note, Overrides
from cellmap_lightning.io.ngff.axes import unit_nm
from cellmap_lightning.io.ngff.near_axes import check_axes
from cellmap_lightning.io.ngff.notes import FOR_ENTRY, OF_PREDICT
from cellmap_lightning.io.ngff.transformations import check_finest_first, implausible_setting, implausible_voxel_size
from cellmap_lightning.io.store import StorePath

#: Where the order of the axes of HDF5 datasets is read from.
_HDF5_AXES = "the order of HDF5 is that of its dimension labels, or of axistags"


def read_foreign(path: StorePath, overrides: Overrides) -> Multiscale | None:
    """Read the image at a location in any format but OME-NGFF; None if it has no known format.

    Args:
        path: the location.
        overrides: settings that override the metadata.

    Raises:
        MetadataError: the volume has no usable voxel size, several channels or no axes z, y and x, or cannot be read.
    """
    found = find_format(path)
    if found is None:
        return None
    volume_format, place = found
    if place != path and isinstance(path, Path):
        _check_one_image(path)
    volume = volume_format.open(place)
    if overrides.multiscale is not None:
        raise MetadataError(
            f"{place}: multiscale={overrides.multiscale} is for groups of OME-NGFF images; leave it out"
        )
    if overrides.voxel_size is None:
        _check_voxel_size(place, volume_format.name, volume)
    factor = (unit_nm(overrides.unit) or 1.0) / volume.unit_nm if overrides.unit is not None else 1.0
    scales = [_scaled(level.voxel_size, factor) for level in volume.levels]
    translations = [_scaled(level.translation, factor) for level in volume.levels]
    notes = _notes(volume, scales[0], _scaled((volume.unit_nm,) * 3, factor), overrides)
    if overrides.voxel_size is not None or overrides.translation is not None:
        scales, translations = overrides.place(scales, translations)
    check_finest_first(place, [level.name for level in volume.levels], scales)
    levels = tuple(
        Level(level.array.path, level.name, scale, translation, *_axes(place, level, overrides.axes), level.array)
        for level, scale, translation in zip(volume.levels, scales, translations, strict=True)
    )
    if volume_format.name == "HDF5" and overrides.axes is None:
        finest = levels[0]
        check_axes(finest.path, volume.attributes, finest.axes, finest.ndim, _HDF5_AXES)
    return Multiscale(place, levels, volume.attributes, notes, overrides.level_translations == "stored")


def _check_one_image(path: Path) -> None:
    """Check that a path without its suffix names one image.

    Raises:
        MetadataError: it names several.
    """
    several = images_named(path.parent, [path.name])
    if several:
        raise MetadataError(
            f"{path}: {path.parent} has {' and '.join(several[path.name])}, each of which may be meant; give the "
            "path with its suffix, or move the others elsewhere"
        )


def _check_voxel_size(place: StorePath, name: str, volume: FormatVolume) -> None:
    """Check that a volume of the format ``name`` stores a usable voxel size.

    Raises:
        MetadataError: it stores none, or a malformed one.
    """
    if volume.voxel_size_problem:
        raise MetadataError(volume.voxel_size_problem)
    if not volume.has_voxel_size:
        raise MetadataError(f"{place}: {_missing_size(name, volume)}{FOR_ENTRY}{OF_PREDICT}")


def _notes(volume: FormatVolume, scale: Vector, unit: Vector, overrides: Overrides) -> tuple[Note, ...]:
    """Return the notes of a volume, and those about its voxel size ``scale`` in a unit of ``unit`` nm."""
    # A position that is set takes the place of one that is stored.
    notes = [note for note in volume.notes if note.kind != "position" or overrides.translation is None]
    if overrides.voxel_size is None:
        notes += implausible_voxel_size(scale, unit)
    else:
        notes += implausible_setting(overrides.voxel_size)
    return tuple(notes)


def _missing_size(name: str, volume: FormatVolume) -> str:
    """Return the message that the voxel size is not stored, with the setting in which known axes are filled in."""
    sizes = volume.known_voxel_size
    known = [f"{axis} {size:.6g}" for axis, size in zip(AXES, sizes, strict=True) if size is not None]
    if not known:
        return f"no voxel size is stored in this {name} volume; set voxel_size=[z, y, x] in nm"
    missing = [axis for axis, size in zip(AXES, sizes, strict=True) if size is None]
    setting = ",".join(axis.upper() if size is None else f"{size:.6g}" for axis, size in zip(AXES, sizes, strict=True))
    return (
        f"no voxel size along {' and '.join(missing)} is stored in this {name} volume ({', '.join(known)} nm are); set "
        f"voxel_size=[{setting}] in nm"
    )


def _scaled(values: Vector, factor: float) -> Vector:
    return to_vector(np.multiply(values, factor))


def _frames(names: str, shape: Sequence[int]) -> str:
    """Return the reason why a stack has frames or channels in place of sections; "" of other axes."""
    if "z" in names or len(shape) != 3 or len(names) != 3 or names[0] not in "tc":
        return ""
    kind = {"t": "frames (time)", "c": "channels"}[names[0]]
    return f"; its {shape[0]} planes are stored as {kind}, as Fiji stores a stack whose properties do not list slices"


def _axes(path: StorePath, level: FormatLevel, replacement: str | None) -> tuple[tuple[int, int, int], int]:
    """Return the stored axes that are z, y and x, and the number of stored axes.

    Raises:
        MetadataError: an axis is missing, named twice, or longer than 1 although it is not spatial.
    """
    shape = level.array.shape
    names = replacement or level.axes or AXIS_NAMES[-len(shape) :]
    if len(names) != len(shape) or len(set(names)) < len(names) or not set(AXES) <= set(names):
        text = f"axes={names}" if replacement else f"the axes are {names!r}"
        raise MetadataError(
            f"{path}: {text}, and its shape is {list(shape)}; set axes to one letter for each stored axis, with z, y "
            f"and x once each, such as axes=zyx{_frames(names, shape)}"
        )
    for name, count in zip(names, shape, strict=True):
        if name not in AXES and count != 1:
            raise MetadataError(
                f"{path}: shape {list(shape)} has the axis {name!r} of length {count} beside z, y and x; images of one "
                "channel can be read: split it, or set axes=... if the axis has the wrong name"
            )
    return (names.index("z"), names.index("y"), names.index("x")), len(shape)
