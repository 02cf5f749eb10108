"""Bounds on lists in metadata, so that a small hostile file does not cost minutes."""

from collections.abc import Sized

from cellmap_lightning.errors import MetadataError

#: Entries of lists at most. Real images have some 10 levels, 5 axes, 2 transformations and 3 codecs.
MOST_LEVELS, MOST_AXES, MOST_TRANSFORMATIONS, MOST_IMAGES, MOST_CODECS = 256, 32, 16, 1000, 16


def check_length(where: object, what: str, values: Sized, most: int) -> None:
    """Check that a list of the metadata is not longer than any real one.

    Args:
        where: the file or the level, for the message.
        what: name of its entries, for the message.
        values: the list.
        most: limit of its length.

    Raises:
        MetadataError: it is longer.
    """
    if len(values) > most:
        raise MetadataError(f"{where}: it lists {len(values)} {what}; at most {most} are read")
