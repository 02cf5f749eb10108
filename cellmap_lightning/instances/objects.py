"""The list of the objects of a segmentation, as a CSV file."""

import csv
from pathlib import Path

import numpy as np

from cellmap_lightning.geometry.lattice import AXES, Lattice
from cellmap_lightning.instances.measures import Measures
from cellmap_lightning.prediction.durable import flush

#: The columns: id, class, size, centre of mass and box in nm (edges of voxels included), and the area at the border of
#: the volume, by which cut objects are recognised.
COLUMNS = (
    "id", "class", "voxels", "volume_nm3",
    *(f"center_{axis}_nm" for axis in AXES),
    *(f"{end}_{axis}_nm" for axis in AXES for end in ("min", "max")),
    "border_area_nm2",
)  # fmt: skip
#: Rows that are converted at a time.
_ROWS = 1 << 16


def write_objects(path: Path, name: str, measures: Measures, lattice: Lattice) -> None:
    """Write the list of objects atomically.

    Args:
        path: the file.
        name: the class.
        measures: the measures of the objects, whose ids are their rows plus 1.
        lattice: the voxels.
    """
    origin, step = np.asarray(lattice.origin), np.asarray(lattice.step)
    faces = np.prod(step) / step
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for first in range(0, len(measures), _ROWS):
            rows = measures[slice(first, first + _ROWS)]
            centers = origin + step * (rows.sums / rows.voxels[:, None])
            boxes = np.stack([origin + step * (rows.low - 0.5), origin + step * (rows.high + 0.5)], axis=2)
            numbers = np.column_stack([
                rows.voxels * np.prod(step), centers, boxes.reshape(len(rows), 6), rows.border @ faces
            ])  # fmt: skip
            for offset, (voxels, values) in enumerate(zip(rows.voxels.tolist(), numbers.tolist(), strict=True)):
                writer.writerow([first + offset + 1, name, voxels, *(f"{value:.10g}" for value in values)])
    flush([str(draft)])
    draft.replace(path)
