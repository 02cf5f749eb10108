"""Voxel counts of each class: from the metadata if they have them, else counted once and cached."""

import logging

import numpy as np
from tqdm import tqdm

from cellmap_lightning.crops.labels import stored_labels
from cellmap_lightning.geometry.grids import StartShape, covering_boxes
from cellmap_lightning.io.declared_counts import compare_counts, declared_foreground, declared_unknown
from cellmap_lightning.io.measurements import count_in, key_of, stamp_of
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.records import recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


def counted_in_metadata(image: Multiscale, level: Level | None = None) -> int | None:
    """Return the foreground voxels of a level, by default the finest, by its ``complement_counts``; see there."""
    return declared_foreground(level or image.finest, image)


def unknown_in_metadata(image: Multiscale) -> int:
    """Return the unannotated voxels of the finest level, by its ``complement_counts``; 0 without these."""
    return declared_unknown(image.finest, image) or 0


def unknown_share(image: Multiscale) -> float | None:
    """Return the unannotated share of the finest level, by its ``complement_counts``; None without these."""
    number = declared_unknown(image.finest, image)
    return None if number is None else number / int(np.prod(image.finest.array.shape))


def foreground(
    image: Multiscale, encoding: Encoding, pool: ReadPool, label: str, retry_policy: RetryPolicy = DEFAULT_RETRY
) -> int:
    """Return the foreground voxels of the finest level, from the metadata or counted; counts are cached elsewhere.

    Args:
        image: a label image.
        encoding: meaning of its values.
        pool: reading threads, which must not include the caller.
        label: name in messages.
        retry_policy: retries and timeouts of reads.
    """
    known = known_foreground(image, image.finest, encoding)
    return known if known is not None else count_foreground(image.finest, encoding, pool, label, retry_policy)


def known_foreground(image: Multiscale, level: Level, encoding: Encoding) -> int | None:
    """Return the foreground voxels of a level from its metadata or a cached count; None if they must be counted."""
    declared = counted_in_metadata(image, level)
    return declared if declared is not None else counted_foreground(level, encoding)


def counted_foreground(level: Level, encoding: Encoding) -> int | None:
    """Return the cached count of the foreground voxels of a level; None if they were not counted since it changed."""
    return recall(key_of(level, "foreground", encoding), lambda: stamp_of(open_reader(level).stored()), count_in)


def count_foreground(
    level: Level, encoding: Encoding, pool: ReadPool, label: str, retry_policy: RetryPolicy = DEFAULT_RETRY
) -> int:
    """Count the foreground voxels of a level of labels, and cache the count in the cache folder."""
    reader = open_reader(level, label, retry_policy=retry_policy, empty=encoding.empty)
    stamp = stamp_of(reader.stored())  # taken first, so that a write during the count makes the count stale
    boxes = list(covering_boxes(reader.shape, reader.chunks))
    counts: list[int] = []

    def count(box: StartShape) -> None:
        stored = stored_labels(reader, encoding, *box)
        counts.append(int(np.count_nonzero(encoding.present(stored))))

    reason = (
        "the metadata have no number of them (complement_counts)"
        if level.whole is None
        else "the number in the metadata (complement_counts) is that of the whole crop, and a box of it is used"
    )
    log.info(
        "%s: counting the foreground voxels (%s), as %s; the number is kept for later runs",
        label, plural(len(boxes), "chunk"), reason,
    )  # fmt: skip
    batch = 4 * pool.workers  # so that the queue stays short and the bar moves
    with tqdm(total=len(boxes), desc=f"counting {label}", unit="chunk", disable=None, leave=False, delay=1) as bar:
        for first in range(0, len(boxes), batch):
            part = boxes[first : first + batch]
            pool.run([lambda b=box: count(b) for box in part])  # type: ignore[misc]
            bar.update(len(part))
    remember(key_of(level, "foreground", encoding), stamp, {"voxels": sum(counts)})
    compare_counts(level, encoding, sum(counts), label)
    return sum(counts)
