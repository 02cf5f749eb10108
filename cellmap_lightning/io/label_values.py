"""The values that a label array holds, read once from its chunks and cached outside the data."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cellmap_lightning.errors import EmptyChunkError, MetadataError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.array_reader import ArrayReader, Empty
from cellmap_lightning.io.measurements import key_of, stamp_of
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.records import recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy

#: Voxels that are read of an array at most; of a larger array, evenly spaced chunks.
MOST_VOXELS = 1 << 27
#: Different ids of a label map at most.
MOST_IDS = 1 << 16
#: The code that CellMap's default encoding gives to unannotated voxels, and image editors to masks.
CODE = 255


@dataclass(frozen=True)
class LabelValues:
    """The values that a label array holds.

    Attributes:
        zero: whether any voxel is 0.
        one: whether any is 1.
        code: whether any is the code of unannotated voxels.
        other: whether any is something else.
        above: whether any is greater than the code.
        negative: a negative value; None without one.
        complete: whether all voxels were read.
    """

    zero: bool = False
    one: bool = False
    code: bool = False
    other: bool = False
    above: bool = False
    negative: int | None = None
    complete: bool = True

    def __or__(self, more: "LabelValues") -> "LabelValues":
        return LabelValues(
            self.zero or more.zero,
            self.one or more.one,
            self.code or more.code,
            self.other or more.other,
            self.above or more.above,
            self.negative if self.negative is not None else more.negative,
            self.complete and more.complete,
        )

    def __str__(self) -> str:
        parts = [text for seen, text in ((self.zero, "0"), (self.one, "1"), (self.other, "other ids")) if seen]
        return " and ".join([*parts, *([str(CODE)] if self.code else [])]) or "nothing"


def label_values(
    level: Level, label: str, code: int = CODE, retry_policy: RetryPolicy = DEFAULT_RETRY, empty: Empty = "error"
) -> LabelValues:
    """Return the values that a label array holds.

    Args:
        level: the array.
        label: name of the crop and class, for messages.
        code: the value that may stand for unannotated voxels.
        retry_policy: retries and timeouts of the reads.
        empty: how chunk files of 0 bytes are read; see `ArrayReader`.

    Raises:
        ChunkError: a chunk cannot be read.
        MetadataError: the labels are not whole numbers.
    """
    reader = open_reader(level, label, retry_policy=retry_policy, empty=empty)
    files = reader.stored()
    key, stamp = key_of(level, "values", code, MOST_VOXELS, empty), stamp_of(files)
    cached = recall(key, lambda: stamp, _parsed)
    if cached is not None:
        return cached
    values = _read(reader, list(files), code)
    remember(key, stamp, asdict(values))
    return values


def stored_ids(
    level: Level, label: str, retry_policy: RetryPolicy = DEFAULT_RETRY, empty: Empty = "error"
) -> list[int]:
    """Return the different values of an array, sorted: of a large one, those of evenly spaced chunks.

    Args:
        level: the array.
        label: name of the crop and class, for messages.
        retry_policy: retries and timeouts of the reads.
        empty: how chunk files of 0 bytes are read; see `ArrayReader`.

    Raises:
        ChunkError: a chunk cannot be read.
        MetadataError: the labels are not whole numbers.
    """
    reader = open_reader(level, label, retry_policy=retry_policy, empty=empty)
    files = reader.stored()
    key, stamp = key_of(level, "ids", MOST_VOXELS, MOST_IDS, empty), stamp_of(files)
    cached = recall(key, lambda: stamp, lambda content: list(map(int, content["ids"])))
    if cached is not None:
        return cached
    ids: set[int] = set()
    for file in _chosen(reader, list(files)):
        for start, shape in reader.chunks_of(file):
            ids.update(map(int, np.unique(read_labels(reader, start, shape))))
        if len(ids) > MOST_IDS:  # not a label map
            break
    remember(key, stamp, {"ids": sorted(ids)})
    return sorted(ids)


def _chosen(reader: ArrayReader, files: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return all files of an array, or as many evenly spaced ones as have `MOST_VOXELS`."""
    size = reader.level.zyx(reader.level.array.files)
    most = max(1, MOST_VOXELS // math.prod(min(f, n) for f, n in zip(size, reader.shape, strict=True)))
    chosen = sorted(files)
    if len(chosen) > most:
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, most).round().astype(int)]
    return chosen


def _parsed(content: Mapping[str, Any]) -> LabelValues:
    for name in LabelValues.__dataclass_fields__:
        types = (int, type(None)) if name == "negative" else (bool,)
        if type(content[name]) not in types:
            raise TypeError(f"{name} is {content[name]!r}")
    return LabelValues(**content)


def _read(reader: ArrayReader, files: list[tuple[int, int, int]], code: int) -> LabelValues:
    level = reader.level
    size = level.zyx(level.array.files)
    grid = [-(-n // f) for n, f in zip(reader.shape, size, strict=True)]
    values = LabelValues()
    if len(files) < math.prod(grid):  # one voxel of a missing chunk shows the fill value of all
        existing = set(files)
        absent = next(index for index in itertools.product(*map(range, grid)) if index not in existing)
        z, y, x = (i * f for i, f in zip(absent, size, strict=True))
        values |= _values(read_labels(reader, (z, y, x), (1, 1, 1)), code)
    chosen = _chosen(reader, files)
    if len(chosen) < len(files):
        values |= LabelValues(complete=False)
    for file in chosen:
        for start, shape in reader.chunks_of(file):
            values |= _values(read_labels(reader, start, shape), code)
    return values


def read_labels(reader: ArrayReader, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
    """Read the labels of a box as integers; for ``begun`` see `ArrayReader.read`.

    Raises:
        ChunkError: a chunk cannot be read.
        MetadataError: they are not whole numbers.
    """
    try:
        stored = reader.read(start, shape, begun)
    except EmptyChunkError as e:
        e.args = (f"{e}. Copy it again, or set missing_labels=unknown to make its voxels unannotated (NaN)",)
        raise
    if stored.dtype.kind != "f":
        return stored
    if not (np.isfinite(stored).all() and (np.rint(stored) == stored).all()):
        raise MetadataError(f"{reader.label}: {reader.level.path} holds labels that are not whole numbers (or NaN)")
    return stored.astype(np.int64)


def _values(stored: AnyArray, code: int) -> LabelValues:
    low, high = int(stored.min()), int(stored.max())
    if low == high:  # true of most chunks of labels
        return _summary({low}, code)
    if low >= 0 and high < 1 << 16:  # few possible values: a histogram is faster than comparisons
        return _summary(set(np.flatnonzero(np.bincount(stored.ravel(), minlength=2)).tolist()), code)
    zero, one, is_code = (bool((stored == value).any()) for value in (0, 1, code))
    return _summary({low, high}, code) | LabelValues(zero=zero, one=one, code=is_code)


def _summary(values: set[int], code: int) -> LabelValues:
    negative = min(values) if min(values) < 0 else None
    other = bool(values - {0, 1, code})
    return LabelValues(0 in values, 1 in values, code in values, other, max(values) > code, negative)
