"""Targets that point to the centre of instances."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.computed import ComputedKind
from cellmap_lightning.transforms.kinds.objects import any_unknown, ndimage, objects, reach, voxel_places
from cellmap_lightning.validation import positive_number

#: Part of ``nm`` below which a voxel is at the centre: larger than the rounding errors of sums.
_AT_CENTER = 1e-6


class Flow(ComputedKind):
    """Unit vectors from each voxel of an instance to the instance's centre; 0 in the background and at the centre.

    The centre is the centroid of the instance's voxels within ``nm`` of the voxel along each axis: that of the whole
    instance where it is no longer than ``nm``, and a local centre on its middle line where it is. So the vectors do not
    depend on where a patch ends, as they would with the centre of the visible part, or the one of Cellpose, which
    follows from a simulated diffusion in the whole instance (Stringer et al., doi:10.1038/s41592-020-01018-x).
    Components are in the order z, y, x, of the axes that are longer than 1. NaN where the box around an
    instance's voxel has an unknown voxel.

    Args:
        nm: half the edge length of the box, nm.

    Raises:
        CellMapValueError: ``nm`` is not positive.
    """

    name = "flow"
    options = ("nm",)
    activation = "tanh"
    value_range = (-1.0, 1.0)
    directional = True

    def __init__(self, window: Window, classes: int, nm: float = 0.0) -> None:
        super().__init__(window, classes)
        self.nm = positive_number("nm (the distance within which flow finds the centre of an instance)", nm)
        self.margin = reach(window, self.nm)
        self.channels = classes * len(self.axes)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and distance."""
        return self.name, self.nm

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The axes."""
        return tuple({"kind": self.name, "name": f"flow_{AXES[axis]}", "nm": self.nm} for axis in self.axes)

    def values(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Compute the vectors of each instance in its bounding box."""
        wide = np.zeros((len(self.axes), *ids.shape))
        for number, box in objects(ids, self.inner):
            own = ids[box] == number
            wide[:, *box] += np.where(own, self._of(own), 0)
        out = wide[:, *self.inner]
        out[:, any_unknown(ids, self.margin)[self.inner] & (ids[self.inner] != 0)] = np.nan
        return out

    def _of(self, own: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Return the vectors of one instance at the voxels of its bounding box."""
        edges = [2 * n + 1 for n in self.margin]

        def window_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            result: npt.NDArray[np.float64] = ndimage().uniform_filter(values, edges, mode="constant", cval=0.0)
            return result

        mask = own.astype(np.float64)
        weight = np.where(own, window_mean(mask), 1)
        places = voxel_places(own.shape, self.window.scale, self.axes)
        vectors = np.stack([window_mean(mask * place) / weight - place for place in places])
        length = np.sqrt((vectors**2).sum(0))
        return np.where(length > _AT_CENTER * self.nm, vectors / np.maximum(length, _AT_CENTER * self.nm), 0)
