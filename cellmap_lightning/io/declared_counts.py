"""A check that the chunks of a label array can hold the voxels that its ``complement_counts`` declare.

A missing chunk of labels holds absent voxels, since writers leave such chunks out. An incomplete copy looks the same,
except that the counts in the attributes declare voxels that no file holds.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.chunk_files import is_empty_file, list_files
from cellmap_lightning.io.chunk_names import has_objects
from cellmap_lightning.io.label_values import read_labels
from cellmap_lightning.io.measurements import count_in, key_of
from cellmap_lightning.io.ngff import ArrayInfo, Encoding, Level, Multiscale, complement_counts
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.records import recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.stamps import digest_of
from cellmap_lightning.io.store import Remote, read_json

log = logging.getLogger(__name__)

#: Chunks of an array that are requested one by one at most.
MOST_ASKED = 4096
#: Arrays of at most so many chunk files are listed at setup, and counted if the files hold at most so many voxels.
#: Larger arrays are compared when a class index or a count is built.
COUNTED_FILES, COUNTED_VOXELS = 64, 1 << 22
_ADVICE = "copy them again or correct the counts, or set missing_labels=unknown to read them as unannotated (NaN)"


def declared_foreground(level: Level, image: Multiscale | None = None) -> int | None:
    """Return the foreground voxels of a level by its ``complement_counts``; None where it declares none.

    ``foreground = size - sum(complement_counts)``, as cellmap-schemas defines it.
    """
    return _foreground(level, complement_counts(level, image))


def declared_unknown(level: Level, image: Multiscale | None = None) -> int | None:
    """Return the unannotated voxels of a level by its ``complement_counts``; None where it declares none."""
    counts = complement_counts(level, image)
    return None if counts is None or not _is_plausible(level, counts) else counts.get("unknown", 0)


def implausible_counts(level: Level, image: Multiscale | None = None) -> str | None:
    """Return ``complement_counts`` that no array of this size can have, as text; None for any other."""
    counts = complement_counts(level, image)
    if not counts or _is_plausible(level, counts):
        return None
    size = math.prod(level.array.shape)
    return f"{dict(counts)} cannot be counts of the {size:,} voxels of {level.name}, and are not used"


def _foreground(level: Level, counts: Mapping[str, Any] | None) -> int | None:
    if not counts or not _is_plausible(level, counts):
        return None
    return math.prod(level.array.shape) - int(sum(counts.values()))


def _is_plausible(level: Level, counts: Mapping[str, Any]) -> bool:
    """Return whether counts are whole numbers from 0 whose sum is not above the voxels of a level."""
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts.values()):
        return False
    return int(sum(counts.values())) <= math.prod(level.array.shape)


def check_declared_counts(
    level: Level,
    encoding: Encoding,
    label: str,
    thorough: bool = False,
    retry_policy: RetryPolicy = DEFAULT_RETRY,
    has_first: bool = False,
    image: Multiscale | None = None,
) -> str | None:
    """Return an error message if a label array has fewer voxels than declared, since chunks are missing; else None.

    None too for a remote array whose files cannot be listed.

    Args:
        level: the array.
        encoding: meaning of its values.
        label: name of the crop and class, for messages.
        thorough: count voxels also in large arrays.
        retry_policy: retries and timeouts of the reads.
        has_first: whether the first chunk is known to exist.
        image: its image; see `complement_counts`.

    Raises:
        ChunkError: a chunk cannot be read.
    """
    counts = complement_counts(level, image)
    foreground = _foreground(level, counts)
    if foreground is None or counts is None:
        return None
    declared = foreground + int(counts.get("unknown", 0))
    grid = math.prod(-(-n // f) for n, f in zip(level.array.shape, level.array.files, strict=True))
    is_sharded = level.array.files != level.array.chunks  # a shard may lack some of its chunks
    if declared == 0 or (grid == 1 and has_first and not is_sharded and not _is_empty(level)):
        return None
    files = _files_to_check(level, declared, grid, thorough)
    if files is None or (len(files) == grid and not is_sharded) or _fill_value(level) != encoding.absent:
        return None
    capacity = sum(_voxels(level, index) for index in files)
    if capacity < declared:
        stored = capacity
    elif thorough or capacity <= COUNTED_VOXELS:
        stored = _count(level, files, encoding, label, retry_policy)
    else:
        return None
    if stored >= declared:
        return None
    if len(files) == grid:  # either the counts or the shards may be wrong
        log.warning(
            "%s: %s: its complement_counts declare %d voxels that are not absent, but its shards hold %d: the counts "
            "are out of date, or shards lack some of their chunks",
            label, level.path, declared, stored,
        )  # fmt: skip
        return None
    return (
        f"{label}: {level.path}: its complement_counts declare {declared} voxels that are not absent ({foreground} of "
        f"the class), but the {len(files)} of its {grid} chunk files that exist hold "
        f"{'at most ' if stored == capacity else ''}{stored}: chunks are missing, or the counts are wrong; {_ADVICE}"
    )


def _files_to_check(level: Level, declared: int, grid: int, thorough: bool) -> list[tuple[int, ...]] | None:
    """Return the chunk files that exist; None where they cannot be listed, or a large array has enough of them.

    Args:
        level: the array.
        declared: voxels that the files must be able to hold.
        grid: number of files of a complete array.
        thorough: list all files also of a large array.
    """
    lists_all = thorough or grid <= COUNTED_FILES
    indices = _files(level) if not isinstance(level.path, Remote) else _remote_files(level, lists_all, thorough)
    if indices is None:
        return None
    files, capacity = [], 0
    for index in indices:
        files.append(index)
        capacity += _voxels(level, index)
        if capacity >= declared and not lists_all:  # no need to list the rest
            return None
    return files


def check_empty_level(
    level: Level, image: Multiscale, encoding: Encoding, label: str, retry_policy: RetryPolicy = DEFAULT_RETRY
) -> str | None:
    """Return an error message for a coarser level without chunks where the finest level has foreground; else None.

    Thin structures may be lost in a pyramid, which is only warned of. A voxel of the coarser level whose finest voxels
    are all foreground cannot be lost: the level was not copied.

    Args:
        level: the level that is read.
        image: its image.
        encoding: meaning of the values.
        label: name of the crop and class, for messages.
        retry_policy: retries and timeouts of the reads.

    Raises:
        ChunkError: a chunk of the finest level cannot be read.
    """
    declared = declared_foreground(image.finest, image)
    if not declared or isinstance(level.path, Remote) or next(_files(level), None) is not None:
        return None
    text = (
        f"{label}: level {level.name}, which is read, has no chunk, but {image.finest.name} declares {declared} voxels "
        "of the class"
    )
    if _has_whole_voxel(level, image.finest, encoding, label, retry_policy):
        return f"{text}, more than a pyramid loses: chunks are missing; {_ADVICE}"
    log.warning(
        "%s: either the level was not copied, or it has lost thin structures; label_downsample=any reads the finest "
        "level",
        text,
    )  # fmt: skip
    return None


def _has_whole_voxel(level: Level, finest: Level, encoding: Encoding, label: str, retry_policy: RetryPolicy) -> bool:
    """Return True if all voxels of the finest level in some voxel of a coarser level are foreground."""
    factor = np.maximum(np.rint(np.divide(level.scale, finest.scale)).astype(int), 1)
    reader = open_reader(finest, label, retry_policy=retry_policy, empty=encoding.empty)
    for index in _files(finest):
        for start, shape in reader.chunks_of(finest.zyx(index)):
            values = read_labels(reader, start, shape)
            present = (values != encoding.absent) & (
                values != (encoding.unknown if encoding.unknown is not None else -1)
            )
            skipped = -np.asarray(start) % factor
            count = (np.asarray(shape) - skipped) // factor
            if (count < 1).any():
                continue
            whole = present[tuple(slice(a, a + n * f) for a, n, f in zip(skipped, count, factor, strict=True))]
            (nz, ny, nx), (fz, fy, fx) = count, factor
            if whole.reshape(nz, fz, ny, fy, nx, fx).all(axis=(1, 3, 5)).any():
                return True
    return False


def compare_counts(level: Level, encoding: Encoding, counted: int, label: str, image: Multiscale | None = None) -> None:
    """Compare the foreground counted by reading a level with the declared one.

    Args:
        level: the array.
        encoding: meaning of its values.
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
    files = grid if isinstance(level.path, Remote) else sum(1 for _ in _files(level))
    if counted < declared and files < grid:
        raise MetadataError(
            f"{label}: {level.path}: its complement_counts declare {declared} voxels of the class, but the {files} of "
            f"its {grid} chunk files that exist hold {counted}: chunks are missing, or the counts are wrong; {_ADVICE}"
        )
    log.warning(
        "%s: %s: its complement_counts declare %d voxels of the class, but %d are stored; the counts are out of date",
        label, level.path, declared, counted,
    )  # fmt: skip


def _files(level: Level) -> Iterator[tuple[int, ...]]:
    """Return indices along the stored axes of the chunk or shard files that exist and are not empty."""
    return (index for index, file in list_files(level.array) if not is_empty_file(file))


def _is_empty(level: Level) -> bool:
    """Return whether the only chunk file of a local array has 0 bytes."""
    return not isinstance(level.path, Remote) and is_empty_file(level.array.file([0] * len(level.array.shape)))


def _remote_files(level: Level, listed: bool, thorough: bool) -> list[tuple[int, ...]] | None:
    """Return the same for a remote array; None where its files cannot be listed, or are too many to request each.

    Args:
        level: the array.
        listed: whether it has few chunks.
        thorough: request each chunk where the store cannot list.
    """
    info, path = level.array, level.path
    assert isinstance(path, Remote)
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    if not listed or math.prod(grid) > MOST_ASKED or not (path.lists or thorough):
        return None
    indices = {info.key(index): index for index in itertools.product(*map(range, grid))}
    if not path.lists:
        exists = has_objects(path, list(indices))
        return [index for index, is_there in zip(indices.values(), exists, strict=True) if is_there]
    try:
        entries = path.filesystem().find(path.key, detail=True)
    except Exception:  # stores raise any type; reading reports the error
        return None
    stored = {name[len(path.key) :].strip("/") for name, entry in entries.items() if entry.get("size") != 0}
    return [index for key, index in indices.items() if key in stored]


def _voxels(level: Level, index: tuple[int, ...]) -> int:
    """Return the voxels of the array in a chunk or shard; 0 beyond the array."""
    spans = zip(index, level.array.files, level.array.shape, strict=True)
    return math.prod(max(0, min((i + 1) * f, n) - i * f) for i, f, n in spans)


def _fill_value(level: Level) -> object:
    """Return the value of voxels in missing chunks; 0 for null, which zarr reads as 0, and in all other formats."""
    if not isinstance(level.array, ArrayInfo):
        return 0
    content = read_json(level.array.metadata) or {}
    value = content.get("fill_value")
    return 0 if value is None else value


def _count(
    level: Level, files: Sequence[tuple[int, ...]], encoding: Encoding, label: str, retry_policy: RetryPolicy
) -> int:
    """Return the voxels that are not absent in the files that exist; the count is cached outside the data."""
    reader = open_reader(level, label, retry_policy=retry_policy, empty=encoding.empty)
    stamp = digest_of([sorted(files), *sorted(reader.stored().items())])
    key = key_of(level, "not absent", encoding.absent, encoding.empty)
    cached = recall(key, lambda: stamp, count_in)
    if cached is not None:
        return cached
    total = 0
    for index in files:
        for start, shape in reader.chunks_of(level.zyx(index)):
            total += int(np.count_nonzero(read_labels(reader, start, shape) != encoding.absent))
    remember(key, stamp, {"voxels": total})
    return total
