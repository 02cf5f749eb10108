"""Patches of one array at the positions of a crop: copied where they are boxes of it, evaluated where they are not.

An array whose voxels do not lie where patches ask for them (a step of 2.62 nm, patches of 8 nm) is evaluated once on
the lattice of the patches, anchored at the first position, and kept: patches are boxes of that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.region import Region
from cellmap_lightning.geometry.lattice import (
    LATTICE_TOLERANCE,
    AffineMap,
    Box,
    FloatArray,
    Lattice,
    Shape,
    box_map,
    patch_map,
    to_vector,
)
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import AnyArray, Slices, copy_slices, slices

#: Where a patch lies: its map to the lattice of an array.
MapTo = Callable[[Lattice], AffineMap]
#: Voxels along an axis of a block that is evaluated at a time.
BLOCK = 64


class Patches:
    """Patches of one array at the positions of a crop.

    Args:
        region: the stored voxels.
        lattice: where they are.
        window: shape and scale of a patch, along its own axes.
        placement: the positions.
        source: what is stored, for patches that are no box.
        plane: how the patch's own axes lie in the volume; None where they are its axes.
        computed: patches are never boxes of the region.
    """

    def __init__(
        self,
        region: Region,
        lattice: Lattice,
        window: Window,
        placement: Placement,
        source: "Source",
        plane: FloatArray | None = None,
        computed: bool = False,
    ) -> None:
        self.region, self.lattice, self.window, self.placement = region, lattice, window, placement
        self.source = source
        ratio = placement.step / lattice.step
        whole = np.rint(ratio)
        fits = np.abs(ratio - whole) * np.maximum(np.subtract(placement.counts, 1), 1) < LATTICE_TOLERANCE
        fits |= np.equal(placement.counts, 1)
        #: Voxels from one position to the next; None where that is no whole number.
        self._steps = tuple(int(n) for n in whole) if fits.all() and not computed else None
        self._cuts: dict[bytes | None, Slices | None] = {}
        self.sliced = self.cut(plane) is not None

    def cut(self, turn: FloatArray | None) -> Slices | None:
        """The box of the patch at the first position, or None where it is none. Worked out once for each turn."""
        if self._steps is None:
            return None
        key = None if turn is None else turn.tobytes()
        if key not in self._cuts:
            amap = patch_map(self.placement.first, self.window.shape, self.window.scale, self.lattice, turn)
            found = slices(amap)
            if found is None:
                return None  # there are as many of these as samples
            self._cuts[key] = found
        return self._cuts[key]

    def start(self, cut: Slices, place: tuple[int, int, int]) -> tuple[int, int, int]:
        """First voxel of the box at a place of the placement's grid."""
        assert self._steps is not None
        (a, b, c), (i, j, k), (z, y, x) = cut.start, self._steps, place
        return a + i * z, b + j * y, c + k * x

    def missing(self, place: tuple[int, int, int], turn: FloatArray | None) -> list[Shape] | None:
        """The chunks that must be filled before a patch is a mere copy; None where it never is."""
        cut = self.cut(turn)
        if cut is None:
            return None
        start = self.start(cut, place)
        shape = cut.shape(self.window.shape)
        lo = [max(a, 0) for a in start]
        hi = [min(a + n, m) for a, n, m in zip(start, shape, self.region.shape, strict=True)]
        if any(a >= b for a, b in zip(lo, hi, strict=True)):
            return []
        return self.region.missing((lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2]))

    def read_into(self, place: tuple[int, int, int], out: AnyArray, turn: FloatArray | None, fill: float) -> None:
        """Write the patch at a place of the placement's grid to ``out``.

        Args:
            place: along z, y, x.
            out: ``[z, y, x, ...]``, the window's shape.
            turn: see `geometry.patch_map`.
            fill: value of the voxels outside the array.
        """
        cut = self.cut(turn)
        if cut is None:
            center = self.placement.first + self.placement.step * place
            self.source.evaluate(partial(patch_map, center, self.window.shape, self.window.scale, turn=turn), out, fill)
        else:
            copy_slices(self.region, cut, self.start(cut, place), out, fill)


def reached(
    placement: Placement, window: Window, lattice: Lattice, turned: bool, roaming: bool
) -> tuple[list[int], list[int]]:
    """Corners, in voxels of an array, of all that the patches of a crop can touch.

    Args:
        placement: the positions.
        window: a patch, along the axes of the volume.
        lattice: the array.
        turned: the axes of patches may be exchanged.
        roaming: patches may be turned by any angle, or are computed.
    """
    half = window.extent / 2
    if roaming:
        half = np.full(3, float(np.linalg.norm(half)))
    elif turned:
        half = np.full(3, half.max())
    box = placement.centers
    lower = (np.subtract(box.lower, half) - lattice.box.lower) / lattice.step
    upper = (np.add(box.upper, half) - lattice.box.lower) / lattice.step
    # Neighbours that an interpolant needs, where it is one.
    exact = np.abs(lower - np.rint(lower)) < LATTICE_TOLERANCE
    more = np.where(exact & (not roaming), 0, 2 + np.ceil(window.scale.max() / np.asarray(lattice.step)))
    lo = np.floor(lower + LATTICE_TOLERANCE) - more
    hi = np.ceil(upper - LATTICE_TOLERANCE) + more
    return lo.astype(int).tolist(), hi.astype(int).tolist()


class Source(Protocol):
    """What is stored, however it is put together."""

    @property
    def lattices(self) -> list[Lattice]:
        """Where its voxels are."""

    def evaluate(self, where: "MapTo", out: AnyArray, fill: float) -> None:
        """Write a patch, straight from what is stored."""

    def stamp(self, box: Box) -> int:
        """A number that changes when what is stored in a physical box does."""

    def identity(self) -> tuple[object, ...]:
        """What its voxels follow from."""


class Resampled:
    """An array on the lattice of the patches, evaluated block by block when it is needed.

    Args:
        source: what is stored.
        limits: its physical box: no voxel has its centre outside it.
        window: a patch, along the axes of the volume.
        placement: the positions.
        dtype: type of a voxel, or of its bytes.
        depth: bytes of a voxel; 0 for one value of the type.
        cache: where blocks are kept that have no other place.
        name: what people call it.
    """

    def __init__(
        self,
        source: Source,
        limits: Box,
        window: Window,
        placement: Placement,
        dtype: np.dtype[Any],
        depth: int,
        cache: ChunkCache,
        name: str = "",
    ) -> None:
        self.source = source
        anchor = placement.first - window.extent / 2
        # The first and the last voxel whose centre is inside, counted from the anchor.
        lower = np.subtract(limits.lower, anchor) / window.scale - 0.5
        upper = np.subtract(limits.upper, anchor) / window.scale - 0.5
        first, last = np.ceil(lower - LATTICE_TOLERANCE), np.floor(upper + LATTICE_TOLERANCE)
        self._empty = bool((last < first).any())
        z, y, x = (int(n) for n in np.maximum(last - first + 1, 1))
        origin = anchor + (first + 0.5) * window.scale
        self.lattice = Lattice(to_vector(origin), to_vector(window.scale), (z, y, x))
        blocks = (min(BLOCK, z), min(BLOCK, y), min(BLOCK, x))
        self.region = Region(
            (z, y, x), blocks, dtype, self._decode, cache, self, depth, self._stamp, self._identity,
            f"{name}, resampled",
        )  # fmt: skip

    def patches(self, window: Window, placement: Placement, plane: FloatArray | None) -> Patches:
        """Its patches; see `Patches`."""
        return Patches(self.region, self.lattice, window, placement, self.source, plane, computed=self._empty)

    def _box(self, start: tuple[int, int, int], shape: Shape) -> Box:
        low = self.lattice.box.lower + np.multiply(start, self.lattice.step)
        return Box(to_vector(low), to_vector(low + np.multiply(shape, self.lattice.step)))

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        depth = self.region.depth
        out = np.zeros((*shape, depth) if depth else shape, self.region.dtype)
        self.source.evaluate(partial(box_map, self.lattice, start, shape), out, 0)
        return out

    def _stamp(self, start: tuple[int, int, int], shape: Shape) -> int:
        return self.source.stamp(self._box(start, shape))

    def _identity(self) -> tuple[object, ...]:
        # The number counts the ways in which they were ever evaluated: what others left behind is not mixed in.
        return "resampled", 2, self.lattice, *self.source.lattices, self.source.identity()


def stored_box(lattice: Lattice, box: Box, more: int) -> tuple[tuple[int, int, int], Shape] | None:
    """Start and shape, in voxels of an array, of what a physical box and some voxels around it hold of it."""
    lower = np.floor((np.asarray(box.lower) - lattice.box.lower) / lattice.step).astype(int) - more
    upper = np.ceil((np.asarray(box.upper) - lattice.box.lower) / lattice.step).astype(int) + more
    lo, hi = np.maximum(lower, 0).tolist(), np.minimum(upper, lattice.shape).tolist()
    if any(a >= b for a, b in zip(lo, hi, strict=True)):
        return None
    return (lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2])
