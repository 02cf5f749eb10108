"""The split of each crop in a configuration, and the crops that it leaves out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from cellmap_lightning.crops.crop_labels import TooCoarseError
from cellmap_lightning.inspection.facts import CropFacts
from cellmap_lightning.splits.crop_names import crop_name
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import SPLITS, CropRecord

#: Reasons for which a crop is left out, apart from the resolution of its labels.
NO_CLASS = "annotated for none of the classes"
OTHER_DATASET = "of a dataset that only_datasets of the proposal leaves out"

_Key = tuple[str, str]


def placed(
    crops: Sequence[CropFacts],
    listed: Iterable[CropRecord],
    splits: CellMapDataSplit,
    coarse: str,
    only_datasets: Sequence[str] | None,
    read: Callable[[Sequence[tuple[str, CropRecord]]], Sequence[CropFacts]],
) -> list[CropFacts]:
    """Return the facts of crops with the split of each in a configuration, or the reason why it is left out.

    Args:
        crops: the crops as they are listed.
        listed: their entries, before crops are cut.
        splits: the opened splits of the configuration.
        coarse: the reason where the labels of a crop are too coarse.
        only_datasets: the datasets that the proposal keeps; None for all.
        read: function that reads the facts of boxes that are not among the crops: ``split=blocks`` cuts by the patch.
    """
    reasons = _reasons(splits, coarse)
    in_use = [(split, entry) for split in SPLITS for entry in splits.entries.get(split, []) if entry.target_path]
    by_key = {(crop.where, _box(crop.metadata.get("box"))): crop for crop in crops}
    entries = {entry.where: entry for entry in listed}
    # The entries of the configuration may have fewer classes than those of the report.
    new = [
        (split, replace(entries[entry.where], metadata=entry.metadata))
        for split, entry in in_use
        if _key(entry) not in by_key
    ]
    by_key |= {(crop.where, _box(crop.metadata.get("box"))): crop for crop in read(new)}
    results = [replace(by_key[_key(entry)], usage=split, left_out=reasons.get(_key(entry))) for split, entry in in_use]
    seen = {entry.where for _, entry in in_use}
    return [*results, *(_excluded(crop, only_datasets) for crop in crops if crop.where not in seen)]


def left_out(
    crops: Sequence[CropFacts], splits: CellMapDataSplit, coarse: str, only_datasets: Sequence[str] | None
) -> list[CropFacts]:
    """Return the facts of crops with the reasons for which a configuration that cuts them leaves some out.

    Args:
        crops: the crops, which are not cut.
        splits: see `placed`.
        coarse: see `placed`.
        only_datasets: see `placed`.
    """
    reasons = {where: reason for (where, _), reason in _reasons(splits, coarse).items()}
    used = {entry.where for split in SPLITS for entry in splits.entries.get(split, [])}
    return [
        replace(crop, left_out=reasons.get(crop.where)) if crop.where in used else _excluded(crop, only_datasets)
        for crop in crops
    ]


def _reasons(splits: CellMapDataSplit, coarse: str) -> dict[_Key, str]:
    """Return why crops are left out that a configuration has."""
    return {
        _key(entry): coarse if isinstance(error, TooCoarseError) else NO_CLASS
        for of in splits.left_out.values()
        for entry, error in of
    }


def _excluded(crop: CropFacts, only_datasets: Sequence[str] | None) -> CropFacts:
    """Return the facts of a crop that a configuration does not have, with the reason."""
    dataset = crop_name(CropRecord(crop.where, crop.raw, crop.target)).dataset
    is_other = only_datasets is not None and dataset not in only_datasets
    return replace(crop, left_out=OTHER_DATASET if is_other else NO_CLASS)


def _key(entry: CropRecord) -> _Key:
    return entry.where, _box(entry.metadata.get("box"))


def _box(box: object) -> str:
    return "" if box is None else str(box)
