"""Elastic deformation: a random smooth displacement of each sample."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.displacement import Displacement, largest_magnitude
from cellmap_lightning.geometry.lattice import AXES, FloatArray, Vector, to_vector
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.rng import ELASTIC, hashes
from cellmap_lightning.transforms.spatial_options import axes_of, keys_of
from cellmap_lightning.validation import positive_number


class Elastic:
    """Random smooth displacements by cubic B-splines; see docs/transforms.md.

    Args:
        config: ``spacing``, the distance of control points, and ``magnitude``, the largest displacement, each in nm or
            as ``{axis: nm}``; ``axes``, those along which content moves, by default all.

    Attributes:
        spacing: nm along each axis.
        magnitude: nm along each axis; 0 along those not displaced.

    Raises:
        CellMapKeyError: an option or an axis is missing or unknown.
        CellMapValueError: a length that is not positive, or a magnitude at which content could fold.

    Example:
        >>> Elastic({"spacing": 256, "magnitude": 60, "axes": ["y", "x"]}).magnitude
        (0.0, 60.0, 60.0)
    """

    def __init__(self, config: Any) -> None:
        config = keys_of("elastic", config, ("spacing", "magnitude"), ("axes",))
        axes = axes_of("elastic", {"axes": config.get("axes")}, Sequence) or AXES
        self.spacing = _lengths("spacing", config["spacing"], AXES)
        self.magnitude = _lengths("magnitude", config["magnitude"], [a for a in AXES if a in axes])
        for axis, spacing, magnitude in zip(AXES, self.spacing, self.magnitude, strict=True):
            largest = largest_magnitude(len(axes)) * spacing
            if magnitude >= largest:
                raise CellMapValueError(
                    f"spatial_transforms.elastic: content could fold at a magnitude of {magnitude:g} nm along {axis}; "
                    f"with a spacing of {spacing:g} nm and {len(axes)} displaced axes it must be below "
                    f"{math.floor(largest * 1000) / 1000:.10g} nm"
                )

    def __repr__(self) -> str:
        return f"elastic spacing {self.spacing}, magnitude {self.magnitude}"

    def check(self, windows: Mapping[str, Window]) -> None:
        """Check that a single slice stays in its plane.

        Raises:
            CellMapValueError: content would be moved along the axis of a single slice.
        """
        for name, window in windows.items():
            for thin in (i for i, n in enumerate(window.shape) if n == 1):
                if self.magnitude[thin]:
                    others = ", ".join(a for a in AXES if a != AXES[thin])
                    raise CellMapValueError(
                        f"spatial_transforms.elastic: a displacement along {AXES[thin]} would bend the single slice of "
                        f"{name!r} (shape {list(window.shape)}); set axes: [{others}]"
                    )

    def draw(self, seed: int, samples: Sequence[int] | npt.NDArray[np.int64]) -> list[Displacement]:
        """Return the displacement of each sample, a function of (seed, sample) alone."""
        keys = hashes(seed, ELASTIC, samples, 1)[:, 0].tolist()
        return [Displacement(key, self.spacing, self.magnitude) for key in keys]

    def extended(self, half: FloatArray) -> FloatArray:
        """Return half the edge lengths (nm) of the box that a box can show."""
        return half + self.magnitude


def _lengths(name: str, value: Any, axes: Sequence[str]) -> Vector:
    """Return a length along each axis, from one for all ``axes`` or one for each; 0 along others."""
    where = f"spatial_transforms.elastic.{name}"
    if isinstance(value, Mapping):
        if set(value) != set(axes):
            raise CellMapKeyError(
                f"{where} must be one length, or one for each of {', '.join(axes)}, got {dict(value)!r}"
            )
        lengths = {axis: positive_number(f"{where}.{axis} (nm)", value[axis]) for axis in axes}
    else:
        lengths = dict.fromkeys(axes, positive_number(f"{where} (nm)", value))
    return to_vector([lengths.get(axis, 0.0) for axis in AXES])
