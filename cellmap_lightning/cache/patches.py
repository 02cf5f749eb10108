"""Patches of one array at the positions of a crop: sliced if aligned to the array's grid, resampled otherwise.

An array whose voxels are not aligned with the patches (a step of 2.62 nm, patches of 8 nm) is resampled once to the
lattice of the patches, anchored at the first position, and cached: patches are slices of the resampled array.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.region import Region
from cellmap_lightning.geometry.lattice import (
    LATTICE_TOLERANCE,
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
from cellmap_lightning.geometry.sample_map import VoxelMap, Warp, sample_map

#: Function from the lattice of an array to the map from a patch's voxels to it.
MapTo = Callable[[Lattice], VoxelMap]
#: Voxels along each axis of a block that is resampled at a time.
BLOCK = 64


class Patches:
    """Patches of one array at the positions of a crop; see docs/reliability.md.

    Args:
        region: the stored voxels.
        lattice: their lattice.
        window: shape and scale of a patch, along the patch's axes.
        placement: the positions.
        source: the stored array, for patches that are not slices.
        plane: matrix from the patch's axes to the volume's; None if they are the same.
        computed: patches are never slices of the region.

    Attributes:
        sliced: True if unrotated patches are slices of the region.
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
        #: Voxels from one position to the next; None if that is not a whole number.
        sliceable = fits.all() and not computed and lattice.turn is None
        self._steps = tuple(int(n) for n in whole) if sliceable else None
        self._cuts: dict[bytes | None, Slices | None] = {}
        self.sliced = self.cut(plane) is not None

    def cut(self, turn: FloatArray | None) -> Slices | None:
        """Return the slices of the patch at the first position, cached per turn; None if the patch is not a slice."""
        if self._steps is None:
            return None
        key = None if turn is None else turn.tobytes()
        if key not in self._cuts:
            amap = patch_map(self.placement.first, self.window.shape, self.window.scale, self.lattice, turn)
            cut = slices(amap)
            if cut is None:
                return None  # not cached: rotations by random angles never repeat
            self._cuts[key] = cut
        return self._cuts[key]

    def start(self, cut: Slices, place: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the first voxel of the slices at a place of the placement's grid."""
        assert self._steps is not None
        (a, b, c), (i, j, k), (z, y, x) = cut.start, self._steps, place
        return a + i * z, b + j * y, c + k * x

    def missing(
        self, place: tuple[int, int, int], turn: FloatArray | None, warp: Warp | None = None
    ) -> list[Shape] | None:
        """Return the chunks that must be filled before a patch is a copy; None if it never is."""
        cut = self.cut(turn) if warp is None else None
        if cut is None:
            return None
        if self.region.is_complete:
            return []
        start = self.start(cut, place)
        shape = cut.shape(self.window.shape)
        lo = [max(a, 0) for a in start]
        hi = [min(a + n, m) for a, n, m in zip(start, shape, self.region.shape, strict=True)]
        if any(a >= b for a, b in zip(lo, hi, strict=True)):
            return []
        return self.region.missing((lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2]))

    def read_into(
        self,
        place: tuple[int, int, int],
        out: AnyArray,
        turn: FloatArray | None,
        fill: float,
        warp: Warp | None = None,
    ) -> None:
        """Write the patch at a place of the placement's grid to ``out``.

        Args:
            place: along z, y, x.
            out: ``[z, y, x, ...]``, the window's shape.
            turn: see `geometry.patch_map`.
            fill: value of voxels outside the array.
            warp: the displacement along the patch's axes; None for none.
        """
        cut = self.cut(turn) if warp is None else None
        if cut is None:
            center = self.placement.first + self.placement.step * place
            where = partial(sample_map, center, self.window.shape, self.window.scale, turn=turn, warp=warp)
            self.source.evaluate(where, out, fill)
        else:
            copy_slices(self.region, cut, self.start(cut, place), out, fill)


def reached(
    placement: Placement,
    window: Window,
    lattice: Lattice,
    turned: bool,
    roaming: bool,
    extended: FloatArray | None = None,
) -> tuple[list[int], list[int]]:
    """Return the corners, in voxels of an array, of the box that the patches of a crop can touch.

    Args:
        placement: the positions.
        window: a patch, along the axes of the volume.
        lattice: the array.
        turned: axes of patches may be permuted.
        roaming: patches may be rotated by any angle, or are resampled.
        extended: half the edge lengths of the box that an unrotated patch can show, nm, where zoom, shear or
            displacements change it.
    """
    half = window.extent / 2 if extended is None else extended
    if roaming:
        half = np.full(3, float(np.linalg.norm(half)))
    elif turned:
        half = np.full(3, half.max())
    box = placement.centers
    lower, upper = lattice.span(np.subtract(box.lower, half), np.add(box.upper, half))
    # Voxels beyond the border that interpolation needs, unless patches are exact slices.
    exact = np.abs(lower - np.rint(lower)) < LATTICE_TOLERANCE
    more = np.where(
        exact & (not roaming and extended is None), 0, 2 + np.ceil(window.scale.max() / np.asarray(lattice.step))
    )
    lo = np.floor(lower + LATTICE_TOLERANCE) - more
    hi = np.ceil(upper - LATTICE_TOLERANCE) + more
    return lo.astype(int).tolist(), hi.astype(int).tolist()


class Source(Protocol):
    """A stored array, or a combination of several, that patches are evaluated from."""

    @property
    def lattices(self) -> list[Lattice]:
        """Lattices of the stored arrays."""

    def evaluate(self, where: "MapTo", out: AnyArray, fill: float) -> None:
        """Write a patch to ``out``, evaluated from the stored voxels."""

    def stamp(self, box: Box) -> int:
        """Return a number that changes when the voxels stored in a physical box do."""

    def identity(self) -> tuple[object, ...]:
        """Return everything that the voxels depend on."""


class Resampled:
    """An array resampled to the lattice of the patches, block by block on demand; see docs/reliability.md.

    Args:
        source: the stored array.
        limits: its physical box, which holds the centres of all resampled voxels.
        window: a patch, along the axes of the volume.
        placement: the positions.
        dtype: type of a voxel, or of its bytes.
        depth: bytes of a voxel; 0 for one value of the type.
        cache: cache of single blocks, used without a mapping.
        name: name in messages.
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
        # First and last voxel whose centre lies inside the limits, counted from the anchor.
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
        """Return the patches of the resampled array; see `Patches`."""
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
        # The version of the resampling: bumped when results change, so that stale caches are not reused.
        return "resampled", 2, self.lattice, *self.source.lattices, self.source.identity()


def stored_box(lattice: Lattice, box: Box, more: int) -> tuple[tuple[int, int, int], Shape] | None:
    """Return start and shape, in voxels of an array, of a physical box with a margin; None if they do not intersect.

    Args:
        lattice: lattice of the array.
        box: the box, nm.
        more: margin in voxels.
    """
    low, high = lattice.span(box.lower, box.upper)
    lower, upper = np.floor(low).astype(int) - more, np.ceil(high).astype(int) + more
    lo, hi = np.maximum(lower, 0).tolist(), np.minimum(upper, lattice.shape).tolist()
    if any(a >= b for a, b in zip(lo, hi, strict=True)):
        return None
    return (lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2])
