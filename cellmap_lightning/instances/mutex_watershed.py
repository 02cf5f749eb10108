"""Mutex watershed of affinities.

The affinity of a voxel and its neighbour at an offset is the probability that both belong to one object.

1. Foreground are voxels with an affinity of at least ``threshold`` to a direct neighbour.
2. Offsets of one voxel are attractive edges with the affinity as their weight; longer ones are repulsive edges with one
   minus the affinity, on a lattice of every ``strides``-th voxel.
3. Edges are processed by decreasing weight. An attractive edge joins its clusters, unless a repulsive edge between them
   was processed before; a repulsive edge forbids its clusters to be joined.

The reach is about the diameter of an object and the longest offset: an edge acts beyond it only through other objects.
Source: Wolf et al., https://arxiv.org/abs/1904.12654; computed by bioimage-cpp.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.instances.components import Labels
from cellmap_lightning.instances.libraries import library
from cellmap_lightning.instances.watershed import Floats, Mask

Offsets = Sequence[Sequence[int]]


def check_offsets(offsets: Offsets, channels: int) -> tuple[Shape, ...]:
    """Return offsets as tuples.

    Raises:
        CellMapValueError: there is not one for each channel, they are not three whole numbers, or none is along an axis
            to the direct neighbour.
    """
    checked = []
    for offset in offsets:
        if len(offset) != 3 or any(int(n) != n for n in offset) or not any(offset):
            raise CellMapValueError(f"offsets: {list(offset)!r} is no neighbour; use three whole voxels (z, y, x)")
        checked.append((int(offset[0]), int(offset[1]), int(offset[2])))
    if len(checked) != channels:
        raise CellMapValueError(
            f"offsets: there are {len(checked)}, and {channels} channels; give one for each channel"
        )
    if not any(is_direct(offset) for offset in checked):
        raise CellMapValueError(
            f"offsets: none of {checked} is a direct neighbour; add [1, 0, 0] or [-1, 0, 0] and so on"
        )
    return tuple(checked)


def is_direct(offset: Shape) -> bool:
    """Return True if an offset leads to a voxel that shares a face."""
    return sum(map(abs, offset)) == 1


def foreground(affinities: Floats, offsets: Sequence[Shape], threshold: float = 0.5) -> Mask:
    """Return the voxels with an affinity of at least a threshold to a direct neighbour.

    Args:
        affinities: ``[C, z, y, x]``, of a voxel and that at the offset from it.
        offsets: of each channel, in voxels.
        threshold: an affinity.
    """
    mask = np.zeros(affinities.shape[1:], bool)
    for values, offset in zip(affinities, offsets, strict=True):
        if not is_direct(offset):
            continue
        here = tuple(slice(max(0, -n), min(0, -n) or None) for n in offset)  # voxels whose neighbour is inside
        there = tuple(slice(max(0, n), min(0, n) or None) for n in offset)
        joined = values[here] >= threshold
        mask[here] |= joined
        mask[there] |= joined
    return mask


def mutex_watershed(
    affinities: Floats,
    offsets: Offsets,
    threshold: float = 0.5,
    strides: Sequence[int] = (1, 1, 1),
    mask: Mask | None = None,
) -> Labels:
    """Divide the foreground of affinities into objects.

    Args:
        affinities: ``[C, z, y, x]`` from 0 to 1, of a voxel and that at the offset from it.
        offsets: of each channel, in voxels (z, y, x).
        threshold: the affinity from which a voxel is foreground.
        strides: distances, in voxels, of those whose repulsive edges are used.
        mask: the foreground; None for `foreground`.

    Returns:
        Numbers from 1, and 0 in the background.

    Raises:
        CellMapValueError: the offsets are invalid.
        MissingExtraError: bioimage-cpp is not installed.

    Example:
        >>> labels = mutex_watershed(affinities, [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0, -5]])  # doctest: +SKIP
    """
    checked = check_offsets(offsets, len(affinities))
    mask = foreground(affinities, checked, threshold) if mask is None else mask
    if not mask.any():
        return np.zeros(mask.shape, np.uint32)
    order = sorted(range(len(checked)), key=lambda channel: not is_direct(checked[channel]))
    direct = sum(map(is_direct, checked))
    weights = np.asarray(affinities, np.float32)[order]
    np.subtract(1, weights[direct:], out=weights[direct:])
    labels = library("bioimage_cpp").segmentation.mutex_watershed(
        weights, [list(checked[channel]) for channel in order], direct,
        strides=None if max(strides) == 1 else [int(n) for n in strides], mask=mask,
    )  # fmt: skip
    return compact(labels)


def compact(labels: np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]) -> Labels:
    """Return numbers without gaps, from 1, in the order of the original ones; 0 is unchanged."""
    flat = labels.ravel()
    numbers = np.zeros(int(flat.max(initial=0)) + 1, np.uint32)
    numbers[flat] = 1
    numbers[0] = 0
    return cast("Labels", np.cumsum(numbers, dtype=np.uint32)[labels] * (labels != 0))
