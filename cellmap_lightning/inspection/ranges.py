"""Problems of float raw whose values are not in the range that the normalization assumes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cellmap_lightning.crops.raw_range import range_problem
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.inspection.facts import VolumeFacts
from cellmap_lightning.inspection.problems import Problem
from cellmap_lightning.io.images import read_image
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.transforms.normalization import AUTO, Normalize


def range_problems(
    volumes: Sequence[VolumeFacts], entries: Mapping[str, Sequence[CropRecord]], settings: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield a problem for each volume whose values contradict the normalization of its entry.

    Args:
        volumes: the raw volumes.
        entries: the crops of each split.
        settings: arguments of `CellMapDataModule`.
    """
    transforms = settings.get("raw_value_transforms", AUTO)
    if transforms != AUTO and not (isinstance(transforms, Mapping) and AUTO in transforms.values()):
        return
    names = {volume.path: volume.name for volume in volumes if volume.wrong is None}
    by_path = {entry.input_path: entry for of_split in entries.values() for entry in of_split}
    for path, entry in by_path.items():
        rule = settings.get("normalize") or "dtype" if entry.normalize is None else entry.normalize
        try:
            text = range_problem(read_image(path, entry.overrides[0], allow_turned=True), Normalize.parse(rule))
        except CellMapError:
            continue  # reported as a problem of the volume, or of the configuration
        if text is not None and path in names:
            yield Problem("range", names[path], text)
