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

        Args:
            box: what is annotated, or the whole volume; nm.
            windows: patches that must lie in it.
            arrays: every array that is read, with the window that it is read by.
            pad: allow boxes smaller than a window.
            label: name of the box, for messages.
            limits: further boxes; each must contain its window at every position (raw volumes).
            cover: only the smallest of ``windows`` must lie inside, so that it reaches the edges.

        Raises:
            CellMapValueError: a window is larger than its box and ``pad`` is off.
        """
        first, step, counts, strides, held = [], [], [], [], []
        for axis in range(3):
            smallest = min(float(w.extent[axis]) for w in windows)
            extent = smallest if cover else max(float(w.extent[axis]) for w in windows)
            s, anchor = _voxel_step(axis, windows, arrays, smallest)
            low, high, holds = _center_range(axis, box, extent, pad, limits, label, s * LATTICE_TOLERANCE)
            tied = anchor is not None
            anchor = box.lower[axis] + extent / 2 if anchor is None else anchor
            # Centres are anchor + k * s for whole numbers k.
            k_low = math.ceil((low - anchor) / s - LATTICE_TOLERANCE)
            k_high = math.floor((high - anchor) / s + LATTICE_TOLERANCE)
            if pad and not tied and not holds:  # the last patch may extend less than a voxel beyond the box
                k_high = math.ceil((high - anchor) / s - LATTICE_TOLERANCE)
            if k_high < k_low:  # no position on the lattice lets the patch in: it is centred in its range
                anchor, k_low, k_high = (low + high) / 2, 0, 0
            first.append(anchor + k_low * s)
            step.append(s)
            counts.append(k_high - k_low + 1)
            strides.append(max(1, math.floor(smallest / s + LATTICE_TOLERANCE)))
            held.append(holds and smallest >= box.extent[axis] - s * LATTICE_TOLERANCE)
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


def _voxel_step(
    axis: int, windows: Sequence[Window], arrays: Sequence[tuple[Window, Lattice]], smallest: float
) -> tuple[float, float | None]:
    """Return the distance of neighbouring centres, and one centre on the lattice; None for it where none has the scale.

    The lattice is the coarsest of ``arrays`` that has the voxel size of its window, the first of equals.

    Args:
        axis: 0, 1 or 2.
        windows: shapes and resolutions of the patches.
        arrays: the arrays, with the window that each is read by.
        smallest: extent of the smallest window, nm; the step is not longer.
    """
    tied = [
        (lattice.step[axis], lattice.box.lower[axis] + w.extent[axis] / 2)
        for w, lattice in arrays
        if lattice.turn is None
        and abs(lattice.step[axis] / w.scale[axis] - 1) * w.shape[axis] < LATTICE_TOLERANCE
        and lattice.step[axis] < smallest * (1 + LATTICE_TOLERANCE)
    ]
    if not tied:
        return min(smallest, max(float(w.scale[axis]) for w in windows)), None
    coarsest = max(step for step, _ in tied)
    # The same voxel size may be stored with different float noise, hence the tolerance.
    return next((step, anchor) for step, anchor in tied if step > coarsest * (1 - LATTICE_TOLERANCE))


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
