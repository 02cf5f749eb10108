"""Advice about target paths that name none of the classes, such as the path of a crop or of a mask."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.formats.registry import find_format
from cellmap_lightning.io.images import image_exists, read_image
from cellmap_lightning.io.label_ids import UNANNOTATED, UNKNOWN
from cellmap_lightning.io.label_values import stored_ids
from cellmap_lightning.io.ngff import Overrides

#: Ids that an example of a label map has at most.
_MOST_IDS = 8


def target_hint(target_path: TargetPath, read: Sequence[str]) -> str:
    """Return the end of the message for a crop that annotates none of the classes; empty without advice.

    Args:
        target_path: its labels; without a bracket, the last part of the path was read as a class.
        read: the classes that are read.
    """
    if len(target_path.names) != 1 or target_path.label_map:
        return ""
    path = target_path.of(target_path.names[0])
    inside = [name for name in read if image_exists(path / name)]
    if inside:
        return f"; name the classes in a bracket, as in {path}/[{','.join(inside)}]"
    if not isinstance(path, Path) or not path.exists() or find_format(path) is None:
        return ""
    if path.suffix and path.stem in read:
        return f"; name the class without the suffix of its file, as in {path.with_suffix('')}"
    return _label_map_hint(path, read)


def _label_map_hint(path: Path, read: Sequence[str]) -> str:
    """Return advice for a file or a folder of sections that is the mask of a class, or holds the ids of several."""
    ids = _ids(path)
    present = [i for i in ids if i != UNANNOTATED or len(ids) == 1]
    name = read[0] if len(present) == len(read) == 1 else "NAME"  # the order of several is not known
    pairs = ", ".join(f"{i}: {name if i in present else UNKNOWN}" for i in ids)
    label_map, output = f"{{{pairs or '1: NAME'}}}", path.with_suffix(".zarr")
    given = shlex.join([f"input={path}", f"output={output}", f"classes={label_map}"])
    size = "" if _has_voxel_size(path) else " voxel_size=[z,y,x]"
    return (
        f"; {path} is an array of ids: give its entry labels={label_map} (in a CSV in the column labels, with quotes), "
        f"or convert it, cellmap-convert {given}{size}, and give the target "
        f"{output}/[{name}]"
    )


def _ids(path: Path) -> list[int]:
    """Return the ids of an array, except the background; at most `_MOST_IDS`, and none if it cannot be read."""
    try:
        image = read_image(path, Overrides.parse(voxel_size=[1, 1, 1]))  # which has no effect on ids
        return [i for i in stored_ids(image.finest, str(path)) if i != 0][:_MOST_IDS]
    except CellMapError:
        return []


def _has_voxel_size(path: Path) -> bool:
    try:
        read_image(path)
    except CellMapError:
        return False
    return True
