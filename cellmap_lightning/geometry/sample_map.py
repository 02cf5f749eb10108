"""The map of one sample: affine, after the displacement of whole sections and a smooth displacement.

The voxel of a patch at ``p`` (nm from its centre, along its axes) shows the volume at
``centre + turn @ motion(p + u(p))``: ``u`` is the smooth displacement, ``motion`` the rigid motion of the section of
``p`` in its plane, ``turn`` the affine part. It is evaluated once for each voxel, of raw and of labels alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.displacement import Displacement
from cellmap_lightning.geometry.lattice import EDGE_TOLERANCE, AffineMap, FloatArray, Lattice, Shape, patch_map
from cellmap_lightning.geometry.sections import Sections
from cellmap_lightning.geometry.spline_map import SplineMap


@dataclass(frozen=True, eq=False)
class Warp:
    """The part of a sample's map that is not affine.

    Attributes:
        displacement: the smooth displacement; None for none.
        sections: displaced sections; the last are the last that the content goes through.
    """

    displacement: Displacement | None = None
    sections: tuple[Sections, ...] = ()


@dataclass(frozen=True, eq=False)
class SampleMap:
    """A map from the voxel indices of a patch to the (fractional) indices of an array, with a displacement.

    Attributes:
        affine: the map without displacement.
        scale: voxel size of the patch, nm.
        warp: the displacement.
    """

    affine: AffineMap
    scale: FloatArray
    warp: Warp

    @property
    def matrix(self) -> FloatArray:
        """Matrix of the affine part."""
        return self.affine.matrix

    @property
    def shape(self) -> Shape:
        """Voxels of the patch."""
        return self.affine.shape

    def shifted(self, shift: FloatArray) -> "SampleMap":
        """Return the map of points beside the voxel centres, at ``shift`` voxels from them."""
        return SampleMap(self.affine.shifted(shift), self.scale, self.warp)

    def pieces(self) -> Iterator[tuple[tuple[slice, slice, slice], AffineMap | SplineMap]]:
        """Yield boxes of the patch, in which all sections move alike, and their maps; together they fill it."""
        middle = (np.asarray(self.shape, float) - 1) / 2
        boxes = [((0, 0, 0), self.affine)]
        for sections in self.warp.sections:
            boxes = [part for start, amap in boxes for part in self._split(sections, start, amap, middle)]
        for start, amap in boxes:
            a, b, c = (slice(f, f + n) for f, n in zip(start, amap.shape, strict=True))
            displacement = self.warp.displacement
            if displacement is None:
                yield (a, b, c), amap
            else:
                yield (a, b, c), SplineMap(amap, displacement, (start - middle) * self.scale, self.scale)

    def _split(
        self, sections: Sections, start: Shape, amap: AffineMap, middle: FloatArray
    ) -> Iterator[tuple[Shape, AffineMap]]:
        """Yield the boxes into which sections divide a box of the patch, first voxel and map."""
        axis = sections.axis
        voxels = np.arange(start[axis], start[axis] + amap.shape[axis])
        motions = sections.motions(sections.numbers((voxels - middle[axis]) * self.scale[axis]))
        borders = np.flatnonzero((motions[1:] != motions[:-1]).any(axis=1)) + 1
        for low, high in zip([0, *borders.tolist()], [*borders.tolist(), len(voxels)], strict=True):
            first, shape, along = list(start), list(amap.shape), np.zeros(3)
            first[axis], shape[axis], along[axis] = start[axis] + low, high - low, low
            matrix, offset = amap.matrix, amap.offset + amap.matrix @ along
            others = [i for i in range(3) if i != axis]
            shift = np.zeros(3)
            shift[others] = motions[low, :2] / self.scale[others]
            # In voxels of the box: v -> turn @ (v - c) + c + shift, with c the centre of the whole patch.
            turn = sections.motion_matrix(float(motions[low, 2])) * self.scale / self.scale[:, None]
            center = middle - first
            offset = offset + matrix @ (center - turn @ center + shift)
            matrix = matrix @ turn
            yield (first[0], first[1], first[2]), AffineMap(matrix, offset, (shape[0], shape[1], shape[2]))

    def points(self) -> FloatArray:
        """Return the array indices of the voxel centres, ``[z, y, x, 3]``."""
        points = np.empty((*self.shape, 3))
        for box, piece in self.pieces():
            points[box] = piece.points()
        return points

    def bounds(self, margin: float = 0.0) -> tuple[FloatArray, FloatArray]:
        """Return bounds of the array indices of the voxel centres; see `AffineMap.bounds`."""
        bounds = [piece.bounds(margin) for _, piece in self.pieces()]
        return np.min([low for low, _ in bounds], axis=0), np.max([high for _, high in bounds], axis=0)


#: The map of one array of a sample.
VoxelMap = AffineMap | SampleMap


def sample_map(
    center: FloatArray,
    shape: Shape,
    scale: FloatArray,
    lattice: Lattice,
    turn: FloatArray | None = None,
    warp: Warp | None = None,
) -> VoxelMap:
    """Return the map of a patch around ``center``; see `patch_map`.

    Args:
        center: centre of the patch's physical box, nm.
        shape: voxels of the patch.
        scale: voxel size of the patch, nm.
        lattice: the array that is read.
        turn: ``[3, 3]`` matrix of the affine part, on nm.
        warp: the displacement along the patch's axes; None for none.
    """
    amap = patch_map(center, shape, scale, lattice, turn)
    return amap if warp is None else SampleMap(amap, scale, warp)


def outside(amap: VoxelMap, shape: Shape) -> npt.NDArray[np.bool_] | None:
    """Return which voxels of a patch have their centres outside of an array; None where none has.

    Args:
        amap: from the patch's voxels to those of the array.
        shape: voxels of the array.
    """
    least, most = -0.5 - EDGE_TOLERANCE, np.asarray(shape) - 0.5 + EDGE_TOLERANCE
    low, high = amap.bounds()
    if (low >= least).all() and (high <= most).all():
        return None
    points = amap.points()
    beyond: npt.NDArray[np.bool_] = np.any((points < least) | (points > most), axis=-1)
    return beyond
