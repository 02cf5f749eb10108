"""Targets that combine the distances of a voxel to the boundary and to the skeleton of its instance."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.computed import ComputedKind
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID
from cellmap_lightning.transforms.kinds.objects import Box, distance_to, distance_to_other, ndimage, objects, reach
from cellmap_lightning.validation import positive_number

#: Slope of the distance to the boundary below which a voxel is of the skeleton; off the medial axis it is 1, and a
#: little less towards the neighbour that is nearest to the steepest direction.
_RIDGE = 0.5


class SkeletonDistance(ComputedKind):
    """Skeleton-aware distance: ``b / (b + s)`` inside instances, 1 on the skeleton; 0 in the background.

    ``b`` is the distance to the nearest voxel of another id, ``s`` that to the instance's skeleton, both between the
    centres of voxels and at most ``nm`` (Lin et al., MICCAI 2023, doi:10.1007/978-3-031-43898-1_51, without its
    exponent). The skeleton is the medial axis (Blum 1967): the voxels none of whose neighbours in the instance is
    farther from the boundary by more than half of the step to it. What is deeper than ``nm`` belongs to it, so that
    values depend on ``2 nm`` around a voxel alone. NaN where an unknown voxel could change the value.

    Args:
        nm: greatest distance, nm; at least the half thickness of the objects whose skeleton matters.

    Raises:
        CellMapValueError: ``nm`` is not positive.
    """

    name = "skeleton_distance"
    options = ("nm",)
    activation = "sigmoid"

    def __init__(self, window: Window, classes: int, nm: float = 0.0) -> None:
        super().__init__(window, classes)
        self.nm = positive_number("nm (the greatest distance of skeleton_distance)", nm)
        self._reach = reach(window, self.nm)
        z, y, x = (2 * n + 1 if axis in self.axes else 0 for axis, n in enumerate(self._reach))
        self.margin = (z, y, x)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and distance."""
        return self.name, self.nm

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The distance."""
        return ({"kind": self.name, "name": "skeleton_distance", "nm": self.nm},)

    def values(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Compute both distances of the voxels of each instance."""
        scale = self.window.scale
        boundary = np.minimum(distance_to_other(ids, scale, self._reach), self.nm)
        unknown = distance_to(ids == UNKNOWN_ID, scale)
        # A distance, and the skeleton at a voxel and its neighbours, may differ if an unknown voxel is nearer.
        near = [3 if axis in self.axes else 1 for axis in range(3)]
        uncertain = (ids == UNKNOWN_ID) | (unknown < boundary)
        if uncertain.any():
            uncertain = ndimage().maximum_filter(uncertain, size=near, mode="constant", cval=False)
        skeleton = (ids > 0) & (self._slope(ids, boundary) < _RIDGE) & ~uncertain
        out = np.zeros(ids.shape)
        for number, box in objects(ids, self.inner):
            own = ids[box] == number
            center = np.minimum(distance_to(own & skeleton[box], scale), self.nm)
            open_to_change = np.minimum(unknown[box], distance_to(own & uncertain[box], scale)) < center
            value = boundary[box] / (boundary[box] + center)
            out[box][own] = np.where(open_to_change, np.nan, value)[own]
        out[ids == UNKNOWN_ID] = np.nan
        return out[None, *self.inner]

    def _slope(self, ids: npt.NDArray[Any], boundary: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the steepest ascent of the distance to the boundary, to the neighbours of the same id."""
        slope = np.full(ids.shape, -np.inf)
        for here, there, step in self._neighbors(ids.shape):
            ascent = np.where(ids[here] == ids[there], (boundary[there] - boundary[here]) / step, -np.inf)
            np.maximum(slope[here], ascent, out=slope[here])
        return slope

    def _neighbors(self, shape: tuple[int, ...]) -> Iterator[tuple[Box, Box, float]]:
        """Yield the voxels that have a neighbour, their neighbours, and the distance, in each direction."""
        for offset in product(*((-1, 0, 1) if axis in self.axes else (0,) for axis in range(3))):
            if any(offset):
                here = tuple(slice(max(-o, 0), n - max(o, 0)) for o, n in zip(offset, shape, strict=True))
                there = tuple(slice(max(o, 0), n - max(-o, 0)) for o, n in zip(offset, shape, strict=True))
                yield here, there, float(np.linalg.norm(np.multiply(offset, self.window.scale)))
