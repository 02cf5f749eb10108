"""A check that the chunk files of precomputed and N5 volumes are named as their metadata declare.

A chunk without a file is read as 0. Files with other names would all be read so, without an error; `chunk_names` is the
same check for Zarr.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.folder_entries import LISTED, Entry, archive_entries, local_entries
from cellmap_lightning.io.store import Remote, StorePath

_SPAN = r"-?\d+--?\d+"
#: A chunk of a precomputed volume: first and last voxel along x, y and z; and names that contain them.
_CHUNK = re.compile(rf"({_SPAN})_({_SPAN})_({_SPAN})")
_CHUNK_LIKE = re.compile(rf"{_SPAN}[_./]{_SPAN}[_./]{_SPAN}.*|[0-9a-f]+\.shard")
_INDICES = re.compile(r"\d+([.,_-]\d+)*(\.\w+)?")


def suffix_of_chunks(folder: StorePath, example: str, is_sharded: bool, fits: Callable[[str], bool]) -> str:
    """Return the suffix of the chunk files of one scale of a precomputed volume: ``.gz``, or none.

    Args:
        folder: the folder of the scale.
        example: the name of its first chunk without a suffix.
        is_sharded: whether the chunks lie in files of shards.
        fits: whether a name without a suffix is that of a chunk of the grid.

    Raises:
        MetadataError: there are chunk files, but all have other names; or some have a suffix and some have none.
    """
    names = sorted(name for name, is_folder in _entries(folder) if not is_folder and _CHUNK_LIKE.fullmatch(name))
    if is_sharded:
        _check_shards(folder, names)
        return ""
    plain, packed = _by_suffix(names)
    if names and not plain and not packed:
        raise MetadataError(
            f"{folder}: its chunks are named as {names[0]}, but by its info file as {example} or {example}.gz, so that "
            "all would be read as 0; unpack or rename them, or copy the volume again"
        )
    if plain and packed:
        raise MetadataError(
            f"{folder}: holds the chunk files {packed[0]} and {plain[0]}; store all chunks with .gz, or all without it"
        )
    if names and not any(fits(name.removesuffix(".gz")) for name in (*plain, *packed)):
        raise MetadataError(
            f"{folder}: its chunk file {names[0]} is not in the grid of the info file, whose first chunk is {example}, "
            "so that all would be read as 0; size, chunk_sizes or voxel_offset are those of another volume"
        )
    return ".gz" if packed else ""


def _by_suffix(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of chunk files without a suffix, and those with ``.gz``; other names are left out."""
    plain = [name for name in names if _CHUNK.fullmatch(name)]
    packed = [name for name in names if name.endswith(".gz") and _CHUNK.fullmatch(name.removesuffix(".gz"))]
    return plain, packed


def _check_shards(folder: StorePath, names: Sequence[str]) -> None:
    """Check that a scale whose chunks lie in shards has shards, if it has files of chunks.

    Args:
        folder: the folder of the scale.
        names: its files that are named as chunks or shards.

    Raises:
        MetadataError: there are chunk files and no shard.
    """
    if names and not any(name.endswith(".shard") for name in names):
        raise MetadataError(
            f"{folder}: holds the chunk file {names[0]} and no shard, and by its info file its chunks lie in "
            "shards, so that all would be read as 0; write the info file of these chunks, or copy the shards"
        )


def check_blocks(folder: StorePath, grid: Sequence[int]) -> None:
    """Check that the blocks of an N5 dataset lie in the folders of its grid.

    Some entries are listed of the dataset's folder and of those on the path to its first block.

    Args:
        folder: the dataset.
        grid: its blocks along the stored axes of N5, x first.

    Raises:
        MetadataError: there are blocks with other names, or beyond the grid.
    """
    place, key = folder, ""
    for depth, count in enumerate(grid):
        entries = dict(_entries(place))
        if depth and "attributes.json" in entries:
            return  # another dataset
        is_last = depth == len(grid) - 1
        numbers = sorted(int(name) for name, is_folder in entries.items() if name.isdigit() and is_folder != is_last)
        if not numbers:
            _check_no_blocks(folder, key, entries, len(grid), is_last)
            return
        if numbers[-1] >= count:
            raise MetadataError(
                f"{folder}: its block {key}{numbers[-1]}{'' if is_last else '/...'} lies beyond the array, which "
                f"has {list(grid)} blocks (x first): dimensions, blockSize or the order of the folders are those of "
                "another dataset; N5 stores blocks in folders x/y/z"
            )
        key += f"{numbers[0]}/"
        place = place / str(numbers[0])


def _check_no_blocks(folder: StorePath, key: str, entries: Mapping[str, bool], ndim: int, is_last: bool) -> None:
    """Check that a folder without blocks of the grid has none with other names.

    Args:
        folder: the dataset.
        key: path of the folder in the dataset, with a slash at its end; empty for the dataset's own.
        entries: the names in the folder, and whether each is a folder.
        ndim: number of axes of the grid.
        is_last: whether blocks are files of this folder, and not of folders in it.

    Raises:
        MetadataError: there are blocks with other names.
    """
    misnamed = [
        name for name, is_folder in entries.items()
        if _INDICES.fullmatch(name) and not is_folder and not (is_last and name.isdigit())
    ]  # fmt: skip
    deeper = [name for name, is_folder in entries.items() if is_last and is_folder and name.isdigit()]
    if misnamed or deeper:
        example = "/".join("0" * ndim)
        raise MetadataError(
            f"{folder}: its blocks are named as {key}{(misnamed or deeper)[0]}, but by attributes.json as {example},"
            " so that all would be read as 0; copy the dataset again, or rename them"
        )


def _entries(folder: StorePath) -> list[Entry]:
    """Return the first entries of a folder; none of a remote store that lists pages of names."""
    if isinstance(folder, Remote):
        return archive_entries(folder) if folder.protocol in LISTED else []
    return local_entries(str(folder))
