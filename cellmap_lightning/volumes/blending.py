"""Which patches make a block of a prediction, and how much each of them counts in each voxel.

- ``trim``: patches have context on every side, of which nothing is kept; at the border of the volume they are kept to
  the edge. Each block is laid out by itself, so that no patch is computed twice.
- ``average`` and ``gaussian``: patches overlap, and a voxel is the weighted mean of all that cover it. They lie on one
  grid for the whole volume, the same as that of MONAI's `sliding_window_inference`, so that blocks agree at their
  seams, whichever are computed. A patch that touches two blocks is computed for both.

Both are functions of the geometry alone. Coordinates are output voxels of the whole volume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.volumes.geometry import AXES, Shape
from cellmap_lightning.volumes.values import Floats, StoredValues

Blend = Literal["trim", "average", "gaussian"]

#: Part of a patch that it shares with its neighbour along each axis, when nothing else is said.
DEFAULT_OVERLAP = {"trim": 0.25, "average": 0.25, "gaussian": 0.5}
#: Width of the Gaussian in parts of the patch, and its smallest value: those of MONAI.
SIGMA, LEAST_WEIGHT = 0.125, 1e-3


@dataclass(frozen=True)
class Part:
    """What one patch gives to a block.

    Attributes:
        start: the patch's first voxel; negative where the volume is smaller than a patch.
        lo: the first voxel of it that counts.
        hi: behind the last.
    """

    start: Shape
    lo: Shape
    hi: Shape


class Tiling:
    """The patches of a volume.

    Args:
        volume: output voxels of the volume.
        patch: output voxels of a patch.
        blend: ``trim``, ``average`` or ``gaussian``.
        overlap: part of a patch that it shares with the next one, per axis or for all; for ``trim`` half of it is the
            context on either side. None for 0.25, or 0.5 with ``gaussian``. An axis of length 1 has none.
        context: for ``trim``, output voxels on either side that are not kept, instead of ``overlap``.

    Raises:
        CellMapValueError: values that cannot be, or a context of which nothing is left.
    """

    def __init__(
        self,
        volume: Shape,
        patch: Shape,
        blend: Blend = "trim",
        overlap: float | Sequence[float] | None = None,
        context: int | Sequence[int] | None = None,
    ) -> None:
        if blend not in get_args(Blend):
            raise CellMapValueError(f"blend is one of {', '.join(get_args(Blend))}, got {blend!r}")
        if context is not None and (blend != "trim" or overlap is not None):
            raise CellMapValueError("context is for blend=trim, and instead of overlap")
        self.volume, self.patch, self.blend = volume, patch, blend
        given = DEFAULT_OVERLAP[blend] if overlap is None else overlap
        fractions = [float(f) for f in (given if isinstance(given, Sequence) else [given] * 3)]
        if len(fractions) != 3 or not all(0 <= f < 1 for f in fractions):
            raise CellMapValueError(f"overlap must be a part of a patch, in [0, 1), or three, got {overlap!r}")
        trims = [0 if n == 1 else math.floor(f * n / 2 + 0.5) for f, n in zip(fractions, patch, strict=True)]
        if context is not None:
            trims = [int(c) for c in (context if isinstance(context, Sequence) else [context] * 3)]
            trims = [0 if n == 1 else c for c, n in zip(trims, patch, strict=True)]
        #: Voxels on either side that are not kept, with ``trim``.
        self.trim = (trims[0], trims[1], trims[2]) if blend == "trim" else (0, 0, 0)
        for axis, (t, n) in enumerate(zip(self.trim, patch, strict=True)):
            if t < 0 or n - 2 * t < 1:
                raise CellMapValueError(
                    f"a context of {t} voxels on either side along {AXES[axis]} leaves nothing of a patch of {n}; at "
                    f"most {(n - 1) // 2} fit"
                )
        #: Voxels from one patch to the next, with ``average`` and ``gaussian``.
        self.stride = [max(1, int(n * (1 - f))) for n, f in zip(patch, fractions, strict=True)]

    @property
    def precision(self) -> np.dtype[Any]:
        """Type of sums: twice the precision where many patches cover a voxel, as errors of equal values add up."""
        covering = math.prod(-(-n // s) for n, s in zip(self.patch, self.stride, strict=True))
        return np.dtype(np.float32 if self.blend == "trim" or covering <= 8 else np.float64)

    def parts(self, start: Shape, shape: Shape) -> list[Part]:
        """The patches of a block, in the order z, y, x.

        Args:
            start: the block's first voxel.
            shape: its voxels.
        """
        axes = [self.along(axis, a, a + n) for axis, (a, n) in enumerate(zip(start, shape, strict=True))]
        return [Part(*zip(*found, strict=True)) for found in product(*axes)]

    def count(self, axis: int, first: int, length: int, block: int) -> int:
        """Patches along an axis, of all blocks of a length that begin at ``first``."""
        end = first + length
        return sum(len(self.along(axis, a, min(a + block, end))) for a in range(first, end, block))

    def along(self, axis: int, a: int, b: int) -> list[tuple[int, int, int]]:
        """The patches that make ``[a, b)`` along an axis: start, first voxel that counts, behind the last."""
        return self._kept(axis, a, b) if self.blend == "trim" else self._covering(axis, a, b)

    def _kept(self, axis: int, a: int, b: int) -> list[tuple[int, int, int]]:
        """Start, and first and last voxel kept, of patches that share out ``[a, b)``."""
        n, patch, trim = self.volume[axis], self.patch[axis], self.trim[axis]
        found, at = [], a
        while at < b:
            start = self._inside(axis, at - trim)
            end = n if start + patch >= n else start + patch - trim
            found.append((start, at, min(end, b)))
            at = end
        return found

    def _covering(self, axis: int, a: int, b: int) -> list[tuple[int, int, int]]:
        """The same of all patches of the grid that touch ``[a, b)``."""
        n, patch, stride = self.volume[axis], self.patch[axis], self.stride[axis]
        last = max(0, -(-(n - patch) // stride))
        found = []
        for k in range(min(last, max(0, (a - patch) // stride)), last + 1):
            start = self._inside(axis, k * stride)
            if start + patch > a and start < b:
                found.append((start, max(a, start), min(b, start + patch)))
        return found

    def _inside(self, axis: int, start: int) -> int:
        """A start moved so that the patch lies in the volume; in the middle of a patch that is larger, it does."""
        n, patch = self.volume[axis], self.patch[axis]
        return -((patch - n) // 2) if n <= patch else min(max(start, 0), n - patch)

    def bounds(self) -> tuple[Shape, Shape]:
        """Lowest and highest start of a patch."""
        lo = [self._inside(axis, 0) for axis in range(3)]
        hi = [self._inside(axis, n) for axis, n in enumerate(self.volume)]
        return (lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2])

    def weights(self) -> Floats | None:
        """How much each voxel of a patch counts, ``[z, y, x]``; None where patches share out a block.

        The Gaussian is MONAI's: ``exp(-x^2 / (2 (0.125 n)^2))`` along each axis, and at least 1e-3.
        """
        if self.blend == "trim":
            return None
        weights = np.ones(self.patch, np.float32)
        if self.blend == "gaussian":
            for axis, n in enumerate(self.patch):
                x = np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)
                along = np.exp(-(x**2) / np.float32(2 * (SIGMA * n) ** 2)).astype(np.float32)
                weights *= along.reshape([-1 if i == axis else 1 for i in range(3)])
            weights = np.maximum(weights, np.float32(max(float(weights.min()), LEAST_WEIGHT)))
        return weights


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


class BlockSum:
    """One block while its patches come in.

    What a voxel becomes follows from the patches that cover it, in the order z, y, x, and from nothing else: it has
    the same bits in every block that it may lie in.

    Args:
        start: its first voxel.
        shape: its voxels.
        channels: channels of a patch.
        tiling: the patches.
        weights: ``tiling.weights()``.
        memory: where it takes memory from, until `release`.
    """

    def __init__(
        self,
        start: Shape,
        shape: Shape,
        channels: int,
        tiling: Tiling,
        weights: Floats | None,
        memory: BlockMemory,
    ) -> None:
        self.start, self.tiling, self.weights = start, tiling, weights
        self._memory = memory
        self._sum = self._memory.take((channels, *shape), tiling.precision)
        if weights is not None:  # otherwise patches share out the block, and each voxel is set once
            self._sum.fill(0)
        self._weighted = None if weights is None or tiling.blend == "average" else np.empty_like(weights)

    def add(self, part: Part, values: Floats) -> None:
        """Add what counts of a patch, ``[C, z, y, x]``."""
        here, there = _boxes(part, self.start)
        if self.weights is None:
            self._sum[:, *here] = values[:, *there]
            return
        for total, value in zip(self._sum, values, strict=True):
            if self._weighted is None:  # the weights are 1
                total[here] += value[there]
            else:
                total[here] += np.multiply(value[there], self.weights[there], out=self._weighted[there])

    def mean(self) -> Floats:
        """The block, ``[C, z, y, x]``, until `release`. Nothing can be added afterwards: it may be the sums' memory."""
        if self.weights is not None:
            shape = self._sum.shape[1:]
            ends = np.add(self.start, shape).tolist()
            axes = [self.tiling.along(axis, a, b) for axis, (a, b) in enumerate(zip(self.start, ends, strict=True))]
            # The sum over the patches along z, y and x is three sums, one after the other, whatever the weights.
            rows = np.zeros((*self.weights.shape[:2], shape[2]), np.float32)
            for start, lo, hi in axes[2]:
                rows[:, :, lo - self.start[2] : hi - self.start[2]] += self.weights[:, :, lo - start : hi - start]
            planes = np.zeros((len(rows), *shape[1:]), np.float32)
            for start, lo, hi in axes[1]:
                planes[:, lo - self.start[1] : hi - self.start[1]] += rows[:, lo - start : hi - start]
            for z in range(self.start[0], ends[0]):
                found = [planes[z - start] for start, lo, hi in axes[0] if lo <= z < hi]
                self._sum[:, z - self.start[0]] /= sum(found[1:], found[0])
        return self._sum.astype(np.float32, copy=False)

    def release(self) -> None:
        """Give the memory back: the block that `mean` gave is not looked at any more."""
        self._memory.give_back(self._sum)


class BlockCopy:
    """One block while patches come in that share it out: each voxel is stored as soon as it is known.

    It takes the room of what is stored, a quarter of the sums' for ``uint8``.

    Args:
        start: its first voxel.
        shape: its voxels.
        channels: channels of a patch.
        values: how they are stored.
        memory: where it takes memory from, until `release`.
        where: what it is called in an error.

    Attributes:
        stored: the block, ``[C, z, y, x]``, until `release`.
        reached: voxels of each channel that reach the threshold.
    """

    def __init__(
        self, start: Shape, shape: Shape, channels: int, values: StoredValues, memory: BlockMemory, where: str
    ) -> None:
        self.start, self._values, self._memory, self._where = start, values, memory, where
        self.stored = memory.take((channels, *shape), values.dtype)
        self.reached = [0] * channels

    def add(self, part: Part, values: Floats) -> None:
        """Store what counts of a patch, ``[C, z, y, x]``.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        here, there = _boxes(part, self.start)
        found = self._values.store(values[:, *there], self.stored[:, *here], self._where)
        self.reached = [a + b for a, b in zip(self.reached, found, strict=True)]

    def release(self) -> None:
        """Give the memory back: the block is not looked at any more."""
        self._memory.give_back(self.stored)


def _boxes(part: Part, block: Shape) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where what counts of a patch is in a block that starts at ``block``, and in the patch."""
    here = tuple(slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, block, strict=True))
    there = tuple(slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, part.start, strict=True))
    return here, there
