"""Values of float raw that batches cannot hold: NaN, which becomes 0, and infinity and overflow, which are errors."""

import logging
import math
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.errors import ChunkError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.redaction import hide_address

log = logging.getLogger(__name__)

#: Volumes whose NaN this process has reported.
_reported: dict[str, object] = {}


@dataclass(frozen=True)
class Unusable:
    """Voxels that are not finite as float32.

    Attributes:
        voxel: the first of them that is infinite or overflows; without one the first NaN.
        value: its value.
        count: number of NaN voxels; 0 where ``value`` is not NaN.

    Example:
        >>> unusable(np.array([[[1, np.nan, np.nan]]], np.float32))
        Unusable(voxel=(0, 0, 1), value=nan, count=2)
    """

    voxel: tuple[int, int, int]
    value: float
    count: int


def unusable(voxels: AnyArray) -> Unusable | None:
    """Return the voxels of a decoded box ``[z, y, x]`` that are not finite as float32; None without any."""
    if voxels.dtype.kind != "f":
        return None
    single = voxels
    if voxels.dtype.itemsize > np.dtype(np.float32).itemsize:
        with np.errstate(over="ignore"):  # found below
            single = voxels.astype(np.float32)
    finite = np.isfinite(single)
    if finite.all():
        return None
    nan = np.isnan(single)
    infinite = ~(finite | nan)
    count = 0 if infinite.any() else int(nan.sum())
    z, y, x = (int(i) for i in np.unravel_index(int((nan if count else infinite).argmax()), voxels.shape))
    return Unusable((z, y, x), float(voxels[z, y, x]), count)


def is_reported(reader: ArrayReader) -> bool:
    """Return True if NaN of a volume was reported by this process, so that its voxels need no further check."""
    return str(reader.level.path) in _reported


def check_finite(
    reader: ArrayReader, voxels: AnyArray, start: tuple[int, int, int], shape: Shape, is_stored: bool = True
) -> None:
    """Check decoded raw, and log the first part of a volume that holds NaN, once per process.

    Args:
        reader: the reader of raw.
        voxels: a decoded box, ``[z, y, x]``.
        start: its first voxel in the array.
        shape: its voxels.
        is_stored: no chunk of the box is missing. Otherwise NaN may be the fill value, which is reported elsewhere.

    Raises:
        ChunkError: a voxel is infinite, or too large for float32.
    """
    found = unusable(voxels)
    if found is None or (found.count and (not is_stored or str(reader.level.path) in _reported)):
        return
    first = tuple(a + b for a, b in zip(start, found.voxel, strict=True))
    voxel = (first[0], first[1], first[2]), (1, 1, 1)
    file = reader.level.array.file(next(iter(reader.files(*voxel))))
    place = hide_address(f"{reader.where(*voxel)} of chunk {file}")
    if not found.count:
        what = "is infinite" if math.isinf(found.value) else "is too large for float32, in which raw is read"
        raise ChunkError(
            f"{place}: the value {found.value:g} {what}; store a finite value there, or NaN, which batches show as 0; "
            f"{reader.box(*voxel)}"
        )
    token = object()
    if _reported.setdefault(str(reader.level.path), token) is not token:  # atomic: one of several threads reports it
        return
    log.warning(
        "%s: the value is NaN, as in %d of the %d voxels read with it. NaN of raw reads as 0 in batches, and so do "
        "voxels interpolated from it; targets there stay known. Make them unknown in the labels, or store other values "
        "in raw. Further NaN of this volume is not reported",
        place, found.count, math.prod(shape),
    )  # fmt: skip
