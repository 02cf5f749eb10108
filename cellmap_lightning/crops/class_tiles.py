"""In which tiles a class is seen, by the coarse levels of its labels: a look at the whole crop that reads little."""

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
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy

IntArray = npt.NDArray[np.int64]

log = logging.getLogger(__name__)

#: Voxels of the largest level that is looked at.
MAX_VOXELS = 1 << 23


def tiles_with(
    image: Multiscale,
    encoding: Callable[[Level], Encoding],
    placement: Placement,
    window: Window,
    label: str,
    retry_policy: RetryPolicy = DEFAULT_RETRY,
) -> IntArray | None:
    """Numbers of the tiles of a crop in which a class is seen, each by the first tile that covers it.

    The coarsest level whose voxels are no larger than half a tile is looked at; where the class is not seen there, as
    thin structures may not be, the next finer one, up to `MAX_VOXELS`. Tiles that have only a little of the class may
    be missing.

    Args:
        image: the labels of the class.
        encoding: what the values of a level mean.
        placement: the tiles.
        window: a patch, along the axes of the volume.
        label: what messages call it.
        retry_policy: how long an object is tried for.

    Returns:
        None where the class may be anywhere in the crop.
    """
    nowhere = np.zeros(0, np.int64)
    if counted_in_metadata(image) == 0:
        return nowhere
    pitch = np.where(placement.held, np.inf, placement.step * placement.stride)
    limit = np.maximum(pitch / 2, window.scale)
    small = [level for level in image.present if (np.asarray(level.scale) <= limit).all()]
    try:
        for level in reversed(small or [image.finest]):
            if math.prod(level.array.shape) > MAX_VOXELS:
                return None
            code = encoding(level)
            reader = ChunkReader(level, label, retry_policy=retry_policy, empty=code.empty)
            present = code.present(stored_labels(reader, code, (0, 0, 0), reader.shape))
            if present.any():
                return _tiles(present, level, placement, window)
    except CellMapError as error:
        # A level that nothing else reads must not end a run that can do without this look.
        log.warning("%s: not looked at, so validation tiles are chosen without it: %s", label, error)
        return None
    return nowhere


def _tiles(present: np.ndarray[Any, Any], level: Level, placement: Placement, window: Window) -> IntArray:
    """Numbers of the tiles that cover the centres of some voxels."""
    places = []
    for axis in range(3):
        centers = level.lattice.origin[axis] + level.lattice.step[axis] * np.arange(present.shape[axis], dtype=float)
        place, first = np.unique(placement.tiles_at(axis, centers, float(window.extent[axis])), return_index=True)
        present = np.logical_or.reduceat(present, first, axis=axis)
        places.append(place)
    z, y, x = (place[index] for place, index in zip(places, np.nonzero(present), strict=True))
    found: IntArray = (z * placement.tiles_along[1] + y) * placement.tiles_along[2] + x
    return found
