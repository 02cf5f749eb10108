"""Versions of the remote arrays of many crops, requested together instead of one by one where they are needed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cellmap_lightning.crops.counts import counted_in_metadata
from cellmap_lightning.io.ngff import fetch_versions

if TYPE_CHECKING:
    from cellmap_lightning.datasets.dataset import CellMapDataset


def fetch_read(datasets: Iterable["CellMapDataset"]) -> None:
    """Request the versions of all arrays that samples are read from.

    Raises:
        MetadataError: a server does not answer.
    """
    fetch_versions(level.array for dataset in datasets if dataset.is_remote for level in dataset.read_levels)


def fetch_counted(datasets: Iterable["CellMapDataset"]) -> None:
    """Request the versions of all label arrays whose voxels are counted, since their metadata has no counts.

    Raises:
        MetadataError: a server does not answer.
    """
    images = [image for dataset in datasets if dataset.is_remote for image in dataset.label_images.values()]
    fetch_versions(image.finest.array for image in images if counted_in_metadata(image) is None)
