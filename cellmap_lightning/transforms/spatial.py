"""Spatial augmentation: one matrix per sample, and the displacement of what it shows.

The matrix maps directions in the patch to directions in the volume, in nm, order z, y, x: the patch's voxel at ``p``
(nm from its centre) shows the volume at ``centre + matrix @ p``; it is orthogonal unless zoom or shear are on. Elastic
deformation and displaced sections move ``p`` before; see `geometry.sample_map`. Both are part of the map of the read,
so that patches are not transformed after reading, and anisotropic patches are correct.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, FloatArray
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.geometry.sample_map import Warp
from cellmap_lightning.runtime.rng import TURN, uniforms
from cellmap_lightning.transforms.elastic import Elastic
from cellmap_lightning.transforms.normalization import is_finite, is_range
from cellmap_lightning.transforms.section_shifts import SectionShifts
from cellmap_lightning.transforms.spatial_options import axes_of
from cellmap_lightning.transforms.stretch import Stretch
from cellmap_lightning.validation import did_you_mean

#: The transforms, in the order in which content goes through them.
NAMES = ("mirror", "transpose", "rotate", "zoom", "shear", "elastic", "slip", "misalign")

#: Rotation about an axis moves content from the first of these axes towards the second (right-handed in x, y, z).
_PLANES = {"z": ("x", "y"), "x": ("y", "z"), "y": ("z", "x")}


class SpatialTransforms:
    """Random mirrors, axis permutations, rotations, zoom, shear and displacements; see docs/transforms.md.

    Args:
        config: any of
            ``mirror: {axes: {x: 0.5}}``, the probability of a flip per axis;
            ``transpose: {axes: [x, y]}``, a random permutation of these axes;
            ``rotate: {axes: {z: [-180, 180]}}``, a uniform angle in degrees about the axis, right-handed: 90 degrees
            about z moves content from x to y;
            ``zoom`` and ``shear``, see `Stretch`; ``elastic``, see `Elastic`; ``slip`` and ``misalign``, see
            `SectionShifts`.
            They are applied to the content in this order, rotations about x, then y, then z.

    Raises:
        CellMapKeyError: an unknown transform, option or axis.
        CellMapValueError: a probability outside [0, 1], an invalid range, or a displacement that could fold.

    Example:
        >>> transforms = SpatialTransforms({"rotate": {"axes": {"z": [90, 90]}}})
        >>> transforms.turns(0, [0])[0]
        array([[ 1.,  0.,  0.],
               [ 0.,  0., -1.],
               [ 0.,  1.,  0.]])
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        config = dict(config or {})
        unknown = sorted(set(config) - set(NAMES))
        if unknown:
            known = ", ".join(NAMES[:-1])
            hint = did_you_mean(unknown[0], NAMES)
            raise CellMapKeyError(f"spatial_transforms has no {unknown}; it has {known} and {NAMES[-1]}{hint}")
        self.mirror: dict[str, float] = {}
        for axis, p in axes_of("mirror", config.get("mirror"), Mapping).items():
            if not is_finite(p) or not 0 <= p <= 1:
                raise CellMapValueError(
                    f"spatial_transforms.mirror: the probability for {axis} must be in [0, 1], got {p!r}"
                )
            self.mirror[axis] = float(p)
        self.transpose: list[str] = list(axes_of("transpose", config.get("transpose"), Sequence))
        self.rotate: dict[str, tuple[float, float]] = {}
        for axis, span in axes_of("rotate", config.get("rotate"), Mapping).items():
            if not is_range(span):
                raise CellMapValueError(
                    f"spatial_transforms.rotate: the angles about {axis} must be [lowest, highest] degrees, "
                    f"got {span!r}"
                )
            self.rotate[axis] = (float(span[0]), float(span[1]))
        self.stretch = Stretch(config.get("zoom"), config.get("shear"))
        self.elastic = None if config.get("elastic") is None else Elastic(config["elastic"])
        self.section_shifts = [
            SectionShifts(name, config[name]) for name in ("slip", "misalign") if config.get(name) is not None
        ]
        self._turns: dict[tuple[tuple[bool, ...], tuple[int, ...]], FloatArray] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SpatialTransforms):
            return NotImplemented
        return repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = [f"mirror {self.mirror}", f"transpose {self.transpose}", f"rotate {self.rotate}"]
        parts += [repr(self.stretch)] if self.stretch else []
        parts += [repr(self.elastic)] if self.elastic else []
        return ", ".join([*parts, *map(repr, self.section_shifts)])

    def __bool__(self) -> bool:
        return bool(self.mirror or self.transpose or self.roaming)

    @property
    def roaming(self) -> bool:
        """True if patches may be other than slices: rotated by any angle, zoomed, sheared or displaced."""
        return bool(self.rotate or self.stretch or self.displaced)

    @property
    def displaced(self) -> bool:
        """True if samples have a displacement beside their matrix."""
        return bool(self.elastic or self.section_shifts)

    def extended(self, half: FloatArray) -> FloatArray | None:
        """Return half the edge lengths of the box that a patch can show before it is rotated and transposed.

        Args:
            half: half the edge lengths of the patch, nm.

        Returns:
            nm, along the patch's axes; None if that is the patch's box.
        """
        if not self.stretch and not self.displaced:
            return None
        if self.elastic:
            half = self.elastic.extended(half)
        for shifts in reversed(self.section_shifts):
            half = shifts.extended(half)
        return self.stretch.extended(half)

    def check(self, windows: Mapping[str, Window]) -> None:
        """Check that the single slice of a two-dimensional patch stays in its plane.

        Raises:
            CellMapValueError: a rotation about an axis in the plane of a patch with a single slice, a permutation that
                exchanges the slice's axis with another, or a shear or displacement along the slice's axis.
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
        self.stretch.check(windows)
        if self.elastic:
            self.elastic.check(windows)
        for shifts in self.section_shifts:
            shifts.check(windows)

    def turns(self, seed: int, samples: Sequence[int] | npt.NDArray[np.int64]) -> list[FloatArray | None]:
        """Return the matrix of each sample, a function of (seed, sample) alone; None without any transform."""
        if not self:
            return [None] * len(samples)
        turns = [self._turn(u) for u in uniforms(seed, TURN, samples, 3 + len(self.transpose) + 3)]
        if not self.stretch:
            return list(turns)
        return [turn @ stretch for turn, stretch in zip(turns, self.stretch.matrices(seed, samples), strict=True)]

    def warps(self, seed: int, samples: Sequence[int] | npt.NDArray[np.int64]) -> list[Warp | None]:
        """Return the displacement of each sample, a function of (seed, sample) alone; None without any."""
        if not self.displaced:
            return [None] * len(samples)
        smooth = self.elastic.draw(seed, samples) if self.elastic else [None] * len(samples)
        sections = [shifts.draw(seed, samples) for shifts in self.section_shifts]
        return [Warp(one, tuple(of[i] for of in sections)) for i, one in enumerate(smooth)]

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
