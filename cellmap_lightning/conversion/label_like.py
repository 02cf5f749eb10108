"""Volumes of few values, such as masks and label maps, whose coarser levels must not be means."""

import logging

import numpy as np

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.io.label_ids import UNANNOTATED
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.validation import first_few

log = logging.getLogger(__name__)

#: Distinct values up to which a volume counts as labels; raw of 8 bits has more in the first block that is read.
MOST_VALUES = 16


def few_values(reader: ArrayReader, grid: BlockGrid) -> list[int]:
    """Return the values of a volume that has 2 to `MOST_VALUES` of them, sorted; none of another volume.

    All voxels are read; of a volume with more values only as many chunks or blocks as it takes to find them.

    Args:
        reader: whole numbers.
        grid: the blocks that are read at a time.
    """
    z, y, x = (min(n, length) for n, length in zip(reader.chunks, reader.shape, strict=True))
    first: tuple[Shape, Shape] = ((0, 0, 0), (z, y, x))  # enough for most raw
    values: set[int] = set()
    for start, shape in (first, *(grid[number] for number in range(len(grid)))):
        values.update(np.unique(reader.read(start, shape)).tolist())
        if len(values) > MOST_VALUES:
            return []
    return sorted(values) if len(values) > 1 else []


def report_few_values(name: str, values: list[int]) -> None:
    """Log that a volume is converted as labels because it has few values.

    Args:
        name: the input.
        values: its values.
    """
    ids = [value for value in values if value != 0]
    names = ["unknown" if value == UNANNOTATED and len(ids) > 1 else "NAME" for value in ids]
    classes = ",".join(f"{value}:{name}" for value, name in zip(ids, names, strict=True))
    log.warning(
        "%s: holds only the values %s, as labels do, so that coarser levels have the most frequent value instead of "
        "means; for a mask of each class name the classes, 'classes={%s}'; pyramid=mode keeps one image without this "
        "warning, and pyramid=mean is for raw",
        name, first_few(values, MOST_VALUES), classes,
    )  # fmt: skip
