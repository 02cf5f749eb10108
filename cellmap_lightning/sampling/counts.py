"""How many voxels of each class there are: from the metadata where it says so, else counted once."""

import logging
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from cellmap_lightning.sampling.labels import stored_labels
from cellmap_lightning.sampling.pool import ReadPool
from cellmap_lightning.volumes.chunks import ChunkReader
from cellmap_lightning.volumes.guard import PATIENT, Patience
from cellmap_lightning.volumes.ngff import Encoding, Multiscale
from cellmap_lightning.volumes.statistics import fingerprint, recall, remember

log = logging.getLogger(__name__)


def counted_in_metadata(image: Multiscale) -> int | None:
    """Foreground voxels of the finest level by its ``complement_counts``, or None where it has none.

    ``foreground = size - sum(complement_counts)``, as cellmap-schemas defines it.
    """
    counts = _complement_counts(image)
    size = int(np.prod(image.finest.array.shape))
    if not counts or not all(isinstance(n, int) for n in counts.values()):
        return None
    return size - sum(counts.values()) if 0 <= sum(counts.values()) <= size else None


def unknown_in_metadata(image: Multiscale) -> int:
    """Voxels of the finest level that nobody annotated, by its ``complement_counts``; 0 where it does not say."""
    counts = _complement_counts(image)
    number = counts.get("unknown", 0) if counts else 0
    return number if isinstance(number, int) else 0


def _complement_counts(image: Multiscale) -> Mapping[str, Any] | None:
    block = image.finest.array.attributes.get("cellmap")
    block = block.get("annotation") if isinstance(block, Mapping) else None
    counts = block.get("complement_counts") if isinstance(block, Mapping) else None
    return counts if isinstance(counts, Mapping) else None


def foreground(image: Multiscale, encoding: Encoding, pool: ReadPool, label: str, patience: Patience = PATIENT) -> int:
    """Foreground voxels of the finest level, counted if the metadata does not say. The count is kept outside the data.

    Args:
        image: a label image.
        encoding: what its values mean.
        pool: threads to read with; the caller is none of them.
        label: what messages call it.
        patience: how long an object is tried for.
    """
    known = counted_in_metadata(image)
    if known is not None:
        return known
    name = fingerprint(image.finest, "foreground", encoding)
    kept = recall(name)
    if kept is not None and isinstance(kept.get("foreground"), int):
        return int(kept["foreground"])  # type: ignore[call-overload, no-any-return]
    reader = ChunkReader(image.finest, label, patience=patience)
    corners = list(product(*(range(0, n, c) for n, c in zip(reader.shape, reader.chunks, strict=True))))
    found: list[int] = []

    def count(start: tuple[int, int, int]) -> None:
        z, y, x = (min(c, n - o) for c, n, o in zip(reader.chunks, reader.shape, start, strict=True))
        stored = stored_labels(reader, encoding, start, (z, y, x))
        found.append(int(np.count_nonzero(encoding.present(stored))))

    log.info("%s: its metadata has no complement_counts, so its %d chunks are counted once", label, len(corners))
    batch = 4 * pool.workers  # so that the queue stays short and the bar moves
    with tqdm(total=len(corners), desc=f"counting {label}", unit="chunk", disable=None, leave=False) as bar:
        for first in range(0, len(corners), batch):
            part = corners[first : first + batch]
            pool.run([lambda c=corner: count(c) for corner in part])  # type: ignore[misc]
            bar.update(len(part))
    remember(name, {"foreground": sum(found)})
    return sum(found)
