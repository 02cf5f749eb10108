"""Positions of patches in a crop: a grid of centres on the lattice of its arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import (
    AXES,
    LATTICE_TOLERANCE,
    Box,
    FloatArray,
    Lattice,
    Shape,
    to_vector,
)


class Window:
    """Shape and resolution of a patch.

    Args:
        shape: voxels (z, y, x).
        scale: voxel size, nm (z, y, x).

    Example:
        >>> Window((64, 64, 64), (8, 8, 8)).extent
        array([512., 512., 512.])

    Raises:
        CellMapValueError: the shape or the scale is not three positive numbers.
    """

    def __init__(self, shape: Sequence[int], scale: Sequence[float]) -> None:
        if len(shape) != 3 or any(not math.isfinite(n) or int(n) != n or n < 1 for n in shape):
            raise CellMapValueError(
                f"a shape must be three positive whole numbers of voxels (z, y, x), got {list(shape)}"
            )
        if len(scale) != 3 or not all(math.isfinite(s) and s > 0 for s in scale):
            raise CellMapValueError(f"a scale must be three positive numbers in nm (z, y, x), got {list(scale)}")
        z, y, x = (int(n) for n in shape)
        self.shape: Shape = (z, y, x)
        self.scale: FloatArray = np.asarray(scale, dtype=np.float64)

    @property
    def extent(self) -> FloatArray:
        """Edge lengths, nm."""
        return self.scale * self.shape


@dataclass(frozen=True, eq=False)
class Placement:
    """The centres that patches may have: a grid, numbered in the order z, y, x.

    `plan` makes one; docs/batches.md describes positions and tiles.

    Attributes:
        first: lowest centre, nm.
        step: distance of neighbouring centres, nm.
        counts: centres along z, y, x.
        stride: positions from one tile to the next that touches it, per axis.
        held: per axis, whether every patch is larger than the crop and contains it.
    """

    first: FloatArray
    step: FloatArray
    counts: Shape
    stride: Shape
    held: tuple[bool, bool, bool]

    @classmethod
    def plan(
        cls,
        box: Box,
        windows: Sequence[Window],
        arrays: Sequence[tuple[Window, Lattice]],
        pad: bool,
        label: str = "",
        limits: Sequence[tuple[Window, Box]] = (),
        cover: bool = False,
    ) -> "Placement":
        """Return the positions at which ``windows``, all around one centre, lie inside ``box``.

        Along an axis on which ``box`` is smaller than a window, and with ``pad``, they are the positions at which the
        window holds the box. Centres are such that patches fall on the voxels of the coarsest of ``arrays`` that has
        the window's voxel size, the first of equals. Along an axis where none has, they are anchored at the box's lower
        edge, in steps of a voxel of the coarsest of ``windows``: all patches of a crop are then slices of one resampled
        array. With ``pad`` the last of them may end less than a voxel beyond the box. No step is longer than the
        smallest of ``windows``, so that tiles leave no gap.

        With ``cover``, patches reach over the edges of the box instead of staying off them where the lattice begins
        elsewhere, and steps are whole numbers of voxels of every one of ``windows``, so that overlapping tiles show the
        same voxels. A lattice that does not allow it makes way for the next finer one.

        Args:
            box: what is annotated, or the whole volume; nm.
            windows: patches that must lie in it.
            arrays: every array that is read, with the window that it is read by.
            pad: allow boxes smaller than a window.
            label: name of the box, for messages.
            limits: further boxes; each must contain its window at every position (raw volumes).
            cover: tiles of the smallest of ``windows`` cover the box; larger ones reach beyond it.

        Raises:
            CellMapValueError: a window is larger than its box and ``pad`` is off.
        """
        first, step, counts, strides, held = [], [], [], [], []
        for axis in range(3):
            smallest = min(float(w.extent[axis]) for w in windows)
            extent = smallest if cover else max(float(w.extent[axis]) for w in windows)
            tied = _tied_lattices(axis, arrays, smallest)
            free = min(smallest, max(float(w.scale[axis]) for w in windows)), box.lower[axis] + extent / 2
            ties = [*tied, free]
            slack = ties[0][0] * LATTICE_TOLERANCE
            low, high, holds = _center_range(axis, box, extent, pad, limits, label, slack)
            held.append((cover or holds) and smallest >= box.extent[axis] - slack)
            if not cover:
                # With pad, the last patch off the lattices may extend less than a voxel beyond the box.
                centers = _inside(low, high, ties[0], pad and not tied and not holds)
            elif held[-1]:
                centers = _holding(low, high, ties)
            else:
                centers = _covering(low, high, ties, [float(w.scale[axis]) for w in windows], smallest)
            first.append(centers[0])
            step.append(centers[1])
            counts.append(centers[2])
            strides.append(max(1, math.floor(smallest / centers[1] + LATTICE_TOLERANCE)))
        return cls(
            np.asarray(first), np.asarray(step), (counts[0], counts[1], counts[2]),
            (strides[0], strides[1], strides[2]), (held[0], held[1], held[2]),
        )  # fmt: skip

    def __len__(self) -> int:
        return math.prod(self.counts)

    def grid_index(self, index: int) -> tuple[int, int, int]:
        """Return the grid coordinates (z, y, x) of position ``index``."""
        rest, x = divmod(index, self.counts[2])
        z, y = divmod(rest, self.counts[1])
        return z, y, x

    def center(self, index: int) -> FloatArray:
        """Return the centre of position ``index`` in nm (z, y, x)."""
        return self.first + self.step * self.grid_index(index)

    def index(self, place: Sequence[int]) -> int:
        """Return the position at grid coordinates (z, y, x)."""
        return (int(place[0]) * self.counts[1] + int(place[1])) * self.counts[2] + int(place[2])

    @property
    def centers(self) -> Box:
        """Box from the lowest to the highest centre, nm."""
        return Box(to_vector(self.first), to_vector(self.first + self.step * np.subtract(self.counts, 1)))

    @cached_property
    def tiles_along(self) -> Shape:
        """Tiles along z, y, x."""
        z, y, x = (
            1 if holds else 1 + math.ceil((count - 1) / stride)
            for count, stride, holds in zip(self.counts, self.stride, self.held, strict=True)
        )
        return z, y, x

    @property
    def tile_count(self) -> int:
        """Number of patches that together cover the box."""
        return math.prod(self.tiles_along)

    def tile(self, number: int) -> int:
        """Return the position of one of the patches that together cover the box, in the order z, y, x.

        The last tile along an axis overlaps the one before it unless tiles divide the axis.
        """
        return self.index([self._along(axis, at) for axis, at in enumerate(self._tile_place(number))])

    def left_out(self, box: Box, window: Window) -> float:
        """Return the share of a box that lies in no tile of ``window``, which is at least as large as the smallest."""
        lower = np.maximum(box.lower, self.centers.lower - window.extent / 2)
        upper = np.minimum(box.upper, self.centers.upper + window.extent / 2)
        return 1 - float(np.prod(np.clip((upper - lower) / box.extent, 0, 1)))

    def advance(self, number: int) -> FloatArray:
        """Return the distance of a tile from the one before it along z, y and x, nm; infinity for the first.

        It bounds the overlap with all earlier tiles, for arrays of any shape and scale: tiles are in order along each
        axis, so the tile before reaches furthest.
        """
        steps = [
            self._along(axis, at) - self._along(axis, at - 1) if at else math.inf
            for axis, at in enumerate(self._tile_place(number))
        ]
        return np.asarray(steps) * self.step

    def tiles_at(self, axis: int, points: FloatArray, extent: float) -> npt.NDArray[np.int64]:
        """Return, along one axis, the first tile that covers each point; the nearest one for uncovered points.

        Args:
            axis: 0, 1 or 2.
            points: nm.
            extent: length of a patch, nm.
        """
        if self.held[axis]:
            return np.zeros(len(points), np.int64)
        beyond = points - (self.first[axis] + extent / 2)
        number = np.ceil(beyond / (self.step[axis] * self.stride[axis]) - LATTICE_TOLERANCE)
        tiles: npt.NDArray[np.int64] = number.clip(0, self.tiles_along[axis] - 1).astype(np.int64)
        return tiles

    def _tile_place(self, number: int) -> tuple[int, int, int]:
        """Return the coordinates of a tile in the grid of tiles (z, y, x)."""
        rest, x = divmod(number, self.tiles_along[2])
        z, y = divmod(rest, self.tiles_along[1])
        return z, y, x

    def _along(self, axis: int, at: int) -> int:
        """Return the coordinate of a tile in the grid of positions, along one axis."""
        return self.counts[axis] // 2 if self.held[axis] else min(at * self.stride[axis], self.counts[axis] - 1)


#: A step and one centre of a lattice along an axis, nm.
_Ties = list[tuple[float, float]]
#: Lowest centre and step along an axis, nm, and number of centres.
_Centers = tuple[float, float, int]


def _tied_lattices(axis: int, arrays: Sequence[tuple[Window, Lattice]], smallest: float) -> _Ties:
    """Return step and one centre of each lattice of ``arrays`` that has the voxel size of its window, coarsest first.

    Of lattices with equal steps only the first of ``arrays`` is returned.

    Args:
        axis: 0, 1 or 2.
        arrays: the arrays, with the window that each is read by.
        smallest: extent of the smallest patch, nm; no step is longer.
    """
    tied = [
        (lattice.step[axis], lattice.box.lower[axis] + w.extent[axis] / 2)
        for w, lattice in arrays
        if lattice.turn is None
        and abs(lattice.step[axis] / w.scale[axis] - 1) * w.shape[axis] < LATTICE_TOLERANCE
        and lattice.step[axis] < smallest * (1 + LATTICE_TOLERANCE)
    ]
    distinct: _Ties = []
    while tied:
        coarsest = max(step for step, _ in tied)
        # The same voxel size may be stored with different float noise, hence the tolerance.
        equal = [tie for tie in tied if tie[0] > coarsest * (1 - LATTICE_TOLERANCE)]
        distinct.append(equal[0])
        tied = [tie for tie in tied if tie not in equal]
    return distinct


def _inside(low: float, high: float, tie: tuple[float, float], beyond: bool) -> _Centers:
    """Return the centres of a lattice from ``low`` to ``high``, nm; with ``beyond`` one more unless the last is there.

    Where the lattice has none, it is the middle.
    """
    s, anchor = tie
    # Centres are anchor + k * s for whole numbers k.
    k_low = math.ceil((low - anchor) / s - LATTICE_TOLERANCE)
    k_high = math.floor((high - anchor) / s + LATTICE_TOLERANCE)
    if beyond:
        k_high = math.ceil((high - anchor) / s - LATTICE_TOLERANCE)
    if k_high < k_low:
        return (low + high) / 2, s, 1
    return anchor + k_low * s, s, k_high - k_low + 1


def _holding(low: float, high: float, ties: _Ties) -> _Centers:
    """Return the centres from ``low`` to ``high``, nm, of the first lattice that has any; the last one has."""
    low, high = min(low, high), max(low, high)
    for s, anchor in ties:
        if math.ceil((low - anchor) / s - LATTICE_TOLERANCE) <= math.floor((high - anchor) / s + LATTICE_TOLERANCE):
            return _inside(low, high, (s, anchor), False)
    return _inside(low, high, ties[-1], False)


def _covering(low: float, high: float, ties: _Ties, voxels: Sequence[float], smallest: float) -> _Centers:
    """Return centres that cover a range: the first is at most ``low``, the last at least ``high``, nm.

    Args:
        low: centre of a patch at the lower edge of the box.
        high: that of one at its upper edge.
        ties: step and one centre of each lattice, the preferred one first; the last one is that of the box.
        voxels: voxel sizes of the patches.
        smallest: extent of the smallest patch; no step is longer.
    """
    commons = [common_step(s, voxels, smallest) for s, _ in ties]
    number = next((n for n, common in enumerate(commons) if common is not None), len(ties) - 1)
    s, anchor = ties[number]
    # Without a common multiple, tiles are in steps of the largest voxel: of the others, they share parts of voxels.
    step = commons[number] or s
    first = anchor + math.floor((low - anchor) / s + LATTICE_TOLERANCE) * s
    return first, step, max(0, math.ceil((high - first) / step - LATTICE_TOLERANCE)) + 1


def common_step(base: float, voxels: Sequence[float], longest: float) -> float | None:
    """Return the smallest multiple of ``base`` that is a whole number of each of ``voxels``; None if it is too long.

    Args:
        base: nm.
        voxels: voxel sizes, nm.
        longest: longest step, nm.

    Example:
        >>> common_step(16, [8, 12], 256)
        48.0
        >>> common_step(16, [7.3], 64)
    """
    multiples = base * np.arange(1, math.floor(longest / base + LATTICE_TOLERANCE) + 1)
    ratios = multiples[:, None] / np.asarray(voxels)
    # Each of two voxel sizes may miss its whole number by the tolerance, over the length of a patch.
    drift = np.abs(ratios / np.maximum(np.rint(ratios), 1) - 1) * (longest / np.asarray(voxels))
    fits = np.flatnonzero((drift < 2 * LATTICE_TOLERANCE).all(axis=1))
    return float(multiples[fits[0]]) if len(fits) else None


def _center_range(
    axis: int, box: Box, extent: float, pad: bool, limits: Sequence[tuple[Window, Box]], label: str, slack: float
) -> tuple[float, float, bool]:
    """Return the lowest and the highest centre along an axis, nm, and whether the patch holds the box there.

    Raises:
        CellMapValueError: the patch is larger than a box that must hold it.
    """
    name = f"{label}: " if label else ""
    low, high = box.lower[axis] + extent / 2, box.upper[axis] - extent / 2
    holds = high < low - slack
    if holds and not pad:
        raise CellMapValueError(
            f"{name}the patch is {extent:g} nm long along {AXES[axis]} but the box that must hold it is only "
            f"{box.extent[axis]:g} nm ({box}); use a smaller patch, or pad=True"
        )
    if holds:
        low, high = high, low
    for w, limit in limits:
        low = max(low, limit.lower[axis] + w.extent[axis] / 2)
        high = min(high, limit.upper[axis] - w.extent[axis] / 2)
    if high < low - slack:
        raise CellMapValueError(
            f"{name}no position for the patch along {AXES[axis]}: an input of "
            f"{max(w.extent[axis] for w, _ in limits):g} nm extends beyond its volume at every position; "
            "use a smaller patch, or pad=True"
        )
    return low, high, holds
