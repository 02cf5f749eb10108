"""Distance by which training patches show raw beyond the box that their targets lie in."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.batches.arrays import ArraySet
from cellmap_lightning.crops.planes import Plane
from cellmap_lightning.geometry.lattice import FloatArray, Vector
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.spatial import SpatialTransforms


@dataclass(frozen=True, eq=False)
class PatchReach:
    """Extent of training patches, and their reach; nm (z, y, x).

    Attributes:
        extent: edge lengths of the box that all targets share (all inputs, without targets), which lies in the crop.
        beyond: distance that any input, augmented, shows beyond the crop.

    Example:
        >>> patch_reach(arrays, SpatialTransforms(None), ["xy"], (8, 8, 8)).beyond  # input 64, target 32 voxels of 8 nm
        array([152., 152., 152.])
    """

    extent: FloatArray
    beyond: FloatArray


def patch_reach(arrays: ArraySet, spatial: SpatialTransforms, planes: Sequence[str], stored: Vector) -> PatchReach:
    """Return the extent and the reach of training patches.

    An input of half edge lengths ``h``, augmented, around a centre at least half of ``extent`` inside of the crop
    reaches ``h - extent / 2`` beyond it, and two voxels of raw and one of the input further for interpolation.

    Args:
        arrays: the inputs and targets.
        spatial: the spatial augmentation.
        planes: planes of flat patches.
        stored: voxel size of the finest level of raw, nm.
    """
    extents, beyond = [], []
    for name in planes:
        plane = Plane.parse(name, arrays.specs)
        windows = {
            key: plane.thicken(spec.window, stored) if spec.flat else spec.window for key, spec in arrays.specs.items()
        }
        inside = [plane.in_volume(windows[key]).extent for key in arrays.targets or arrays.inputs]
        extent = np.max(inside, axis=0)
        directions = np.eye(3)[:, list(plane.axes)]
        for key in arrays.inputs:
            half = directions @ _augmented(windows[key], spatial)
            scale = plane.in_volume(windows[key]).scale
            interpolated = 2 * np.maximum(stored, scale) + scale.max()
            beyond.append(np.maximum(half + interpolated - extent / 2, 0))
        extents.append(extent)
    return PatchReach(np.max(extents, axis=0), np.max(beyond, axis=0))


def _augmented(window: Window, spatial: SpatialTransforms) -> FloatArray:
    """Return half the edge lengths, along the patch's axes, of the box that an augmented patch can show."""
    half = window.extent / 2
    stretched = spatial.extended(half)
    half = half if stretched is None else stretched
    exchanged = ["zyx".index(axis) for axis in spatial.transpose]
    if exchanged:
        half = half.copy()
        half[exchanged] = half[exchanged].max()
    turning = ["zyx".index(axis) for axis in spatial.rotate]
    if len(turning) == 1:
        moved = [axis for axis in range(3) if axis not in turning]
        half = half.copy()
        half[moved] = np.linalg.norm(half[moved])
    elif turning:
        half = np.full(3, float(np.linalg.norm(half)))
    if exchanged:
        half[exchanged] = half[exchanged].max()
    return half
