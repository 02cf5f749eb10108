"""Targets that compare each voxel with its neighbours at some offsets."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, TargetKind
from cellmap_lightning.transforms.targets import packed_bytes, set_bits, unpack


class Affinities(TargetKind):
    """1 where a voxel and its neighbour at an offset belong to one instance, else 0; NaN where either is unknown.

    Channels are ``class * offsets + offset``.

    Args:
        offsets: neighbours, in voxels of the target (z, y, x).
        weights: weight of each offset in the loss, 0 to leave an offset out; by default 1 each.

    Raises:
        CellMapValueError: offsets or weights are invalid.
    """

    computed = True
    name = "affinities"
    reads = "ids"
    options = ("offsets", "weights")
    activation = "sigmoid"
    directional = True

    def __init__(
        self,
        window: Window,
        classes: int,
        offsets: Sequence[Sequence[int]] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(window, classes)
        if len(offsets) == 0 or not all(_is_offset(offset) for offset in offsets):
            raise CellMapValueError(
                f"affinities need offsets: a list of neighbours [z, y, x] in whole voxels, not [0, 0, 0]; "
                f"got {offsets!r}"
            )
        self.offsets = tuple((int(o[0]), int(o[1]), int(o[2])) for o in offsets)
        z, y, x = (max(abs(o[a]) for o in self.offsets) for a in range(3))
        self.margin = (z, y, x)
        self.channels = classes * len(self.offsets)
        self.weights = _weights(weights, len(self.offsets))

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name, offsets and weights."""
        return self.name, self.offsets, self.weights

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The offsets, in voxels and in nm."""
        return tuple(
            {
                "kind": self.name,
                "name": "affinity_" + "_".join(map(str, offset)),
                "offset": list(offset),
                "offset_nm": [n * float(s) for n, s in zip(offset, self.window.scale, strict=True)],
            }
            for offset in self.offsets
        )

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of bits, packed as for presence, of every channel."""
        return (*self.window.shape, packed_bytes(self.channels)), np.dtype(np.uint8)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compare each voxel with its neighbours."""
        out[...] = 0
        for c in range(self.classes):
            ids = stored[c][self.inner]
            for k, offset in enumerate(self.offsets):
                shifted = zip(self.margin, offset, self.window.shape, strict=True)
                neighbours = stored[c][tuple(slice(m + o, m + o + n) for m, o, n in shifted)]
                known = (ids != UNKNOWN_ID) & (neighbours != UNKNOWN_ID)
                same = known & (ids == neighbours) & (ids != 0)
                set_bits(out, c * len(self.offsets) + k, same, known)

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.channels)


def _is_offset(offset: Any) -> bool:
    """Return True for three whole numbers that are not all 0."""
    return isinstance(offset, Sequence) and len(offset) == 3 and all(isinstance(n, int) for n in offset) and any(offset)


def _weights(weights: Any, count: int) -> tuple[float, ...]:
    """Return one weight per offset.

    Raises:
        CellMapValueError: they are no numbers from 0, of another number than the offsets, or all 0.
    """
    if weights is None:
        return (1.0,) * count
    listed = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else []
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < math.inf for w in listed)
    if len(listed) != count or not numbers or not any(listed):
        raise CellMapValueError(
            f"weights must be one number from 0 for each of the {count} offsets, not all 0; got {weights!r}"
        )
    return tuple(float(w) for w in listed)
