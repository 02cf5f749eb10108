"""Crops whose folders or brackets spell a class otherwise than the setting ``classes``."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cellmap_lightning.crops.spelling import other_spellings
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.splits.crop_names import target_of
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.splits.manifests import ListedCrop
from cellmap_lightning.validation import first_few, with_form

log = logging.getLogger(__name__)

#: Crops that a line names.
_LISTED = 8


@dataclass(frozen=True)
class OtherSpelling:
    """A class that a crop annotates under another spelling, so that it is unannotated there.

    Attributes:
        where: the entry, for messages and for filters.
        crop: name of the crop.
        name: the class.
        stored: the other spelling.
    """

    where: str
    crop: str
    name: str
    stored: str


def spelt_otherwise(
    crops: Sequence[ListedCrop],
    listed: Mapping[str, Sequence[CropRecord]],
    classes: Sequence[str],
    read: Callable[[Sequence[str]], Sequence[str]],
) -> list[OtherSpelling]:
    """Return the classes that crops annotate under another spelling.

    Args:
        crops: the crops of a folder or a manifest; empty without one.
        listed: otherwise the entries of each split.
        classes: the requested classes.
        read: function that returns the classes to read of those that a crop annotates.
    """
    named: list[tuple[str, str, Sequence[str]]] = []
    if crops:
        named = [(crop.where, TargetPath.parse(f"{crop.folder}/[_]").label, crop.classes) for crop in crops]
    else:
        for split, entries in listed.items():
            targets = [(entry, target_of(entry)) for entry in entries] if split != "predict" else []
            named += [(entry.where, target.label, target.names) for entry, target in targets if target is not None]
    return [
        OtherSpelling(where, crop, name, stored)
        for where, crop, annotated in named
        for name, stored in other_spellings(classes, annotated, read(annotated)).items()
    ]


def report_spellings(found: Sequence[OtherSpelling]) -> None:
    """Warn of classes that crops annotate under another spelling, in one message."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for item in found:
        pairs.setdefault((item.name, item.stored), []).append(item.crop)
    if pairs:
        lines = "; ".join(
            f"{name!r} is {with_form(stored, name)} in {first_few(crops, _LISTED)}"
            for (name, stored), crops in pairs.items()
        )
        log.warning(
            "classes are spelt otherwise in some crops, and unannotated there: %s; rename the folders, correct the "
            "label maps, or list the other spelling in classes too if it is another class",
            lines,
        )
