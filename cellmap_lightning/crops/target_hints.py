"""Advice about target paths that name none of the classes, such as the path of a crop or of a mask."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError
from cellmap_lightning.io.formats.registry import find_format, formats
from cellmap_lightning.io.images import image_children, image_exists, read_image
from cellmap_lightning.io.label_ids import UNANNOTATED, UNKNOWN
from cellmap_lightning.io.label_values import stored_ids
from cellmap_lightning.io.ngff import NoImageError, Overrides
from cellmap_lightning.io.store import StorePath
from cellmap_lightning.validation import first_few

#: Ids that an example of a label map has at most.
_MOST_IDS = 8
#: Classes that a message lists at most.
_LISTED = 12
#: Suffixes of volumes that no format of files lists: containers, and a format that is not read.
_OTHER_SUFFIXES = (".zarr", ".n5", ".nii", ".nii.gz")


def target_hint(target_path: TargetPath, read: Sequence[str]) -> str:
    """Return the end of the message for a crop that annotates none of the classes; empty without advice.

    Args:
        target_path: its labels; without a bracket, the last part of the path was read as a class.
        read: the classes that are read.
    """
    advice = _advice(target_path, read)
    return f"; {advice}" if advice else ""


def misread_target(target_path: TargetPath, read: Sequence[str], others_annotate: bool = False) -> str:
    """Return what is wrong with a target whose last part is not the name of a class, and what to write instead.

    The last part is a file, whose suffix belongs to no class, or it stands without a bracket and is not a class.

    Args:
        target_path: the labels of a crop.
        read: the classes that are read.
        others_annotate: whether other crops annotate these classes, so that an array without a bracket is probably
            the annotation of another class.

    Returns:
        The message; empty where the target is right, or annotates other classes only.
    """
    if target_path.label_map or target_path.after:
        return ""
    if len(target_path.names) > 1:
        return _suffixes_hint(target_path)
    name = target_path.names[0]
    if without_suffix(name) == name and (name in read or target_path.bracketed):
        return ""
    if others_annotate and without_suffix(name) == name and _is_image(target_path.of(name)):
        return ""
    return _advice(target_path, [other for other in read if without_suffix(other) == other])


def without_suffix(name: str) -> str:
    """Return the name of a class without the suffix of a file of a volume format.

    Example:
        >>> without_suffix("mito_mask.tif"), without_suffix("mito.v2")
        ('mito_mask', 'mito.v2')
    """
    known = {*_OTHER_SUFFIXES, *(suffix for volume_format in formats() for suffix in volume_format.suffixes)}
    suffix = max((suffix for suffix in known if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(suffix)] or name


def _suffixes_hint(target_path: TargetPath) -> str:
    """Return advice for a bracket of several classes that names files with their suffixes; empty for others."""
    names = target_path.names
    files = [name for name in names if without_suffix(name) != name and image_exists(target_path.of(name))]
    if not files:
        return ""
    bracket = _beside(f"{target_path.before}/", f"[{','.join(map(without_suffix, names))}]")
    return f'the bracket names files ({", ".join(files)}), whose classes are named without suffixes: write "{bracket}"'


def _advice(target_path: TargetPath, read: Sequence[str]) -> str:
    """Return what a target is, and what to write instead; empty without advice."""
    if len(target_path.names) != 1 or target_path.label_map:
        return ""
    name = target_path.names[0]
    path, shown = target_path.of(name), _shown(target_path)
    inside = [other for other in read if image_exists(path / other)]
    if inside:
        return _folder_hint(shown, _stored(path) or inside, inside)
    if isinstance(path, Path) and path.exists() and find_format(path) is not None:
        stem = without_suffix(name)
        if stem in read or not read:
            bracket = _beside(shown, f"[{stem}]")
            return f'{shown!r} is a file, whose class is named without its suffix, {stem}: write "{bracket}"'
        return _label_map_hint(path, shown, read)
    if target_path.bracketed and without_suffix(name) == name:
        return ""
    return _unbracketed_hint(path, shown, name, read)


def _unbracketed_hint(path: StorePath, shown: str, name: str, read: Sequence[str]) -> str:
    """Return advice for a path in a container that is the array of another class, a folder of classes, or neither."""
    if _is_image(path):
        label_map = _label_map(_ids(path), read)
        other = "" if without_suffix(name) != name else f", or name it as a class: classes=[{name}]"
        return (
            f"{shown!r} is one array, and no folder of classes, so that its name {name!r} was read as the class: give "
            f"its entry labels={label_map} (in a CSV in the column labels, with quotes){other}"
        )
    stored = _stored(path)
    if stored and all(_is_image(path / child) for child in stored[:_LISTED]):
        return _folder_hint(shown, stored, [])
    if not image_exists(path):
        return ""  # its error lists what is beside it
    held = f"; it holds {first_few(stored, _LISTED)}" if stored else ""
    return (
        f"{shown!r} is neither a label image nor a folder of classes{held}; the target of a crop is written as in "
        ".../crop1/[mito,er]"
    )


def _folder_hint(shown: str, stored: Sequence[str], inside: Sequence[str]) -> str:
    """Return advice for a folder of classes; ``inside`` are the requested ones that it holds."""
    classes = first_few(stored, _LISTED)
    text = f"{shown!r} is a folder of classes ({classes})"
    if inside:
        return f'{text}; write "{shown}/[{",".join(inside)}]"'
    bracket = f"{shown}/[{','.join(stored[:_LISTED])}]"
    return f'{text}, none of which is requested; write "{bracket}" and request them with classes'


def _stored(path: StorePath) -> list[str]:
    """Return the names of the folders, files and arrays in a folder; empty where it cannot be listed."""
    try:
        return sorted(image_children(path))
    except CellMapError:
        return []


def _shown(target_path: TargetPath) -> str:
    """Return the path as it was written, without a bracket."""
    name = target_path.names[0]
    if "://" in target_path.before or target_path.before.startswith("~"):
        return str(target_path.of(name))
    return _beside(f"{target_path.before}/{name}", name)


def _beside(path: str, name: str) -> str:
    """Return the path of another name in the folder of a path."""
    folder = path.rpartition("/")[0]
    return name if folder in ("", ".") else f"{folder}/{name}"


def _is_image(path: StorePath) -> bool:
    """Return True if a path is an image, even one whose metadata are incomplete."""
    try:
        read_image(path, allow_turned=True)
    except (NoImageError, CellMapFileNotFoundError):
        return False
    except CellMapError:
        return True
    return True


def _label_map(ids: Sequence[int], read: Sequence[str]) -> str:
    """Return a label map for the ids of an array: of the class that is read, or of a NAME to replace."""
    if len(ids) > _MOST_IDS:
        return "{ID: NAME, ...}"
    present = [i for i in ids if i != UNANNOTATED or len(ids) == 1]
    name = read[0] if len(present) == len(read) == 1 else "NAME"  # the order of several is not known
    pairs = ", ".join(f"{i}: {name if i in present else UNKNOWN}" for i in ids)
    return f"{{{pairs or '1: NAME'}}}"


def _label_map_hint(path: Path, shown: str, read: Sequence[str]) -> str:
    """Return advice for a file or a folder of sections that is the mask of a class, or holds the ids of several."""
    label_map, output = _label_map(_ids(path), read), Path(shown).with_suffix(".zarr")
    name = read[0] if len(read) == 1 and f": {read[0]}" in label_map else "NAME"
    given = shlex.join([f"input={shown}", f"output={output}", f"classes={label_map}"])
    size = "" if _has_voxel_size(path) else " voxel_size=[z,y,x]"
    return (
        f"{shown} is an array of ids: give its entry labels={label_map} (in a CSV in the column labels, with quotes), "
        f"or convert it, cellmap-convert {given}{size}, and give the target "
        f"{output}/[{name}]"
    )


def _ids(path: StorePath) -> list[int]:
    """Return the ids of an array, except the background: a few, and none if it cannot be read."""
    try:
        image = read_image(path, Overrides.parse(voxel_size=[1, 1, 1]))  # which has no effect on ids
        return [i for i in stored_ids(image.finest, str(path)) if i != 0][: _MOST_IDS + 1]
    except CellMapError:
        return []


def _has_voxel_size(path: Path) -> bool:
    try:
        read_image(path)
    except CellMapError:
        return False
    return True
