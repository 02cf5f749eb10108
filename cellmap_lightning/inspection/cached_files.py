"""Cached files of this user: regions of decoded voxels, and measurements. No other file is listed or removed."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cellmap_lightning.cache.shared_memory import RegionFolder
from cellmap_lightning.io.records import drafts, records, source_of
from cellmap_lightning.runtime.location import cache_folder, region_folder


@dataclass(frozen=True)
class CachedFile:
    """One file.

    Attributes:
        path: the file.
        size: bytes on disk.
        used: time of the last use, seconds since the epoch.
        of: the source that it was computed from.

    Example:
        >>> for file in measurements():
        ...     print(file.of, file.size)
    """

    path: Path
    size: int
    used: float
    of: str


def measurements() -> list[CachedFile]:
    """Return counts, statistics and indices, least recently used first; the source of damaged ones is empty."""
    files = []
    # Blocks of 512 bytes are the space on disk, which st_size is not for small or sparse files.
    for path in records(cache_folder()):
        with suppress(FileNotFoundError):  # race: another process may just have cleared it
            stat = path.stat()
            files.append(CachedFile(path, stat.st_blocks * 512, stat.st_mtime, source_of(path)))
    return sorted(files, key=lambda file: file.used)


def regions() -> list[CachedFile]:
    """Return the files of decoded voxels, least recently used first."""
    if not region_folder().is_dir():
        return []
    folder = RegionFolder(region_folder())
    return [CachedFile(path, size, used, folder.name(path)) for path, size, used in folder.files()]


def listing() -> str:
    """Return a table of the cached files, as text."""
    lines = []
    for name, files, folder in (
        ("regions of decoded voxels", regions(), region_folder()),
        ("measurements", measurements(), cache_folder()),
    ):
        if not files:
            lines.append(f"no {name} are cached in {folder}")
            continue
        lines += [
            f"{_megabytes([file])}  {datetime.fromtimestamp(file.used):%Y-%m-%d %H:%M}  {file.of or file.path.stem}"
            for file in files
        ]
        lines.append(f"{_megabytes(files)}  in {len(files)} {name} in {folder}")
    return "\n".join(lines)


def clear() -> str:
    """Remove the cached files, except regions that a process uses. Return a summary, as text.

    Drafts of measurements whose process was killed are removed too. A measurement is read at once and whole, so none is
    in use.
    """
    lines = []
    cached = regions()
    if cached:
        folder = RegionFolder(region_folder())
        removed = folder.evict(sum(file.size for file in cached) + 1, set())
        left = len(folder.files())
        lines.append(f"{removed / 1e6:10.1f} MB  of decoded voxels removed" + (f"; {left} are in use" if left else ""))
    measured = measurements()
    for path in [*(file.path for file in measured), *drafts(cache_folder())]:
        path.unlink(missing_ok=True)
    if measured:
        lines.append(f"{_megabytes(measured)}  of measurements removed")
    return "\n".join(lines) or "nothing is cached"


def _megabytes(files: Iterable[CachedFile]) -> str:
    return f"{sum(file.size for file in files) / 1e6:10.1f} MB"
