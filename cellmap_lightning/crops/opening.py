"""Opening of a crop: the metadata of raw and of each class that is read."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellmap_lightning.crops.counts import unknown_in_metadata
from cellmap_lightning.crops.spelling import meant
from cellmap_lightning.crops.target_hints import misread_target, target_hint
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.io.images import image_exists, read_image, replaced_values
from cellmap_lightning.io.ngff import Multiscale, Note, Overrides, report
from cellmap_lightning.io.store import StorePath, prefetch_metadata

log = logging.getLogger(__name__)


class NotAnnotatedError(CellMapValueError):
    """A crop annotates none of the classes."""


@dataclass(frozen=True, eq=False)
class CropImages:
    """The images of a crop.

    Attributes:
        raw: the raw image.
        labels: the label image of each class that is read and annotated.
        absent: names in the bracket without a folder, if these are tolerated.
    """

    raw: Multiscale
    labels: dict[str, Multiscale]
    absent: tuple[str, ...] = ()


def open_images(
    label: str,
    raw_path: StorePath,
    target_path: TargetPath | None,
    classes: Sequence[str],
    read: Sequence[str],
    overrides: tuple[Overrides, Overrides],
    tolerant: bool = False,
) -> CropImages:
    """Read the metadata of all levels of raw and of each class that is read and annotated.

    Args:
        label: name of the crop, for messages.
        raw_path: the raw image.
        target_path: the label images; None for raw only.
        classes: the classes of the targets.
        read: the classes to read: these, and those that imply something about them.
        overrides: replacements for the metadata of raw and of labels.
        tolerant: names in the bracket may have no folder.

    Raises:
        NotAnnotatedError: none of ``read`` is annotated.
        CellMapValueError: raw is the label array of a class.
        CellMapError: the problem with one image, or a list of all problems.
    """
    paths: dict[str, StorePath] = {"raw": raw_path}
    absent: list[str] = []
    if target_path is not None:
        absent += _check_classes(target_path, classes, read, tolerant)
        groups = _class_groups(label, target_path, classes, read)
        prefetch_metadata(list(groups.values()))
        paths |= groups
    images: dict[str, Multiscale] = {}
    problems: list[CellMapError] = []
    for key, path in paths.items():
        try:
            images[key] = _read(key, path, target_path, overrides)
        except CellMapError as e:
            missing = _missing_class(target_path, key)
            if missing is not None and tolerant:
                absent.append(key.removeprefix("class "))
            else:
                problems.append(missing or e)
    _raise_all(label, problems)
    raw = images.pop("raw")
    _check_not_raw(label, raw, images)
    _warn_of_unknown(label, images)
    return CropImages(raw, {key.removeprefix("class "): image for key, image in images.items()}, tuple(absent))


def _check_classes(
    target_path: TargetPath, classes: Sequence[str], read: Sequence[str], tolerant: bool
) -> Sequence[str]:
    """Return the names in the bracket that are unknown, which only a tolerant reader accepts.

    Raises:
        CellMapError: a name is unknown, or a class is spelled differently.
    """
    known = list(dict.fromkeys((*classes, *read)))
    if tolerant:
        return target_path.unknown_names(known)
    target_path.check_names(known)
    target_path.check_spelling(classes, known)
    return ()


def _class_groups(
    label: str, target_path: TargetPath, classes: Sequence[str], read: Sequence[str]
) -> dict[str, StorePath]:
    """Return the label image of each class that is read and annotated.

    Raises:
        NotAnnotatedError: there is none.
        CellMapValueError: the labels are not those of single classes.
    """
    annotated = [name for name in read if name in target_path.names]
    misread = misread_target(target_path, read) if annotated else ""
    if misread:
        raise CellMapValueError(f"{label}: {misread}")
    if not annotated:
        raise NotAnnotatedError(
            f"{label}: none of the classes {list(classes)} is annotated in it; it has {list(target_path.names)}"
            f"{target_hint(target_path, read) or meant(classes, target_path.names)}"
        )
    target_path.check_single(annotated)
    return {f"class {name}": target_path.of(name) for name in annotated}


def _raise_all(label: str, problems: Sequence[CellMapError]) -> None:
    """Raise the only problem, or a list of several; nothing without any."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CellMapValueError(
            f"{label}: {len(problems)} things are wrong:" + "".join(f"\n    - {e}" for e in problems)
        )


def _check_not_raw(label: str, raw: Multiscale, images: Mapping[str, Multiscale]) -> None:
    """Check that raw is not the label array of a class.

    Raises:
        CellMapValueError: it is, so that the input would be the target.
    """

    def place(image: Multiscale) -> str:
        path = image.finest.path
        return os.path.realpath(path) if isinstance(path, Path) else str(path)

    for key, image in images.items():
        if place(image) == place(raw):
            raise CellMapValueError(
                f"{label}: raw and the {key} are the same array {raw.finest.path}, so that the input would be the "
                "target; give the path of the grey values as raw"
            )


def _warn_of_unknown(label: str, images: Mapping[str, Multiscale]) -> None:
    for key, image in images.items():
        unknown, voxels = unknown_in_metadata(image), math.prod(image.finest.array.shape)
        if unknown == voxels:
            log.warning("%s, %s: by its metadata all %d voxels are unknown", label, key, voxels)


def _read(
    key: str, path: StorePath, target_path: TargetPath | None, overrides: tuple[Overrides, Overrides]
) -> Multiscale:
    """Return the image of raw or of a class, after a report of what was assumed about its metadata.

    Raises:
        CellMapError: it cannot be read, or its metadata have no usable geometry.
    """
    if target_path is None or key == "raw":
        image = read_image(path, overrides[0], allow_turned=True)
    else:
        image = target_path.read(key.removeprefix("class "), overrides[1])
    reversed_values = replaced_values(path, overrides[0 if key == "raw" else 1], reversed_only=True)
    report(image.path, [Note("order", text) for text in reversed_values])
    _ = image.finest.lattice  # raises if the metadata have no usable geometry
    report(image.path, image.notes)
    return image


def _missing_class(target_path: TargetPath | None, key: str) -> CellMapError | None:
    """Return the error for a class that does not exist, which lists those that do; None if it exists.

    Raises:
        CellMapFileNotFoundError: the crop as a whole does not exist.
    """
    if target_path is None or key == "raw":
        return None
    try:
        target_path.existing(key.removeprefix("class "))
    except CellMapError as e:
        if not image_exists(target_path.crop):
            raise
        return e
    return None
