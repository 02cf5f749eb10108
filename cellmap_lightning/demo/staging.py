"""Atomic replacement of the synthetic volume on disk, and checks of what is there already.

A volume is written to a folder beside its path and renamed at the end, so that an interrupted write never leaves an
incomplete volume at the path, and processes that race end with a complete one.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zarr

#: Seconds after which a staged folder belongs to a process that was killed; far more than a write takes.
_STALE_SECONDS = 3600
#: Attempts to rename a folder to a path that other processes write to as well.
_ATTEMPTS = 20


def inventory(path: Path) -> dict[str, int]:
    """Return number and size of the files of a volume, without its root metadata, which holds these two numbers."""
    files = size = 0
    for folder, _, names in os.walk(path):
        if Path(folder) != path:
            files += len(names)
            size += sum((Path(folder) / name).stat().st_size for name in names)
    return {"files": files, "bytes": size}


def read_marker(path: Path) -> dict[str, Any] | None:
    """Return version, seed, format and inventory from the root attributes; None if it is not a synthetic volume."""
    try:
        attributes = zarr.open_group(str(path), mode="r", use_consolidated=False).attrs.asdict()
    except (OSError, ValueError, KeyError):
        return None
    marker = attributes.get("synthetic")
    return marker if isinstance(marker, dict) else None


def is_complete(path: Path, expected: Mapping[str, Any]) -> bool:
    """Check that a synthetic volume has the expected version, seed and format, and all of its files."""
    marker = read_marker(path)
    if marker is None or any(marker.get(key) != value for key, value in expected.items()):
        return False
    try:
        return inventory(path).items() <= marker.items()
    except FileNotFoundError:  # race: another process is replacing it
        return False


def staged_path(path: Path, purpose: str = "partial") -> Path:
    """Return a hidden path beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{purpose}")


def remove_stale(path: Path) -> None:
    """Remove the folders that killed processes left beside a volume."""
    for purpose in ("partial", "replaced"):
        for leftover in path.parent.glob(f".{path.name}.*.{purpose}"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(leftover)


def move_into_place(staged: Path, path: Path, is_acceptable: Callable[[], bool]) -> None:
    """Rename a finished folder to ``path``, atomically.

    Args:
        staged: the finished folder; removed if it is not needed.
        path: the final path. A folder that is there is moved aside and removed, unless it is acceptable.
        is_acceptable: checks the folder at ``path``, which another process may just have written.
    """
    for attempt in range(_ATTEMPTS):
        try:
            staged.rename(path)
            return
        except OSError:
            # A folder in the way is expected, anything else is an error; it may also have gone in the meantime.
            if attempt == _ATTEMPTS - 1 or not path.parent.is_dir():
                raise
        if is_acceptable():
            shutil.rmtree(staged)
            return
        aside = staged_path(path, "replaced")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            shutil.rmtree(aside)
