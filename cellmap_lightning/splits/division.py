"""Division of crops into splits, by filters and by a rule, from their metadata."""

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np

from cellmap_lightning.batches.arrays import ArraySpecs, parse_targets
from cellmap_lightning.crops.crop_box import CropBox
from cellmap_lightning.crops.options import LabelOptions
from cellmap_lightning.crops.target_hints import misread_target
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, FloatArray
from cellmap_lightning.splits.absent_crops import check_on_disk
from cellmap_lightning.splits.crop_metadata import CropMetadata, read_crop_metadata
from cellmap_lightning.splits.crop_names import crop_name, crop_names, target_of
from cellmap_lightning.splits.entries import CropRecord, table_of
from cellmap_lightning.splits.manifests import Filter
from cellmap_lightning.splits.opening import for_all
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.splits.rules import CandidateCrop, assign, missing_classes
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


class Division:
    """Division of crops into splits; see docs/data.md.

    Args:
        source: source of the crops, for messages.
        options: the filters and the rule.
        classes: the requested classes; None for raw only.
        target_arrays: the targets, whose voxel sizes decide which crops are too coarse.
        labels: options of the meaning of labels.
        seed: seed of the rule.
        root: the folder of the datasets of a manifest; see `check_on_disk`.

    Raises:
        CellMapError: an invalid filter.
    """

    def __init__(
        self,
        source: str,
        options: SplitOptions,
        classes: Sequence[str] | None,
        target_arrays: ArraySpecs | None,
        labels: LabelOptions,
        seed: int,
        root: str | Path | None = None,
    ) -> None:
        self.source, self.options, self.classes = source, options, classes
        self._target_arrays, self._labels = target_arrays, labels
        self._seed, self._root = seed, root
        self._filter = Filter(options.only_datasets, options.only_crops)
        self._metadata: dict[tuple[str, str | None, CropBox | None], CropMetadata | None] = {}

    def with_options(self, options: SplitOptions) -> "Division":
        """Return the division of the same crops by other options."""
        other = copy(self)
        other.options = options
        return other

    def read_classes(self, annotated: Sequence[str]) -> tuple[str, ...]:
        """Return the requested classes, and those that imply something about them."""
        labels = self._labels
        return Implications(
            self.classes or (), annotated, labels.infer, labels.class_table, labels.class_relation_dict
        ).read

    def divide(self, listed: Mapping[str, list[CropRecord]]) -> dict[str, list[CropRecord]]:
        """Return the crops of each split, by the filters and by the rule.

        Args:
            listed: the crops of each split in the CSV, or ``datasets``.

        Raises:
            CellMapError: the rule cannot divide these crops, none matches a filter, or crops of a manifest are not on
                disk.
        """
        splits = self._filtered(listed)
        self._check_targets(splits)
        if self._root is not None and self.options.manifest is not None:
            annotated = [entry for entries in splits.values() for entry in entries if entry.target_path is not None]
            check_on_disk(annotated, self.options.manifest, self._root)
        if self.options.rule in ("csv", "blocks"):
            return splits
        pool = [*splits.get("train", []), *splits.get("val", [])]
        for entry in pool:
            if entry.dataset is not None:
                raise CellMapTypeError(
                    f"{entry.where}: a dataset that was made with is_train={entry.dataset.is_train} cannot be moved by "
                    f"split={self.options.rule}; give its paths instead"
                )
        if not pool:
            raise CellMapValueError(
                f"split={self.options.rule} divides the crops for train and val, and {self.source} has none"
            )
        usages = self._usages(pool)
        rest = {split: entries for split, entries in splits.items() if split not in ("train", "val")}
        divided = {
            split: [entry for entry, usage in zip(pool, usages, strict=True) if usage == split]
            for split in ("train", "val")
        }
        return {**{split: entries for split, entries in divided.items() if entries}, **rest}

    def _check_targets(self, splits: Mapping[str, list[CropRecord]]) -> None:
        """Refuse targets whose last part was read as a class and is a file, an array or a folder of classes.

        Raises:
            CellMapValueError: there are some; the message lists all of them.
        """
        if self.classes is None:
            return
        entries = [entry for split in ("train", "val", "test") for entry in splits.get(split, [])]
        targets = [(entry, target_of(entry)) for entry in entries if entry.dataset is None]
        read = [(entry, target, self.read_classes(target.names)) for entry, target in targets if target is not None]
        annotate = any(name in names for _, target, names in read for name in target.names)
        problems: list[tuple[CropRecord, CellMapError]] = []
        for entry, target, names in read:
            text = misread_target(target, names, annotate)
            if text:
                problems.append((entry, CellMapValueError(text)))
        if len(problems) == 1:
            raise CellMapValueError(f"{problems[0][0].where}: {problems[0][1]}")
        if problems:
            raise CellMapValueError(
                f"the targets of {len(problems)} of the {plural(len(entries), 'crop')} of {self.source} do not name "
                f"their classes:\n{table_of(problems)}"
            )

    def _filtered(self, listed: Mapping[str, list[CropRecord]]) -> dict[str, list[CropRecord]]:
        """Return the crops of each split that match the filters; crops for ``predict`` are not filtered."""
        if not self._filter:
            return dict(listed)
        annotated = [(split, entry) for split in ("train", "val", "test") for entry in listed.get(split, [])]
        matches = self._filter.matches([crop_name(entry) for _, entry in annotated])
        if not any(matches):
            raise CellMapValueError(f"no crop of {self.source} is left by only_datasets and only_crops")
        splits = {"predict": listed["predict"]} if "predict" in listed else {}
        for (split, entry), is_match in zip(annotated, matches, strict=True):
            if is_match:
                splits.setdefault(split, []).append(entry)
        return splits

    def _usages(self, pool: Sequence[CropRecord]) -> list[str]:
        """Return ``train`` or ``val`` for each entry."""
        names = crop_names(pool)
        crops, usable = [], []
        for index, (entry, known, name) in enumerate(zip(pool, self.metadata(pool), names, strict=True)):
            if self.classes is not None and (known is None or not known.voxels or self._too_coarse(known)):
                continue  # dropped or refused when it is opened, so that the rule must not rely on it
            metadata = known or CropMetadata({})
            classes = metadata.classes.intersection(self.classes or ())
            crops.append(CandidateCrop(str(name), name.dataset, classes, metadata.box or entry.box))
            usable.append(index)
        usages = ["train"] * len(pool)
        if not crops:
            return usages
        if len(crops) < len(pool):
            log.warning(
                "split=%s divides %d of the %d crops: the others annotate none of the classes, or too coarsely",
                self.options.rule, len(crops), len(pool),
            )  # fmt: skip
        options = self.options
        assigned = assign(
            crops, options.rule, val_fraction=options.val_fraction, fold=options.fold, n_folds=options.n_folds,
            seed=self._seed,
        )  # fmt: skip
        for index, usage in zip(usable, assigned, strict=True):
            usages[index] = usage
        missing = zip(("val", "train"), missing_classes(crops, assigned), strict=True)
        texts = [f"no crop for {split} holds {', '.join(names)}" for split, names in missing if names]
        if texts:
            log.warning("split=%s: %s", options.rule, "; ".join(texts))
        return usages

    def metadata(self, entries: Sequence[CropRecord]) -> list[CropMetadata | None]:
        """Return the metadata of each entry, read once; None without a target, or if its path is malformed."""

        def key(entry: CropRecord) -> tuple[str, str | None, CropBox | None]:
            return entry.input_path, entry.target_path if entry.dataset is None else entry.where, entry.crop_box

        tolerant = self._labels.unannotated_classes == "unknown"

        def read(entry: CropRecord) -> CropMetadata | None:
            target = target_of(entry) if self.classes is not None else None
            if target is None:
                return None
            return read_crop_metadata(
                target, self.read_classes(target.names), entry.overrides[1], tolerant, entry.crop_box
            )

        new = list({key(entry): entry for entry in entries if key(entry) not in self._metadata}.values())
        for entry, metadata in zip(new, for_all(read, new, "reading metadata of crops"), strict=True):
            self._metadata[key(entry)] = metadata
        return [self._metadata[key(entry)] for entry in entries]

    def _too_coarse(self, metadata: CropMetadata) -> bool:
        """Return True if a crop will be dropped for its resolution; for flat patches this is decided on opening."""
        finest = self._finest_scale
        if self._labels.too_coarse != "drop" or finest is None or metadata.scale is None:
            return False
        return bool((np.divide(metadata.scale, finest) > 1 + SCALE_TOLERANCE).any())

    @property
    def _finest_scale(self) -> FloatArray | None:
        arrays = self._target_arrays
        targets = parse_targets(arrays, len(self.classes or ())) if arrays and self.classes else {}
        if not targets or any(spec.flat for spec in targets.values()):
            return None
        scales: FloatArray = np.min([spec.window.scale for spec in targets.values()], axis=0)
        return scales
