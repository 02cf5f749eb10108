"""Names of the crops of a split, from the paths of their raw volumes and labels."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from cellmap_lightning.crops.crop_name import CropName, container_of
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.store import parts_of
from cellmap_lightning.splits.entries import CropRecord


def dataset_and_crop(input_path: str, target: TargetPath | None) -> tuple[str, str]:
    """Return the dataset of a crop, and the crop's path inside it; both independent of where the data are stored.

    The dataset is the name of the Zarr container, or else of the deepest folder that holds raw and target.
    """
    path = parts_of(target.before) if target else parts_of(input_path)
    container = container_of(path.parents if target else (path, *path.parents))
    if container is not None:
        return container.stem, path.relative_to(container).as_posix()
    raw = parts_of(input_path)
    if target is None:
        return raw.name, raw.name
    shared = [a for a, b in zip(raw.parts, path.parts, strict=False) if a == b]
    return PurePosixPath(*shared).name if shared else raw.name, path.name


def target_of(entry: CropRecord) -> TargetPath | None:
    """Return the target of an entry; None if it is malformed, which raises an error when the crop is opened."""
    try:
        return entry.target
    except CellMapError:
        return None


def crop_name(entry: CropRecord) -> CropName:
    """Return the name of an entry, by which filters select it: ``jrc_hela-2/crop1``."""
    dataset, inside = dataset_and_crop(entry.input_path, target_of(entry))
    return CropName(dataset, PurePosixPath(inside).name)


def crop_names(entries: Sequence[CropRecord]) -> list[CropName]:
    """Return the name of each entry: ``jrc_hela-2/crop1``, or with the whole path inside if that is ambiguous."""
    locations = [dataset_and_crop(entry.input_path, target_of(entry)) for entry in entries]
    paths: dict[CropName, set[str]] = {}
    for dataset, inside in locations:
        paths.setdefault(CropName(dataset, PurePosixPath(inside).name), set()).add(inside)
    names = []
    for dataset, inside in locations:
        name = CropName(dataset, PurePosixPath(inside).name)
        names.append(name if len(paths[name]) == 1 else CropName(dataset, inside))
    return names
