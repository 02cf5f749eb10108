"""What is kept on this machine: decoded voxels, and small measurements. Nothing else is listed or removed."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cellmap_lightning.cache.shared_memory import RegionFolder
from cellmap_lightning.io.records import drafts, records, source_of
from cellmap_lightning.runtime.location import cache_folder, region_folder


@dataclass(frozen=True)
class Kept:
    """One file.

    Attributes:
        path: the file.
        size: bytes on disk.
        used: time of the last use, seconds since the epoch.
        of: what it was made from.
    """

    path: Path
    size: int
    used: float
    of: str


def measurements() -> list[Kept]:
    """Counts, statistics and indices of this user, the longest unused first; damaged ones without their source."""
    found = []
    for path in records(cache_folder()):
        with suppress(FileNotFoundError):  # another process may just have cleared it
            stat = path.stat()
            found.append(Kept(path, stat.st_blocks * 512, stat.st_mtime, source_of(path)))
    return sorted(found, key=lambda kept: kept.used)


def regions() -> list[Kept]:
    """Decoded voxels of this user, the longest unused first."""
    where = region_folder()
    if not where.is_dir():
        return []
    folder = RegionFolder(where)
    return [Kept(path, size, used, folder.name(path)) for path, size, used in folder.files()]


def listing() -> str:
    """What is kept, for people."""
    lines = []
    for what, kept, where in (
        ("regions of decoded voxels", regions(), region_folder()),
        ("measurements", measurements(), cache_folder()),
    ):
        if not kept:
            lines.append(f"no {what} are kept in {where}")
            continue
        lines += [
            f"{one.size / 1e6:10.1f} MB  {datetime.fromtimestamp(one.used):%Y-%m-%d %H:%M}  {one.of or one.path.stem}"
            for one in kept
        ]
        lines.append(f"{sum(one.size for one in kept) / 1e6:10.1f} MB  in {len(kept)} {what} in {where}")
    return "\n".join(lines)


def clear() -> str:
    """Remove what is kept, but for regions that a process uses. Returns what was done.

    Drafts of measurements go too whose process was killed.

    A measurement is read at once and whole, so none is in use.
    """
    lines = []
    before = regions()
    if before:
        folder = RegionFolder(region_folder())
        removed = folder.evict(sum(one.size for one in before) + 1, set())
        left = len(folder.files())
        lines.append(f"{removed / 1e6:10.1f} MB  of decoded voxels removed" + (f"; {left} are in use" if left else ""))
    measured = measurements()
    for path in [*(one.path for one in measured), *drafts(cache_folder())]:
        path.unlink(missing_ok=True)
    if measured:
        lines.append(f"{sum(one.size for one in measured) / 1e6:10.1f} MB  of measurements removed")
    return "\n".join(lines) or "nothing is kept"
