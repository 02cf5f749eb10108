"""Keys and stamps of what is measured of an array, by which its records are found again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cellmap_lightning.io.chunks import array_identity
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.records import RecordKey
from cellmap_lightning.io.stamps import digest_of


def key_of(level: Level, kind: str, *settings: object) -> RecordKey:
    """Return the key of a measurement.

    Args:
        level: the array.
        kind: name of the measurement.
        settings: what else its result depends on.
    """
    identity = array_identity(level)
    of = identity[0] if isinstance(level.path, Path) else level.path
    return RecordKey(kind, (*identity, *settings), str(of))


def stamp_of(files: Mapping[tuple[int, int, int], bytes]) -> str:
    """Return the stamp of all files of an array, as `ChunkReader.stored` gives them."""
    return digest_of(sorted(files.items()))


def count_in(content: Mapping[str, Any]) -> int:
    """Return the number of voxels that a record holds.

    Raises:
        ValueError: it holds none.
    """
    voxels = content["voxels"]
    if type(voxels) is not int or voxels < 0:
        raise ValueError(f"voxels is {voxels!r}")
    return voxels
