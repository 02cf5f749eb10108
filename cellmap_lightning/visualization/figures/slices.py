"""Choice of the slices of a patch that show most, contrast limits, and lengths of scale bars."""

import math
from collections.abc import Sequence

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures.canvas import Array, BoolArray, FloatArray

THRESHOLD = 0.5
"""Probability above which a voxel belongs to a class."""


def scale_bar_nm(extent_nm: float) -> float:
    """Choose a round length for a scale bar.

    Args:
        extent_nm: width of the image in nm.

    Returns:
        The greatest of 1, 2 and 5 times a power of ten, in nm, that is at most 0.4 of the width.

    Raises:
        CellMapValueError: the width is not a positive number.
    """
    if not (math.isfinite(extent_nm) and extent_nm > 0):
        raise CellMapValueError(f"The width of an image must be a positive number of nm, got {extent_nm}")
    limit = 0.4 * extent_nm * (1 + 1e-9)
    power = math.floor(math.log10(limit))
    return max(
        factor * 10.0**exponent
        for exponent in (power - 1, power)
        for factor in (1, 2, 5)
        if factor * 10.0**exponent <= limit
    )


def scale_bar_label(nm: float) -> str:
    """Return the length of a scale bar with its unit, such as ``200 nm`` or ``2 µm``."""
    return f"{nm:g} nm" if nm < 1000 else f"{nm / 1000:g} µm"


def contrast_limits(raw: FloatArray) -> tuple[float, float]:
    """Return the intensities to show as black and white.

    Args:
        raw: intensities of any shape.

    Returns:
        The 0.5 and the 99.5 percentile of the finite values. Exact zeros are left out where they are probably padding:
        where they are more than 2 % of the voxels but not nearly all of them. The two always differ.
    """
    values = np.asarray(raw).ravel()
    values = values[:: max(1, values.size // 2_000_000)].astype(np.float64)  # two million values are enough
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    # A mask has zeros too, but hardly more than two values besides: there they are content, not padding.
    content = values[values != 0]
    if 0.005 * values.size < content.size < 0.98 * values.size and np.unique(content[:10_000]).size > 2:
        values = content
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if high > low:
        return low, high
    low, high = float(values.min()), float(values.max())
    if high > low:
        return low, high
    pad = max(1.0, abs(low))  # one value everywhere: mid-grey
    return low - pad, high + pad


def best_slice(target: FloatArray | None, prediction: FloatArray | None, shape: Sequence[int]) -> int:
    """Choose the xy slice that shows most.

    The slice with most classes in the target wins, then with most foreground in the target, then with most classes and
    foreground in the prediction, then with most annotated voxels, then the one nearest to the middle.

    Args:
        target: ``[class, z, y, x]`` with 0, 1 and NaN, or None.
        prediction: probabilities ``[class, z, y, x]``, or None.
        shape: number of voxels ``(z, y, x)``.

    Returns:
        Index of the slice along z, in voxels.
    """
    n = shape[0]
    keys: list[Array] = []
    known = np.zeros(n, dtype=np.int64)
    for stack in (target, prediction):
        classes, voxels = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        if stack is not None:
            for channel in stack:  # one class at a time: a patch with 48 classes is large
                inside = (channel >= THRESHOLD).sum(axis=(1, 2))
                classes += inside > 0
                voxels += inside
                if stack is target:
                    known += (~np.isnan(channel)).sum(axis=(1, 2))
        keys += [classes, voxels]
    return _greatest([*keys, known])


def best_row(target: BoolArray | None, prediction: BoolArray | None, rows: int) -> int:
    """Choose the row of an xy slice where an xz slice shows most.

    The row wins in which the number of classes times the number of pixels inside any class is greatest, so that it
    crosses objects rather than grazes them; the pixels of a class that fills more than nine tenths of the slice do not
    count. The prediction decides where the target does not, then the distance to the middle.

    Args:
        target: masks ``[class, y, x]``, or None.
        prediction: masks ``[class, y, x]``, or None.
        rows: number of rows.

    Returns:
        Index of the row, in voxels.
    """
    keys: list[Array] = []
    for masks in (target, prediction):
        if masks is not None:
            classes = masks.any(axis=2).sum(axis=0)
            objects = masks[masks.mean(axis=(1, 2)) < 0.9]
            keys += [classes * objects.any(axis=0).sum(axis=1), classes]
    return _greatest([*keys, np.zeros(rows)])


def _greatest(keys: Sequence[Array]) -> int:
    """Return the index of the greatest by the first key, then by the next ones, then nearest to the middle."""
    index = np.arange(len(keys[0]))
    # The last key of lexsort is the primary one; of equals, the first index wins.
    order = np.lexsort([-index, -np.abs(2 * index - (len(index) - 1)), *keys[::-1]])
    return int(order[-1])
