"""Missing chunks of raw: counted when a crop is opened, to choose and report the policy."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from itertools import product

from cellmap_lightning.crops.image import MissingRaw, StoredImage
from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE, Box, Shape
from cellmap_lightning.io.ngff import first_time
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

_CONSEQUENCE = {
    "error": "a sample that shows one of them is an error",
    "warn": "they show the fill value",
    "fill": "they show the fill value",
    "mask": "they show the fill value, and targets there are unknown",
}
#: Chunks along each axis of a volume that are probed, to distinguish a partial copy from a whole one.
_PROBES = 3
#: Time and result of the probes, of the volume of the crop that was opened last.
_probed: dict[str, tuple[float, dict[tuple[int, ...], bool]]] = {}
#: Seconds for which results are reused.
_PROBE_LIFETIME = 60.0
#: True while volumes are opened whose missing chunks are counted later.
_counted_later: ContextVar[bool] = ContextVar("counted_later", default=False)


@contextlib.contextmanager
def counted_later() -> Iterator[None]:
    """Open volumes in this thread without a count of missing chunks: a prediction counts those of its own patches."""
    token = _counted_later.set(True)
    try:
        yield
    finally:
        _counted_later.reset(token)


def resolve(label: str, images: Iterable[StoredImage], policy: MissingRaw, crop: Box | None) -> MissingRaw:
    """Report missing chunks of raw, and return the policy that applies to a crop.

    ``auto`` becomes ``mask`` if raw is a partial copy, in which chunks exist only around crops, and otherwise
    ``error``. Chunks are only counted if that is fast.

    Args:
        label: name of the crop.
        images: the images of raw.
        policy: the policy that was set.
        crop: box of the labels; None without labels, when nothing can be masked.
    """
    if _counted_later.get():
        return "error" if policy == "auto" else policy
    distinct = {image.level.path: image for image in images}.values()
    incomplete = [(image, *counts) for image in distinct if (counts := image.count_missing()) and counts[0]]
    if policy == "auto":
        if crop is not None and incomplete and all(_is_partial(image, crop) for image, _, _ in incomplete):
            for image, missing, files in incomplete:
                _report_partial(label, image, missing, files, crop)
            return "mask"
        policy = "error"
    for image, missing, files in incomplete:
        log.warning(
            "%s: %d of the %s of raw that its patches reach are not stored (%s); with missing_raw=%s %s",
            label, missing, plural(files, "chunk"), image.level.path, policy, _CONSEQUENCE[policy],
        )  # fmt: skip
        image.quiet = policy == "fill"
    return policy


def within(image: StoredImage, crop: Box) -> tuple[Shape, Shape] | None:
    """Return the first voxel and the shape of the part of raw that a crop covers; None if it covers nothing."""
    lattice = image.lattice
    parts = []
    for low, high, count in zip(*lattice.span(crop.lower, crop.upper), lattice.shape, strict=True):
        first = max(0, math.floor(low + LATTICE_TOLERANCE))
        end = min(count, math.ceil(high - LATTICE_TOLERANCE))
        if end <= first:
            return None
        parts.append((first, end - first))
    (z, dz), (y, dy), (x, dx) = parts
    return (z, y, x), (dz, dy, dx)


def _is_partial(image: StoredImage, crop: Box) -> bool:
    """Return True if all chunks that touch a crop are stored, but fewer than half of evenly spaced ones elsewhere."""
    part = within(image, crop)
    if part is None:
        return False
    inside = set(image.reader.files(*part))
    if not all(image.stored(index) for index in inside):
        return False
    elsewhere = [is_stored for index, is_stored in _probe(image).items() if index not in inside]
    return sum(elsewhere) < len(elsewhere) / 2


def _probe(image: StoredImage) -> dict[tuple[int, ...], bool]:
    """Return for evenly spaced chunks of a volume whether each is stored; crops opened together share the result."""
    path, now = str(image.level.path), time.monotonic()
    cached = _probed.get(path)
    if cached is not None and now - cached[0] < _PROBE_LIFETIME:
        return cached[1]
    info = image.level.array
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    along = [sorted({round(i * (n - 1) / (_PROBES - 1)) for i in range(_PROBES)}) for n in grid]
    result = {index: image.stored(index) for index in product(*along)}
    _probed.clear()  # one volume is enough: its crops are opened one after the other
    _probed[path] = now, result
    return result


def _report_partial(label: str, image: StoredImage, missing: int, files: int, crop: Box) -> None:
    """Log that raw is a partial copy, and the padding with which the challenge's tool fetches the rest."""
    image.quiet = True
    # A warning for the first crop of a volume.
    level = logging.WARNING if first_time(str(image.level.path), "partial copy") else logging.INFO
    if not log.isEnabledFor(level):
        return
    start, shape = image.region.extent
    low, size = within(image, crop) or (start, shape)
    before = [a - b for a, b in zip(low, start, strict=True)]
    after = [b + n - a - m for a, m, b, n in zip(low, size, start, shape, strict=True)]
    padding = max(1, *before, *after)
    log.log(
        level,
        "%s: %s is a partial copy, with chunks around crops alone: %d of the %d chunks (%.0f %%) that its patches "
        "reach are not stored; they show the fill value, and targets there are unknown (missing_raw=auto). "
        "csc fetch-data --raw-padding %d fetches them",
        label, image.level.path, missing, files, 100 * missing / files, padding,
    )  # fmt: skip
