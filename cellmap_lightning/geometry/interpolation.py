"""Neighbours and weights of interpolation along one axis, and the weighted sums of maps along the axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import EDGE_TOLERANCE, SCALE_TOLERANCE, FloatArray
from cellmap_lightning.geometry.source import AnyArray, Source, compute_type, read_box, store_values


def is_inside(points: FloatArray, count: int) -> npt.NDArray[np.bool_]:
    """Return which points lie in an array of ``count`` voxels, its edges included."""
    inside: npt.NDArray[np.bool_] = (points >= -0.5 - EDGE_TOLERANCE) & (points <= count - 0.5 + EDGE_TOLERANCE)
    return inside


def nearest_index(points: FloatArray, count: int) -> npt.NDArray[np.int64]:
    """Return the index of the voxel that holds each point, -1 outside the array; on an edge, the lower voxel."""
    index = np.ceil(points - 0.5 - EDGE_TOLERANCE).astype(np.int64)
    index[(index == -1) & (points >= -0.5 - EDGE_TOLERANCE)] = 0
    index[(index < 0) | (index >= count)] = -1
    return index


def linear_weights(points: FloatArray, width: float, count: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Return neighbours and weights of the linear interpolant of ``count`` voxels, along one axis.

    Args:
        points: positions in voxels, each inside ``[-0.5, count - 0.5]``.
        width: voxels over which the interpolant is averaged around each point; up to 1.01 it is taken at the point.
        count: voxels of the array.

    Returns:
        Indices and weights, both ``[points, neighbours]``.
    """
    if width <= 1 + SCALE_TOLERANCE:
        middles, lengths = points[:, None], np.ones((len(points), 1))
    else:
        # Between two voxel centres the interpolant is linear, so its mean over a piece is its value in the middle. The
        # knots cut the window [a, b] at the voxel centres inside it; those clipped to an end have length 0.
        a = np.maximum(points - width / 2, -0.5)
        b = np.minimum(points + width / 2, count - 0.5)
        # No more than the array has: a wrong voxel size in metadata may make a window of billions of voxels.
        knots = np.floor(a)[:, None] + np.arange(min(int(np.ceil(width)), count) + 2)
        knots = np.clip(knots, a[:, None], b[:, None])
        knots[:, -1] = b
        lengths = np.diff(knots) / (b - a)[:, None]
        middles = (knots[:, 1:] + knots[:, :-1]) / 2
    if count == 1:
        return np.zeros((len(points), 1), np.int64), np.ones((len(points), 1))
    left = np.clip(np.floor(middles), 0, count - 2).astype(np.int64)
    part = middles - left
    index = np.concatenate([left, left + 1], axis=1)
    weight = np.concatenate([lengths * (1 - part), lengths * part], axis=1)
    return index, weight


@dataclass(frozen=True)
class Band:
    """Weighted sums along one axis, each added up in the order of its neighbours.

    The order makes results bit-identical whichever patch or block a voxel is computed in. A matrix product would add in
    an order that depends on its shape and on the number of threads.

    Attributes:
        low: ``[points]``, the first neighbour of each point.
        weights: ``[points, neighbours]``, of the first neighbour and of those after it.
    """

    low: npt.NDArray[np.int64]
    weights: FloatArray

    @classmethod
    def of(cls, points: FloatArray, width: float, count: int) -> "Band":
        """Return the sums at some points; see `linear_weights`."""
        index, weight = linear_weights(points, width, count)
        low = index.min(axis=1)
        weights = np.zeros((len(low), int((index - low[:, None]).max()) + 1))
        np.add.at(weights, (np.arange(len(low))[:, None], index - low[:, None]), weight)
        return cls(low, weights)

    @property
    def used(self) -> tuple[int, int]:
        """First neighbour with a weight, and the one after the last."""
        neighbours = (self.low[:, None] + np.arange(self.weights.shape[1]))[self.weights != 0]
        return int(neighbours.min()), int(neighbours.max()) + 1

    @property
    def copies(self) -> npt.NDArray[np.int64] | None:
        """Neighbour of each point that is copied; None where a point has several."""
        one = ((self.weights == 0) | (self.weights == 1)).all()
        return self.low + self.weights.argmax(axis=1) if one else None

    def __call__(self, values: AnyArray, axis: int, first: int) -> AnyArray:
        """Return the sums along an axis of ``values``, whose first voxel is voxel ``first`` of the array.

        For booleans, the sum is the logical or over neighbours with a weight.
        """
        shape = list(values.shape)
        shape[axis] = len(self.low)
        total = np.zeros(shape, values.dtype)
        along = [1] * values.ndim
        along[axis] = -1
        part = np.empty_like(total)
        for number in range(self.weights.shape[1]):
            weights = self.weights[:, number]
            if not weights.any():
                continue
            # Clipped neighbours have weight 0.
            np.take(values, self.low + number - first, axis, out=part, mode="clip")
            if values.dtype == bool:
                total |= part & (weights != 0).reshape(along)
            else:
                part *= weights.astype(values.dtype).reshape(along)
                total += part
        return total


def weighted_sums(
    source: Source, points: Sequence[FloatArray], widths: Sequence[float], out: AnyArray, fill: float
) -> None:
    """Write the weighted sums along each axis in turn.

    The trilinear interpolant, and its mean over a box, are products over the axes.

    Args:
        source: the array.
        points: indices along each axis of the array.
        widths: voxels over which each axis is averaged.
        out: the patch, in the array's order of axes.
        fill: value of voxels whose centre lies outside the array.
    """
    inside, bands, low, high = [], [], [], []
    for axis, count in enumerate(source.shape):
        hits = np.flatnonzero(is_inside(points[axis], count))
        if not len(hits):
            out[...] = fill
            return
        inside.append(slice(int(hits[0]), int(hits[-1]) + 1))
        bands.append(Band.of(np.clip(points[axis][hits], -0.5, count - 0.5), widths[axis], count))
        first, stop = bands[axis].used
        low.append(first)
        high.append(stop)
    target = out[tuple(inside)]
    if target.shape != out.shape:
        out[...] = fill
    values = read_box(source, low, high).astype(compute_type(source.dtype))
    # 0 * NaN is NaN, so non-finite voxels are replaced, and a mask of them is summed along with the values.
    invalid = ~np.isfinite(values) if source.dtype.kind == "f" else None
    if invalid is not None and invalid.any():
        values[invalid] = 0
    else:
        invalid = None
    # The axis that shrinks most goes first, so that the later sums are small.
    for axis in sorted(range(3), key=lambda a: -widths[a]):
        band = bands[axis]
        copies = band.copies
        if copies is not None and np.array_equal(copies, np.arange(low[axis], high[axis])):
            continue
        values = band(values, axis, low[axis])
        if invalid is not None:
            invalid = band(invalid, axis, low[axis])
    if invalid is not None:
        values[invalid] = np.nan
    values += 0  # turns -0 to 0, as sums do
    store_values(values, target, source.dtype)
