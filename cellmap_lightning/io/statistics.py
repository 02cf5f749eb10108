"""Intensity statistics of a volume, measured once from a coarse level and cached outside the data."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.grids import covering_boxes
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.io.measurements import key_of
from cellmap_lightning.io.ngff import Level, Multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.records import RecordKey, recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.stamps import digest_of

#: Voxels that are read: enough for the 0.1th percentile of a volume, and quick to read.
ENOUGH_VOXELS = 1 << 22
_LEAST_VOXELS = 1 << 16
_QUANTILES = 1001
#: Attribute of an open image that caches its statistics.
_ATTRIBUTE = "_statistics"
_lock = threading.Lock()
#: Statistics that this process has read or measured, each with the stamp of its chunks.
_known: dict[RecordKey, tuple[str, "Statistics"]] = {}

#: Start and shape of a chunk.
_Box = tuple[tuple[int, int, int], Shape]


@dataclass(frozen=True)
class Statistics:
    """Statistics of the stored values of a volume, without voxels of value 0.

    Attributes:
        mean: mean.
        std: standard deviation.
        quantiles: 1001 values, the 0th to the 100th percentile in steps of 0.1.

    Example:
        >>> statistics(read_multiscale("jrc_a.zarr/recon-1/em/fibsem-uint8")).percentile(99.5)
        231.0
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Return the stored value below which ``percent`` of the voxels lie."""
        return float(np.interp(percent, np.linspace(0, 100, len(self.quantiles)), self.quantiles))


def statistics(image: Multiscale, retry_policy: RetryPolicy = DEFAULT_RETRY) -> Statistics:
    """Return statistics of a volume's stored values, from the coarsest level with enough voxels.

    Voxels of value 0 are ignored, since missing chunks are read as 0. Of a level that is larger than needed, evenly
    spaced chunks are read.

    Args:
        image: the volume.
        retry_policy: attempts and timeout of each object.

    Raises:
        CellMapValueError: the volume holds nothing but zeros.
    """
    with _lock:
        cached: Statistics | None = image.__dict__.get(_ATTRIBUTE)
        if cached is None:
            # Crops that are opened together share the image, so its chunks are examined once for all of them.
            cached = image.__dict__[_ATTRIBUTE] = _cached_or_measured(_measured_level(image), retry_policy)
        return cached


def _cached_or_measured(level: Level, retry_policy: RetryPolicy) -> Statistics:
    key, boxes = _measurement(level)
    reader = open_reader(level, retry_policy=retry_policy, empty="missing")
    stamp = _stamp(reader, boxes)
    measured = _cached(key, lambda: stamp)
    if measured is None:
        measured = _measure(reader, boxes)
        _known[key] = stamp, measured
        remember(key, stamp, asdict(measured))
    return measured


def known_statistics(image: Multiscale) -> Statistics | None:
    """Return the same if it is cached by this process or on disk; None where voxels would have to be read."""
    level = _measured_level(image)
    key, boxes = _measurement(level)
    with _lock:
        return _cached(key, lambda: _stamp(open_reader(level), boxes))


def _measured_level(image: Multiscale) -> Level:
    sizes = [(int(np.prod(level.array.shape)), level) for level in image.present]
    enough = [pair for pair in sizes if pair[0] >= min(_LEAST_VOXELS, sizes[0][0])]
    return min(enough, key=lambda pair: pair[0])[1]


def _measurement(level: Level) -> tuple[RecordKey, list[_Box]]:
    """Return the key of a measurement, and start and shape of the chunks that are read for it."""
    shape, chunks = level.zyx(level.array.shape), level.zyx(level.array.chunks)
    boxes = list(covering_boxes(shape, chunks))
    count = max(1, ENOUGH_VOXELS // int(np.prod(chunks)))
    if len(boxes) > count:
        boxes = [boxes[i] for i in np.linspace(0, len(boxes) - 1, count).round().astype(int)]
    return key_of(level, "statistics", ENOUGH_VOXELS, _LEAST_VOXELS), boxes


def _stamp(reader: ArrayReader, boxes: Sequence[_Box]) -> str:
    """Return the stamp of the chunks that are read."""
    return digest_of(reader.stamp(*box) for box in boxes)


def _cached(key: RecordKey, stamp: Callable[[], str]) -> Statistics | None:
    known = _known.get(key)
    if known is not None and known[0] == stamp():
        return known[1]
    recalled = recall(key, stamp, _parsed)
    if recalled is not None:
        _known[key] = stamp(), recalled
    return recalled


def _parsed(content: Mapping[str, Any]) -> Statistics:
    mean, std, quantiles = float(content["mean"]), float(content["std"]), tuple(map(float, content["quantiles"]))
    if len(quantiles) != _QUANTILES or not np.isfinite([mean, std, *quantiles]).all():
        raise ValueError(f"expected {_QUANTILES} finite quantiles, got {len(quantiles)} values")
    return Statistics(mean, std, quantiles)


def _measure(reader: ArrayReader, boxes: Sequence[_Box]) -> Statistics:
    parts = []
    for box in boxes:
        chunk = reader.read(*box).ravel()
        parts.append(chunk[(chunk != 0) & np.isfinite(chunk)])
    values = np.concatenate(parts).astype(np.float64)
    if not len(values):
        raise CellMapValueError(
            f"{reader.level.path} holds nothing but zeros, so it cannot be normalized by its values"
        )
    quantiles = np.percentile(values, np.linspace(0, 100, _QUANTILES)).tolist()
    return Statistics(float(values.mean()), float(values.std()), tuple(quantiles))
