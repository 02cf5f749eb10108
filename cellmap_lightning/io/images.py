"""Reading of images of any volume format."""

from cellmap_lightning.errors import CellMapFileNotFoundError
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
