"""Seeded watershed of a distance map, which divides objects that touch.

1. The distance of each foreground voxel to the background, in nm, is computed from the mask, or given.
2. The distance is smoothed with a Gaussian, so that a rough surface adds no maxima.
3. A seed is a connected set of voxels, each at least ``seed_depth`` from the background, whose smoothed distance is the
   maximum of the foreground that is connected to them inside of the box of ``seed_distance`` around each of them. A
   higher value of another object close by suppresses no seed, nor does one that is connected outside of the box alone,
   so that a seed depends on its box and not on the block in which it is computed.
4. Each foreground voxel joins the seed from which the negative distance floods it, by faces. Parts that touch flooded
   voxels at edges or corners alone join the highest neighbour, as far as ``connectivity`` says that they are connected.
5. Components of the foreground without a seed are objects of their own: no foreground voxel is left out.

Heights are whole numbers of 1/16 of the smallest voxel length, so that equal shapes give equal results at any place of
an array. The reach is the diameter of the largest object plus ``seed_distance`` and three times ``smoothing``.
The distance transform and the watershed are those of bioimage-cpp.
"""

from collections.abc import Sequence
from itertools import product
from typing import cast

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.instances.components import Connectivity, Labels, label_components
from cellmap_lightning.instances.libraries import library

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Heights = npt.NDArray[np.int32]

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
    connectivity: Connectivity = 26,
) -> Labels:
    """Divide the foreground of a mask into objects around the maxima of a distance map.

    Args:
        mask: the foreground, ``[z, y, x]``.
        voxel_size: nm.
        distance: the distance map, ``[z, y, x]`` in nm; None for that of the mask.
        smoothing: standard deviation of the Gaussian, nm.
        seed_distance: the shortest distance of two seeds along an axis, nm; None for two voxels.
        seed_depth: the smallest distance of a seed, nm; a component without a seed is one object.
        connectivity: neighbours of a voxel; voxels of two components are never of one object.

    Returns:
        Numbers from 1 in the foreground, and 0 in the background.

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
    reach = [2] * 3 if seed_distance is None else np.rint(np.divide(seed_distance, voxel_size)).astype(int).tolist()
    least = max(1, int(np.ceil(seed_depth * _STEPS / min(voxel_size))))
    inside = np.where(mask, heights, np.int32(-1))  # smoothed heights outside of the mask are of no object
    seeds = label_components(_maxima(inside, [max(1, n) for n in reach], least, connectivity), connectivity)
    labels = flood(-heights.astype(np.float32), seeds, mask)
    left = mask & (labels == 0)
    if left.any():
        _join_parts(labels, left, inside, connectivity)
        others = label_components(left, connectivity)
        labels[left] = others[left] + labels.max()
    return labels


def flood(heights: Floats, seeds: Labels, mask: Mask) -> Labels:
    """Flood heights from seeds by faces, inside of a mask: each voxel gets the number of a seed, or 0."""
    return cast("Labels", library("bioimage_cpp").segmentation.watershed(heights, seeds, mask=mask))


def _heights(distance: Floats, voxel_size: Sequence[float], smoothing: float) -> Heights:
    """Return a smoothed distance map in whole steps."""
    if smoothing > 0:
        sigma = np.divide(smoothing, voxel_size)
        distance = library("scipy.ndimage").gaussian_filter(distance, sigma, truncate=TRUNCATE)
    steps = np.rint(distance * np.float32(_STEPS / min(voxel_size)))
    return cast("Heights", np.clip(steps, 0, _HIGHEST).astype(np.int32))


def _maxima(inside: Heights, reach: Sequence[int], least: int, connectivity: Connectivity) -> Mask:
    """Return the voxels that no higher voxel suppresses.

    Args:
        inside: heights of the foreground, and -1 elsewhere.
        reach: voxels from a voxel to the ends of its window.
        least: the smallest height of a seed.
        connectivity: a voxel is suppressed by those that are connected to it inside of its window.
    """
    filters, size = library("scipy.ndimage"), [2 * n + 1 for n in reach]
    maxima = cast("Mask", (inside == filters.maximum_filter(inside, size)) & (inside >= least))
    peaks = (inside >= least) & ~maxima  # a higher voxel of this or another object is in the window
    for axis in range(3):
        peaks &= inside == filters.maximum_filter1d(inside, 3, axis)
    if not peaks.any():
        return maxima
    components = label_components(inside >= 0, connectivity)
    boxes = filters.find_objects(components.view(np.int32))
    for number in np.unique(components[peaks]).tolist():
        box = boxes[number - 1]
        own = components[box] == number
        values = np.where(own, inside[box], np.int32(-1))
        peak = peaks[box] & own
        alone = peak & (values == filters.maximum_filter(values, size))
        maxima[box] |= alone
        if any(length > n + 1 for length, n in zip(own.shape, reach, strict=True)):  # parts may be apart in a window
            maxima[box] |= _apart(values, peak & ~alone, reach, connectivity)
    return maxima


def _apart(values: Heights, peaks: Mask, reach: Sequence[int], connectivity: Connectivity) -> Mask:
    """Return the peaks of a component that are connected to no higher voxel inside of their windows.

    Args:
        values: heights of the component, and -1 elsewhere.
        peaks: the voxels in question.
        reach: voxels from a voxel to the ends of its window.
        connectivity: see `Connectivity`.
    """
    left, apart = peaks.copy(), np.zeros(peaks.shape, bool)
    for at in map(tuple, np.argwhere(peaks).tolist()):
        if not left[at]:
            continue
        # Any two voxels of half a window are in the windows of each other: many peaks are decided at once.
        near = _window(at, [n // 2 for n in reach])
        left[near] &= values[near] == _tops(values[near], connectivity)
        if left[at]:
            window = _window(at, reach)
            place = tuple(a - part.start for a, part in zip(at, window, strict=True))
            apart[at] = _tops(values[window], connectivity)[place] == values[at]
            left[at] = False
    return apart


def _window(at: Sequence[int], reach: Sequence[int]) -> tuple[slice, ...]:
    """Return a box around a voxel; it may exceed an array at its end."""
    return tuple(slice(max(0, a - n), a + n + 1) for a, n in zip(at, reach, strict=True))


def _tops(values: Heights, connectivity: Connectivity) -> Heights:
    """Return the largest value of the connected component of each voxel, and -1 where a value is -1."""
    labels = label_components(values >= 0, connectivity)
    tops = np.full(int(labels.max()) + 1, -1, np.int32)
    np.maximum.at(tops, labels.reshape(-1), values.reshape(-1))
    return tops[labels]


def _join_parts(labels: Labels, left: Mask, inside: Heights, connectivity: Connectivity) -> None:
    """Give voxels without a label that of their highest neighbour, step by step, as far as they are connected.

    Args:
        labels: numbers, which are changed; voxels at a distance of a face have none or the same.
        left: the foreground without a label, which is changed too.
        inside: heights of the foreground.
        connectivity: the neighbours.
    """
    edges = {6: 1, 18: 2, 26: 3}[connectivity]
    offsets = np.array([o for o in product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, o)) <= edges])
    limits = np.subtract(left.shape, 1)
    voxels = np.argwhere(left)
    while len(voxels):
        best, chosen = np.full(len(voxels), -1, np.int32), np.zeros(len(voxels), np.uint32)
        for offset in offsets:
            there = voxels + offset
            valid = ((there >= 0) & (there <= limits)).all(axis=1)
            place = tuple(np.clip(there, 0, limits).T)
            number = np.where(valid, labels[place], 0)
            better = (number > 0) & (inside[place] > best)
            best[better], chosen[better] = inside[place][better], number[better]
        joined = chosen > 0
        if not joined.any():
            return
        labels[tuple(voxels[joined].T)] = chosen[joined]
        left[tuple(voxels[joined].T)] = False
        voxels = voxels[~joined]
