"""Downsampling of voxels for the coarser levels of a pyramid: means of intensities, modes of labels.

A ragged last plane, too thin for a window, is **dropped**, so that every voxel is computed from data alone.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError


def _window_parts(data: NDArray[Any], factors: Sequence[int]) -> list[NDArray[Any]]:
    """Return the members of every window, as ``prod(factors)`` strided views of one common shape."""
    if len(factors) != data.ndim or any(f < 1 for f in factors):
        raise CellMapValueError(
            f"factors {tuple(factors)} do not fit an array of shape {data.shape}: one integer >= 1 each"
        )
    shape = [n // f for n, f in zip(data.shape, factors, strict=True)]
    if 0 in shape:
        raise CellMapValueError(f"an array of shape {data.shape} has no whole window of {tuple(factors)} voxels")
    return [
        data[tuple(slice(o, o + n * f, f) for o, n, f in zip(offsets, shape, factors, strict=True))]
        for offsets in product(*(range(f) for f in factors))
    ]


def _axis_sums(data: NDArray[Any], factors: Sequence[int], wide: np.dtype[Any]) -> NDArray[Any]:
    """Return the sum of every window, computed axis by axis, so that most of the work runs along whole rows."""
    sums: NDArray[Any] = data
    for axis, factor in enumerate(factors):
        end = sums.shape[axis] // factor * factor
        before = (slice(None),) * axis
        members = [sums[(*before, slice(o, end, factor))] for o in range(factor)]
        sums = members[0].astype(wide) if factor == 1 else np.add(members[0], members[1], dtype=wide)
        for member in members[2:]:
            sums += member
    return sums


def downsample_mean(data: NDArray[Any], factors: Sequence[int] = (2, 2, 2)) -> NDArray[Any]:
    """Average every window of ``factors`` voxels.

    Integers are summed exactly and rounded to nearest, halves upwards, so that repeated levels do not darken.

    Args:
        data: Integer or floating array.
        factors: Window size in voxels, one per axis.

    Returns:
        Array of the same dtype and of shape ``data.shape[i] // factors[i]``.

    Raises:
        CellMapTypeError: If the dtype has no mean (booleans, strings).
        CellMapValueError: If the array is smaller than one window.
    """
    parts = _window_parts(data, factors)
    n = len(parts)
    if data.dtype.kind == "f":
        total = np.zeros(parts[0].shape, np.float64)
        for part in parts:
            total += part
        return (total / n).astype(data.dtype)
    if data.dtype.kind not in "iu":
        raise CellMapTypeError(f"cannot average dtype {data.dtype}; integers and floats have a mean")
    # Sums fit into twice as many bits for any sensible window; there is no integer type wider than eight bytes.
    bits = data.dtype.itemsize * 8
    if bits < 64 and n <= 1 << bits - 1:
        sums = _axis_sums(data, factors, np.dtype(f"{data.dtype.kind}{data.dtype.itemsize * 2}"))
        sums += sums.dtype.type(n // 2)
        if n & n - 1:
            sums //= sums.dtype.type(n)
        else:  # a shift is several times as fast as a division
            sums >>= sums.dtype.type(n.bit_length() - 1)
        return sums.astype(data.dtype)
    # Without a wider type: quotients and remainders by n are summed separately, so that nothing overflows.
    quotient = np.zeros(parts[0].shape, data.dtype)
    remainder = np.zeros(parts[0].shape, np.int64)
    for part in parts:
        whole = part // n
        quotient += whole
        remainder += (part - whole * n).astype(np.int64)
    quotient += ((remainder + n // 2) // n).astype(data.dtype)
    return quotient


def downsample_mode(data: NDArray[Any], factors: Sequence[int] = (2, 2, 2)) -> NDArray[Any]:
    """Take the most frequent value of every window of ``factors`` voxels.

    A tie goes to the first voxel of the window (lowest z, y, x) if its value is among the most frequent, as in
    tinybrain, else to the smallest of these. No value is preferred, so that objects keep their volume over many levels.

    Args:
        data: Integer or boolean array.
        factors: Window size in voxels, one per axis.

    Returns:
        Array of the same dtype and of shape ``data.shape[i] // factors[i]``.

    Raises:
        CellMapTypeError: If the dtype is not one of labels.
        CellMapValueError: If the array is smaller than one window.
    """
    if data.dtype.kind not in "iub":
        raise CellMapTypeError(f"cannot take the mode of dtype {data.dtype}; labels are integers")
    parts = _window_parts(data, factors)
    least = parts[0].copy()
    most = parts[0].copy()
    for part in parts[1:]:
        np.minimum(least, part, out=least)
        np.maximum(most, part, out=most)
    # Nearly all windows of a label volume hold one value; only the others are counted.
    mixed = np.nonzero(least != most)
    if mixed[0].size:
        least[mixed] = _mixed_mode([part[mixed] for part in parts], least[mixed], most[mixed])
    return least


def _mixed_mode(members: Sequence[NDArray[Any]], least: NDArray[Any], most: NDArray[Any]) -> NDArray[Any]:
    """Return the mode of windows with several values; see `downsample_mode`.

    Args:
        members: the members of the windows, ``[windows]`` each, first the first voxel.
        least: the smallest value of each window.
        most: the largest.
    """
    low, high = np.zeros(least.shape, np.int32), np.zeros(least.shape, np.int32)
    for member in members:
        low += member == least
        high += member == most
    # Two values, as at the surface of an object: the counts decide, and on a tie the first voxel.
    winner = np.where(low == high, members[0], np.where(low > high, least, most))
    several = np.flatnonzero(low + high < len(members))
    if several.size:
        winner[several] = _sorted_mode([member[several] for member in members])
    return winner


def _sorted_mode(members: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the mode of windows with any number of values, by their longest run of sorted values."""
    ordered = np.sort(np.stack(members), axis=0)
    # Of equally long runs the first wins, which has the smaller value.
    winner = ordered[0].copy()
    run = np.ones(winner.shape, np.int32)
    longest = run.copy()
    for before, value in pairwise(ordered):
        run = np.where(value == before, run + 1, 1).astype(np.int32)
        better = run > longest
        winner[better] = value[better]
        np.maximum(longest, run, out=longest)
    first, count = members[0], np.ones(winner.shape, np.int32)
    for member in members[1:]:
        count += member == first
    return np.where(count == longest, first, winner)
