"""Chunks of raw that are not stored: counted when a crop is opened, and the policy that follows from them."""

import logging
import math
import time
from collections.abc import Iterable
from itertools import product

from cellmap_lightning.crops.image import MissingRaw, StoredImage
from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE, Box, Shape
from cellmap_lightning.io.ngff import first_time

log = logging.getLogger(__name__)

_CONSEQUENCE = {
    "error": "a sample that shows one of them is an error",
    "warn": "they show the fill value",
    "fill": "they show the fill value",
    "mask": "they show the fill value, and targets there are unknown",
}
#: Chunks along each axis of a volume that are looked for, to tell a partial copy from a whole one.
_LOOKS = 3
#: Which of them are stored, and when this was looked up, of the volume of which a crop was opened last.
_LOOKED: dict[str, tuple[float, dict[tuple[int, ...], bool]]] = {}
#: Seconds for which the answer is used.
_SHARED = 60.0


def resolve(label: str, images: Iterable[StoredImage], policy: MissingRaw, crop: Box | None) -> MissingRaw:
    """Return the policy that applies to a crop, after a report of the chunks of raw that are not stored.

    ``auto`` is ``mask`` where raw is visibly a partial copy, in which chunks exist only around crops, and otherwise
    ``error``. Chunks are counted where that is quick.

    Args:
        label: name of the crop.
        images: the images of raw.
        policy: the policy that was set.
        crop: where labels lie; None where there are none, and nothing could be masked.
    """
    holes = [(image, *(image.count_missing() or (0, 0))) for image in {i.level.path: i for i in images}.values()]
    holes = [entry for entry in holes if entry[1]]
    if policy == "auto":
        partial = bool(holes) and crop is not None and all(_is_partial(image, crop) for image, _, _ in holes)
        policy = "mask" if partial else "error"
        if partial and crop is not None:
            for image, missing, files in holes:
                _report_partial(label, image, missing, files, crop)
            return policy
    for image, missing, files in holes:
        log.warning(
            "%s: %d of the %d chunks of raw that it can show are not stored (%s); with missing_raw=%s %s",
            label, missing, files, image.level.path, policy, _CONSEQUENCE[policy],
        )  # fmt: skip
        image.quiet = policy == "fill"
    return policy


def _within(image: StoredImage, crop: Box) -> tuple[Shape, Shape] | None:
    """Return the first voxel and the shape of the part of raw that a crop covers; None where it covers nothing."""
    lattice = image.lattice
    parts = []
    for low, high, start, step, count in zip(
        crop.lower, crop.upper, lattice.box.lower, lattice.step, lattice.shape, strict=True
    ):
        first = max(0, math.floor((low - start) / step + LATTICE_TOLERANCE))
        end = min(count, math.ceil((high - start) / step - LATTICE_TOLERANCE))
        if end <= first:
            return None
        parts.append((first, end - first))
    (z, dz), (y, dy), (x, dx) = parts
    return (z, y, x), (dz, dy, dx)


def _is_partial(image: StoredImage, crop: Box) -> bool:
    """Return whether all chunks that touch a crop are stored, and of evenly spaced ones elsewhere fewer than half."""
    within = _within(image, crop)
    if within is None:
        return False
    own = set(image.reader.files(*within))
    if not all(image.stored(index) for index in own):
        return False
    elsewhere = [there for index, there in _looks(image).items() if index not in own]
    return sum(elsewhere) < len(elsewhere) / 2


def _looks(image: StoredImage) -> dict[tuple[int, ...], bool]:
    """Return which of evenly spaced chunks of a volume are stored; crops that are opened together share the answer."""
    path, now = str(image.level.path), time.monotonic()
    known = _LOOKED.get(path)
    if known is not None and now - known[0] < _SHARED:
        return known[1]
    info = image.level.array
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    along = [sorted({round(i * (n - 1) / (_LOOKS - 1)) for i in range(_LOOKS)}) for n in grid]
    found = {index: image.stored(index) for index in product(*along)}
    _LOOKED.clear()  # the crops of a volume follow each other
    _LOOKED[path] = now, found
    return found


def _report_partial(label: str, image: StoredImage, missing: int, files: int, crop: Box) -> None:
    image.quiet = True
    # A warning for the first crop of a volume.
    level = logging.WARNING if first_time(str(image.level.path), "partial copy") else logging.INFO
    if not log.isEnabledFor(level):
        return
    start, shape = image.region.extent
    low, size = _within(image, crop) or (start, shape)
    before = [a - b for a, b in zip(low, start, strict=True)]
    after = [b + n - a - m for a, m, b, n in zip(low, size, start, shape, strict=True)]
    padding = max(1, *before, *after)
    log.log(
        level,
        "%s: %s is a partial copy, with chunks around crops alone: %d of the %d chunks (%.0f %%) that patches can show "
        "are not stored; they show the fill value, and targets there are unknown (missing_raw=auto). "
        "csc fetch-data --raw-padding %d fetches them",
        label, image.level.path, missing, files, 100 * missing / files, padding,
    )  # fmt: skip
