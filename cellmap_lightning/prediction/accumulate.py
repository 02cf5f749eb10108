"""The accumulation of patches in blocks of a prediction.

The value of a voxel depends only on the patches that cover it, which are added in the order z, y, x: it is
deterministic, with the same bits for any division into blocks.
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
    """A pool of reused memory for blocks: allocating pages costs more than adding a patch. Thread-safe.

    See docs/prediction.md.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an uninitialized array."""
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            flat = self._free.pop()
        except IndexError:
            flat = np.empty(0, np.uint8)
        if flat.nbytes < nbytes:  # replaced by a larger one
            flat = np.empty(nbytes, np.uint8)
        return flat[:nbytes].view(dtype).reshape(shape)

    def give_back(self, array: npt.NDArray[Any]) -> None:
        """Return an array to the pool; it must not be used afterwards."""
        assert array.base is not None
        self._free.append(array.base)


class StoredBlock:
    """A block whose voxels are converted to stored values at once; see docs/prediction.md.

    Args:
        shape: voxels of the block.
        channels: number of channels.
        values: the conversion to stored values.
        memory: pool of memory, used until `release`.
        where: name of the block, for messages.
    """

    def __init__(self, shape: Shape, channels: int, values: StoredValues, memory: BlockMemory, where: str) -> None:
        self._values, self._memory, self._where = values, memory, where
        self._stored = memory.take((channels, *shape), values.dtype)
        self._reached = [0] * channels

    def put(self, box: Box, values: Floats) -> None:
        """Store the values of a box, ``[C, z, y, x]``. Each voxel is stored once.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        stored = self._stored[:, *box]
        self._values.store(values, stored, self._where)
        if self._values.least is None:
            reached = self._values.reached(stored, values)
            self._reached = [a + b for a, b in zip(self._reached, reached, strict=True)]

    def finish(self) -> tuple[npt.NDArray[Any], list[int]]:
        """Return the stored values, and the number of voxels of each channel that reach the threshold."""
        if self._values.least is not None:
            self._reached = self._values.reached(self._stored)
        return self._stored, self._reached

    def release(self) -> None:
        """Release the memory."""
        self._memory.give_back(self._stored)


class MeanBlock:
    """A block that is the mean over several tilings; see docs/prediction.md.

    Args:
        shape: voxels of the block.
        channels: number of channels.
        tilings: number of tilings; each puts each voxel once.
        values: the conversion to stored values.
        memory: pool of memory, used until `release`.
        where: name of the block, for messages.
    """

    def __init__(
        self, shape: Shape, channels: int, tilings: int, values: StoredValues, memory: BlockMemory, where: str
    ) -> None:
        self._tilings, self._values, self._memory, self._where = tilings, values, memory, where
        self._total: Floats = memory.take((channels, *shape), np.dtype(np.float32))
        self._total.fill(0)

    def put(self, box: Box, values: Floats) -> None:
        """Add the values of a box from one tiling, ``[C, z, y, x]``."""
        self._total[:, *box] += values

    def finish(self) -> tuple[npt.NDArray[Any], list[int]]:
        """Return the stored values, and the number of voxels of each channel that reach the threshold.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        self._total /= np.float32(self._tilings)
        stored = np.empty(self._total.shape, self._values.dtype)
        self._values.store(self._total, stored, self._where)
        return stored, self._values.reached(stored, self._total)

    def release(self) -> None:
        """Release the memory."""
        self._memory.give_back(self._total)


class PatchCopy:
    """The accumulation of patches that partition a block, with ``trim``; see docs/prediction.md.

    Args:
        start: first voxel of the block.
        block: the block.
    """

    def __init__(self, start: Shape, block: StoredBlock | MeanBlock) -> None:
        self.start, self.block = start, block

    def add(self, part: Part, values: Floats) -> None:
        """Copy the used part of a patch, ``[C, z, y, x]``, to the block."""
        in_block, in_patch = _boxes(part, self.start)
        self.block.put(in_block, values[:, *in_patch])


class PatchSum:
    """The weighted mean of overlapping patches, for one block or for several below each other.

    Patches come in the order z, y, x, so that planes are finished one after the other. A ring buffer holds only as many
    planes as a patch has; finished planes are divided by the sum of weights, and put into their block. See
    docs/prediction.md.

    Args:
        start: first voxel of the first block.
        shape: voxels of all blocks that may follow below.
        channels: channels of a patch.
        tiling: the patches.
        weights: ``tiling.weights()``.
        memory: pool of memory, used until `release`.
    """

    def __init__(
        self, start: Shape, shape: Shape, channels: int, tiling: Tiling, weights: Floats, memory: BlockMemory
    ) -> None:
        self.start, self.shape, self.tiling, self.weights = start, shape, tiling, weights
        self._memory = memory
        self._depth = min(tiling.patch[0], shape[0])
        # A ring buffer: plane z is at index z modulo the depth.
        self._sum: npt.NDArray[Any] = memory.take((channels, self._depth, *shape[1:]), tiling.precision)
        self._sum.fill(0)
        self._weighted = None if tiling.blend == "average" else np.empty_like(weights)
        self._together = max(1, PUT_VOXELS // math.prod(shape[1:]))
        self._done = self._end = 0
        self._layers: tuple[int, ...] | None = None
        self._weight_planes = np.empty((2, *shape[1:]), np.float32)

    @staticmethod
    def nbytes(shape: Shape, channels: int, tiling: Tiling) -> int:
        """Return the bytes of the ring buffer, of weights and their sums, and of planes that are rounded."""
        plane, patch = shape[1] * shape[2], math.prod(tiling.patch)
        sums = channels * min(tiling.patch[0], shape[0]) * plane * tiling.precision.itemsize
        single = tiling.precision == np.float32
        rounded = 0 if single else channels * max(plane, min(PUT_VOXELS, math.prod(shape)))
        # Equal weights need the rows of a single plane, and no products.
        planes, patches = (1, 1) if tiling.blend == "average" else (tiling.patch[0], 2)
        weights = 2 * plane + planes * tiling.patch[1] * shape[2] + patches * patch
        return sums + (weights + rounded) * np.dtype(np.float32).itemsize

    def into(self, block: StoredBlock | MeanBlock, planes: int) -> None:
        """Set the block that the next planes belong to."""
        self._block, self._origin, self._end = block, self._done, self._done + planes

    def add(self, part: Part, values: Floats) -> None:
        """Add the used part of a patch, ``[C, z, y, x]``.

        Raises:
            CellMapValueError: finished planes cannot be stored, see `StoredValues.store`.
        """
        in_block, in_patch = _boxes(part, self.start)
        # Later patches start at or below this one, so that all planes above it are finished.
        self._finish(in_block[0].start)
        first = self._done  # planes of a patch that begins above the block are already stored
        while first < in_block[0].stop:
            # One pass, or two if the planes wrap around the end of the ring buffer.
            slot = first % self._depth
            end = min(in_block[0].stop, first + self._depth - slot)
            at = (slice(slot, slot + end - first), *in_block[1:])
            z = in_patch[0].start - in_block[0].start
            patch = (slice(first + z, end + z), *in_patch[1:])
            for total, value in zip(self._sum, values, strict=True):
                if self._weighted is None:  # the weights are 1
                    total[at] += value[patch]
                else:
                    total[at] += np.multiply(value[patch], self.weights[patch], out=self._weighted[patch])
            first = end

    def end(self) -> None:
        """Finish the block, which has no more patches.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        self._finish(self._end)

    def release(self) -> None:
        """Release the memory."""
        self._memory.give_back(self._sum)

    def _finish(self, end: int) -> None:
        """Divide and store the planes before ``end``, a few at a time, while they are in the processor's cache."""
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
        """The spans of all patches along each axis."""
        ends = np.add(self.start, self.shape).tolist()
        return [self.tiling.along(axis, a, b) for axis, (a, b) in enumerate(zip(self.start, ends, strict=True))]

    @cached_property
    def _rows(self) -> Floats:
        """The weights of a row of patches side by side along x: ``[plane of a patch, y of a patch, x]``."""
        # With equal weights all planes of a patch are the same.
        weights = self.weights[:1] if self._weighted is None else self.weights
        rows = np.zeros((*weights.shape[:2], self.shape[2]), np.float32)
        for start, lo, hi in self._along[2]:
            rows[:, :, lo - self.start[2] : hi - self.start[2]] += weights[:, :, lo - start : hi - start]
        return rows

    def _weight(self, z: int) -> Floats:
        """Return the sum of the weights of all patches in a plane, ``[y, x]``; valid until the next call.

        The patches lie on a product grid, so that the sums along x, y and z are computed one after the other. The
        result is reused for the next plane if the same planes of patches cover it.
        """
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
        weight: Floats = self._weight_planes[0]
        return weight


def _boxes(part: Part, block: Shape) -> tuple[Box, Box]:
    """Return the used part of a patch in a block that starts at ``block``, and in the patch."""
    z, y, x = (slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, block, strict=True))
    i, j, k = (slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, part.start, strict=True))
    return (z, y, x), (i, j, k)
