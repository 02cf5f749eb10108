"""Targets that mark the boundaries of instances."""

from typing import Any

import numpy as np
import torch

from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, TargetKind
from cellmap_lightning.transforms.kinds.objects import distance_to, distance_to_other, reach
from cellmap_lightning.transforms.targets import set_bits, unpack
from cellmap_lightning.validation import positive_number


class Boundary(TargetKind):
    """1 where a voxel of another instance, or of the background, is within ``nm``, else 0; see docs/targets.md.

    Both sides of a boundary are marked. Distances are those between the centres of voxels. NaN where nothing of another
    id is within ``nm``, but an unknown voxel is.

    Args:
        nm: greatest distance of a voxel that is marked.

    Raises:
        CellMapValueError: ``nm`` is not positive.
    """

    name = "boundary"
    computed = True
    reads = "ids"
    options = ("nm",)
    activation = "sigmoid"

    def __init__(self, window: Window, classes: int, nm: float = 0.0) -> None:
        super().__init__(window, classes)
        self.nm = positive_number("nm (the distance up to which a boundary is marked)", nm)
        self.margin = reach(window, self.nm)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and distance."""
        return self.name, self.nm

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The boundary."""
        return ({"kind": self.name, "name": "boundary", "nm": self.nm},)

    def encode(self, stored: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Compute the distances and compare them with ``nm``."""
        out[...] = 0
        # Distances of whole voxels can be a rounding error above nm.
        nm, scale = self.nm * (1 + 1e-9), self.window.scale
        for index, ids in enumerate(stored):
            near = distance_to_other(ids, scale, self.margin)[self.inner] <= nm
            unknown = distance_to(ids == UNKNOWN_ID, scale)[self.inner]
            known = (unknown > 0) & (near | (unknown > nm))
            set_bits(out, index, known & near, known)

    def finish(self, compact: torch.Tensor) -> torch.Tensor:
        """Unpack the bits."""
        return unpack(compact, self.classes)
