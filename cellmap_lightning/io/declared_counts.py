"""A check that the chunks of a label array can hold the voxels that its ``complement_counts`` declare.

A chunk of labels that is not stored holds absent voxels, as writers leave such chunks out. A copy that lost chunks
looks the same, except that the counts in the attributes promise voxels that no file holds.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.chunk_names import has_objects
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.label_values import read_labels
from cellmap_lightning.io.measurements import count_in, key_of
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale, complement_counts
from cellmap_lightning.io.records import recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.stamps import digest_of
from cellmap_lightning.io.store import Remote, read_json

log = logging.getLogger(__name__)

#: Chunks of an array that are asked for one by one at most.
MOST_ASKED = 4096
#: Arrays of at most so many chunk files are listed at setup, and their voxels counted if there are at most so many in
#: the files that exist. Larger ones are compared when a class index or a count is built.
COUNTED_FILES, COUNTED_VOXELS = 64, 1 << 22
_ADVICE = "copy them again, or set missing_labels=unknown to make their voxels unknown (NaN)"


def declared_foreground(level: Level, image: Multiscale | None = None) -> int | None:
    """Return the foreground voxels of a level by its ``complement_counts``; None where it declares none.

    ``foreground = size - sum(complement_counts)``, as cellmap-schemas defines it.
    """
    return _foreground(level, complement_counts(level, image))


def _foreground(level: Level, counts: Mapping[str, Any] | None) -> int | None:
    size = math.prod(level.array.shape)
    if not counts or not all(isinstance(n, int) and not isinstance(n, bool) for n in counts.values()):
        return None
    return size - sum(counts.values()) if 0 <= sum(counts.values()) <= size else None


def check_declared_counts(
    level: Level,
    encoding: Encoding,
    label: str,
    thorough: bool = False,
    retry_policy: RetryPolicy = DEFAULT_RETRY,
    has_first: bool = False,
    image: Multiscale | None = None,
) -> str | None:
    """Return what contradicts the missing chunks of a label array; None where nothing does.

    None too for a remote array whose files cannot be listed.

    Args:
        level: the array.
        encoding: what its values mean.
        label: name of the crop and class, for messages.
        thorough: count voxels also in large arrays.
        retry_policy: retries and deadlines of the reads.
        has_first: whether it is known that the first chunk exists.
        image: its image; see `complement_counts`.

    Raises:
        ChunkError: a chunk cannot be read.
    """
    counts = complement_counts(level, image)
    foreground = _foreground(level, counts)
    if foreground is None or counts is None:
        return None
    wanted = foreground + int(counts.get("unknown", 0))
    if wanted == 0:
        return None
    files: list[tuple[int, ...]] = []
    room = 0
    grid = math.prod(-(-n // f) for n, f in zip(level.array.shape, level.array.files, strict=True))
    sharded = level.array.files != level.array.chunks  # a shard may lack some of its chunks
    if grid == 1 and has_first and not sharded and not _is_empty(level):
        return None
    listed = thorough or grid <= COUNTED_FILES
    there = _files(level) if not isinstance(level.path, Remote) else _remote_files(level, listed, thorough)
    for place in there if there is not None else ():
        files.append(place)
        room += _voxels(level, place)
        if room >= wanted and not listed:
            return None
    if there is None or (len(files) == grid and not sharded) or _fill_value(level) != encoding.absent:
        return None
    if room < wanted:
        held = room
    elif thorough or room <= COUNTED_VOXELS:
        held = _count(level, files, encoding, label, retry_policy)
    else:
        return None
    if held >= wanted:
        return None
    if len(files) == grid:  # nothing says whether the counts or the shards are right
        log.warning(
            "%s: %s: its complement_counts promise %d voxels that are not absent, and its shards hold %d: the counts "
            "are out of date, or shards lack some of their chunks",
            label, level.path, wanted, held,
        )  # fmt: skip
        return None
    what = "at most " if held == room else ""
    return (
        f"{label}: {level.path}: its complement_counts promise {wanted} voxels that are not absent ({foreground} of "
        f"the class), and the {len(files)} of its {grid} chunk files that exist hold {what}{held}: chunks are missing; "
        f"{_ADVICE}"
    )


def warn_of_empty_level(level: Level, image: Multiscale, label: str) -> None:
    """Warn of a coarser level without chunks where the finest one promises foreground.

    Thin structures may be lost in a pyramid, so this is no error.

    Args:
        level: the level that is read.
        image: its image.
        label: name of the crop and class, for messages.
    """
    promised = declared_foreground(image.finest, image)
    if promised and not isinstance(level.path, Remote) and next(_files(level), None) is None:
        log.warning(
            "%s: level %s, which is read, has no chunk, and %s promises %d voxels of the class: either the level was "
            "not copied, or it has lost thin structures; label_downsample=any reads the finest level",
            label, level.name, image.finest.name, promised,
        )  # fmt: skip


def compare_counts(level: Level, encoding: Encoding, counted: int, label: str, image: Multiscale | None = None) -> None:
    """Compare the foreground counted by reading a level with the declared one.

    Args:
        level: the array.
        encoding: what its values mean.
        counted: foreground voxels of all of its chunks.
        label: name of the crop and class, for messages.
        image: its image; see `complement_counts`.

    Raises:
        MetadataError: fewer are stored than declared, and chunks are missing.
    """
    declared = declared_foreground(level, image)
    if declared is None or declared == counted or encoding.missing != "absent":
        return
    grid = math.prod(-(-n // f) for n, f in zip(level.array.shape, level.array.files, strict=True))
    there = grid if isinstance(level.path, Remote) else sum(1 for _ in _files(level))
    if counted < declared and there < grid:
        raise MetadataError(
            f"{label}: {level.path}: its complement_counts promise {declared} voxels of the class, and the {there} of "
            f"its {grid} chunk files that exist hold {counted}: chunks are missing; {_ADVICE}"
        )
    log.warning(
        "%s: %s: its complement_counts say %d voxels of the class, and %d are stored; the counts are out of date",
        label, level.path, declared, counted,
    )  # fmt: skip


def _files(level: Level) -> Iterator[tuple[int, ...]]:
    """Indices along the stored axes of the chunk or shard files that exist and are not empty."""
    info = level.array
    root, ndim = str(info.path), len(info.shape)
    if info.separator == ".":
        for name in _names(root):
            parts = name.removeprefix(info.prefix).split(".")
            is_chunk = name.startswith(info.prefix) and len(parts) == ndim and all(map(str.isdigit, parts))
            if is_chunk and _has_bytes(f"{root}/{name}"):
                yield tuple(map(int, parts))
        return

    def below(folder: str, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for name in _names(folder):
            if name.isdigit():
                if len(place) == ndim - 1:
                    if _has_bytes(f"{folder}/{name}"):
                        yield (*place, int(name))
                else:
                    yield from below(f"{folder}/{name}", (*place, int(name)))

    yield from below(f"{root}/{info.prefix}".rstrip("/"), ())


def _has_bytes(file: str) -> bool:
    """Return False for a file of 0 bytes; True for any other, also for one that cannot be looked at."""
    try:
        return os.stat(file).st_size > 0  # noqa: PTH116  as below
    except OSError:
        return True


def _is_empty(level: Level) -> bool:
    """Return True if the only chunk file of a local array has 0 bytes."""
    return not isinstance(level.path, Remote) and not _has_bytes(level.array.file([0] * len(level.array.shape)))


def _remote_files(level: Level, listed: bool, thorough: bool) -> list[tuple[int, ...]] | None:
    """Return the same for a remote array; None where its files cannot be listed, or are too many to ask for each.

    Args:
        level: the array.
        listed: whether it has few chunks.
        thorough: ask for each chunk where nothing can be listed.
    """
    info, path = level.array, level.path
    assert isinstance(path, Remote)
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    if not listed or math.prod(grid) > MOST_ASKED or not (path.lists or thorough):
        return None
    places = {
        info.prefix + info.separator.join(map(str, place)): place for place in itertools.product(*map(range, grid))
    }
    if not path.lists:
        there = has_objects(path, list(places))
        return [place for place, found in zip(places.values(), there, strict=True) if found]
    try:
        found = path.filesystem().find(path.key, detail=True)
    except Exception:  # stores raise whatever they like; reading says what is wrong
        return None
    stored = {name[len(path.key) :].strip("/") for name, entry in found.items() if entry.get("size") != 0}
    return [place for key, place in places.items() if key in stored]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  thousands of them, and a Path costs more than the call
    except OSError:
        return []


def _voxels(level: Level, place: tuple[int, ...]) -> int:
    """Voxels of the array in a chunk or shard; 0 beyond the array."""
    spans = zip(place, level.array.files, level.array.shape, strict=True)
    return math.prod(max(0, min((i + 1) * f, n) - i * f) for i, f, n in spans)


def _fill_value(level: Level) -> object:
    """The value of voxels that no file holds; null, which zarr reads as 0, is 0."""
    content = read_json(level.array.metadata) or {}
    value = content.get("fill_value")
    return 0 if value is None else value


def _count(
    level: Level, files: Sequence[tuple[int, ...]], encoding: Encoding, label: str, retry_policy: RetryPolicy
) -> int:
    """Voxels that are not absent in the files that exist; the count is cached outside the data."""
    reader = ChunkReader(level, label, retry_policy=retry_policy, empty=encoding.empty)
    stamp = digest_of([sorted(files), *sorted(reader.stored().items())])
    key = key_of(level, "not absent", encoding.absent, encoding.empty)
    cached = recall(key, lambda: stamp, count_in)
    if cached is not None:
        return cached
    total = 0
    size = level.zyx(level.array.files)
    for place in files:
        corner = [i * f for i, f in zip(level.zyx(place), size, strict=True)]
        ends = [min(c + f, n) for c, f, n in zip(corner, size, reader.shape, strict=True)]
        steps = [range(c, e, n) for c, e, n in zip(corner, ends, reader.chunks, strict=True)]
        for z, y, x in itertools.product(*steps):
            dz, dy, dx = (min(n, e - c) for n, e, c in zip(reader.chunks, ends, (z, y, x), strict=True))
            total += int(np.count_nonzero(read_labels(reader, (z, y, x), (dz, dy, dx)) != encoding.absent))
    remember(key, stamp, {"voxels": total})
    return total
