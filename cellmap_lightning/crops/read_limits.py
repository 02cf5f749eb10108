"""Limits of what samples read, against wrong voxel sizes: refused at setup, before a sample takes gigabytes."""

from collections.abc import Iterable

import numpy as np

from cellmap_lightning.cache.patches import BLOCK
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Box, FloatArray, Lattice, Vector
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.ngff.notes import FOR_ENTRY
from cellmap_lightning.io.ngff.transformations import suspected_unit

#: Voxels of an array along an axis of one voxel of a patch, at most. Pyramids halve voxels, and patches are read from
#: the level nearest in size, so that even an image without coarser levels needs no more than some tens.
MOST_AVERAGED = 1000
#: Bytes, as float32, of the stored voxels from which a block of at most 64 voxels along each axis is computed, at most.
MOST_READ_BYTES = 1 << 34
#: Part of a crop inside raw below which a crop whose raw has a wrong voxel size counts as lying outside.
LEAST_INSIDE = 5e-4


def check_inside(label: str, input_path: str, crop: Box, voxel: FloatArray, volume: Box, raw_voxel: Vector) -> None:
    """Check that labels do not lie outside raw, save for the corner where both begin.

    Volumes that begin at 0 share that corner, however small a wrong voxel size makes one of them.

    Args:
        label: the crop, for messages.
        input_path: its raw, for messages.
        crop: the box of its labels, nm.
        voxel: voxel size of the labels, nm.
        volume: the box of raw, nm.
        raw_voxel: voxel size of raw, nm.

    Raises:
        CellMapValueError: they do.
    """
    where = f"{label}: the labels ({crop}) lie outside the raw volume {input_path} ({volume})"
    if not crop.intersects(volume):
        raise CellMapValueError(where)
    shared = np.minimum(crop.upper, volume.upper) - np.maximum(crop.lower, volume.lower)
    inside = float(np.prod(np.clip(shared / crop.extent, 0, 1)))
    suspicion = suspected_unit(raw_voxel, "raw's")
    if inside < LEAST_INSIDE and (suspicion or (volume.extent < voxel / 2).any()):
        raise CellMapValueError(
            f"{where}, save for {100 * inside:.2g} % of them; "
            f"{suspicion or 'set voxel_size=[z, y, x] in nm of raw or of the labels'}{FOR_ENTRY}"
        )


def check_reads(label: str, reads: Iterable[tuple[str, Window, Lattice]]) -> None:
    """Check that no patch needs more stored voxels than any resampling does.

    Args:
        label: the crop, for messages.
        reads: name of each input or target, a patch of it along the axes of the volume, and an array it is read from.

    Raises:
        CellMapValueError: one does.
    """
    for name, window, lattice in reads:
        if lattice.turn is not None:
            ratio = np.full(3, np.max(window.scale) / np.min(lattice.step))
        else:
            ratio = np.divide(window.scale, lattice.step)
        advice = suspected_unit(lattice.step) or "set its voxel_size=[z, y, x] in nm if the stored one is wrong"
        sizes = " x ".join(f"{step:g}" for step in lattice.step)
        where = f"{label}: {name}: voxels of {' x '.join(f'{s:g}' for s in window.scale)} nm"
        axis = int(np.argmax(ratio))
        if ratio[axis] > MOST_AVERAGED:
            raise CellMapValueError(
                f"{where} from an array with voxels of {sizes} nm are means over {ratio[axis]:.3g} of them "
                f"along {AXES[axis]}, and at most {MOST_AVERAGED} are allowed; {advice}{FOR_ENTRY}, or choose a finer "
                f"scale of {name}"
            )
        stored = np.minimum(np.ceil(np.minimum(window.shape, BLOCK) * ratio) + 2, lattice.shape)
        nbytes = 4 * float(np.prod(stored))
        if nbytes > MOST_READ_BYTES:
            raise CellMapValueError(
                f"{where} need {nbytes / 2**30:.3g} GiB of the array with voxels of {sizes} nm at a time, and at most "
                f"{MOST_READ_BYTES / 2**30:g} GiB are allowed; {advice}{FOR_ENTRY}, write coarser levels, or choose a "
                f"finer scale of {name}"
            )
