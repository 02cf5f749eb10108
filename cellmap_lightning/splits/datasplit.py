"""Which crops are for training, validation, test and prediction."""

import contextlib
import csv
import difflib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from cellmap_lightning.batches.arrays import ArraySpecs, parse_classes, parse_inputs, parse_targets
from cellmap_lightning.crops.encodings import (
    MissingLabels,
    Unknown,
    check_missing_labels,
    check_unknown,
)
from cellmap_lightning.crops.image import MAX_UPSAMPLING, MissingRaw, check_missing_raw
from cellmap_lightning.crops.labels import Downsample
from cellmap_lightning.datasets.dataset import CellMapDataset, NotAnnotatedError, TooCoarseError
from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.errors import (
    CellMapError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
)
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, FloatArray
from cellmap_lightning.io.chunks import Reader, check_reader
from cellmap_lightning.io.ngff import LevelTranslations, Overrides, shared_metadata
from cellmap_lightning.io.retrying import PATIENT, Patience
from cellmap_lightning.io.store import absolute, local
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.runtime.location import CacheMode, check_mode
from cellmap_lightning.runtime.thread_pool import REMOTE_WORKERS
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.splits.crop_metadata import Holding, look, place_of
from cellmap_lightning.splits.entries import METADATA_KEYS, SPLITS, Entry, read_csv, read_mapping, table_of
from cellmap_lightning.splits.leakage import Leakage, check_leakage, check_leakage_rule
from cellmap_lightning.splits.manifests import Filter, ListedCrop, find_crops, read_manifest
from cellmap_lightning.splits.rules import Crop, SplitRule, assign, check_split, missing_classes
from cellmap_lightning.transforms.augment import IntensityTransforms
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.intensity import AUTO
from cellmap_lightning.transforms.spatial import SpatialTransforms

log = logging.getLogger(__name__)

#: Crops that are opened at a time: on a network file system most of that is waiting.
OPENERS = 8
_E = TypeVar("_E")
_T = TypeVar("_T")


class CellMapDataSplit:
    """Datasets of each split, built when they are first asked for, and kept.

    Args:
        csv_path: a CSV without or with a header, of 5 columns ``usage, zarr, raw dataset, zarr, target dataset`` or of
            3 ``usage, raw, target``; for prediction the target may be empty or left out. Relative paths are relative
            to the CSV's folder. Usages: train, val (or validate), test, predict. With a header, more columns may
            follow: ``weight`` (of the crop, for the strategy ``weighted``), ``unknown``, ``unit``, ``voxel_size``,
            ``translation`` and ``multiscale`` (see `CellMapDataset`), written as in YAML, empty for the default.
        datasets: instead of it, ``{split: [{"raw": path, "gt": path}, ...]}``; an entry may also say ``normalize``,
            ``invert`` and ``weight``, and ``unknown``, ``unit``, ``voxel_size``, ``translation`` and ``multiscale`` of
            `CellMapDataset`, or be a `CellMapDataset`.
        classes: the targets' channels; None for raw only.
        input_arrays: see `CellMapDataset`, as all that follow.
        target_arrays: see there.
        spatial_transforms: applied to the train split.
        intensity_transforms: applied to the train split.
        raw_value_transforms: see there.
        target_value_transforms: see there.
        class_relation_dict: see there.
        pad: see there; so too what follows.
        max_workers: see there.
        seed: see there.
        normalize: see there.
        invert: see there.
        infer: see there.
        class_table: see there.
        label_downsample: see there.
        unknown: see there.
        nan_targets: see there.
        planes: of flat patches, a dataset in each.
        too_coarse: what becomes of crops whose labels are coarser than asked for: ``drop`` (logged), ``upsample``, or
            ``error``.
        max_upsampling: see there.
        cache: see there.
        cache_bytes: see there.
        reader: see there.
        missing_raw: see there. Volumes to predict are not refused for missing chunks, which most programs leave out
            where a volume is empty: ``error`` and ``auto`` are ``warn`` there.
        missing_labels: see there.
        level_translations: see there.
        read_attempts: see there.
        read_timeout: see there.
        split: ``csv``: each crop is for what the CSV, or ``datasets``, says. Otherwise its crops for train and val are
            divided anew by a rule, see `splits.assign`: ``random``, ``stratified``, ``by_dataset``,
            ``leave_one_dataset_out`` or ``kfold``; those for test and predict stay.
        val_fraction: the part of these crops that validates; ``kfold`` and ``leave_one_dataset_out`` have their own.
        fold: which fold, or which dataset in alphabetical order, validates.
        n_folds: number of folds of ``kfold``.
        search_path: the crops instead of a CSV: the folder of the challenge's data, see `layout.find_crops`.
        manifest: the challenge's list of these crops, see `layout.read_manifest`; by default, those that are there.
        only_datasets: names or patterns of the datasets whose crops are wanted for train, val and test.
        only_crops: likewise names, numbers or patterns of the crops, see `layout.Filter`.
        strategy: where the samples of the train split come from, see `CellMapMultiDataset`.
        balance_datasets: see there.
        leakage: annotated crops of the train split that also validate or test: ``error``, ``warn`` or ``ignore``.
            Crops that overlap in part are warned of unless it is ``ignore``.
        held_out: a manifest of crops that nothing is to be trained on, such as the challenge's
            ``test_crop_manifest.csv``; ``leakage`` holds for them too.

    Raises:
        CellMapFileNotFoundError: there is no such CSV, manifest or folder.
        CellMapValueError: rows that cannot be read, all of them in one table.
    """

    def __init__(
        self,
        csv_path: str | Path | None = None,
        datasets: Mapping[str, Sequence[Any] | None] | None = None,
        classes: Sequence[str] | None = None,
        input_arrays: ArraySpecs | None = None,
        target_arrays: ArraySpecs | None = None,
        spatial_transforms: Mapping[str, Any] | None = None,
        raw_value_transforms: Any = AUTO,
        target_value_transforms: Any = None,
        class_relation_dict: Mapping[str, Any] | None = None,
        pad: bool = False,
        max_workers: int | None = None,
        seed: int = 0,
        *,
        intensity_transforms: Mapping[str, Any] | None = None,
        normalize: Any = "dtype",
        invert: bool = False,
        infer: Sequence[str] = (),
        class_table: str | None = None,
        label_downsample: Downsample = "stored",
        unknown: Unknown = "metadata",
        nan_targets: bool = True,
        planes: Sequence[str] = ("xy",),
        too_coarse: Literal["drop", "upsample", "error"] = "drop",
        max_upsampling: float = MAX_UPSAMPLING,
        cache: CacheMode = "auto",
        cache_bytes: int | None = None,
        reader: Reader = "zarr",
        missing_raw: MissingRaw = "auto",
        missing_labels: MissingLabels = "error",
        level_translations: LevelTranslations = "auto",
        read_attempts: int = PATIENT.attempts,
        read_timeout: float = PATIENT.timeout,
        storage_options: Mapping[str, Any] | None = None,
        split: SplitRule = "csv",
        val_fraction: float = 0.1,
        fold: int = 0,
        n_folds: int = 5,
        search_path: str | Path | None = None,
        manifest: str | Path | None = None,
        only_datasets: Sequence[str] | None = None,
        only_crops: Sequence[str | int] | None = None,
        strategy: Any = "mix",
        balance_datasets: bool = False,
        leakage: Leakage = "error",
        held_out: str | Path | None = None,
    ) -> None:
        check_leakage_rule(leakage)
        self.leakage, self.held_out = leakage, held_out
        sources = {"csv_path": csv_path, "datasets": datasets, "search_path": search_path}
        given = [name for name, value in sources.items() if value is not None]
        if manifest is not None and search_path is None:
            raise CellMapTypeError("manifest needs search_path too: the folder that holds its datasets")
        if len(given) != 1:
            raise CellMapTypeError(
                "give the crops either as csv_path or as datasets or as search_path; got "
                + (" and ".join(given) or "none of them")
            )
        check_split(split, val_fraction, fold, n_folds)
        if split == "csv" and search_path is not None:
            raise CellMapValueError(
                "search_path does not say which crops validate: choose a rule, such as split=stratified, "
                "by_dataset or kfold"
            )
        if too_coarse not in ("drop", "upsample", "error"):
            raise CellMapValueError(f"too_coarse must be 'drop', 'upsample' or 'error', got {too_coarse!r}")
        # What is the same for every crop is refused here, once, and not crop by crop.
        check_mode(cache, cache_bytes)
        check_reader(reader)
        check_missing_raw(missing_raw)
        check_missing_labels(missing_labels)
        check_unknown(unknown)
        Overrides.parse(level_translations=level_translations)
        Patience(read_attempts, read_timeout)
        SpatialTransforms(spatial_transforms)
        IntensityTransforms(intensity_transforms)
        self._strategy, self._balance = parse_strategy(strategy), bool(balance_datasets)
        self.classes = parse_classes(classes) if classes is not None else None
        self.too_coarse = too_coarse
        self.source = "datasets" if datasets is not None else str(csv_path or manifest or search_path)
        self.rule = split
        self._rule: dict[str, Any] = {"val_fraction": val_fraction, "fold": fold, "n_folds": n_folds, "seed": seed}
        self._filter = Filter(only_datasets, only_crops)
        self._common: dict[str, Any] = {
            "classes": self.classes,
            "input_arrays": input_arrays,
            "target_arrays": target_arrays,
            "raw_value_transforms": raw_value_transforms,
            "target_value_transforms": target_value_transforms,
            "class_relation_dict": class_relation_dict,
            "pad": pad,
            "max_workers": max_workers,
            "seed": seed,
            "normalize": normalize,
            "invert": invert,
            "infer": tuple(infer),
            "class_table": class_table,
            "label_downsample": label_downsample,
            "unknown": unknown,
            "nan_targets": nan_targets,
            "too_coarse": "upsample" if too_coarse == "upsample" else "error",
            "max_upsampling": max_upsampling,
            "cache": cache,
            "cache_bytes": cache_bytes,
            "reader": reader,
            "storage_options": storage_options,
            "missing_raw": missing_raw,
            "missing_labels": missing_labels,
            "level_translations": level_translations,
            "read_attempts": read_attempts,
            "read_timeout": read_timeout,
        }
        if isinstance(planes, str) or not planes or len(set(planes)) != len(list(planes)):
            raise CellMapValueError(f"planes must name xy, xz and yz at most once, got {planes!r}")
        self.planes = tuple(planes)
        self._spatial, self._intensity = spatial_transforms, intensity_transforms
        if search_path is not None:
            if manifest is None:
                found = find_crops(search_path, storage_options)
            else:
                found = read_manifest(manifest, search_path, storage_options)
            self._given = {"train": self._listed(found)}
        else:
            annotated = self.classes is not None
            self._given = read_csv(csv_path, annotated) if csv_path is not None else read_mapping(datasets or {})
        self._given = {split: [self._with_options(e) for e in entries] for split, entries in self._given.items()}
        if self.classes is None:
            self._given = {name: _volumes(name, entries) for name, entries in self._given.items()}
        self._entries: dict[str, list[Entry]] | None = None
        self._holdings: dict[tuple[str, str | None], Holding | None] = {}
        self._built: dict[str, CellMapMultiDataset] = {}
        self._affine: dict[str, tuple[float, float]] = {}
        self._lock = threading.RLock()

    @property
    def entries(self) -> Mapping[str, list[Entry]]:
        """The crops of each split. By a rule they are divided when this is first asked for: metadata is read.

        Raises:
            CellMapError: the crops cannot be divided like this, or nothing fits a filter.
        """
        with self._lock:
            if self._entries is None:
                self._entries = self._divided()
            return self._entries

    def given(self, split: str) -> bool:
        """Whether there are entries for a split."""
        return bool(self.entries.get(split))

    def __getitem__(self, split: str) -> CellMapMultiDataset:
        """The dataset of a split, the same object each time.

        Raises:
            CellMapKeyError: there is no such split, or nothing was given for it.
            CellMapValueError: crops that cannot be used, all of them in one table; or every crop was dropped.
        """
        if split not in SPLITS:
            raise CellMapKeyError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
        with self._lock:
            if split not in self._built:
                self._built[split] = self._build(split)
            return self._built[split]

    @property
    def built(self) -> Mapping[str, CellMapMultiDataset]:
        """The datasets that exist so far."""
        return dict(self._built)

    def _check_unknown(self) -> None:
        """Refuse classes in the setting ``unknown`` that no crop has, as after a typo.

        Raises:
            CellMapKeyError: there is one.
        """
        entries = [entry for entries in self._given.values() for entry in entries]
        settings = [self._common["unknown"], *(entry.metadata.get("unknown") for entry in entries)]
        named = {name for setting in settings if isinstance(setting, Mapping) for name in setting} - {"*"}
        if not named:
            return
        known = set(self.classes or ())
        for entry in entries:
            with contextlib.suppress(CellMapError):  # opening it says what is wrong
                known |= set(entry.target.names) if entry.target is not None else set()
        for name in sorted(named - known):
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; they have {', '.join(sorted(known))}"
            raise CellMapKeyError(f"unknown names the class {name!r}, which no crop annotates{hint}")

    def _build(self, split: str) -> CellMapMultiDataset:
        entries = self.entries.get(split, [])
        if not entries:
            usage = "validate" if split == "val" else split
            raise CellMapKeyError(
                f"no crops were given for {split!r}: {self.source} has none"
                f" (a CSV marks them with the usage {usage!r}, datasets with the key {split!r})"
            )
        self._check_unknown()
        datasets: list[CellMapDataset] = []
        problems: list[tuple[Entry, CellMapError]] = []
        dropped: list[tuple[Entry, CellMapError]] = []
        for entry, result in zip(entries, self._opened(entries, split), strict=True):
            if not isinstance(result, CellMapError):
                datasets += result
            elif isinstance(result, TooCoarseError):
                (dropped if self.too_coarse == "drop" else problems).append((entry, result))
            elif isinstance(result, NotAnnotatedError):
                dropped.append((entry, result))
            else:
                problems.append((entry, result))
        if problems:
            also = f"; {len(dropped)} more would be dropped" if dropped else ""
            raise CellMapValueError(
                f"{len(problems)} of the {len(entries)} crops for {split!r} cannot be used{also}:\n{table_of(problems)}"
            ) from (problems[0][1] if len(problems) == 1 else None)
        if not datasets:
            raise CellMapValueError(
                f"none of the {len(entries)} crops for {split!r} is left, so there is nothing to read:\n"
                f"{table_of(dropped)}"
            )
        if dropped:
            log.warning(
                "%d of the %d crops for %r are left out:\n%s", len(dropped), len(entries), split, table_of(dropped)
            )
        how = (self._strategy, self._balance) if split == "train" else ()
        multi = CellMapMultiDataset(datasets, *how)
        multi.set_affine(self._affine)
        self._check_classes(split, multi)
        check_leakage(split, {**self._built, split: multi}, self.leakage, self.held_out)
        return multi

    def _opened(self, entries: Sequence[Entry], split: str) -> list[list[CellMapDataset] | CellMapError]:
        """The datasets of each entry, or what is wrong with it."""

        def opened(entry: Entry) -> list[CellMapDataset] | CellMapError:
            try:
                if entry.dataset:
                    return [self._own(entry.dataset, split)]
                return [self._open(entry, split, plane) for plane in self.planes]
            except CellMapError as e:
                return e

        return for_all(opened, entries, f"opening {split}")

    def _with_options(self, entry: Entry) -> Entry:
        options = self._common["storage_options"] if entry.storage_options is None else entry.storage_options
        metadata = {"level_translations": self._common["level_translations"], **entry.metadata}
        own, common = metadata.get("unknown"), self._common["unknown"]
        if isinstance(own, Mapping):  # classes that it does not name are as everywhere
            everywhere = common if isinstance(common, Mapping) else {"*": common}
            metadata["unknown"] = {**everywhere, **own}
        return replace(entry, storage_options=options, metadata=metadata)

    # -- division

    def _listed(self, crops: Sequence[ListedCrop]) -> list[Entry]:
        """Entries of crops that a folder or a manifest names, with the classes that are read."""
        if self.classes is None:
            return [Entry(crop.where, raw) for raw, crop in {crop.raw: crop for crop in crops}.items()]
        entries = []
        for crop in crops:
            names = [name for name in self._read(crop.classes) if name in crop.classes]
            if names:
                target = f"{crop.folder}/[{','.join(names)}]"
                entries.append(Entry(crop.where, crop.raw, target, box=crop.box))
        annotated = sorted({name for crop in crops for name in crop.classes})
        if not entries:
            raise CellMapValueError(
                f"none of the {len(crops)} crops of {self.source} annotates any of {', '.join(self.classes)}; they "
                f"annotate {', '.join(annotated) or 'nothing'}"
            )
        if len(entries) < len(crops):
            log.info("%d of the %d crops annotate none of the classes", len(crops) - len(entries), len(crops))
        return entries

    def _read(self, annotated: Sequence[str]) -> tuple[str, ...]:
        """The classes that are asked for, and those that say something about them."""
        common = self._common
        return Implications(
            self.classes or (), annotated, common["infer"], common["class_table"], common["class_relation_dict"]
        ).read

    def _divided(self) -> dict[str, list[Entry]]:
        """The crops of each split, by the filters and by the rule."""
        given = self._given
        if self._filter:
            annotated = [(split, entry) for split in ("train", "val", "test") for entry in given.get(split, [])]
            kept = self._filter.kept([_named(entry) for _, entry in annotated])
            given = {"predict": given["predict"]} if "predict" in given else {}
            for (split, entry), wanted in zip(annotated, kept, strict=True):
                if wanted:
                    given.setdefault(split, []).append(entry)
            if not any(kept):
                raise CellMapValueError(f"no crop of {self.source} is left by only_datasets and only_crops")
        if self.rule == "csv":
            return given
        pool = [*given.get("train", []), *given.get("val", [])]
        for entry in pool:
            if entry.dataset is not None:
                raise CellMapTypeError(
                    f"{entry.where}: a dataset that was made with is_train={entry.dataset.is_train} cannot be moved by "
                    f"split={self.rule}; give its paths instead"
                )
        if not pool:
            raise CellMapValueError(
                f"split={self.rule} divides the crops for train and val, and {self.source} has none"
            )
        usages = self._usages(pool)
        rest = {split: entries for split, entries in given.items() if split not in ("train", "val")}
        divided = {
            split: [entry for entry, usage in zip(pool, usages, strict=True) if usage == split]
            for split in ("train", "val")
        }
        return {**{split: entries for split, entries in divided.items() if entries}, **rest}

    def _usages(self, pool: Sequence[Entry]) -> list[str]:
        """``train`` or ``val`` for each entry."""
        holdings = self._look(pool)
        names = _names(pool)
        crops, counted = [], []
        for index, (entry, holding, (dataset, name)) in enumerate(zip(pool, holdings, names, strict=True)):
            if self.classes is not None and (holding is None or not holding.voxels or self._too_coarse(holding)):
                continue  # it will be dropped, or refused, when it is opened: no rule should count on it
            known = holding or Holding({})
            asked = known.classes.intersection(self.classes or ())
            crops.append(Crop(name, dataset, asked, known.box or entry.box))
            counted.append(index)
        usages = ["train"] * len(pool)
        if not crops:
            return usages
        if len(crops) < len(pool):
            log.warning(
                "split=%s counts on %d of the %d crops: the others annotate none of the classes, or too coarsely",
                self.rule, len(crops), len(pool),
            )  # fmt: skip
        chosen = assign(crops, self.rule, **self._rule)
        for index, usage in zip(counted, chosen, strict=True):
            usages[index] = usage
        in_val, in_train = missing_classes(crops, chosen)
        if in_val or in_train:
            log.warning(
                "split=%s: %s",
                self.rule,
                "; ".join(
                    f"no crop for {split} holds {', '.join(missing)}"
                    for split, missing in (("val", in_val), ("train", in_train))
                    if missing
                ),
            )
        return usages

    def _look(self, entries: Sequence[Entry]) -> list[Holding | None]:
        """What each entry holds by its metadata; None where there is no target, or none that can be told."""

        def key(entry: Entry) -> tuple[str, str | None]:
            return entry.input_path, entry.target_path if entry.dataset is None else entry.where

        def looked(entry: Entry) -> Holding | None:
            try:
                target = entry.target if self.classes is not None else None
            except CellMapError:
                return None  # opening it will say what is wrong
            return look(target, self._read(target.names), entry.overrides[1]) if target is not None else None

        new = list({key(entry): entry for entry in entries if key(entry) not in self._holdings}.values())
        for entry, holding in zip(new, for_all(looked, new, "looking at crops"), strict=True):
            self._holdings[key(entry)] = holding
        return [self._holdings[key(entry)] for entry in entries]

    def _too_coarse(self, holding: Holding) -> bool:
        """Whether a crop will be dropped for its resolution; of flat patches that is known once raw is open."""
        asked = self._finest
        if self.too_coarse != "drop" or asked is None or holding.scale is None:
            return False
        return bool((np.divide(holding.scale, asked) > 1 + SCALE_TOLERANCE).any())

    @property
    def _finest(self) -> FloatArray | None:
        arrays = self._common["target_arrays"]
        targets = parse_targets(arrays, len(self.classes or ())) if arrays and self.classes else {}
        if not targets or any(spec.flat for spec in targets.values()):
            return None
        scales: FloatArray = np.min([spec.window.scale for spec in targets.values()], axis=0)
        return scales

    def write_csv(self, path: str | Path) -> None:
        """Write the crops of every split as a CSV of ``usage, raw, target`` with absolute paths, and what entries say.

        Read again with ``split="csv"`` it gives the same splits. How single entries are normalized or inverted has no
        place in a CSV; that is logged. Credentials in addresses are hidden.
        """
        rows, own = [], []
        every = [entry for entries in self.entries.values() for entry in entries]
        columns = [key for key in METADATA_KEYS if any(key in entry.metadata for entry in every)]
        weighted = any(entry.weight is not None for entry in every)
        for split in SPLITS:
            for entry in self.entries.get(split, []):
                target = entry.target_path
                if entry.dataset is not None and entry.dataset.target_path is not None:
                    target = str(entry.dataset.target_path)
                raw, gt = hide_address(absolute(entry.input_path)), hide_address(absolute(target)) if target else ""
                weight = [] if not weighted else ["" if entry.weight is None else repr(entry.weight)]
                more = [json.dumps(entry.metadata[key]) if key in entry.metadata else "" for key in columns]
                rows.append(["validate" if split == "val" else split, raw, gt, *weight, *more])
                if entry.normalize is not None or entry.invert is not None:
                    own.append(entry.where)
        if own:
            log.warning("%s does not say how these are normalized and inverted: %s", path, ", ".join(own))
        file = local(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(["usage", "raw", "target", *(["weight"] if weighted else []), *columns])
            writer.writerows(rows)

    def table(self) -> str:
        """How many crops of each split hold each class, and the foreground voxels in them where the metadata says so.

        Voxels are those of the finest level. ``-`` where no crop says how many, ``>=`` where some do not.
        """
        shown = [split for split in ("train", "val", "test") if self.entries.get(split)]
        holdings = {split: [h or Holding({}) for h in self._look(self.entries[split])] for split in shown}
        rows = [["class", *(cell for split in shown for cell in (split, "voxels"))]]
        for name in self.classes or ():
            row = [name]
            for split in shown:
                counts = [h.voxels[name] for h in holdings[split] if name in h.classes]
                known = [count for count in counts if count is not None]
                at_least = ">=" if len(known) < len(counts) else ""
                row += [str(len(counts)), f"{at_least}{sum(known):.3g}" if known else "-" if counts else "0"]
            rows.append(row)
        rows.append(["crops", *(cell for split in shown for cell in (str(len(self.entries[split])), ""))])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            (
                f"{row[0]:<{widths[0]}}"
                + "".join(f"  {cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True))
            ).rstrip()
            for row in rows
        )

    # -- one crop

    def _own(self, dataset: CellMapDataset, split: str) -> CellMapDataset:
        """A dataset that was given ready-made, if it delivers what is asked for."""
        inputs = parse_inputs(self._common["input_arrays"])
        given, wanted = list(dataset.layout.inputs), list(inputs)
        if dataset.layout.targets and dataset.classes != (self.classes or ()):
            raise CellMapValueError(
                f"{dataset.label} was made for the classes {list(dataset.classes)}, not {list(self.classes or ())}"
            )
        if dataset.is_train != (split == "train"):
            raise CellMapValueError(
                f"{dataset.label} was made with is_train={dataset.is_train}, and stands in {split!r}"
            )
        if given != wanted:
            raise CellMapValueError(f"{dataset.label} was made with the inputs {given}, not {wanted}")
        return dataset

    def _open(self, entry: Entry, split: str, plane: str) -> CellMapDataset:
        training = split == "train"
        if split != "predict" and self.classes is not None and entry.target_path is None:
            raise CellMapValueError(f"a crop for {split!r} needs a target; only those for 'predict' may go without")
        own: dict[str, Any] = {"normalize": entry.normalize, "invert": entry.invert}
        own["storage_options"] = entry.storage_options
        if split == "predict" and self._common["missing_raw"] in ("error", "auto"):
            own["missing_raw"] = "warn"
        dataset = CellMapDataset(
            entry.input_path,
            None if split == "predict" else entry.target_path,
            is_train=training,
            spatial_transforms=self._spatial if training else None,
            intensity_transforms=self._intensity if training else None,
            plane=plane,
            **self._common | {key: value for key, value in own.items() if value is not None} | dict(entry.metadata),
        )
        dataset.weight = entry.weight
        return dataset

    def _check_classes(self, split: str, multi: CellMapMultiDataset) -> None:
        """A class that no crop annotates would be learnt from nothing."""
        nowhere = [c for c, n in multi.annotated_in().items() if n == 0] if multi.layout.targets else []
        if nowhere and split == "train":
            listed = sorted({n for d in multi.datasets if d.target_path for n in d.target_path.names})
            close = [c for name in nowhere for c in difflib.get_close_matches(name, listed, 1)]
            hint = f" (did you mean {' and '.join(map(repr, close))}?)" if close else ""
            raise CellMapValueError(
                f"no crop for 'train' annotates {', '.join(map(repr, nowhere))}{hint}; they "
                f"annotate {', '.join(listed)}"
            )
        if nowhere:
            log.warning("no crop for %r annotates %s: nothing is measured for them there", split, ", ".join(nowhere))

    @property
    def normalization(self) -> dict[str, tuple[float, float]]:
        """Offset and factor of every volume and rule that was opened, ``{normalization_key: (offset, factor)}``."""
        return {d.normalization_key: d.affine for multi in self._built.values() for d in multi.datasets}

    def restore_normalization(self, affine: Mapping[str, tuple[float, float]]) -> None:
        """Normalize these volumes as they were before, now and when they are opened."""
        self._affine.update(affine)
        for multi in self._built.values():
            multi.set_affine(self._affine)

    def close(self) -> None:
        """Close every dataset."""
        for dataset in self._built.values():
            dataset.close()

    def stop(self) -> None:
        """Stop every dataset: end threads and passes, keep what is decoded."""
        for dataset in self._built.values():
            dataset.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def for_all(work: Callable[[_E], _T], entries: Sequence[_E], what: str, unit: str = "crop") -> list[_T]:
    """The result for each entry, several at a time: each comes from many small files."""
    if not entries:
        return []
    with (
        ThreadPoolExecutor(min(_openers(entries), len(entries)), "cellmap-open") as pool,
        shared_metadata(),
        tqdm(total=len(entries), desc=what, unit=unit, disable=None, leave=False, delay=1) as bar,
    ):
        futures = [pool.submit(work, entry) for entry in entries]
        try:
            results = []
            for future in futures:
                results.append(future.result())
                bar.update()
            return results
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _openers(entries: Sequence[Any]) -> int:
    """How many crops are opened at a time: those that lie elsewhere cost a thread that waits."""
    return REMOTE_WORKERS if any("://" in getattr(entry, "input_path", "") for entry in entries) else OPENERS


def _volumes(split: str, entries: list[Entry]) -> list[Entry]:
    """Each raw volume once: without classes, what a row names is the whole volume and no crop of it."""
    found = {
        (e.input_path, str(e.normalize), e.invert, str(e.metadata)) if e.dataset is None else e.where: e
        for e in entries
    }
    if len(found) < len(entries):
        log.info("%s: %d crops without classes are %d raw volumes", split, len(entries), len(found))
    return list(found.values())


def _named(entry: Entry) -> tuple[str, str]:
    """Dataset of an entry, and the name of its crop."""
    dataset, inside = _place(entry)
    return dataset, PurePosixPath(inside).name


def _names(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Dataset and full name of each: ``jrc_hela-2/crop1``, or its whole path where that would name another crop too."""
    places = [_place(entry) for entry in entries]
    called: dict[tuple[str, str], set[str]] = {}
    for dataset, inside in places:
        called.setdefault((dataset, PurePosixPath(inside).name), set()).add(inside)
    return [
        (dataset, f"{dataset}/{PurePosixPath(inside).name if len(called[dataset, Path(inside).name]) == 1 else inside}")
        for dataset, inside in places
    ]


def _place(entry: Entry) -> tuple[str, str]:
    try:
        target = entry.target
    except CellMapError:
        target = None  # opening it will say what is wrong
    return place_of(entry.input_path, target)
