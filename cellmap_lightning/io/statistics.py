"""Intensity statistics of a volume, measured once from a coarse level and cached outside the data."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.measurements import key_of
from cellmap_lightning.io.ngff import Level, Multiscale
from cellmap_lightning.io.records import RecordKey, recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.stamps import digest_of

#: Voxels that are looked at: enough for the 0.1th percentile of a volume, quick to read.
ENOUGH_VOXELS = 1 << 22
_LEAST_VOXELS = 1 << 16
_QUANTILES = 1001
#: The attribute of an image that was opened which holds its statistics.
_OF_IMAGE = "_statistics"
_lock = threading.Lock()
#: Statistics that this process has read or measured, each with the stamp of its chunks.
_known: dict[RecordKey, tuple[str, "Statistics"]] = {}


#: Start and shape of a chunk.
_Box = tuple[tuple[int, int, int], Shape]


@dataclass(frozen=True)
class Statistics:
    """Stored values of a volume, voxels that were never written left out.

    Attributes:
        mean: mean.
        std: standard deviation.
        quantiles: 1001 values, the 0th to the 100th percentile in steps of 0.1.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """The stored value below which ``percent`` of the voxels lie."""
        return float(np.interp(percent, np.linspace(0, 100, len(self.quantiles)), self.quantiles))


def statistics(image: Multiscale, retry_policy: RetryPolicy = DEFAULT_RETRY) -> Statistics:
    """Statistics of a volume's stored values, from the coarsest level that has enough of them.

    Voxels of value 0 are left out: chunks that were never written read as 0. A level that is larger than needed is
    looked at in evenly spaced chunks.

    Args:
        image: the volume.
        retry_policy: how long an object is tried for.

    Raises:
        CellMapValueError: the volume holds nothing but zeros.
    """
    with _lock:
        found: Statistics | None = image.__dict__.get(_OF_IMAGE)
        if found is None:
            # Crops that are opened together share the image, and its chunks are examined once for all of them.
            found = image.__dict__[_OF_IMAGE] = _found_or_measured(_measured_level(image), retry_policy)
        return found


def _found_or_measured(level: Level, retry_policy: RetryPolicy) -> Statistics:
    key, boxes = _measurement(level)
    reader = ChunkReader(level, retry_policy=retry_policy, empty="missing")  # as other chunks that are missing
    stamp = _stamp(reader, boxes)
    found = _cached(key, lambda: stamp)
    if found is None:
        found = _measure(reader, boxes)
        _known[key] = stamp, found
        remember(key, stamp, asdict(found))
    return found


def known_statistics(image: Multiscale) -> Statistics | None:
    """The same if it was measured before, by this process or another; None where voxels would have to be read."""
    level = _measured_level(image)
    key, boxes = _measurement(level)
    with _lock:
        return _cached(key, lambda: _stamp(ChunkReader(level), boxes))


def _measured_level(image: Multiscale) -> Level:
    sizes = [(int(np.prod(level.array.shape)), level) for level in image.present]
    enough = [pair for pair in sizes if pair[0] >= min(_LEAST_VOXELS, sizes[0][0])]
    return min(enough, key=lambda pair: pair[0])[1]


def _measurement(level: Level) -> tuple[RecordKey, list[_Box]]:
    """Return the key of a measurement, and the chunks that are read for it: start and shape of each."""
    shape, chunks = level.zyx(level.array.shape), level.zyx(level.array.chunks)
    grid = [range(0, n, c) for n, c in zip(shape, chunks, strict=True)]
    corners = list(product(*grid))
    wanted = max(1, ENOUGH_VOXELS // int(np.prod(chunks)))
    if len(corners) > wanted:
        corners = [corners[i] for i in np.linspace(0, len(corners) - 1, wanted).round().astype(int)]
    boxes: list[_Box] = []
    for z, y, x in corners:
        dz, dy, dx = (min(c, n - o) for c, n, o in zip(chunks, shape, (z, y, x), strict=True))
        boxes.append(((z, y, x), (dz, dy, dx)))
    return key_of(level, "statistics", ENOUGH_VOXELS, _LEAST_VOXELS), boxes


def _stamp(reader: ChunkReader, boxes: Sequence[_Box]) -> str:
    """Return the stamp of the chunks that are read."""
    return digest_of(reader.stamp(*box) for box in boxes)


def _cached(key: RecordKey, stamp: Callable[[], str]) -> Statistics | None:
    known = _known.get(key)
    if known is not None and known[0] == stamp():
        return known[1]
    found = recall(key, stamp, _parsed)
    if found is not None:
        _known[key] = stamp(), found
    return found


def _parsed(content: Mapping[str, Any]) -> Statistics:
    found = Statistics(float(content["mean"]), float(content["std"]), tuple(map(float, content["quantiles"])))
    if len(found.quantiles) != _QUANTILES or not np.isfinite([found.mean, found.std, *found.quantiles]).all():
        raise ValueError(f"{_QUANTILES} finite quantiles were expected, and {len(found.quantiles)} values were found")
    return found


def _measure(reader: ChunkReader, boxes: Sequence[_Box]) -> Statistics:
    parts = []
    for box in boxes:
        values = reader.read(*box).ravel()
        parts.append(values[(values != 0) & np.isfinite(values)])
    found = np.concatenate(parts).astype(np.float64)
    if not len(found):
        raise CellMapValueError(
            f"{reader.level.path} holds nothing but zeros, so it cannot be normalized by its values"
        )
    quantiles = np.percentile(found, np.linspace(0, 100, _QUANTILES)).tolist()
    return Statistics(float(found.mean()), float(found.std()), tuple(quantiles))
