"""Targets that are local shape descriptors of instances."""

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import AXES, Shape
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.kinds.computed import ComputedKind
from cellmap_lightning.transforms.kinds.objects import any_unknown, ndimage, objects, voxel_places
from cellmap_lightning.validation import positive_number

#: Standard deviations at which the Gaussian window ends.
_TRUNCATE = 3.0
#: Least variance, nm^2, by which a covariance is divided.
_LEAST_VARIANCE = 1e-3


class ShapeDescriptors(ComputedKind):
    """Local shape descriptors: size, centre and shape of an instance in a Gaussian window around each voxel.

    Sheridan et al., Nature Methods 2023 (doi:10.1038/s41592-022-01711-z). In three dimensions a class has ten channels:
    the offset from the voxel to the mean of the instance's voxels in the window (z, y, x), their variances (z, y, x),
    their correlations (zy, zx, yx), and the part of the window that they fill; see docs/targets.md for the scaling to
    [0, 1]. 0 in the background. A patch of one slice has six channels. NaN where the window of an instance's voxel has
    an unknown voxel.

    Args:
        sigma: standard deviation of the window, nm; it ends at three of them.

    Raises:
        CellMapValueError: ``sigma`` is not positive.
    """

    name = "lsd"
    options = ("sigma",)
    activation = "sigmoid"
    directional = True

    def __init__(self, window: Window, classes: int, sigma: float = 0.0) -> None:
        super().__init__(window, classes)
        self.sigma = positive_number("sigma (of the window of local shape descriptors, nm)", sigma)
        self._voxels = [self.sigma / float(s) if axis in self.axes else 0.0 for axis, s in enumerate(window.scale)]
        z, y, x = (int(_TRUNCATE * s + 0.5) for s in self._voxels)
        self.margin: Shape = (z, y, x)
        self._pairs = list(combinations(range(len(self.axes)), 2))
        self.channels = classes * (2 * len(self.axes) + len(self._pairs) + 1)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Name and standard deviation."""
        return self.name, self.sigma

    @property
    def components(self) -> tuple[dict[str, Any], ...]:
        """The descriptors."""
        axes = [AXES[axis] for axis in self.axes]
        names = [f"offset_{a}" for a in axes] + [f"variance_{a}" for a in axes]
        names += [f"correlation_{axes[i]}{axes[j]}" for i, j in self._pairs] + ["size"]
        return tuple({"kind": self.name, "name": f"lsd_{name}", "sigma": self.sigma} for name in names)

    def values(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Compute the descriptors of each instance in its bounding box."""
        wide = np.zeros((self.channels // self.classes, *ids.shape))
        for number, box in objects(ids, self.inner):
            own = ids[box] == number
            wide[:, *box] += np.where(own, self._of(own), 0)
        out = wide[:, *self.inner]
        out[:, any_unknown(ids, self.margin)[self.inner] & (ids[self.inner] != 0)] = np.nan
        return out

    def _of(self, own: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Return the descriptors of one instance at the voxels of its bounding box."""

        def window_sum(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            result: npt.NDArray[np.float64] = ndimage().gaussian_filter(
                values, self._voxels, mode="constant", cval=0.0, truncate=_TRUNCATE
            )
            return result

        mask = own.astype(np.float64)
        places = voxel_places(own.shape, self.window.scale, self.axes)
        size = window_sum(mask)
        weight = np.where(own, size, 1)
        mean = [window_sum(mask * place) / weight for place in places]
        variance = [
            np.maximum(window_sum(mask * place**2) / weight - m**2, _LEAST_VARIANCE)
            for place, m in zip(places, mean, strict=True)
        ]
        correlation = [
            (window_sum(mask * places[i] * places[j]) / weight - mean[i] * mean[j]) / np.sqrt(variance[i] * variance[j])
            for i, j in self._pairs
        ]
        offset = [(m - place) / self.sigma for m, place in zip(mean, places, strict=True)]
        channels = np.stack(
            [
                *(0.5 + 0.5 * value for value in offset),
                *(value / self.sigma**2 for value in variance),
                *(0.5 + 0.5 * value for value in correlation),
                size,
            ]
        )
        clipped: npt.NDArray[np.float64] = np.clip(channels, 0, 1)
        return clipped
