"""The parts of an HDF5 dataset that are not stored, which HDF5 reads as the fill value without an error.

Virtual datasets: https://docs.h5py.org/en/stable/vds.html. Chunks are allocated when they are written first.
"""

import math
from pathlib import Path
from typing import Any

from cellmap_lightning.errors import MetadataError

#: Virtual datasets on the way to the stored voxels that are followed.
_DEEPEST = 4


def is_incomplete(dataset: Any) -> bool:
    """Return whether some chunks of a dataset were never written, or all of one without chunks."""
    if dataset.is_virtual or not dataset.size or dataset.external:
        return False
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size() == 0)
    whole = math.prod(-(-n // size) for n, size in zip(dataset.shape, dataset.chunks, strict=True))
    return bool(dataset.id.get_num_chunks() < whole)


def has_gaps(container: Path, dataset: Any, depth: int = 0) -> bool:
    """Return whether parts of a virtual dataset are not stored, after a check that its sources exist.

    Args:
        container: its file.
        dataset: a dataset of h5py; all but virtual ones have no sources.
        depth: virtual datasets that led to it.

    Raises:
        MetadataError: the file or the dataset of a source is missing.
    """
    if not dataset.is_virtual or depth > _DEEPEST:
        return depth > 0 and is_incomplete(dataset)
    covered, gaps = 0, False
    for source in dataset.virtual_sources():
        if "%" in source.file_name.replace("%%", ""):  # a pattern of files, for a dataset that grows
            return gaps
        covered += source.vspace.get_select_npoints()
        gaps |= _has_gaps(container, dataset, source, depth)
    return gaps or covered < dataset.size


def _has_gaps(container: Path, dataset: Any, source: Any, depth: int) -> bool:
    """Return whether parts of one source are not stored."""
    import h5py

    where = f"{container}{dataset.name}: is a virtual dataset, and its source"
    fill = "so that the fill value would be read; copy"
    is_inside = source.file_name == "."
    place = container if is_inside else _found(container, source.file_name)
    if not place.is_file():
        raise MetadataError(f"{where} {place} does not exist, {fill} that file to its place too")
    try:
        file = dataset.file if is_inside else h5py.File(place, "r", locking=False)
    except OSError as e:
        raise MetadataError(f"{where} {place} is not a whole HDF5 file ({e}), {fill} it again") from e
    try:
        inner = file.get(source.dset_name)
        if not isinstance(inner, h5py.Dataset):
            raise MetadataError(
                f"{where} {place} has no dataset {source.dset_name}, {fill} the right file to its place"
            )
        return has_gaps(place, inner, depth + 1)
    finally:
        if not is_inside:
            file.close()


def _found(container: Path, name: str) -> Path:
    """Return the file of a source: as HDF5, beside the file of the virtual dataset, else by its own path."""
    beside, alone = container.resolve().parent / name, Path(name)
    return alone if not beside.is_file() and alone.is_file() else beside
