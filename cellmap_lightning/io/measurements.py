"""Keys and stamps of measurements of an array, by which cached records are looked up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cellmap_lightning.io.chunk_files import array_identity
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.records import RecordKey
from cellmap_lightning.io.stamps import digest_of


def key_of(level: Level, kind: str, *settings: object) -> RecordKey:
    """Return the key of a measurement.

    Args:
        level: the array.
        kind: name of the measurement.
        settings: all other values that its result depends on.
    """
    identity = array_identity(level)
    source = identity[0] if isinstance(level.path, Path) else level.path
    return RecordKey(kind, (*identity, *settings), str(source))


def stamp_of(files: Mapping[tuple[int, int, int], bytes]) -> str:
    """Return the stamp of all files of an array, from those that `ChunkReader.stored` returns."""
    return digest_of(sorted(files.items()))


def count_in(content: Mapping[str, Any]) -> int:
    """Return the number of voxels in a record.

    Raises:
        ValueError: it is not a number.
    """
    voxels = content["voxels"]
    if type(voxels) is not int or voxels < 0:
        raise ValueError(f"voxels is {voxels!r}")
    return voxels
