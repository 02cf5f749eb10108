"""Division of crops into splits, by filters and by a rule, from their metadata."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cellmap_lightning.batches.arrays import ArraySpecs, parse_targets
from cellmap_lightning.crops.options import LabelOptions
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, FloatArray
from cellmap_lightning.splits.crop_metadata import CropMetadata, dataset_and_crop, look
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.splits.manifests import Filter
from cellmap_lightning.splits.opening import for_all
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.splits.rules import Crop, assign, missing_classes
from cellmap_lightning.transforms.implied import Implications

log = logging.getLogger(__name__)


class Division:
    """Division of crops into splits.

    Args:
        source: where the crops come from, for messages.
        options: the filters and the rule.
        classes: the classes that are asked for; None for raw only.
        target_arrays: the targets, of which the voxel sizes count.
        labels: what labels mean.
        seed: seed of the rule.

    Raises:
        CellMapError: a filter that is none.
    """

    def __init__(
        self,
        source: str,
        options: SplitOptions,
        classes: Sequence[str] | None,
        target_arrays: ArraySpecs | None,
        labels: LabelOptions,
        seed: int,
    ) -> None:
        self.source, self.options, self.classes = source, options, classes
        self._target_arrays, self._labels = target_arrays, labels
        self._rule: dict[str, Any] = {
            "val_fraction": options.val_fraction, "fold": options.fold, "n_folds": options.n_folds, "seed": seed
        }  # fmt: skip
        self._filter = Filter(options.only_datasets, options.only_crops)
        self._holdings: dict[tuple[str, str | None], CropMetadata | None] = {}

    def read_classes(self, annotated: Sequence[str]) -> tuple[str, ...]:
        """Return the classes that are asked for, and those that imply something about them."""
        labels = self._labels
        return Implications(
            self.classes or (), annotated, labels.infer, labels.class_table, labels.class_relation_dict
        ).read

    def divide(self, given: Mapping[str, list[CropRecord]]) -> dict[str, list[CropRecord]]:
        """Return the crops of each split, by the filters and by the rule.

        Args:
            given: the crops as the CSV, or ``datasets``, has them.

        Raises:
            CellMapError: the crops cannot be divided like this, or none fits a filter.
        """
        given = dict(given)
        if self._filter:
            annotated = [(split, entry) for split in ("train", "val", "test") for entry in given.get(split, [])]
            kept = self._filter.kept([_named(entry) for _, entry in annotated])
            given = {"predict": given["predict"]} if "predict" in given else {}
            for (split, entry), wanted in zip(annotated, kept, strict=True):
                if wanted:
                    given.setdefault(split, []).append(entry)
            if not any(kept):
                raise CellMapValueError(f"no crop of {self.source} is left by only_datasets and only_crops")
        if self.options.split == "csv":
            return given
        pool = [*given.get("train", []), *given.get("val", [])]
        for entry in pool:
            if entry.dataset is not None:
                raise CellMapTypeError(
                    f"{entry.where}: a dataset that was made with is_train={entry.dataset.is_train} cannot be moved by "
                    f"split={self.options.split}; give its paths instead"
                )
        if not pool:
            raise CellMapValueError(
                f"split={self.options.split} divides the crops for train and val, and {self.source} has none"
            )
        usages = self._usages(pool)
        rest = {split: entries for split, entries in given.items() if split not in ("train", "val")}
        divided = {
            split: [entry for entry, usage in zip(pool, usages, strict=True) if usage == split]
            for split in ("train", "val")
        }
        return {**{split: entries for split, entries in divided.items() if entries}, **rest}

    def _usages(self, pool: Sequence[CropRecord]) -> list[str]:
        """``train`` or ``val`` for each entry."""
        holdings = self.metadata(pool)
        names = _names(pool)
        crops, counted = [], []
        for index, (entry, holding, (dataset, name)) in enumerate(zip(pool, holdings, names, strict=True)):
            if self.classes is not None and (holding is None or not holding.voxels or self._too_coarse(holding)):
                continue  # it will be dropped, or refused, when it is opened: no rule should count on it
            known = holding or CropMetadata({})
            asked = known.classes.intersection(self.classes or ())
            crops.append(Crop(name, dataset, asked, known.box or entry.box))
            counted.append(index)
        usages = ["train"] * len(pool)
        if not crops:
            return usages
        if len(crops) < len(pool):
            log.warning(
                "split=%s counts on %d of the %d crops: the others annotate none of the classes, or too coarsely",
                self.options.split, len(crops), len(pool),
            )  # fmt: skip
        chosen = assign(crops, self.options.split, **self._rule)
        for index, usage in zip(counted, chosen, strict=True):
            usages[index] = usage
        in_val, in_train = missing_classes(crops, chosen)
        if in_val or in_train:
            log.warning(
                "split=%s: %s",
                self.options.split,
                "; ".join(
                    f"no crop for {split} holds {', '.join(missing)}"
                    for split, missing in (("val", in_val), ("train", in_train))
                    if missing
                ),
            )
        return usages

    def metadata(self, entries: Sequence[CropRecord]) -> list[CropMetadata | None]:
        """What each entry holds by its metadata; None where there is no target, or none that can be told."""

        def key(entry: CropRecord) -> tuple[str, str | None]:
            return entry.input_path, entry.target_path if entry.dataset is None else entry.where

        tolerant = self._labels.unannotated_classes == "unknown"

        def looked(entry: CropRecord) -> CropMetadata | None:
            try:
                target = entry.target if self.classes is not None else None
            except CellMapError:
                return None  # opening it will say what is wrong
            if target is None:
                return None
            return look(target, self.read_classes(target.names), entry.overrides[1], tolerant)

        new = list({key(entry): entry for entry in entries if key(entry) not in self._holdings}.values())
        for entry, holding in zip(new, for_all(looked, new, "looking at crops"), strict=True):
            self._holdings[key(entry)] = holding
        return [self._holdings[key(entry)] for entry in entries]

    def _too_coarse(self, holding: CropMetadata) -> bool:
        """Whether a crop will be dropped for its resolution; of flat patches that is known once raw is open."""
        asked = self._finest
        if self._labels.too_coarse != "drop" or asked is None or holding.scale is None:
            return False
        return bool((np.divide(holding.scale, asked) > 1 + SCALE_TOLERANCE).any())

    @property
    def _finest(self) -> FloatArray | None:
        arrays = self._target_arrays
        targets = parse_targets(arrays, len(self.classes or ())) if arrays and self.classes else {}
        if not targets or any(spec.flat for spec in targets.values()):
            return None
        scales: FloatArray = np.min([spec.window.scale for spec in targets.values()], axis=0)
        return scales


def _named(entry: CropRecord) -> tuple[str, str]:
    """Dataset of an entry, and the name of its crop."""
    dataset, inside = _place(entry)
    return dataset, PurePosixPath(inside).name


def _names(entries: Sequence[CropRecord]) -> list[tuple[str, str]]:
    """Dataset and full name of each: ``jrc_hela-2/crop1``, or its whole path where that would name another crop too."""
    places = [_place(entry) for entry in entries]
    called: dict[tuple[str, str], set[str]] = {}
    for dataset, inside in places:
        called.setdefault((dataset, PurePosixPath(inside).name), set()).add(inside)
    return [
        (dataset, f"{dataset}/{PurePosixPath(inside).name if len(called[dataset, Path(inside).name]) == 1 else inside}")
        for dataset, inside in places
    ]


def _place(entry: CropRecord) -> tuple[str, str]:
    try:
        target = entry.target
    except CellMapError:
        target = None  # opening it will say what is wrong
    return dataset_and_crop(entry.input_path, target)
