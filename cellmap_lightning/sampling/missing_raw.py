"""Chunks of raw that are not stored: counted when a crop is opened, and the policy that follows from them."""

import logging
from collections.abc import Iterable
from itertools import product

import numpy as np

from cellmap_lightning.volumes.geometry import LATTICE_TOLERANCE, Box, Shape
from cellmap_lightning.volumes.image import MissingRaw, StoredImage
from cellmap_lightning.volumes.ngff import first_time

log = logging.getLogger(__name__)

_CONSEQUENCE = {
    "error": "a sample that shows one of them is an error",
    "warn": "they show the fill value",
    "fill": "they show the fill value",
    "mask": "they show the fill value, and targets there are unknown",
}
#: Chunks along each axis of a volume that are looked for, to tell a partial copy from a whole one.
_LOOKS = 3


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
    holes = [(image, *(image.holes() or (0, 0))) for image in {i.level.path: i for i in images}.values()]
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
    first, end = (np.subtract(edge, lattice.box.lower) / lattice.step for edge in (crop.lower, crop.upper))
    low = np.floor(first + LATTICE_TOLERANCE).clip(0).astype(int)
    high = np.ceil(end - LATTICE_TOLERANCE).astype(int)
    (z, y, x), (dz, dy, dx) = low.tolist(), (np.minimum(high, lattice.shape) - low).tolist()
    return ((z, y, x), (dz, dy, dx)) if min(dz, dy, dx) > 0 else None


def _is_partial(image: StoredImage, crop: Box) -> bool:
    """Return whether all chunks that touch a crop are stored, and of evenly spaced ones elsewhere fewer than half."""
    within = _within(image, crop)
    if within is None:
        return False
    own = set(image.reader.files(*within))
    if not all(image.stored(index) for index in own):
        return False
    info = image.level.array
    grid = [-(-n // f) for n, f in zip(info.shape, info.files, strict=True)]
    looks = [sorted(set(np.linspace(0, n - 1, _LOOKS).round().astype(int).tolist())) for n in grid]
    elsewhere = [index for index in product(*looks) if index not in own]
    return sum(image.stored(index) for index in elsewhere) < len(elsewhere) / 2


def _report_partial(label: str, image: StoredImage, missing: int, files: int, crop: Box) -> None:
    image.quiet = True
    start, shape = image.region.extent
    low, size = _within(image, crop) or (start, shape)
    before = np.subtract(low, start)
    after = np.subtract(np.add(start, shape), np.add(low, size))
    padding = int(np.max([before, after]).clip(1))
    # In full for the first crop of a volume.
    level = logging.WARNING if first_time(f"{image.level.path}", "partial copy") else logging.INFO
    log.log(
        level,
        "%s: %s is a partial copy, with chunks around crops alone: %d of the %d chunks (%.0f %%) that patches can show "
        "are not stored; they show the fill value, and targets there are unknown (missing_raw=auto). "
        "csc fetch-data --raw-padding %d fetches them",
        label, image.level.path, missing, files, 100 * missing / files, padding,
    )  # fmt: skip
