"""Which patches make a block of a prediction, and how much each of them counts in each voxel.

- ``trim``: patches have context on every side, of which nothing is kept; at the border of the volume they are kept to
  the edge. Each block is laid out by itself, so that no patch is computed twice.
- ``average`` and ``gaussian``: patches overlap, and a voxel is the weighted mean of all that cover it. They lie on one
  grid for the whole volume, the same as that of MONAI's `sliding_window_inference`, so that blocks agree at their
  seams, whichever are computed. A patch that touches two blocks is computed for
  both, but where one lies below the other and goes on from there: see `BlockPlan`.

Both are functions of the geometry alone. Coordinates are output voxels of the whole volume.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Shape
from cellmap_lightning.prediction.quantize import Floats

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
