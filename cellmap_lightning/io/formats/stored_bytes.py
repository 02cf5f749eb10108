"""Content of the chunk files of formats other than Zarr."""

from typing import Any

from cellmap_lightning.io.retrying import DEFAULT_RETRY, tried
from cellmap_lightning.io.store import Remote, StorePath


def stored_bytes(folder: StorePath, key: str) -> bytes | None:
    """Return the content of a chunk file; None where it does not exist.

    Raises:
        OSError: it cannot be read.
    """
    if not isinstance(folder, Remote):
        try:
            with open(f"{folder}/{key}", "rb") as file:  # noqa: PTH123  a Path costs more than the call
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
    place = folder / key
    fs = place.filesystem()

    def read(_: Any) -> dict[str, Any]:
        try:
            return {place.key: fs.cat_file(place.key)}
        except Exception as e:  # stores raise any type
            return {place.key: e}

    return tried(read, [place.key], DEFAULT_RETRY)[place.key]
