"""Seeded watershed of a distance map, which divides objects that touch.

1. The distance of each foreground voxel to the background, in nm, is computed from the mask, or given.
2. The distance is smoothed with a Gaussian, so that a rough surface adds no maxima.
3. A seed is a connected set of voxels whose smoothed distance is the maximum of the box of ``seed_distance`` around
   each of them, and at least ``seed_depth``.
4. Each foreground voxel joins the seed from which the negative distance floods it. Components without a seed are left
   out.

Heights are whole numbers of 1/16 of the smallest voxel length, so that equal shapes give equal results at any place of
an array. The reach is the diameter of the largest object plus ``seed_distance`` and three times ``smoothing``.
The distance transform and the watershed are those of bioimage-cpp.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.instances.components import Labels, label_components
from cellmap_lightning.instances.libraries import library

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

#: Steps of a height per voxel, and the largest height: the library distinguishes 65536.
_STEPS, _HIGHEST = 16, 65535
#: Standard deviations at which the Gaussian ends.
TRUNCATE = 3.0


def mask_distance(mask: Mask, voxel_size: Sequence[float]) -> Floats:
    """Return the distance of each voxel of a mask to the nearest voxel outside, nm.

    Beyond the ends of the array there is no background. A mask without background has the distance 0.

    Args:
        mask: booleans ``[z, y, x]``.
        voxel_size: nm.
    """
    if mask.all():
        return np.zeros(mask.shape, np.float32)
    distance = library("bioimage_cpp").distance.distance_transform(mask, sampling=[float(s) for s in voxel_size])
    return cast("Floats", np.asarray(distance, np.float32))


def distance_watershed(
    mask: Mask,
    voxel_size: Sequence[float],
    distance: Floats | None = None,
    smoothing: float = 0.0,
    seed_distance: float | None = None,
    seed_depth: float = 0.0,
) -> Labels:
    """Divide the foreground of a mask into objects around the maxima of a distance map.

    Args:
        mask: the foreground, ``[z, y, x]``.
        voxel_size: nm.
        distance: the distance map, ``[z, y, x]`` in nm; None for that of the mask.
        smoothing: standard deviation of the Gaussian, nm.
        seed_distance: the shortest distance of two seeds along an axis, nm; None for two voxels.
        seed_depth: the smallest distance of a seed, nm.

    Returns:
        Numbers from 1, and 0 in the background.

    Raises:
        CellMapValueError: the shapes differ.
        MissingExtraError: a library is not installed.

    Example:
        >>> labels = distance_watershed(probabilities > 0.5, (8, 8, 8), smoothing=8, seed_distance=40)
        ... # doctest: +SKIP
    """
    distance = mask_distance(mask, voxel_size) if distance is None else distance
    if distance.shape != mask.shape:
        raise CellMapValueError(f"distance: the shape is {list(distance.shape)}; the mask has {list(mask.shape)}")
    if not mask.any():
        return np.zeros(mask.shape, np.uint32)
    heights = _heights(distance, voxel_size, smoothing)
    seeds = label_components(_maxima(heights, mask, voxel_size, seed_distance, seed_depth))
    return flood(-heights.astype(np.float32), seeds, mask)


def flood(heights: Floats, seeds: Labels, mask: Mask) -> Labels:
    """Flood heights from seeds, inside of a mask: each voxel gets the number of a seed, or 0."""
    return cast("Labels", library("bioimage_cpp").segmentation.watershed(heights, seeds, mask=mask))


def _heights(distance: Floats, voxel_size: Sequence[float], smoothing: float) -> npt.NDArray[np.int32]:
    """Return a smoothed distance map in whole steps."""
    if smoothing > 0:
        sigma = np.divide(smoothing, voxel_size)
        distance = library("scipy.ndimage").gaussian_filter(distance, sigma, truncate=TRUNCATE)
    steps = np.rint(distance * np.float32(_STEPS / min(voxel_size)))
    return cast("npt.NDArray[np.int32]", np.clip(steps, 0, _HIGHEST).astype(np.int32))


def _maxima(
    heights: npt.NDArray[np.int32],
    mask: Mask,
    voxel_size: Sequence[float],
    seed_distance: float | None,
    seed_depth: float,
) -> Mask:
    """Return the voxels that are as high as any other within a distance along the axes."""
    reach = [2] * 3 if seed_distance is None else np.rint(np.divide(seed_distance, voxel_size)).astype(int).tolist()
    highest: Any = library("scipy.ndimage").maximum_filter(heights, size=[2 * max(1, n) + 1 for n in reach])
    least = max(1, int(np.ceil(seed_depth * _STEPS / min(voxel_size))))
    return cast("Mask", (heights == highest) & mask & (heights >= least))
