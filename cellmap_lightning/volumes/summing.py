"""One block of a prediction while its patches come in.

What a voxel becomes follows from the patches that cover it, in the order z, y, x, and from nothing else: it has the
same bits in every block that it may lie in.
"""

import math
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.volumes.behind import Behind
from cellmap_lightning.volumes.blending import Part, Tiling
from cellmap_lightning.volumes.geometry import Shape
from cellmap_lightning.volumes.values import Floats, StoredValues

Box = tuple[slice, slice, slice]
#: Tasks of the writing thread that may be under way when finished planes are given to it, those too.
_WAITING = 2


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

    def end(self) -> None:
        """There are no more patches."""


class PatchSum:
    """The patches of a block that overlap: their weighted mean.

    Patches come in the order z, y, x, so that planes are finished one after the other. Only as many as a patch has are
    summed at a time; those that are finished are divided, and put into the block, behind the owner's back.

    Args:
        start: the block's first voxel.
        shape: its voxels.
        channels: channels of a patch.
        tiling: the patches.
        weights: ``tiling.weights()``.
        block: where its voxels go.
        memory: where planes take memory from.
        behind: the thread that divides them.
    """

    def __init__(
        self,
        start: Shape,
        shape: Shape,
        channels: int,
        tiling: Tiling,
        weights: Floats,
        block: StoredBlock | MeanBlock,
        memory: BlockMemory,
        behind: Behind,
    ) -> None:
        self.start, self.shape, self.tiling, self.weights, self.block = start, shape, tiling, weights, block
        self._memory, self._behind = memory, behind
        self._planes = (channels, min(tiling.patch[0], shape[0]), *shape[1:])
        self._first = 0
        self._sum = self._new()
        self._sum.fill(0)
        self._weighted = None if tiling.blend == "average" else np.empty_like(weights)

    @staticmethod
    def nbytes(shape: Shape, channels: int, tiling: Tiling) -> int:
        """Bytes of the planes of a block that are held at most, and of the sums of weights."""
        planes = min(tiling.patch[0], shape[0]) * shape[1] * shape[2]
        return planes * (channels * tiling.precision.itemsize * (1 + _WAITING) + np.dtype(np.float32).itemsize)

    def _new(self) -> npt.NDArray[Any]:
        return self._memory.take(self._planes, self.tiling.precision)

    def add(self, part: Part, values: Floats) -> None:
        """Add what counts of a patch, ``[C, z, y, x]``.

        Raises:
            CellMapValueError: of planes before, see `StoredValues.store`.
        """
        here, there = _boxes(part, self.start)
        if here[0].start > self._first:
            self._advance(here[0].start)
        at = (slice(here[0].start - self._first, here[0].stop - self._first), *here[1:])
        for total, value in zip(self._sum, values, strict=True):
            if self._weighted is None:  # the weights are 1
                total[at] += value[there]
            else:
                total[at] += np.multiply(value[there], self.weights[there], out=self._weighted[there])

    def _advance(self, first: int) -> None:
        """The planes before ``first`` are finished."""
        self._behind.room(_WAITING)  # before there are more planes
        done, count = self._sum, first - self._first
        left = max(0, self._planes[1] - count)
        self._sum = self._new()
        self._sum[:, :left] = done[:, self._planes[1] - left :]
        self._sum[:, left:] = 0
        self._give(done, count)
        self._first = first

    def end(self) -> None:
        """There are no more patches: give the last planes.

        Raises:
            CellMapValueError: of planes before, see `StoredValues.store`.
        """
        self._give(self._sum, self.shape[0] - self._first)

    def _give(self, planes: npt.NDArray[Any], count: int) -> None:
        first = self._first

        def finish() -> None:
            found = planes[:, :count]
            for z in range(count):
                found[:, z] /= self._weight(first + z)
            self.block.put(
                (slice(first, first + count), slice(None), slice(None)), found.astype(np.float32, copy=False)
            )
            self._memory.give_back(planes)

        self._behind.give(finish, _WAITING)

    @cached_property
    def _along(self) -> list[list[tuple[int, int, int]]]:
        ends = np.add(self.start, self.shape).tolist()
        return [self.tiling.along(axis, a, b) for axis, (a, b) in enumerate(zip(self.start, ends, strict=True))]

    @cached_property
    def _plane_weights(self) -> Floats:
        """The weights of all patches that begin at one plane, summed along y and x: ``[plane of a patch, y, x]``.

        The sum over the patches along z, y and x is three sums, one after the other, whatever the weights.
        """
        rows = np.zeros((*self.weights.shape[:2], self.shape[2]), np.float32)
        for start, lo, hi in self._along[2]:
            rows[:, :, lo - self.start[2] : hi - self.start[2]] += self.weights[:, :, lo - start : hi - start]
        planes = np.zeros((len(rows), *self.shape[1:]), np.float32)
        for start, lo, hi in self._along[1]:
            planes[:, lo - self.start[1] : hi - self.start[1]] += rows[:, lo - start : hi - start]
        return planes

    def _weight(self, z: int) -> Floats:
        """The sum of the weights of all patches in a plane of the block, ``[y, x]``."""
        z += self.start[0]
        found: list[Floats] = [self._plane_weights[z - start] for start, lo, hi in self._along[0] if lo <= z < hi]
        total = found[0]
        for weight in found[1:]:
            total = total + weight
        return total


def _boxes(part: Part, block: Shape) -> tuple[Box, Box]:
    """Where what counts of a patch is in a block that starts at ``block``, and in the patch."""
    z, y, x = (slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, block, strict=True))
    i, j, k = (slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, part.start, strict=True))
    return (z, y, x), (i, j, k)
