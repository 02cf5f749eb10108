"""The tiling of a volume by patches for sliding-window inference, and the weight of each voxel of a patch.

- ``trim``: patches have context (a halo) on every side that is discarded, except at the border of the volume. Each
  block is tiled separately, so that no patch is computed twice.
- ``average`` and ``gaussian``: patches overlap, and a voxel is the weighted mean of all patches that cover it. They lie
  on one grid for the whole volume, the same as that of MONAI's `sliding_window_inference`, so that blocks agree at
  their seams. A patch that touches two blocks is computed for both, except for a block directly below the last one: see
  `BlockPlan`.

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
from cellmap_lightning.validation import one_of

Blend = Literal["trim", "average", "gaussian"]

#: Default fraction of a patch that it shares with its neighbour along each axis.
DEFAULT_OVERLAP = {"trim": 0.25, "average": 0.25, "gaussian": 0.5}
#: Standard deviation of the Gaussian as a fraction of the patch, and its smallest value: those of MONAI.
SIGMA, LEAST_WEIGHT = 0.125, 1e-3


@dataclass(frozen=True)
class Part:
    """The part of a patch that contributes to a block; see docs/prediction.md.

    Attributes:
        start: first voxel of the patch; negative if the volume is smaller than a patch.
        lo: first voxel of the part.
        hi: end of the part, exclusive.
    """

    start: Shape
    lo: Shape
    hi: Shape


class Tiling:
    """The patches of a volume; see docs/prediction.md.

    Args:
        volume: output voxels of the volume.
        patch: output voxels of a patch.
        blend: ``trim``, ``average`` or ``gaussian``.
        overlap: fraction of a patch that it shares with the next one, per axis or for all; for ``trim`` half of it is
            the context on either side. None for 0.25, or 0.5 with ``gaussian``. An axis of length 1 has none.
        context: for ``trim``, output voxels on either side that are discarded, instead of ``overlap``.

    Attributes:
        trim: voxels on either side that are discarded; 0 except for ``trim``.
        stride: voxels from one patch to the next, with ``average`` and ``gaussian``.

    Raises:
        CellMapValueError: an argument is invalid, or the context leaves nothing of a patch.
    """

    def __init__(
        self,
        volume: Shape,
        patch: Shape,
        blend: Blend = "trim",
        overlap: float | Sequence[float] | None = None,
        context: int | Sequence[int] | None = None,
    ) -> None:
        one_of("blend", blend, get_args(Blend))
        if context is not None and (blend != "trim" or overlap is not None):
            raise CellMapValueError("context needs blend=trim, and replaces overlap; leave one of them out")
        self.volume, self.patch, self.blend = volume, patch, blend
        fractions = _overlap_fractions(DEFAULT_OVERLAP[blend] if overlap is None else overlap)
        self.trim = _trim(patch, fractions, context) if blend == "trim" else (0, 0, 0)
        self.stride = [max(1, int(n * (1 - f))) for n, f in zip(patch, fractions, strict=True)]

    @property
    def precision(self) -> np.dtype[Any]:
        """The type of sums: double if many patches cover a voxel, as rounding errors of equal values add up."""
        covering = math.prod(math.ceil(n / s) for n, s in zip(self.patch, self.stride, strict=True))
        return np.dtype(np.float32 if self.blend == "trim" or covering <= 8 else np.float64)

    def parts(self, start: Shape, shape: Shape) -> list[Part]:
        """Return the patches of a block, in the order z, y, x.

        Args:
            start: first voxel of the block.
            shape: voxels of the block.
        """
        axes = [self.along(axis, a, a + n) for axis, (a, n) in enumerate(zip(start, shape, strict=True))]
        return [Part(*zip(*spans, strict=True)) for spans in product(*axes)]

    def count(self, axis: int, first: int, length: int, block: int) -> int:
        """Return the number of patches along an axis, of blocks of length ``block`` that cover ``length`` voxels."""
        end = first + length
        return sum(len(self.along(axis, a, min(a + block, end))) for a in range(first, end, block))

    def along(self, axis: int, a: int, b: int) -> list[tuple[int, int, int]]:
        """Return the patches for ``[a, b)`` along an axis: first voxel, and begin and end of the part that is used."""
        return self._trimmed(axis, a, b) if self.blend == "trim" else self._covering(axis, a, b)

    def _trimmed(self, axis: int, a: int, b: int) -> list[tuple[int, int, int]]:
        """Return patches whose parts without context partition ``[a, b)``."""
        n, patch, trim = self.volume[axis], self.patch[axis], self.trim[axis]
        spans, at = [], a
        while at < b:
            start = self._inside(axis, at - trim)
            # At the border of the volume there is no neighbour to take over the context.
            end = n if start + patch >= n else start + patch - trim
            spans.append((start, at, min(end, b)))
            at = end
        return spans

    def _covering(self, axis: int, a: int, b: int) -> list[tuple[int, int, int]]:
        """Return all patches of the grid that intersect ``[a, b)``."""
        n, patch, stride = self.volume[axis], self.patch[axis], self.stride[axis]
        last = max(0, -(-(n - patch) // stride))
        spans = []
        # The last patch is moved inside, so that it may intersect although its place on the grid does not.
        for k in range(min(last, max(0, (a - patch) // stride)), last + 1):
            start = self._inside(axis, k * stride)
            if start + patch > a and start < b:
                spans.append((start, max(a, start), min(b, start + patch)))
        return spans

    def _inside(self, axis: int, start: int) -> int:
        """Return a start moved so that the patch lies in the volume, or is centred on it if it is larger."""
        n, patch = self.volume[axis], self.patch[axis]
        return -((patch - n) // 2) if n <= patch else min(max(start, 0), n - patch)

    def bounds(self) -> tuple[Shape, Shape]:
        """Return the lowest and the highest start of a patch."""
        lo = [self._inside(axis, 0) for axis in range(3)]
        hi = [self._inside(axis, n) for axis, n in enumerate(self.volume)]
        return (lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2])

    def weights(self) -> Floats | None:
        """Return the weight of each voxel of a patch, ``[z, y, x]``; None for ``trim``.

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
            # Clipped as by MONAI.
            weights = np.maximum(weights, np.float32(max(float(weights.min()), LEAST_WEIGHT)))
        return weights


def _overlap_fractions(overlap: float | Sequence[float]) -> list[float]:
    fractions = [float(f) for f in (overlap if isinstance(overlap, Sequence) else [overlap] * 3)]
    if len(fractions) != 3 or not all(0 <= f < 1 for f in fractions):
        raise CellMapValueError(f"overlap must be a fraction of a patch, in [0, 1), or three of them, got {overlap!r}")
    return fractions


def _trim(patch: Shape, fractions: Sequence[float], context: int | Sequence[int] | None) -> Shape:
    """Return the voxels to discard on either side, from the context, or by default half of the overlap."""
    if context is None:
        trims = [math.floor(f * n / 2 + 0.5) for f, n in zip(fractions, patch, strict=True)]
    else:
        given = list(context) if isinstance(context, Sequence) else [context] * 3
        if len(given) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
            raise CellMapValueError(
                f"context must be a whole number of voxels, or three of them (z, y, x), got {context!r}"
            )
        trims = [int(n) for n in given]
    z, y, x = (0 if n == 1 else trim for trim, n in zip(trims, patch, strict=True))
    for axis, trim, n in zip(AXES, (z, y, x), patch, strict=True):
        if trim < 0 or n - 2 * trim < 1:
            raise CellMapValueError(
                f"a context of {trim} voxels on either side along {axis} leaves nothing of a patch of {n}; "
                f"give at most {(n - 1) // 2}"
            )
    return z, y, x
