"""Names of crops in messages and tables: ``jrc_hela-2/crop1``, and ``jrc_hela-2/crop1/mito`` for a class of it."""

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple


class CropName(NamedTuple):
    """Dataset and name of a crop; as text ``<dataset>/<crop>``.

    Attributes:
        dataset: name of the dataset, that of its Zarr container.
        crop: name of the crop in it.

    Example:
        >>> str(CropName("jrc_hela-2", "crop1")), CropName("jrc_hela-2", "crop1").of("mito")
        ('jrc_hela-2/crop1', 'jrc_hela-2/crop1/mito')
    """

    dataset: str
    crop: str

    def __str__(self) -> str:
        return f"{self.dataset}/{self.crop}"

    def of(self, name: str) -> str:
        """Return the name of a class of the crop."""
        return f"{self}/{name}"


def container_of(folders: Iterable[PurePosixPath]) -> PurePosixPath | None:
    """Return the first of some folders that is a Zarr or N5 container, whose stem names the dataset; None without one.

    Args:
        folders: the folders, the innermost first, such as the parents of a path.
    """
    return next((folder for folder in folders if folder.suffix in (".zarr", ".n5")), None)
