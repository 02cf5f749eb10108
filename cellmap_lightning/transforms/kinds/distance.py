"""Targets that are signed distances to the boundary of a class."""

import math
from typing import Any

import numpy as np
import torch

from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import TargetKind
from cellmap_lightning.transforms.kinds.objects import distance_to, reach
from cellmap_lightning.transforms.targets import unpack_class
from cellmap_lightning.validation import positive_number


class SignedDistance(TargetKind):
    """Signed distance to the boundary of a class in units of ``nm``, positive inside, clipped to [-1, 1].

    Inside it is the distance from the voxel's centre to the nearest centre outside, outside the negative distance to
    the nearest centre inside. NaN where an unknown voxel is nearer than that, since it could be nearest of either kind.

    Args:
        nm: the distance that is scaled to 1.
    """

    computed = True
    name = "sdt"
    unknown = math.nan
    channels_first = True
    options = ("nm",)
    activation = "tanh"
    value_range = (-1.0, 1.0)

    def __init__(self, window: Window, classes: int, nm: float = 0.0) -> None:
        super().__init__(window, classes)
        self.nm = positive_number("nm (the distance that an sdt scales to 1)", nm)
        self.margin = reach(window, self.nm)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and distance."""
        return self.name, self.nm

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The distance."""
        return ({"kind": self.name, "name": "sdt", "nm": self.nm},)

    def compact(self, id_dtype: np.dtype[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape of distances, and float32."""
        return (self.classes, *self.window.shape), np.dtype(np.float32)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compute the distances."""
        for index in range(self.classes):
            present, known = unpack_class(stored, index)
            inside, outside = (distance_to(mask, self.window.scale)[self.inner] for mask in (known & ~present, present))
            distance = np.where(present[self.inner], inside, -outside)
            # An unknown voxel closer than the boundary could be of either kind, and then the distance would differ.
            unknown = distance_to(~known, self.window.scale)[self.inner]
            uncertain = unknown < np.minimum(np.abs(distance), self.nm)
            value = np.clip(distance / self.nm, -1, 1)
            value[uncertain | ~known[self.inner]] = np.nan
            out[index] = value

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Return the distances, which need no decoding."""
        return compact
