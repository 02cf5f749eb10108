"""Zarr arrays without a multiscale image around them."""

from collections.abc import Mapping
from typing import Any

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.io.ngff.arrays import ArrayInfo, axis_names, read_attributes
from cellmap_lightning.io.ngff.attribute_voxels import attribute_voxels
from cellmap_lightning.io.ngff.levels import Level, Multiscale
from cellmap_lightning.io.ngff.near_axes import check_axes
from cellmap_lightning.io.ngff.near_keys import unread_offset, unread_voxel_size
from cellmap_lightning.io.ngff.notes import FOR_ENTRY, Note
from cellmap_lightning.io.ngff.overrides import Overrides
from cellmap_lightning.io.ngff.transformations import implausible_setting, implausible_voxel_size
from cellmap_lightning.io.store import StorePath, read_json

#: Folders between a level and its image at most.
DEEPEST_LEVEL = 3


def read_plain_array(array: ArrayInfo, overrides: Overrides) -> Multiscale:
    """Read a Zarr array without a multiscale image around it.

    The voxel size is the one that is set, or that of the attributes; see `attribute_voxels`.

    Raises:
        MetadataError: the array is a level of an image, has no voxel size, or fewer than three axes; the message has
            the right path or setting.
    """
    path, ndim = array.path, len(array.shape)
    if overrides.voxel_size is None:
        _check_not_in_image(path)
    axes = _named_axes(array, overrides.axes)
    size, origin = overrides.voxel_size, (0.0, 0.0, 0.0)
    if size is not None:
        notes = implausible_setting(size)
        unread = unread_offset(array.attributes) if overrides.translation is None else ""
        if unread:
            notes.append(
                Note(
                    "offset",
                    f"voxel_size is set and translation is not: {unread}, and the array begins at 0; set "
                    f"translation=[z, y, x] in nm, the centre of voxel 0{FOR_ENTRY}",
                )
            )
    else:
        is_placed = overrides.translation is not None
        stored = attribute_voxels(path, array.attributes, ndim, axes, overrides.unit, is_placed)
        if stored is None:
            unread = unread_voxel_size(array.attributes)
            raise MetadataError(
                f"{path} is a plain Zarr array without OME-NGFF metadata, and its attributes have no voxel_size or "
                f"resolution{f' ({unread})' if unread else ''}: set voxel_size=[z, y, x] in nm and "
                f"translation{FOR_ENTRY}"
            )
        size, origin = stored
        notes = implausible_voxel_size(size, (1.0, 1.0, 1.0))
    level = Level(path, path.name, size, overrides.translation or origin, axes, ndim)
    return Multiscale(path, (level,), array.attributes, tuple(notes))


def _check_not_in_image(path: StorePath) -> None:
    """Check that an array is not part of a multiscale image.

    Raises:
        MetadataError: it is; the message names the image.
    """
    inside, above = path.name, path
    for _ in range(DEEPEST_LEVEL):
        above = above.parent
        node = read_attributes(above)
        scales = listed_images(*node) if node is not None else None
        if scales is not None:
            listed = [d.get("path") for s in scales if isinstance(s, dict) for d in s.get("datasets") or () if d]
            part = "one level" if inside in listed else "an array"
            raise MetadataError(f"{path} is {part} of the image {above}; give its parent, {above}")
        inside = f"{above.name}/{inside}"


def _named_axes(array: ArrayInfo, replacement: str | None) -> tuple[int, int, int]:
    """Return the axes z, y and x of a plain array: as set, or by their names if it has any, else the last three.

    Names are those of Zarr v3 (``dimension_names``), xarray (``_ARRAY_DIMENSIONS``), funlib (``axis_names``) and others
    (``axes``).

    Raises:
        MetadataError: z, y and x are not among the names, two attributes contradict each other, one with nearly
            the right name has another order, or axes are missing.
    """
    attributes, ndim = array.attributes, len(array.shape)
    content = read_json(array.metadata) or {}
    if ndim < len(AXES):
        raise MetadataError(f"{array.path}: shape {list(array.shape)} has fewer axes than z, y and x")
    named = {"axes": replacement} if replacement is not None else {
        "dimension_names": content.get("dimension_names"),
        **{key: attributes.get(key) for key in ("_ARRAY_DIMENSIONS", "axis_names", "axes")},
    }  # fmt: skip
    found = {key: names for key, value in named.items() if (names := axis_names(value, array))}
    for key, names in found.items():
        if not set(AXES) <= set(names):
            raise MetadataError(f"{array.path}: the axes z, y and x are needed once each, got {list(names)} in {key}")
    orders = {key: tuple(names.index(axis) for axis in AXES) for key, names in found.items()}
    if len(set(orders.values())) > 1:
        texts = " and ".join(f"{key} {list(names)}" for key, names in found.items())
        raise MetadataError(f"{array.path}: its axes are {texts}; set axes to a letter for each stored axis{FOR_ENTRY}")
    z, y, x = next(iter(orders.values()), (ndim - 3, ndim - 2, ndim - 1))
    if replacement is None:
        check_axes(array.path, attributes, (z, y, x), ndim)
    return z, y, x


def listed_images(attributes: Mapping[str, Any], zarr_format: int) -> list[Any] | None:
    """Return the list of images in a group's attributes, or None.

    OME-NGFF 0.4 (``multiscales``) describes groups of Zarr v2, and 0.5 (``ome``) those of Zarr v3. Where a group has
    both, the one of its Zarr format is returned.
    """
    return next(iter(image_lists(attributes, zarr_format).values()), None)


def image_lists(attributes: Mapping[str, Any], zarr_format: int) -> dict[str, list[Any]]:
    """Return the lists of images in a group's attributes by their place, the one that is read first."""
    ome = attributes.get("ome")
    places = {
        "ome": ome.get("multiscales") if isinstance(ome, dict) else None,
        "multiscales": attributes.get("multiscales"),
    }
    names = list(places) if zarr_format == 3 else list(reversed(places))
    found = {name: places[name] for name in names}
    return {
        name: scales
        for name, scales in found.items()
        if isinstance(scales, list) and scales and isinstance(scales[0], dict)
    }
