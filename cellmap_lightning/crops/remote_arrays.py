"""Versions of the remote arrays of many crops, requested together instead of one by one on use."""

from collections.abc import Iterable

from cellmap_lightning.crops.counts import counted_in_metadata
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.io.ngff import fetch_versions


def fetch_read(crops: Iterable[Crop]) -> None:
    """Request the versions of all arrays that samples are read from.

    Raises:
        MetadataError: a server does not answer.
    """
    fetch_versions(level.array for crop in crops if crop.is_remote for level in crop.read_levels)


def fetch_counted(crops: Iterable[Crop]) -> None:
    """Request the versions of all label arrays whose voxels must be counted, since their metadata have no counts.

    Raises:
        MetadataError: a server does not answer.
    """
    images = [image for crop in crops if crop.is_remote for image in crop.label_images.values()]
    fetch_versions(image.finest.array for image in images if counted_in_metadata(image) is None)
