"""Reading of images of any volume format."""

from dataclasses import replace

import numpy as np

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Vector
from cellmap_lightning.io.ngff import NO_OVERRIDES, Multiscale, NoImageError, Overrides, read_multiscale, shared_image
from cellmap_lightning.io.store import Remote, StorePath, children, exists, parse_location


def read_image(path: str | StorePath, overrides: Overrides = NO_OVERRIDES, allow_turned: bool = False) -> Multiscale:
    """Read the metadata of an image: OME-NGFF, a plain Zarr array, or any format in docs/formats.md.

    Args:
        path: the image: a group, an array, a file, an array in a file (``volume.h5/raw``) or a folder of slices.
        overrides: settings that override the metadata.
        allow_turned: see `read_multiscale`.

    Raises:
        CellMapFileNotFoundError: ``path`` does not exist.
        MissingExtraError: an optional library is needed and not installed.
        MetadataError: the metadata are malformed, or no format fits.

    Example:
        >>> read_image("volume.h5/raw", Overrides(voxel_size=(8, 4, 4))).finest.scale
        (8.0, 4.0, 4.0)
    """
    # OME-NGFF is tried first, so that its images cost no look at other formats.
    try:
        return read_multiscale(path, overrides, allow_turned)
    except (NoImageError, CellMapFileNotFoundError) as e:
        from cellmap_lightning.io.formats.multiscale import read_foreign

        image = shared_image(parse_location(path), overrides, read_foreign)
        if image is None:
            from cellmap_lightning.io.formats.slices import stray_entries
            from cellmap_lightning.io.formats.unread import unread_format

            place = parse_location(path)
            if isinstance(place, Remote):
                raise
            text = unread_format(place)
            if text:
                raise NoImageError(text) from None
            strays = stray_entries(place) if isinstance(e, NoImageError) else ""
            if strays:
                raise NoImageError(f"{place}: {strays}") from None
            raise
        return image


def replaced_values(path: str | StorePath, overrides: Overrides, reversed_only: bool = False) -> list[str]:
    """Return a message for the voxel size and the translation of a file, where overrides replace them by others.

    Args:
        path: the image.
        overrides: the settings.
        reversed_only: leave out values that are not the stored ones in the reversed order.

    Returns:
        Messages without the path; none where nothing is stored, a translation of 0 included.

    Example:
        >>> replaced_values("volume.h5/raw", Overrides(voxel_size=(8, 4, 4)))
        ['the file says voxel_size=[8, 4.6, 4.6] nm; voxel_size=[8, 4, 4] replaces it']
    """
    if overrides.voxel_size is None and overrides.translation is None:
        return []
    try:
        stored = read_image(path, replace(overrides, voxel_size=None, translation=None), allow_turned=True).finest
    except CellMapError:  # it stores no voxel size; other errors are raised when the image is read
        return []
    pairs = {
        "voxel_size": (stored.scale, overrides.voxel_size),
        "translation": (stored.translation if any(stored.translation) else None, overrides.translation),
    }
    texts = []
    for key, (old, new) in pairs.items():
        if old is None or new is None or _same(old, new, stored.scale):
            continue
        is_reversed = _same(old, new[::-1], stored.scale)
        if is_reversed or not reversed_only:
            order = " and is probably in the order x, y, z; the order is z, y, x" if is_reversed else ""
            texts.append(f"the file says {key}={_listed(old)} nm; {key}={_listed(new)} replaces it{order}")
    return texts


def _same(stored: Vector, given: Vector, scale: Vector) -> bool:
    """Return True if values in nm are the same but for rounding, in parts of a voxel."""
    return bool((np.abs(np.subtract(stored, given)) <= SCALE_TOLERANCE * np.asarray(scale)).all())


def _listed(values: Vector) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def image_exists(path: StorePath) -> bool:
    """Return whether a location exists, or is an array inside a file, or a file but for its suffix."""
    if exists(path):
        return True
    from cellmap_lightning.io.formats.registry import find_format

    return find_format(path) is not None


def image_children(path: StorePath) -> list[str]:
    """Return the names of the folders in ``path`` or of the arrays in a file, such as the classes of a crop."""
    names = children(path)
    if names or isinstance(path, Remote):
        return names
    from cellmap_lightning.io.formats.registry import format_children

    return format_children(path)
