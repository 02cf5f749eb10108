"""Spatial augmentation: mirrors, axis permutations and rotations, as one orthogonal matrix per sample.

The matrix maps directions in the patch to directions in the volume, in nm, order z, y, x: the patch's voxel at ``p``
(nm from its centre) shows the volume at ``centre + matrix @ p``. It is part of the affine map of the read, so that
patches are not rotated after reading, and anisotropic patches are correct.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.rng import TURN, uniforms
from cellmap_lightning.transforms.normalization import is_finite, is_range

#: Rotation about an axis moves content from the first of these axes towards the second (right-handed in x, y, z).
_PLANES = {"z": ("x", "y"), "x": ("y", "z"), "y": ("z", "x")}


class SpatialTransforms:
    """Random mirrors, axis permutations and rotations; see docs/transforms.md.

    Args:
        config: any of
            ``mirror: {axes: {x: 0.5}}``, the probability of a flip per axis;
            ``transpose: {axes: [x, y]}``, a random permutation of these axes;
            ``rotate: {axes: {z: [-180, 180]}}``, a uniform angle in degrees about the axis, right-handed: 90 degrees
            about z moves content from x to y.
            They are applied to the content in this order: mirror, transpose, rotate (about x, then y, then z).

    Raises:
        CellMapKeyError: an unknown transform or axis.
        CellMapValueError: a probability outside [0, 1], or an invalid range.
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        config = dict(config or {})
        unknown = set(config) - {"mirror", "transpose", "rotate"}
        if unknown:
            raise CellMapKeyError(f"spatial_transforms has no {sorted(unknown)}; it has mirror, transpose and rotate")
        self.mirror: dict[str, float] = {}
        for axis, p in _axes("mirror", config.get("mirror"), Mapping).items():
            if not is_finite(p) or not 0 <= p <= 1:
                raise CellMapValueError(
                    f"spatial_transforms.mirror: the probability for {axis} must be in [0, 1], got {p!r}"
                )
            self.mirror[axis] = float(p)
        self.transpose: list[str] = list(_axes("transpose", config.get("transpose"), Sequence))
        self.rotate: dict[str, tuple[float, float]] = {}
        for axis, span in _axes("rotate", config.get("rotate"), Mapping).items():
            if not is_range(span):
                raise CellMapValueError(
                    f"spatial_transforms.rotate: the angles about {axis} must be [lowest, highest] degrees, "
                    f"got {span!r}"
                )
            self.rotate[axis] = (float(span[0]), float(span[1]))

        self._turns: dict[tuple[tuple[bool, ...], tuple[int, ...]], FloatArray] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SpatialTransforms):
            return NotImplemented
        return (self.mirror, self.transpose, self.rotate) == (other.mirror, other.transpose, other.rotate)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"mirror {self.mirror}, transpose {self.transpose}, rotate {self.rotate}"

    def __bool__(self) -> bool:
        return bool(self.mirror or self.transpose or self.rotate)

    def check(self, windows: Mapping[str, Window]) -> None:
        """Check that the single slice of a two-dimensional patch stays in its plane.

        Raises:
            CellMapValueError: a rotation about an axis in the plane of a patch with a single slice, or a permutation
                that exchanges the slice's axis with another.
        """
        for name, window in windows.items():
            for thin in (i for i, n in enumerate(window.shape) if n == 1):
                tilting = [a for a, (lo, hi) in self.rotate.items() if a != AXES[thin] and (lo, hi) != (0, 0)]
                if tilting:
                    raise CellMapValueError(
                        f"spatial_transforms.rotate: a rotation about {tilting[0]} would tilt the single slice of "
                        f"{name!r} (shape {list(window.shape)}); rotate about {AXES[thin]} instead"
                    )
                if AXES[thin] in self.transpose and len(self.transpose) > 1:
                    raise CellMapValueError(
                        f"spatial_transforms.transpose: exchanging {AXES[thin]} would turn the single slice of "
                        f"{name!r} (shape {list(window.shape)}) out of its plane; leave {AXES[thin]} out"
                    )

    def turns(self, seed: int, samples: Sequence[int] | npt.NDArray[np.int64]) -> list[FloatArray | None]:
        """Return the matrix of each sample, a function of (seed, sample) alone; None without any transform."""
        if not self:
            return [None] * len(samples)
        return [self._turn(u) for u in uniforms(seed, TURN, samples, 3 + len(self.transpose) + 3)]

    def _turn(self, u: FloatArray) -> FloatArray:
        """Return the matrix of a sample from its random numbers."""
        flips = tuple(bool(value < self.mirror.get(axis, 0)) for axis, value in zip(AXES, u.tolist(), strict=False))
        count = len(self.transpose)
        order = tuple(sorted(range(count), key=u[3 : 3 + count].tolist().__getitem__))
        # Cached: there are at most 48 combinations of mirrors and permutations.
        matrix = self._turns.get((flips, order))
        if matrix is None:
            matrix = np.diag([-1.0 if flip else 1.0 for flip in flips])
            if count:
                rows = [AXES.index(a) for a in self.transpose]
                permuted = np.eye(3)
                permuted[rows] = np.eye(3)[[rows[i] for i in order]]
                matrix = permuted @ matrix
            # The content moves by the matrix, so that directions in the patch map to the volume by its inverse.
            matrix = self._turns[flips, order] = matrix.T
        if not self.rotate:
            return matrix
        for i, axis in enumerate(("x", "y", "z")):
            if axis in self.rotate:
                lo, hi = self.rotate[axis]
                matrix = matrix @ rotation(axis, lo + (hi - lo) * u[-3 + i]).T
        return matrix


def rotation(axis: str, degrees: float) -> FloatArray:
    """Return the matrix (order z, y, x) of a right-handed rotation of content: 90 degrees about z moves x to y."""
    angle = math.radians(degrees)
    quarter = round(degrees / 90)
    # Quarter turns are exact, so that they are permutations of the voxels.
    c, s = (  # cosine and sine
        (math.cos(angle), math.sin(angle))
        if degrees != quarter * 90
        else ((1, 0), (0, 1), (-1, 0), (0, -1))[quarter % 4]
    )
    a, b = (AXES.index(name) for name in _PLANES[axis])
    out = np.eye(3)
    out[a, a], out[b, a], out[a, b], out[b, b] = c, s, -s, c
    return out


def _axes(name: str, config: Any, kind: type) -> Any:
    """Return the ``axes`` of a transform, after a check."""
    empty: Any = {} if kind is Mapping else []
    if config is None:
        return empty
    shape = "{axis: value}" if kind is Mapping else "[axis, ...]"
    if not isinstance(config, Mapping) or set(config) != {"axes"}:
        raise CellMapKeyError(f"spatial_transforms.{name} must be {{axes: {shape}}}, got {config!r}")
    axes = config["axes"]
    if axes is None:
        return empty
    if not isinstance(axes, kind) or isinstance(axes, str):
        raise CellMapValueError(f"spatial_transforms.{name}.axes must be {shape}, got {axes!r}")
    names: list[Any] = list(axes)  # type: ignore[call-overload]
    if not set(names) <= set(AXES) or len(set(names)) != len(names):
        raise CellMapKeyError(f"spatial_transforms.{name}.axes must name z, y and x at most once, got {names}")
    return axes
