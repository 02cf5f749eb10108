"""Blocks of a prediction while their patches come in.

What a voxel becomes follows from the patches that cover it, in the order z, y, x, and from nothing else: it has the
same bits in every block that it may lie in.
"""

import math
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.prediction.blending import Part, Tiling
from cellmap_lightning.prediction.quantize import PUT_VOXELS, Floats, StoredValues

Box = tuple[slice, slice, slice]


class BlockMemory:
    """Memory of blocks: what one leaves is used for the next, as new memory costs more than to add a patch in it."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array whose values are not set. Any thread may take one."""
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            flat = self._free.pop()
        except IndexError:
            flat = np.empty(0, np.uint8)
        if flat.nbytes < nbytes:  # which is then given up for a larger one
            flat = np.empty(nbytes, np.uint8)
        return flat[:nbytes].view(dtype).reshape(shape)

    def give_back(self, array: npt.NDArray[Any]) -> None:
        """Take back what was taken; nobody may look at it afterwards."""
        assert array.base is not None
        self._free.append(array.base)


class StoredBlock:
    """A block of which each voxel is stored as soon as it is known.

    Args:
        shape: its voxels.
        channels: its channels.
        values: how they are stored.
        memory: where it takes memory from, until `release`.
        where: what it is called in an error.
    """

    def __init__(self, shape: Shape, channels: int, values: StoredValues, memory: BlockMemory, where: str) -> None:
        self._values, self._memory, self._where = values, memory, where
        self._stored = memory.take((channels, *shape), values.dtype)
        self._reached = [0] * channels

    def put(self, box: Box, values: Floats) -> None:
        """Store voxels, ``[C, z, y, x]``; each of them once.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        stored = self._stored[:, *box]
        self._values.store(values, stored, self._where)
        if self._values.least is None:
            found = self._values.reached(stored, values)
            self._reached = [a + b for a, b in zip(self._reached, found, strict=True)]

    def finish(self) -> tuple[npt.NDArray[Any], list[int]]:
        """The block as it is stored, and how many voxels of each channel reach the threshold."""
        if self._values.least is not None:
            self._reached = self._values.reached(self._stored)
        return self._stored, self._reached

    def release(self) -> None:
        """Give the memory back: the block is not looked at any more."""
        self._memory.give_back(self._stored)


class MeanBlock:
    """A block that is the mean over several tilings, each of which puts each voxel once.

    Args:
        shape: its voxels.
        channels: its channels.
        tilings: how many.
        values: how they are stored.
        memory: where it takes memory from, until `release`.
        where: what it is called in an error.
    """

    def __init__(
        self, shape: Shape, channels: int, tilings: int, values: StoredValues, memory: BlockMemory, where: str
    ) -> None:
        self._tilings, self._values, self._memory, self._where = tilings, values, memory, where
        self._total: Floats = memory.take((channels, *shape), np.dtype(np.float32))
        self._total.fill(0)

    def put(self, box: Box, values: Floats) -> None:
        """Add what one tiling gives for some voxels, ``[C, z, y, x]``."""
        self._total[:, *box] += values

    def finish(self) -> tuple[npt.NDArray[Any], list[int]]:
        """The block as it is stored, and how many voxels of each channel reach the threshold.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        self._total /= np.float32(self._tilings)
        stored = np.empty(self._total.shape, self._values.dtype)
        self._values.store(self._total, stored, self._where)
        return stored, self._values.reached(stored, self._total)

    def release(self) -> None:
        """Give the memory back."""
        self._memory.give_back(self._total)


class PatchCopy:
    """The patches of a block that share it out, as with ``trim``.

    Args:
        start: the block's first voxel.
        block: where its voxels go.
    """

    def __init__(self, start: Shape, block: StoredBlock | MeanBlock) -> None:
        self.start, self.block = start, block

    def add(self, part: Part, values: Floats) -> None:
        """Put what counts of a patch, ``[C, z, y, x]``, into the block."""
        here, there = _boxes(part, self.start)
        self.block.put(here, values[:, *there])


class PatchSum:
    """Patches that overlap: their weighted mean, for one block or for several below each other.

    Patches come in the order z, y, x, so that planes are finished one after the other. Only as many as a patch has are
    held; those that are finished are divided, and put into the block that they belong to.

    Args:
        start: the first voxel.
        shape: the voxels, of all blocks that may come.
        channels: channels of a patch.
        tiling: the patches.
        weights: ``tiling.weights()``.
        memory: where planes take memory from, until `release`.
    """

    def __init__(
        self, start: Shape, shape: Shape, channels: int, tiling: Tiling, weights: Floats, memory: BlockMemory
    ) -> None:
        self.start, self.shape, self.tiling, self.weights = start, shape, tiling, weights
        self._memory = memory
        self._depth = min(tiling.patch[0], shape[0])
        # Plane z is held at z modulo their number.
        self._sum: npt.NDArray[Any] = memory.take((channels, self._depth, *shape[1:]), tiling.precision)
        self._sum.fill(0)
        self._weighted = None if tiling.blend == "average" else np.empty_like(weights)
        self._together = max(1, PUT_VOXELS // math.prod(shape[1:]))
        self._done = self._end = 0
        self._layers: tuple[int, ...] | None = None
        self._weight_planes = np.empty((2, *shape[1:]), np.float32)

    @staticmethod
    def nbytes(shape: Shape, channels: int, tiling: Tiling) -> int:
        """Bytes of the planes that are held, of the weights and their sums, and of planes that are rounded."""
        plane, patch = shape[1] * shape[2], math.prod(tiling.patch)
        sums = channels * min(tiling.patch[0], shape[0]) * plane * tiling.precision.itemsize
        single = tiling.precision == np.float32
        rounded = 0 if single else channels * max(plane, min(PUT_VOXELS, math.prod(shape)))
        # With equal weights rows of one plane are enough, and nothing is multiplied with them.
        planes, patches = (1, 1) if tiling.blend == "average" else (tiling.patch[0], 2)
        weights = 2 * plane + planes * tiling.patch[1] * shape[2] + patches * patch
        return sums + (weights + rounded) * np.dtype(np.float32).itemsize

    def into(self, block: StoredBlock | MeanBlock, planes: int) -> None:
        """The next planes are those of a block."""
        self._block, self._origin, self._end = block, self._done, self._done + planes

    def add(self, part: Part, values: Floats) -> None:
        """Add what counts of a patch, ``[C, z, y, x]``.

        Raises:
            CellMapValueError: of planes that are finished, see `StoredValues.store`.
        """
        here, there = _boxes(part, self.start)
        self._finish(here[0].start)
        first = self._done  # of a patch that begins above, the rest
        while first < here[0].stop:
            slot = first % self._depth
            end = min(here[0].stop, first + self._depth - slot)
            at = (slice(slot, slot + end - first), *here[1:])
            z = there[0].start - here[0].start
            patch = (slice(first + z, end + z), *there[1:])
            for total, value in zip(self._sum, values, strict=True):
                if self._weighted is None:  # the weights are 1
                    total[at] += value[patch]
                else:
                    total[at] += np.multiply(value[patch], self.weights[patch], out=self._weighted[patch])
            first = end

    def end(self) -> None:
        """The block has no more patches.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        self._finish(self._end)

    def release(self) -> None:
        """Give the memory back."""
        self._memory.give_back(self._sum)

    def _finish(self, end: int) -> None:
        """The planes before ``end`` are finished: while they are in the processor's cache, do all that is left."""
        while self._done < end:
            slot = self._done % self._depth
            count = min(self._together, end - self._done, self._depth - slot)
            planes = self._sum[:, slot : slot + count]
            for z in range(count):
                planes[:, z] /= self._weight(self._done + z)
            first = self._done - self._origin
            box = (slice(first, first + count), slice(None), slice(None))
            self._block.put(box, planes.astype(np.float32, copy=False))
            planes.fill(0)
            self._done += count

    @cached_property
    def _along(self) -> list[list[tuple[int, int, int]]]:
        ends = np.add(self.start, self.shape).tolist()
        return [self.tiling.along(axis, a, b) for axis, (a, b) in enumerate(zip(self.start, ends, strict=True))]

    @cached_property
    def _rows(self) -> Floats:
        """The weights of a row of patches side by side along x: ``[plane of a patch, y of a patch, x]``."""
        # With equal weights the planes of a patch are the same.
        weights = self.weights[:1] if self._weighted is None else self.weights
        rows = np.zeros((*weights.shape[:2], self.shape[2]), np.float32)
        for start, lo, hi in self._along[2]:
            rows[:, :, lo - self.start[2] : hi - self.start[2]] += weights[:, :, lo - start : hi - start]
        return rows

    def _weight(self, z: int) -> Floats:
        """The sum of the weights of all patches in a plane, ``[y, x]``; good until it is asked for another plane."""
        z += self.start[0]
        layers = tuple(z - start if len(self._rows) > 1 else 0 for start, lo, hi in self._along[0] if lo <= z < hi)
        if layers != self._layers:
            self._layers = layers
            total, layer = self._weight_planes
            total.fill(0)
            for plane in layers:
                layer.fill(0)
                for start, lo, hi in self._along[1]:
                    layer[lo - self.start[1] : hi - self.start[1]] += self._rows[plane, lo - start : hi - start]
                total += layer
        found: Floats = self._weight_planes[0]
        return found


def _boxes(part: Part, block: Shape) -> tuple[Box, Box]:
    """Where what counts of a patch is in a block that starts at ``block``, and in the patch."""
    z, y, x = (slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, block, strict=True))
    i, j, k = (slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, part.start, strict=True))
    return (z, y, x), (i, j, k)
