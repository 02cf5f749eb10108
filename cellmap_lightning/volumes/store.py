"""From a path to the JSON under it. Nothing is listed unless an error has to say what is there."""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapValueError, MetadataError

if TYPE_CHECKING:
    from zarr.abc.store import Store

#: Bytes of a metadata file at most: those of real volumes have kilobytes, with consolidated metadata megabytes.
MOST_JSON_BYTES = 1 << 28


def local(path: str | Path) -> Path:
    """A path as the operating system knows it, with ``~`` expanded.

    Raises:
        CellMapValueError: a URL was given.
    """
    text = str(path)
    if "://" in text and not text.startswith("file://"):
        raise CellMapValueError(f"{text}: only local paths can be read so far, not {text.split('://')[0]}:// addresses")
    return Path(text.removeprefix("file://")).expanduser()


def open_store(path: Path) -> "Store":
    """What zarr-python reads an array from."""
    from zarr.storage import LocalStore  # metadata is read without it

    return LocalStore(path, read_only=True)


def exists(path: Path) -> bool:
    """Whether there is anything at a path.

    Raises:
        MetadataError: a folder on the way may not be looked into, or the path cannot be one.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as e:
        raise MetadataError(f"{path}: cannot be looked at ({getattr(e, 'strerror', None) or e})") from e


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file.

    Raises:
        MetadataError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise MetadataError(f"{path}: has {size} bytes, too many for metadata; at most {MOST_JSON_BYTES} are read")
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except CellMapError:
        raise
    except OSError as e:
        raise MetadataError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise MetadataError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise MetadataError(f"{path}: should hold a JSON object, holds {type(content).__name__}")
    return content


def children(path: Path) -> list[str]:
    """Names of the folders in ``path``, for messages."""
    try:
        return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def missing(path: Path, what: str) -> CellMapFileNotFoundError:
    """The error for a path that is not there: how far it exists, and what stands there instead."""
    found = path
    while not exists(found) and found != found.parent:
        found = found.parent
    text = f"{what} {path} does not exist"
    if found != path:
        lost = path.relative_to(found).parts[0]
        names = children(found)
        close = difflib.get_close_matches(lost, names, 3, 0.5)
        text += f": {found} has no {lost!r}"
        if close:
            text += f"; did you mean {' or '.join(map(repr, close))}?"
        elif names:
            text += f"; it has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    return CellMapFileNotFoundError(text)
