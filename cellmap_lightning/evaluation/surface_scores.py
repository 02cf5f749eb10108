"""Distances between the surfaces of a predicted and an annotated class, in nm.

A surface consists of the voxels of the class that have a neighbour across a face in which the class is absent; faces of
the crop and unannotated neighbours are no surface. Distances are those between centres of voxels, from each voxel of
one surface to the nearest of the other. Surfaces are collected block by block: memory is that of the surfaces.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import missing_extra
from cellmap_lightning.evaluation.pairs import CropPair, Mask

Points = npt.NDArray[np.float64]

SURFACE_METRICS = ("hausdorff_nm", "hausdorff95_nm", "surface_distance_nm")


@dataclass(frozen=True)
class SurfaceScore:
    """Surface distances of one class in one crop; see docs/evaluation.md.

    Attributes:
        hausdorff_nm: the largest distance from a voxel of either surface to the other surface.
        hausdorff95_nm: the larger of the 95th percentiles of the distances from either surface to the other.
        surface_distance_nm: mean of the distances of all voxels of both surfaces to the other surface.

    They are NaN where neither has a surface, and infinite where one of the two has none.
    """

    hausdorff_nm: float
    hausdorff95_nm: float
    surface_distance_nm: float


def surface_score(pair: CropPair) -> SurfaceScore:
    """Compute the surface distances of a class in a crop; predictions count where they are annotated.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    predicted: list[Points] = []
    annotated: list[Points] = []
    for block in pair.blocks(halo=1):
        known = block.truth >= 0
        first = np.asarray(block.start) + [part.start for part in block.inner]
        for surfaces, mask in ((annotated, block.truth > 0), (predicted, block.predicted & known)):
            points = np.argwhere(surface(mask, known)[block.inner]) + first
            surfaces.append(points * np.asarray(pair.voxel_size))
    return surface_distances(np.concatenate(predicted), np.concatenate(annotated))


def surface(mask: Mask, known: Mask) -> Mask:
    """Return the voxels of a mask that have a known neighbour across a face outside of the mask."""
    absent = known & ~mask
    touches: Mask = np.zeros_like(mask)
    for axis in range(3):
        a, b = [slice(None)] * 3, [slice(None)] * 3
        a[axis], b[axis] = slice(None, -1), slice(1, None)
        lower, upper = tuple(a), tuple(b)
        touches[lower] |= absent[upper]
        touches[upper] |= absent[lower]
    return mask & touches


def surface_distances(predicted: Points, annotated: Points) -> SurfaceScore:
    """Compute the distances between two surfaces.

    Args:
        predicted: ``[n, 3]``, centres of voxels in nm.
        annotated: ``[m, 3]``, likewise.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if not len(predicted) or not len(annotated):
        value = math.nan if not len(predicted) and not len(annotated) else math.inf
        return SurfaceScore(value, value, value)
    try:
        from scipy.spatial import KDTree
    except ImportError:
        raise missing_extra("targets", "surface distances need scipy", "set metric=voxels") from None
    there = KDTree(annotated).query(predicted)[0]
    back = KDTree(predicted).query(annotated)[0]
    return SurfaceScore(
        float(max(there.max(), back.max())),
        float(max(np.percentile(there, 95), np.percentile(back, 95))),
        float(np.concatenate([there, back]).mean()),
    )
