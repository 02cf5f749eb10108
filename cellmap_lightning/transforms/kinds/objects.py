"""Distances and bounding boxes of the objects in an array of instance ids."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import MissingExtraError
from cellmap_lightning.geometry.lattice import FloatArray, Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID

Ids = npt.NDArray[Any]
Box = tuple[slice, ...]


def ndimage() -> Any:
    """Return ``scipy.ndimage``.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        import scipy.ndimage
    except ImportError:
        raise MissingExtraError(
            'targets that are computed from distances or objects need scipy: pip install "cellmap-lightning[targets]"'
        ) from None
    return scipy.ndimage


def reach(window: Window, nm: float) -> Shape:
    """Return the voxels along each axis that a distance in nm covers, rounded up; 0 along an axis of length 1."""
    z, y, x = (math.ceil(nm / s) if n > 1 else 0 for s, n in zip(window.scale, window.shape, strict=True))
    return z, y, x


def distance_to(mask: npt.NDArray[np.bool_], scale: FloatArray) -> npt.NDArray[np.float64]:
    """Return the distance of every voxel's centre to the nearest centre of a mask, nm; infinite without any."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    distances: npt.NDArray[np.float64] = ndimage().distance_transform_edt(~mask, sampling=scale)
    return distances


def objects(ids: Ids, inner: Box = ()) -> list[tuple[int, Box]]:
    """Return the id and the bounding box of each object, in ascending order.

    Args:
        ids: instance ids, ``[z, y, x]``.
        inner: part of the array that an object must reach into; by default any.
    """
    numbers = np.unique(ids)
    numbers = numbers[numbers > 0]
    # find_objects has a list with an entry for every number up to the largest, so that large ids are renumbered.
    dense = np.where(ids > 0, np.searchsorted(numbers, ids) + 1, 0).astype(np.int32)
    boxes = zip(numbers.tolist(), ndimage().find_objects(dense), strict=True)
    wanted = set(np.unique(ids[inner]).tolist())
    return [(number, box) for number, box in boxes if number in wanted]


def grown(box: Box, by: Shape, shape: tuple[int, ...]) -> Box:
    """Return a box with more voxels on each side, within the array."""
    return tuple(slice(max(b.start - n, 0), min(b.stop + n, m)) for b, n, m in zip(box, by, shape, strict=True))


def distance_to_other(ids: Ids, scale: FloatArray, within: Shape) -> npt.NDArray[np.float64]:
    """Return the distance of every known voxel to the nearest voxel of another id, background included, nm.

    Args:
        ids: instance ids, 0 in the background and -1 where unknown; unknown voxels are of no id.
        scale: voxel size, nm.
        within: voxels up to which distances are exact; larger ones may be infinite.
    """
    distances = np.where(ids == 0, distance_to(ids > 0, scale), np.inf)
    # On the way from a voxel to the nearest one of another id, all voxels are of its id, so that the border of the
    # bounding box is far enough; unless unknown voxels lie in between.
    margin = within if (ids == UNKNOWN_ID).any() else (1, 1, 1)
    for number, box in objects(ids):
        part = grown(box, margin, ids.shape)
        own = ids[part] == number
        distances[part][own] = distance_to(~own & (ids[part] != UNKNOWN_ID), scale)[own]
    return distances


def any_unknown(ids: Ids, within: Shape) -> npt.NDArray[np.bool_]:
    """Return a mask of the voxels with an unknown voxel in the box of ``2 within + 1`` voxels around them."""
    unknown: npt.NDArray[np.bool_] = ids == UNKNOWN_ID
    if unknown.any():
        unknown = ndimage().maximum_filter(unknown, size=[2 * n + 1 for n in within], mode="constant", cval=False)
    return unknown


def voxel_places(shape: tuple[int, ...], scale: FloatArray, axes: tuple[int, ...]) -> list[npt.NDArray[np.float64]]:
    """Return the coordinate of each voxel along each of some axes, nm from the first voxel."""
    grids = np.meshgrid(*(np.arange(n) * float(s) for n, s in zip(shape, scale, strict=True)), indexing="ij")
    return [grids[axis] for axis in axes]
