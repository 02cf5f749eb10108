"""Where patches may lie: the centres of a crop, on the lattice of its arrays."""

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
    """

    def __init__(self, shape: Sequence[int], scale: Sequence[float]) -> None:
        if len(shape) != 3 or any(not math.isfinite(n) or int(n) != n or n < 1 for n in shape):
            raise CellMapValueError(f"a shape is three positive whole numbers of voxels (z, y, x), got {list(shape)}")
        if len(scale) != 3 or not all(math.isfinite(s) and s > 0 for s in scale):
            raise CellMapValueError(f"a scale is three positive numbers of nm (z, y, x), got {list(scale)}")
        z, y, x = (int(n) for n in shape)
        self.shape: Shape = (z, y, x)
        self.scale: FloatArray = np.asarray(scale, dtype=np.float64)

    @property
    def extent(self) -> FloatArray:
        """Edge lengths, nm."""
        return self.scale * self.shape


@dataclass(frozen=True, eq=False)
class Placement:
    """The centres that patches may have: a grid, counted in the order z, y, x.

    Attributes:
        first: lowest centre, nm.
        step: distance of neighbouring centres, nm.
        counts: centres along z, y, x.
        stride: positions from one tile to the next that touches it, per axis.
        held: per axis, whether every patch is larger than the crop and holds it.
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
        """Positions at which ``windows``, all around one centre, lie inside ``box``.

        Along an axis on which ``box`` is smaller than a window, and with ``pad``, they are the positions at which the
        window holds the box. Centres are such that patches fall on the voxels of the coarsest of ``arrays`` that has
        the window's voxel size, the first of equals. Along an axis where none has, they are anchored at the box's lower
        edge, in steps of a voxel of the coarsest of ``windows``: all patches of a crop are then slices of one resampled
        array. With ``pad`` the last of them may end less than a voxel beyond the box. No step is longer than the
        smallest of ``windows``, so that tiles leave no gap.

        Args:
            box: what is annotated, or the whole volume; nm.
            windows: what must lie in it.
            arrays: every array that is read, with the window it is read by.
            pad: allow boxes smaller than a window.
            label: what messages call the box.
            limits: further boxes that hold windows at every position (raw volumes that must not be left).
            cover: positions at which the smallest of ``windows`` lies inside, so that it reaches the edges; the others
                may stick out.

        Raises:
            CellMapValueError: a window is larger than its box and ``pad`` is off.
        """
        name = f"{label}: " if label else ""
        first, step, counts, strides, held = [], [], [], [], []
        for axis in range(3):
            smallest = min(float(w.extent[axis]) for w in windows)
            extent = smallest if cover else max(float(w.extent[axis]) for w in windows)
            tied = [
                (lattice.step[axis], lattice.box.lower[axis] + w.extent[axis] / 2)
                for w, lattice in arrays
                if abs(lattice.step[axis] / w.scale[axis] - 1) * w.shape[axis] < LATTICE_TOLERANCE
                and lattice.step[axis] < smallest * (1 + LATTICE_TOLERANCE)
            ]
            s = max((lattice_step for lattice_step, _ in tied), default=0.0)
            # The same voxel size may be stored with different float noise, hence the tolerance.
            s, c0 = next(
                (t for t in tied if t[0] > s * (1 - LATTICE_TOLERANCE)),
                (min(smallest, max(float(w.scale[axis]) for w in windows)), math.nan),
            )
            slack = s * LATTICE_TOLERANCE
            lo, hi = box.lower[axis] + extent / 2, box.upper[axis] - extent / 2
            holds = hi < lo - slack
            if holds and not pad:
                raise CellMapValueError(
                    f"{name}the patch is {extent:g} nm long along {AXES[axis]} and what it must lie in is only "
                    f"{box.extent[axis]:g} nm ({box}); use a smaller patch, or pad=True"
                )
            if holds:
                lo, hi = hi, lo
            for w, limit in limits:
                lo = max(lo, limit.lower[axis] + w.extent[axis] / 2)
                hi = min(hi, limit.upper[axis] - w.extent[axis] / 2)
            if hi < lo - slack:
                raise CellMapValueError(
                    f"{name}no place for the patch along {AXES[axis]}: an input of "
                    f"{max(w.extent[axis] for w, _ in limits):g} nm leaves its volume everywhere; "
                    "use a smaller patch, or pad=True"
                )
            if not tied:
                c0 = box.lower[axis] + extent / 2
            k_lo, k_hi = math.ceil((lo - c0) / s - LATTICE_TOLERANCE), math.floor((hi - c0) / s + LATTICE_TOLERANCE)
            if pad and not tied and not holds:  # the last patch may stick out by less than a voxel, to reach the end
                k_hi = math.ceil((hi - c0) / s - LATTICE_TOLERANCE)
            if k_hi < k_lo:  # no voxel edge of the coarsest array lets the patch in: it lies where the box says
                c0, k_lo, k_hi = (lo + hi) / 2, 0, 0
            first.append(c0 + k_lo * s)
            step.append(s)
            counts.append(k_hi - k_lo + 1)
            strides.append(max(1, math.floor(smallest / s + LATTICE_TOLERANCE)))
            held.append(holds and smallest >= box.extent[axis] - slack)
        return cls(
            np.asarray(first), np.asarray(step), (counts[0], counts[1], counts[2]),
            (strides[0], strides[1], strides[2]), (held[0], held[1], held[2]),
        )  # fmt: skip

    def __len__(self) -> int:
        return math.prod(self.counts)

    def place(self, index: int) -> tuple[int, int, int]:
        """Where position ``index`` is in the grid (z, y, x)."""
        rest, x = divmod(index, self.counts[2])
        z, y = divmod(rest, self.counts[1])
        return z, y, x

    def center(self, index: int) -> FloatArray:
        """Centre of position ``index`` in nm (z, y, x)."""
        return self.first + self.step * self.place(index)

    def index(self, place: Sequence[int]) -> int:
        """Position at a place of the grid (z, y, x)."""
        return (int(place[0]) * self.counts[1] + int(place[1])) * self.counts[2] + int(place[2])

    @property
    def centers(self) -> Box:
        """The box from the lowest to the highest centre, nm."""
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
        """Position of one of the patches that together cover the box, in the order z, y, x.

        The last along an axis overlaps the one before it where they do not divide.
        """
        return self.index([self._along(axis, at) for axis, at in enumerate(self._tile_place(number))])

    def advance(self, number: int) -> FloatArray:
        """How far a tile lies beyond the one before it along z, y and x, nm; infinite where it is the first.

        What of it the one before covers too is then known for arrays of any shape and scale: along an axis tiles come
        in the order of their places, and a longer patch that reaches back over several of them ends before the next.
        """
        steps = [
            self._along(axis, at) - self._along(axis, at - 1) if at else math.inf
            for axis, at in enumerate(self._tile_place(number))
        ]
        return np.asarray(steps) * self.step

    def tiles_at(self, axis: int, points: FloatArray, extent: float) -> npt.NDArray[np.int64]:
        """Along one axis, the first tile that covers each point; the nearest one for points that none covers.

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
        """Where a tile is in the grid of tiles (z, y, x)."""
        rest, x = divmod(number, self.tiles_along[2])
        z, y = divmod(rest, self.tiles_along[1])
        return z, y, x

    def _along(self, axis: int, at: int) -> int:
        """Place of a tile in the grid of positions, along one axis."""
        return self.counts[axis] // 2 if self.held[axis] else min(at * self.stride[axis], self.counts[axis] - 1)
