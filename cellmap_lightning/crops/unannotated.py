"""Classes that no crop annotates: an error, or targets that are unknown everywhere."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from cellmap_lightning.crops.spelling import closest_class
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.validation import first_few

log = logging.getLogger(__name__)

#: What becomes of a class that no crop annotates, or that a bracket names without a folder.
UnannotatedClasses = Literal["error", "unknown"]
#: Kinds of targets that separate objects which touch.
_SEPARATING = ("affinities", "boundary", "instances", "lsd", "flow")
#: Crops, and classes, that a message names.
_NAMED, _LISTED = 3, 8


def check_unannotated_classes(value: Any) -> UnannotatedClasses:
    """Check the setting ``unannotated_classes``.

    Raises:
        CellMapValueError: it is not one of its values.
    """
    if value not in get_args(UnannotatedClasses):
        raise CellMapValueError(
            f"unannotated_classes must be one of {', '.join(get_args(UnannotatedClasses))}, got {value!r}"
        )
    policy: UnannotatedClasses = value
    return policy


def refuse_unannotated(split: str, nowhere: Sequence[str], listed: Sequence[str]) -> None:
    """Refuse to train on classes that no crop annotates, and warn of them in other splits.

    Args:
        split: whose crops they are.
        nowhere: classes that none of them annotates.
        listed: the classes that they do annotate.

    Raises:
        CellMapValueError: there are such classes in the train split.
    """
    if nowhere and split == "train":
        raise CellMapValueError(
            f"no crop for 'train' annotates {first_few([*map(repr, nowhere)], _LISTED)}{_hint(nowhere, listed)}; "
            f"they annotate {', '.join(listed)}: leave it out of classes, or set unannotated_classes=unknown for "
            "targets that are NaN"
        )
    if nowhere:
        log.warning(
            "no crop for %r annotates %s: nothing is measured for them there", split, first_few(nowhere, _LISTED)
        )


def report_unannotated(
    split: str,
    nowhere: Sequence[str],
    listed: Sequence[str],
    absent: Mapping[str, Sequence[str]],
    labels_kind: bool = False,
) -> None:
    """Warn of the classes whose targets are unknown because no crop annotates them, or their folder is missing.

    Args:
        split: whose crops they are.
        nowhere: classes that none of its crops annotates.
        listed: the classes that they do annotate.
        absent: classes without a folder, with the crops whose brackets name them.
        labels_kind: whether a target numbers the classes, for which all of them must be known.
    """
    parts = [f"no crop annotates {first_few(nowhere, _LISTED)}{_hint(nowhere, listed)}"] if nowhere else []
    if absent:
        places = "; ".join(f"{name} in {first_crops(crops)}" for name, crops in absent.items())
        parts.append(f"classes in brackets of target paths have no folder ({places})")
    if parts:
        more = ", and in targets of kind 'labels' no voxel is background" if labels_kind and nowhere else ""
        log.warning(
            "%s: %s; their targets are unknown (NaN) there, so that nothing is learnt or measured of them%s",
            split, ", and ".join(parts), more,
        )  # fmt: skip


def report_masks(crops: Iterable[Any], kinds: Collection[str], reported: set[str]) -> None:
    """Warn of classes whose objects targets separate, and whose annotations are masks in all crops; once for each.

    Args:
        crops: the crops of a split, as `Crop`.
        kinds: the kinds of the targets.
        reported: classes of earlier warnings, to which new ones are added.
    """
    apart = [kind for kind in _SEPARATING if kind in kinds]
    if not apart:
        return
    masks: dict[str, bool] = {}
    for crop in crops:
        for name in crop.annotated:
            masks[name] = masks.get(name, True) and name in crop.labels.encodings.masks
    for name in [name for name, is_mask in masks.items() if is_mask and name not in reported]:
        reported.add(name)
        log.warning(
            "%s: its annotations are masks without ids of objects: all objects are one in targets of kind %s; number "
            "them with cellmap-segment method=components, and give its output as the labels",
            name, " and ".join(map(repr, apart)),
        )  # fmt: skip


def _hint(nowhere: Sequence[str], listed: Sequence[str]) -> str:
    closest = (closest_class(name, listed) for name in nowhere)
    close = list(dict.fromkeys(name for name in closest if name is not None))[:_NAMED]
    return f" (did you mean {' and '.join(map(repr, close))}?)" if close else ""


def first_crops(labels: Sequence[str]) -> str:
    """Return the names of crops, of many only the first ones."""
    names = list(dict.fromkeys(labels))  # several planes are datasets of one crop
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
