"""Lattices in nanometres, physical boxes, and the affine map from a patch to an array.

Convention (OME-NGFF 0.6 / RFC-5, which CellMap's data follows): ``translation`` is the *centre* of voxel 0, so an
array of ``n`` voxels of size ``s`` covers ``[t - s/2, t + (n - 1/2) s]``. Lattices are compared at their voxel *edges*,
where arrays of different voxel sizes share corners, with a tolerance, since stored numbers carry float noise
(3133.52 / 5.24 is 597.99999).

Vectors are ordered z, y, x.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError

AXES = ("z", "y", "x")
FloatArray = npt.NDArray[np.float64]
Vector = tuple[float, float, float]
#: A matrix ``[3, 3]``, row by row.
Turn = tuple[Vector, Vector, Vector]
Shape = tuple[int, int, int]

#: Voxels by which a patch may miss an array's lattice over its whole length and still be read by slicing.
LATTICE_TOLERANCE = 5e-4
#: Relative difference up to which two voxel sizes count as the same when a level is chosen.
SCALE_TOLERANCE = 0.01
#: Voxels within which a point counts as lying on the edge between two voxels.
EDGE_TOLERANCE = 1e-6


def vector(value: Sequence[float] | Mapping[str, float] | FloatArray, name: str = "a point") -> FloatArray:
    """Return three numbers in the order z, y, x, from a sequence or from ``{"z": .., "y": .., "x": ..}``.

    Args:
        value: the sequence or the mapping.
        name: name of the value, for messages.

    Raises:
        CellMapKeyError: an axis is missing or unknown.
        CellMapValueError: not three finite numbers.
    """
    if isinstance(value, Mapping):
        if set(value) != set(AXES):
            raise CellMapKeyError(f"{name} needs the axes z, y and x, got {sorted(value)}")
        value = [value[a] for a in AXES]
    out = np.asarray(value, dtype=np.float64)
    if out.shape != (3,) or not np.isfinite(out).all():
        raise CellMapValueError(f"{name} needs three finite numbers (z, y, x), got {value!r}")
    return out


@dataclass(frozen=True)
class Box:
    """A physical box, ``lower`` and ``upper`` corner in nm (z, y, x).

    Example:
        >>> Box((0, 0, 0), (80, 40, 40)).intersects(Box((80, 0, 0), (160, 40, 40)))
        False
    """

    lower: Vector
    upper: Vector

    @property
    def extent(self) -> FloatArray:
        """Edge lengths in nm."""
        return np.subtract(self.upper, self.lower)

    @property
    def center(self) -> FloatArray:
        """Centre in nm."""
        return np.add(self.lower, self.upper) / 2

    def intersects(self, other: "Box") -> bool:
        """Return whether two boxes share a volume (not only a face)."""
        return all(a < d and c < b for a, b, c, d in zip(self.lower, self.upper, other.lower, other.upper, strict=True))

    def union(self, other: "Box") -> "Box":
        """Return the smallest box that holds both."""
        return Box(to_vector(np.minimum(self.lower, other.lower)), to_vector(np.maximum(self.upper, other.upper)))

    def intersection(self, other: "Box") -> "Box":
        """Return the box that two boxes share; they must intersect."""
        return Box(to_vector(np.maximum(self.lower, other.lower)), to_vector(np.minimum(self.upper, other.upper)))

    def as_dict(self) -> dict[str, list[float]]:
        """Return ``{"z": [lower, upper], ...}`` in nm."""
        return {a: [self.lower[i], self.upper[i]] for i, a in enumerate(AXES)}

    def __str__(self) -> str:
        return (
            ", ".join(f"{a} [{lo:g}, {hi:g}]" for a, lo, hi in zip(AXES, self.lower, self.upper, strict=True)) + " nm"
        )


def to_vector(value: npt.ArrayLike) -> Vector:
    """Return a plain tuple of three floats."""
    z, y, x = (float(v) for v in np.asarray(value, dtype=np.float64))
    return z, y, x


@dataclass(frozen=True)
class Lattice:
    """A regular grid of voxels.

    Attributes:
        origin: centre of voxel 0, nm.
        step: voxel size along the array's axes, nm.
        shape: voxels along the array's axes z, y, x.
        turn: matrix whose columns are the directions of the array's axes in space, of length 1, where the array is
            rotated, mirrored or sheared; None where its axes are those of space.

    Example:
        >>> Lattice(origin=(4, 4, 4), step=(8, 8, 8), shape=(10, 10, 10)).box.upper
        (80.0, 80.0, 80.0)
    """

    origin: Vector
    step: Vector
    shape: Shape
    turn: Turn | None = None

    def __repr__(self) -> str:  # keys of caches contain it, and are the same as before there was a turn
        turn = f", turn={self.turn}" if self.turn is not None else ""
        return f"Lattice(origin={self.origin}, step={self.step}, shape={self.shape}{turn})"

    @property
    def matrix(self) -> FloatArray:
        """``[3, 3]``: the displacement from one voxel to the next along each axis of the array, as columns, nm."""
        return np.diag(self.step) if self.turn is None else np.multiply(self.turn, self.step)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel, nm^3."""
        volume = float(np.prod(self.step))
        return volume if self.turn is None else volume * abs(float(np.linalg.det(np.asarray(self.turn))))

    def points(self, voxels: npt.ArrayLike) -> FloatArray:
        """Return the centres of voxels ``[..., 3]``, nm."""
        if self.turn is None:
            return np.add(self.origin, np.multiply(voxels, self.step))
        return np.asarray(voxels, float) @ self.matrix.T + self.origin

    def span(self, lower: npt.ArrayLike, upper: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return the lowest and the highest place of a physical box in the array.

        Places are in voxels from the lower edge of voxel 0, along the array's axes.
        """
        if self.turn is None:
            return np.subtract(lower, self.box.lower) / self.step, np.subtract(upper, self.box.lower) / self.step
        inverse = np.linalg.inv(self.matrix)
        middle = inverse @ (np.add(lower, upper) / 2 - self.origin) + 0.5
        half = np.abs(inverse) @ (np.subtract(upper, lower) / 2)
        return middle - half, middle + half

    @property
    def box(self) -> Box:
        """Physical box that the voxels fill, edges included; the smallest one that holds them if they are turned."""
        if self.turn is not None:
            middle = self.points((np.asarray(self.shape) - 1) / 2)
            half = np.abs(self.matrix) @ np.divide(self.shape, 2)
            return Box(to_vector(middle - half), to_vector(middle + half))
        lower = np.subtract(self.origin, np.divide(self.step, 2))
        return Box(to_vector(lower), to_vector(lower + np.multiply(self.step, self.shape)))

    def matches(self, other: "Lattice") -> bool:
        """Return whether voxel i of one lattice is voxel i of the other, within the tolerance."""
        if self.shape != other.shape or (self.turn is None) != (other.turn is None):
            return False
        if self.turn is not None:
            difference = np.abs(np.subtract(self.turn, other.turn)) @ self.shape  # type: ignore[arg-type]
            if difference.max() >= LATTICE_TOLERANCE:
                return False
        # The offset of the first voxel, and the error of the step added up to the last.
        first = np.abs(np.subtract(self.origin, other.origin)) / self.step
        drift = np.abs(np.divide(other.step, self.step) - 1) * self.shape
        return bool((first + drift < LATTICE_TOLERANCE).all())


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A map from the voxel indices of a patch to the (fractional) indices of an array.

    ``index = matrix @ voxel + offset``.

    Voxel centres map to voxel centres; index 0.0 is the centre of the array's voxel 0, -0.5 its lower edge.

    Attributes:
        matrix: ``[3, 3]``, array voxels per patch voxel.
        offset: ``[3]``, the array index of the centre of voxel (0, 0, 0).
        shape: voxels of the patch.
        first: first voxel of the patch in a lattice parallel to the array's, where the patch is a box of one. Voxels
            are then numbered in that lattice, so that overlapping boxes evaluate a voxel at the same index, to the last
            bit.
    """

    matrix: FloatArray
    offset: FloatArray
    shape: Shape
    first: Shape | None = None

    def along(self, axis: int) -> npt.NDArray[np.int64]:
        """Return indices of the patch's voxels along an axis."""
        begin = self.first[axis] if self.first is not None else 0
        return np.arange(begin, begin + self.shape[axis])

    def points(self) -> FloatArray:
        """Return the array indices of the voxel centres, ``[z, y, x, 3]``; for patches without `first`."""
        points: FloatArray = np.moveaxis(np.indices(self.shape), 0, -1) @ self.matrix.T + self.offset
        return points

    def bounds(self, margin: float = 0.0) -> tuple[FloatArray, FloatArray]:
        """Return the lowest and the highest array index of the voxel centres along each axis.

        Args:
            margin: voxels of the patch by which the box of its voxel centres is grown; 0.5 for the voxels' edges.
        """
        # An affine map takes its extremes at the corners.
        corners = np.array(np.meshgrid(*((-margin, n - 1 + margin) for n in self.shape), indexing="ij")).reshape(3, -1)
        ends = self.matrix @ corners + self.offset[:, None]
        return ends.min(axis=1), ends.max(axis=1)

    def shifted(self, shift: FloatArray) -> "AffineMap":
        """Return the map of points beside the voxel centres, at ``shift`` voxels from them."""
        return AffineMap(self.matrix, self.offset + self.matrix @ shift, self.shape, self.first)

    def separable(self) -> tuple[tuple[int, int, int], FloatArray] | None:
        """Return array axis and step of each patch axis, or None unless the rotation is a multiple of 90 degrees."""
        axes = np.abs(self.matrix).argmax(axis=0)
        steps = self.matrix[axes, range(3)]
        rest = self.matrix.copy()
        rest[axes, range(3)] = 0
        if len(set(axes.tolist())) < 3 or (np.abs(rest) @ np.asarray(self.shape, float)).max() >= LATTICE_TOLERANCE:
            return None
        z, y, x = axes.tolist()
        return (z, y, x), steps


def patch_map(
    center: FloatArray, shape: Shape, scale: FloatArray, lattice: Lattice, turn: FloatArray | None = None
) -> AffineMap:
    """Return the map of a patch around ``center``.

    Args:
        center: centre of the patch's physical box, nm.
        shape: voxels of the patch.
        scale: voxel size of the patch, nm.
        lattice: the array that is read.
        turn: ``[3, 3]`` orthogonal matrix (mirror, axis permutation, rotation) from patch to world directions, acting
            on nm, so that anisotropic patches stay right. None leaves the patch as it is.
    """
    turned = np.diag(scale) if turn is None else turn * scale
    middle = (np.asarray(shape, float) - 1) / 2
    if lattice.turn is not None:
        inverse = np.linalg.inv(lattice.matrix)
        matrix = inverse @ turned
        return AffineMap(matrix, inverse @ (center - lattice.origin) - matrix @ middle, shape)
    matrix = turned / np.asarray(lattice.step)[:, None]
    offset = (center - lattice.origin) / lattice.step - matrix @ middle
    return AffineMap(matrix, offset, shape)


def box_map(inner: Lattice, first: Shape, shape: Shape, lattice: Lattice) -> AffineMap:
    """Return the map of a box of another lattice along the same axes; see `AffineMap.first`.

    Args:
        inner: the lattice of the box.
        first: first voxel of the box in it.
        shape: voxels of the box.
        lattice: the array that is read.
    """
    if lattice.turn is not None:
        inverse = np.linalg.inv(lattice.matrix)
        matrix = inverse @ inner.matrix
        return AffineMap(matrix, inverse @ (inner.points(first) - lattice.origin), shape)
    matrix = np.diag(np.divide(inner.step, lattice.step))
    return AffineMap(matrix, np.subtract(inner.origin, lattice.origin) / lattice.step, shape, first)
