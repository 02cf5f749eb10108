"""Tiles that contain a class, found from coarse pyramid levels of its labels."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.counts import counted_in_metadata
from cellmap_lightning.crops.labels import stored_labels
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy

IntArray = npt.NDArray[np.int64]

log = logging.getLogger(__name__)

#: Voxels of the largest level that is read.
MAX_VOXELS = 1 << 23


def tiles_with(
    image: Multiscale,
    encoding: Callable[[Level], Encoding],
    placement: Placement,
    window: Window,
    label: str,
    retry_policy: RetryPolicy = DEFAULT_RETRY,
) -> IntArray | None:
    """Return the numbers of the tiles of a crop that contain a class, each voxel counted for the first tile with it.

    The coarsest level with voxels no larger than half a tile is read; if it has no foreground, as may happen with thin
    structures, the next finer one, up to `MAX_VOXELS`. Tiles with few voxels of the class may be missing.

    Args:
        image: the labels of the class.
        encoding: function from a level to the meaning of its values.
        placement: the tiles.
        window: a patch, along the axes of the volume.
        label: name in messages.
        retry_policy: retries and timeouts of reads.

    Returns:
        Numbers of tiles; None if the class may be anywhere in the crop.
    """
    no_tiles = np.zeros(0, np.int64)
    if counted_in_metadata(image) == 0:
        return no_tiles
    # Axes along which every patch holds the whole crop do not limit the voxel size.
    pitch = np.where(placement.held, np.inf, placement.step * placement.stride)
    limit = np.maximum(pitch / 2, window.scale)
    small = [level for level in image.present if (np.asarray(level.scale) <= limit).all()]
    try:
        for level in reversed(small or [image.finest]):
            if math.prod(level.array.shape) > MAX_VOXELS:
                return None
            code = encoding(level)
            reader = open_reader(level, label, retry_policy=retry_policy, empty=code.empty)
            present = code.present(stored_labels(reader, code, (0, 0, 0), reader.shape))
            if present.any():
                return _tiles(present, level, placement, window)
    except CellMapError as error:
        # Nothing else may need this level, so that an error must not end the run.
        log.warning("%s: cannot be read, so validation tiles are chosen without it: %s", label, error)
        return None
    return no_tiles


def _tiles(present: np.ndarray[Any, Any], level: Level, placement: Placement, window: Window) -> IntArray:
    """Return the numbers of the tiles that cover the centres of the voxels in a mask."""
    if level.lattice.turn is not None:
        points = level.lattice.points(np.argwhere(present))
        places = [placement.tiles_at(axis, points[:, axis], float(window.extent[axis])) for axis in range(3)]
        return np.unique((places[0] * placement.tiles_along[1] + places[1]) * placement.tiles_along[2] + places[2])
    tiles_along = []
    for axis in range(3):
        centers = level.lattice.origin[axis] + level.lattice.step[axis] * np.arange(present.shape[axis], dtype=float)
        tiles, first = np.unique(placement.tiles_at(axis, centers, float(window.extent[axis])), return_index=True)
        present = np.logical_or.reduceat(present, first, axis=axis)
        tiles_along.append(tiles)
    z, y, x = (tiles[index] for tiles, index in zip(tiles_along, np.nonzero(present), strict=True))
    numbers: IntArray = (z * placement.tiles_along[1] + y) * placement.tiles_along[2] + x
    return numbers
