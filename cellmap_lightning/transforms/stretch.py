"""Zoom and shear: random affine transforms that change sizes and angles."""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.rng import STRETCH, uniforms
from cellmap_lightning.transforms.normalization import is_range
from cellmap_lightning.transforms.spatial_options import axes_of

#: Pairs of axes: along the first, content is moved along the second. They are applied in this order.
PAIRS = tuple(a + b for a, b in permutations(AXES, 2))


class Stretch:
    """Random zoom and shear about the centre of the patch; see docs/transforms.md.

    Args:
        zoom: ``{axes: {x: [0.8, 1.25]}}``, a uniform factor per axis; or ``[0.8, 1.25]``, one for all axes. Content is
            magnified by factors above 1.
        shear: ``{axes: {zx: [-0.1, 0.1]}}``: content is moved along x by a uniform number of nm per nm along z.

    Raises:
        CellMapKeyError: an unknown axis or pair of axes.
        CellMapValueError: an invalid range.

    Example:
        >>> Stretch([2, 2], None).matrices(0, [0])[0].diagonal()
        array([0.5, 0.5, 0.5])
    """

    def __init__(self, zoom: Any, shear: Any) -> None:
        #: One factor for all axes, instead of one per axis.
        self.isotropic = isinstance(zoom, Sequence) and not isinstance(zoom, str)
        self.zoom: dict[str, tuple[float, float]] = {}
        factors = dict.fromkeys(AXES, zoom) if self.isotropic else axes_of("zoom", zoom, Mapping)
        for axis, span in factors.items():
            if not is_range(span) or span[0] <= 0:
                raise CellMapValueError(
                    f"spatial_transforms.zoom: the factors along {axis} must be [lowest, highest] above 0, got {span!r}"
                )
            self.zoom[axis] = (float(span[0]), float(span[1]))
        self.shear: dict[str, tuple[float, float]] = {}
        for pair, span in axes_of("shear", shear, Mapping, PAIRS).items():
            if not is_range(span):
                raise CellMapValueError(
                    f"spatial_transforms.shear: {pair} must be [lowest, highest] nm along {pair[1]} per nm along "
                    f"{pair[0]}, got {span!r}"
                )
            self.shear[pair] = (float(span[0]), float(span[1]))

    def __bool__(self) -> bool:
        return bool(self.zoom or self.shear)

    def __repr__(self) -> str:
        return f"zoom {self.zoom}{' together' if self.isotropic else ''}, shear {self.shear}"

    def check(self, windows: Mapping[str, Window]) -> None:
        """Check that a single slice stays in its plane.

        Raises:
            CellMapValueError: content would be moved along the axis of a single slice.
        """
        for name, window in windows.items():
            for thin in (AXES[i] for i, n in enumerate(window.shape) if n == 1):
                tilting = [pair for pair, span in self.shear.items() if pair[1] == thin and span != (0, 0)]
                if tilting:
                    raise CellMapValueError(
                        f"spatial_transforms.shear: {tilting[0]} would tilt the single slice of {name!r} (shape "
                        f"{list(window.shape)}); shear along its two other axes instead"
                    )

    def matrices(self, seed: int, samples: Sequence[int] | npt.NDArray[np.int64]) -> FloatArray:
        """Return the matrix of each sample, ``[n, 3, 3]``, from directions in the patch to those in the volume."""
        drawn = uniforms(seed, STRETCH, samples, len(AXES) + len(PAIRS))
        matrices = np.tile(np.eye(3), (len(drawn), 1, 1))
        for i, axis in enumerate(AXES):
            if axis in self.zoom:
                low, high = self.zoom[axis]
                matrices[:, i, i] = 1 / (low + (high - low) * drawn[:, 0 if self.isotropic else i])
        for number, pair in enumerate(PAIRS):
            if pair in self.shear:
                low, high = self.shear[pair]
                inverse = np.tile(np.eye(3), (len(drawn), 1, 1))
                inverse[:, AXES.index(pair[1]), AXES.index(pair[0])] = -(low + (high - low) * drawn[:, 3 + number])
                matrices = matrices @ inverse
        return matrices

    def extended(self, half: FloatArray) -> FloatArray:
        """Return half the edge lengths (nm) of the box that a box can show."""
        for pair in reversed(PAIRS):
            if pair in self.shear:
                half = half.copy()
                half[AXES.index(pair[1])] += max(map(abs, self.shear[pair])) * half[AXES.index(pair[0])]
        return half / [self.zoom.get(axis, (1.0,))[0] for axis in AXES]
