"""Resampling of a prediction to labels on the voxels that the challenge scores.

Every voxel is resampled once: probabilities are interpolated linearly at its centre (averaged over the voxel where it
is coarser than the prediction) and then compared with the threshold; labels are those of the voxel nearest to it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.evaluation.numbering import Labels, Numbering
from cellmap_lightning.geometry.grids import covering_boxes
from cellmap_lightning.geometry.lattice import Lattice, Shape, box_map, to_vector
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.io.meanings import Meaning, ValuesSetting, meaning_of
from cellmap_lightning.io.ngff import Level, read_multiscale
from cellmap_lightning.splits.manifests import ManifestRow

#: Shape of the blocks that are resampled at a time, voxels.
_BLOCK = (128, 256, 256)


def check_covers(row: ManifestRow, path: Path) -> None:
    """Check that a prediction covers the voxels of a manifest, up to half a voxel of the prediction.

    A prediction consists of the voxels whose centres lie in its bounds. It may end half a voxel before them, where they
    are not multiples of its voxel size.

    Raises:
        CellMapValueError: it does not, or it cannot be read.
    """
    try:
        lattice = read_multiscale(path).finest.lattice
    except CellMapError as e:
        raise CellMapValueError(f"{row.label} cannot be read, or its prediction is not finished: {e}") from e
    box = lattice.box
    first = np.asarray(row.lattice.origin)
    last = first + np.multiply(row.lattice.step, np.subtract(row.lattice.shape, 1))
    fine = 1e-3 * np.asarray(row.lattice.step)  # tolerance of rounded metadata
    slack = np.maximum(0.5 * np.asarray(lattice.step) - fine, fine)
    if (first < box.lower - slack).any() or (last > box.upper + slack).any():
        raise CellMapValueError(
            f"{row.label}: the prediction {path} covers {box}, which does not contain all of {row.lattice.box}"
        )


def stored_meaning(row: ManifestRow, path: Path, values: ValuesSetting = "auto") -> Meaning:
    """Return the meaning of the stored values of a prediction; see `meaning_of`."""
    return meaning_of(read_multiscale(path), row.label, values)


def prediction_labels(
    row: ManifestRow, path: Path, threshold: float, number: Numbering | None, meaning: Meaning
) -> Labels:
    """Return a prediction as labels on the voxels of a manifest.

    Args:
        row: the voxels.
        path: the prediction; see `check_covers`.
        threshold: probability from which a voxel is positive.
        number: function that numbers objects, for a class of instances; stored ids are used unchanged. None for a
            boolean volume.
        meaning: the meaning of stored values; see `stored_meaning`.

    Raises:
        CellMapError: the prediction cannot be read, its values contradict its metadata, or the numbers of objects are
            not integers of at least 0.
    """
    ids = number is not None and meaning.kind == "ids"
    values = _resample(row, read_multiscale(path).finest, meaning, threshold, ids)
    if number is None:
        return values
    numbers = values if ids else np.asarray(number(values))
    if numbers.shape != values.shape or numbers.dtype.kind not in "iub" or (numbers.size and numbers.min() < 0):
        raise CellMapTypeError(
            f"{row.label}: instances must return integers of at least 0 of the shape {list(values.shape)}, "
            f"got {numbers.dtype} {list(numbers.shape)}"
        )
    return numbers


def _resample(row: ManifestRow, level: Level, meaning: Meaning, threshold: float, ids: bool) -> Labels:
    """Return the stored ids, or the mask of the class, on the voxels of a manifest."""
    source = StoredImage(level, ChunkCache(), row.label).region
    stored = level.array.dtype
    dtype = stored if meaning.is_labels else np.dtype(np.float32)
    # Ids in floats, become integers.
    id_type = np.dtype(np.int64) if stored.kind == "f" else stored
    first, inside = _inside(row.lattice, level.lattice)
    result: npt.NDArray[Any] = np.zeros(inside.shape, id_type if ids else bool)
    for start, shape in covering_boxes(inside.shape, _BLOCK):
        block = np.empty(shape, dtype)
        amap = box_map(inside, start, shape, level.lattice)
        evaluate(source, amap, block, method="nearest" if meaning.is_labels else "linear", fill=0)
        inner = tuple(map(slice, *_between(inside, start, shape, level.lattice))) if not meaning.is_labels else ...
        meaning.check(block[inner], row.label)
        present = meaning.present(block, threshold)
        result[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] = (
            np.where(present, block, 0) if ids else present
        )
    # Voxels outside the stored box, within half a stored voxel, repeat the nearest voxel inside.
    pads = [(a, n - a - m) for a, n, m in zip(first, row.lattice.shape, inside.shape, strict=True)]
    return np.pad(result, pads, mode="edge") if any(a or b for a, b in pads) else result


def _between(inside: Lattice, start: Shape, shape: Shape, stored: Lattice) -> tuple[list[int], list[int]]:
    """Return the first and the end of the voxels of a block that lie between the centres of stored voxels.

    Within half a stored voxel of the border the interpolant continues its last slope, so that it may leave the range of
    the stored values there: the values of other voxels alone show that range.
    """
    first = np.asarray(inside.origin) + np.multiply(start, inside.step)
    last = np.asarray(stored.origin) + np.multiply(stored.step, np.subtract(stored.shape, 1))
    low = np.ceil((stored.origin - first) / inside.step - 1e-6).clip(0, shape).astype(int)
    high = np.floor((last - first) / inside.step + 1e-6).astype(int) + 1
    # One stored voxel has no slope.
    low, high = (np.where(np.equal(stored.shape, 1), a, b) for a, b in ((0, low), (shape, high.clip(low, shape))))
    return low.tolist(), high.tolist()


def _inside(lattice: Lattice, stored: Lattice) -> tuple[Shape, Lattice]:
    """Return the index of the first voxel whose centre lies in a stored box, and the lattice of all such voxels."""
    slack = 1e-3 * np.asarray(lattice.step)
    lower = np.ceil((stored.box.lower - slack - lattice.origin) / lattice.step).clip(0).astype(int)
    upper = np.floor((stored.box.upper + slack - lattice.origin) / lattice.step).astype(int) + 1
    z, y, x = (np.minimum(upper, lattice.shape) - lower).clip(1).tolist()
    first = np.minimum(lower, np.subtract(lattice.shape, 1))
    origin = np.asarray(lattice.origin) + first * np.asarray(lattice.step)
    a, b, c = first.tolist()
    return (a, b, c), Lattice(to_vector(origin), lattice.step, (z, y, x))
