"""Datasets of the splits train, val, test and predict."""

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

from cellmap_lightning.batches.arrays import ArraySet, ArraySpecs, parse_classes, parse_inputs
from cellmap_lightning.crops.crop_labels import TooCoarseError
from cellmap_lightning.crops.missing_raw import counted_later
from cellmap_lightning.crops.opening import NotAnnotatedError
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.crops.unannotated import refuse_unannotated, report_masks, report_unannotated
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.flat_options import refuse_flat
from cellmap_lightning.splits.block_options import BlockOptions
from cellmap_lightning.splits.box_report import report_boxes
from cellmap_lightning.splits.division import Division
from cellmap_lightning.splits.entries import SPLITS, CropRecord, read_csv, read_mapping, table_of
from cellmap_lightning.splits.inside import InsideSplit
from cellmap_lightning.splits.leakage import check_leakage
from cellmap_lightning.splits.manifest_classes import report_unknown_classes
from cellmap_lightning.splits.manifest_geometry import report_geometry
from cellmap_lightning.splits.manifests import ListedCrop, ManifestRow, find_crops, read_manifest
from cellmap_lightning.splits.opening import for_all
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.splits.part_classes import report_parts
from cellmap_lightning.splits.spellings import OtherSpelling, report_spellings, spelt_otherwise
from cellmap_lightning.splits.summary import class_table, write_csv
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.validation import did_you_mean, first_few, whole_number
from cellmap_lightning.wording import part_of, plural

log = logging.getLogger(__name__)

#: Uses of crops, in log lines.
_PURPOSES = {"train": "training", "val": "validation", "test": "testing", "predict": "prediction"}


class CellMapDataSplit:
    """Datasets of each split, created at first use and cached.

    Args:
        csv_path: a CSV without or with a header, of 5 columns ``usage, zarr, raw dataset, zarr, target dataset`` or of
            3 ``usage, raw, target``; for prediction the target may be empty or left out. Relative paths are relative
            to the CSV's folder. Usages: train, val (or validate), test, predict. With a header, more columns may
            follow: ``weight`` (of the crop, for the strategy ``weighted``), ``box`` (the part of the crop that is used,
            see `CropBox`), ``unknown``, ``unit``, ``voxel_size``, ``translation`` and ``multiscale`` (see
            `ReadOptions`), written as in YAML, empty for the default.
        datasets: the crops instead of a CSV: ``{split: [{"raw": path, "gt": path}, ...]}``; an entry may also have
            ``normalize``, ``invert``, ``weight``, ``box``, ``unknown``, ``unit``, ``voxel_size``, ``translation`` and
            ``multiscale``, or be a `CellMapDataset`.
        search_path: the crops instead of a CSV: the folder of the challenge's data, see `manifests.find_crops`.
        classes: the targets' channels; None for raw only.
        input_arrays: see `CellMapDataset`.
        target_arrays: see `CellMapDataset`.
        spatial_transforms: applied to the train split.
        seed: see `CellMapDataset`.
        options: options of the splits and of sampling.
        read: options of reading and caching. Volumes for prediction are not refused for missing chunks, which most
            programs omit where a volume is empty: ``missing_raw="auto"`` is ``warn`` there.
        labels: options of the meaning of stored labels; ``too_coarse`` is by default ``drop``: such crops are left out,
            which is logged.
        intensity: options of the values of inputs; intensity transforms are applied to the train split.
        flat: none; options that are given flat are an error that names their dataclass.

    Raises:
        CellMapFileNotFoundError: the CSV, manifest or folder does not exist.
        CellMapValueError: rows are invalid; the message lists all of them.

    Example:
        >>> patch = {"shape": [64, 64, 64], "scale": [8, 8, 8]}
        >>> split = CellMapDataSplit("crops.csv", None, None, ["mito", "er"], {"raw": patch}, {"labels": patch})
        >>> split["train"], split["val"]  # doctest: +SKIP
    """

    def __init__(
        self,
        csv_path: str | Path | None = None,
        datasets: Mapping[str, Sequence[Any] | None] | None = None,
        search_path: str | Path | None = None,
        classes: Sequence[str] | None = None,
        input_arrays: ArraySpecs | None = None,
        target_arrays: ArraySpecs | None = None,
        spatial_transforms: Mapping[str, Any] | None = None,
        seed: int = 0,
        options: SplitOptions | None = None,
        read: ReadOptions | None = None,
        labels: LabelOptions | None = None,
        intensity: IntensityOptions | None = None,
        **flat: Never,
    ) -> None:
        groups = {"options": SplitOptions, "read": ReadOptions, "labels": LabelOptions, "intensity": IntensityOptions}
        refuse_flat(CellMapDataSplit, flat, groups)
        self.options = options or SplitOptions()
        self.read, self.labels = read or ReadOptions(), labels or LabelOptions(too_coarse="drop")
        self.intensity = intensity or IntensityOptions()
        manifest = self.options.manifest
        _check_source(self.options, csv_path=csv_path, datasets=datasets, search_path=search_path)
        SpatialTransforms(spatial_transforms)  # checked once here instead of for each crop
        self.classes = parse_classes(classes) if classes is not None else None
        self.seed = seed = whole_number("seed", seed)
        self.input_arrays, self.target_arrays, self.spatial_transforms = input_arrays, target_arrays, spatial_transforms
        #: Source of the crops, for messages.
        self.source = "datasets" if datasets is not None else str(csv_path or manifest or search_path)
        self._rows: dict[str, tuple[ManifestRow, ...]] = {}  # of a manifest, by the path of the labels
        self._division = Division(
            self.source, self.options, self.classes, target_arrays, self.labels, seed, search_path
        )
        storage = self.read.storage_options
        crops: list[ListedCrop] = []
        if search_path is not None:
            if manifest is None:
                crops = find_crops(search_path, storage)
            else:
                crops = read_manifest(manifest, search_path, storage)
            listed = {"train": self._records(crops)}
        else:
            annotated = self.classes is not None
            listed = read_csv(csv_path, annotated) if csv_path is not None else read_mapping(datasets or {})
        self._spellings = spelt_otherwise(crops, listed, self.classes or (), self._division.read_classes)
        self._listed = {split: [self._with_options(e) for e in entries] for split, entries in listed.items()}
        if self.classes is None:
            self._listed = {name: _volumes(name, entries) for name, entries in self._listed.items()}
        self._entries: dict[str, list[CropRecord]] | None = None
        self._built: dict[str, CellMapMultiDataset] = {}
        self._left_out: dict[str, list[tuple[CropRecord, CellMapError]]] = {}
        self._affine: dict[str, tuple[float, float]] = {}
        self._lock = threading.RLock()
        self._reported: set[str] = set()  # unannotated classes
        self._annotated = {name for crop in crops for name in crop.classes}
        self._masks: set[str] = set()  # classes without ids of objects
        self._compared: set[str] = set()  # labels whose boxes were compared
        #: True if the missing chunks of volumes to predict are counted by the caller, and not when they are opened.
        self.counts_later = False

    @property
    def entries(self) -> Mapping[str, list[CropRecord]]:
        """The crops of each split, divided by the rule at first use, which reads metadata.

        Raises:
            CellMapError: the rule cannot divide these crops, or none matches a filter.
        """
        with self._lock:
            if self._entries is None:
                self._entries = self.uncut
                if self.options.blocks is not None:
                    rule = self.inside(self.options.blocks)
                    self._entries = rule.divide(self._entries)
                    log.info("%s", "\n".join(rule.cuts.values()))
            return self._entries

    @property
    def uncut(self) -> dict[str, list[CropRecord]]:
        """The crops of each split before ``split=blocks`` cuts them.

        Raises:
            CellMapError: the rule cannot divide these crops, or none matches a filter.
        """
        return self._division.divide(self._listed)

    def divided_by(self, **options: Any) -> dict[str, list[CropRecord]]:
        """Return the crops of each split by another rule, with ``options`` in place of those of `SplitOptions`.

        Raises:
            CellMapError: the rule cannot divide these crops.
        """
        return self._division.with_options(replace(self.options, **options)).divide(self._listed)

    def inside(self, blocks: BlockOptions) -> InsideSplit:
        """Return the rule that cuts these crops into boxes for training and validation."""
        arrays = None
        if self.input_arrays is not None:
            arrays = ArraySet.parse(self.input_arrays, self.target_arrays, self.classes, self.classes is not None)
        spatial = SpatialTransforms(self.spatial_transforms)
        tolerant = self.labels.unannotated_classes == "unknown"
        return InsideSplit(blocks, self._division, arrays, spatial, self.options.planes, self.seed, tolerant)

    @property
    def other_spellings(self) -> list[OtherSpelling]:
        """The classes that crops annotate under another spelling; of filtered crops, only those of `entries`."""
        if self.options.only_datasets is None and self.options.only_crops is None:
            return self._spellings
        used = {entry.where for entries in self.entries.values() for entry in entries}
        return [found for found in self._spellings if found.where in used]

    def has_crops(self, split: str) -> bool:
        """Return True if a split has crops."""
        return bool(self.entries.get(split))

    def __getitem__(self, split: str) -> CellMapMultiDataset:
        """Return the dataset of a split, the same object each time.

        Raises:
            CellMapKeyError: the split does not exist, or has no crops.
            CellMapValueError: crops cannot be used, which the message lists; or every crop was dropped.
        """
        if split not in SPLITS:
            raise CellMapKeyError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
        with self._lock:
            if split not in self._built:
                self._built[split] = self._build(split)
            return self._built[split]

    @property
    def built(self) -> Mapping[str, CellMapMultiDataset]:
        """The datasets that were created so far."""
        return dict(self._built)

    @property
    def left_out(self) -> Mapping[str, Sequence[tuple[CropRecord, CellMapError]]]:
        """The crops that the datasets created so far leave out, each with the reason, by split."""
        return dict(self._left_out)

    def _check_unknown(self) -> None:
        """Check that the classes in the setting ``unknown`` are annotated in some crop, to catch typos.

        Raises:
            CellMapKeyError: a class is not.
        """
        entries = [entry for entries in self._listed.values() for entry in entries]
        settings = [self.labels.unknown, *(entry.metadata.get("unknown") for entry in entries)]
        named = {name for setting in settings if isinstance(setting, Mapping) for name in setting} - {"*"}
        if not named:
            return
        known = set(self.classes or ())
        for entry in entries:
            with contextlib.suppress(CellMapError):  # raised when the crop is opened
                known |= set(entry.target.names) if entry.target is not None else set()
        for name in sorted(named - known):
            hint = did_you_mean(name, sorted(known), f"; they have {', '.join(sorted(known))}")
            raise CellMapKeyError(f"unknown names the class {name!r}, which no crop annotates{hint}")

    def _build(self, split: str) -> CellMapMultiDataset:
        """Create the dataset of a split, after a report of the crops that cannot be used."""
        entries = self.entries.get(split, [])
        if not entries:
            usage = "validate" if split == "val" else split
            raise CellMapKeyError(
                f"no crops were given for {split!r}: {self.source} has none"
                f" (a CSV marks them with the usage {usage!r}, datasets with the key {split!r})"
            )
        self._check_unknown()
        if not self._built:
            report_spellings(self.other_spellings)
        datasets: list[CellMapDataset] = []
        problems: list[tuple[CropRecord, CellMapError]] = []
        dropped: list[tuple[CropRecord, CellMapError]] = []
        # All crops are opened before an error is raised, so that one message lists all problems.
        for entry, result in zip(entries, self._opened(entries, split), strict=True):
            if not isinstance(result, CellMapError):
                datasets += result
            elif isinstance(result, TooCoarseError):
                (dropped if self.labels.too_coarse == "drop" else problems).append((entry, result))
            elif isinstance(result, NotAnnotatedError):
                dropped.append((entry, result))
            else:
                problems.append((entry, result))
        if problems:
            also = f"; {len(dropped)} more would be dropped" if dropped else ""
            raise CellMapValueError(
                f"{part_of(len(problems), len(entries), 'crop')} for {split!r} cannot be used{also}:\n"
                f"{table_of(problems)}"
            ) from (problems[0][1] if len(problems) == 1 else None)
        if not datasets:
            raise CellMapValueError(
                f"none of the {plural(len(entries), 'crop')} for {split!r} is left, so there is nothing to read:\n"
                f"{table_of(dropped)}"
            )
        if dropped:
            log.warning(
                "%d of the %s for %r are left out:\n%s",
                len(dropped), plural(len(entries), "crop"), split, table_of(dropped),
            )  # fmt: skip
        self._left_out[split] = dropped
        options = self.options
        how = {"strategy": options.strategy, "balance_datasets": options.balance_datasets} if split == "train" else {}
        multi = CellMapMultiDataset(datasets, purpose=_PURPOSES.get(split), **how)
        multi.set_affine(self._affine)
        self._check_classes(split, multi)
        report_boxes(multi.crops, self._compared)
        report_geometry(multi.crops, self._rows)
        built = {**self._built, split: multi}
        check_leakage(split, built, options.leakage, options.held_out)
        if options.blocks is not None and split in ("train", "val") and {"train", "val"} <= set(built):
            report_parts(built["train"], built["val"])
        return multi

    def _opened(self, entries: Sequence[CropRecord], split: str) -> list[list[CellMapDataset] | CellMapError]:
        """Return the datasets of each entry, or the error of opening it."""

        def open_entry(entry: CropRecord) -> list[CellMapDataset] | CellMapError:
            try:
                if entry.dataset:
                    return [self._checked(entry.dataset, split)]
                return [self._open(entry, split, plane) for plane in self.options.planes]
            except CellMapError as e:
                return e

        return for_all(open_entry, entries, f"opening {split}")

    def _with_options(self, entry: CropRecord) -> CropRecord:
        """Return an entry with the common options that it does not set itself."""
        options = self.read.storage_options if entry.storage_options is None else entry.storage_options
        metadata = {"level_translations": self.read.level_translations, **entry.metadata}
        entry_unknown, common = metadata.get("unknown"), self.labels.unknown
        if isinstance(entry_unknown, Mapping):  # the common setting still applies to classes that it does not name
            common_codes = common if isinstance(common, Mapping) else {"*": common}
            metadata["unknown"] = {**common_codes, **entry_unknown}
        return replace(entry, storage_options=options, metadata=metadata)

    def _records(self, crops: Sequence[ListedCrop]) -> list[CropRecord]:
        """Return the entries of crops of a folder or a manifest, with the classes that are read."""
        if self.classes is None:
            return [CropRecord(crop.where, raw) for raw, crop in {crop.raw: crop for crop in crops}.items()]
        entries = []
        for crop in crops:
            names = [name for name in self._division.read_classes(crop.classes) if name in crop.classes]
            if names:
                target = f"{crop.folder}/[{','.join(names)}]"
                entries.append(CropRecord(crop.where, crop.raw, target, box=crop.box))
                self._rows[str(TargetPath.parse(target, self.read.storage_options))] = crop.rows
        annotated = sorted({name for crop in crops for name in crop.classes})
        if not entries:
            raise CellMapValueError(
                f"none of the {plural(len(crops), 'crop')} of {self.source} annotates any of "
                f"{first_few(self.classes, 8)}; they annotate {', '.join(annotated) or 'nothing'}"
            )
        if self.options.manifest is not None:
            report_unknown_classes(self.options.manifest, annotated, self.classes)
        if len(entries) < len(crops):
            log.info("%d of the %d crops annotate none of the classes", len(crops) - len(entries), len(crops))
        return entries

    def write_csv(self, path: str | Path) -> None:
        """Write the crops of every split as a CSV; see `summary.write_csv`."""
        write_csv(self.entries, path)

    def table(self) -> str:
        """Return a table of the crops of each split that hold each class; see `summary.class_table`."""
        return class_table(self.entries, self.classes or (), self._division.metadata)

    # -- one crop

    def _open(self, entry: CropRecord, split: str, plane: str) -> CellMapDataset:
        """Return the dataset of an entry, with its settings in place of the common ones."""
        training = split == "train"
        if split != "predict" and self.classes is not None and entry.target_path is None:
            raise CellMapValueError(f"a crop for {split!r} needs a target; only those for 'predict' need none")
        if split == "predict" and entry.crop_box is not None:
            raise CellMapValueError(
                f"the box {entry.crop_box} restricts annotated crops, and the entry is for 'predict'; leave it out and "
                "give the part to predict with writer.region"
            )
        changes = {key: value for key, value in entry.metadata.items() if key != "unknown"}
        if entry.storage_options is not None:
            changes["storage_options"] = entry.storage_options
        if split == "predict" and self.read.missing_raw == "auto":
            changes["missing_raw"] = "warn"
        labels, intensity = self.labels, self.intensity
        if "unknown" in entry.metadata:
            labels = replace(labels, unknown=entry.metadata["unknown"])
        if labels.too_coarse == "drop":
            labels = replace(labels, too_coarse="error")
        settings = {"normalize": entry.normalize, "invert": entry.invert}
        intensity = replace(intensity, **{key: value for key, value in settings.items() if value is not None})
        with counted_later() if self.counts_later and split == "predict" else contextlib.nullcontext():
            dataset = CellMapDataset(
                entry.input_path,
                None if split == "predict" else entry.target_path,
                self.classes,
                self.input_arrays,
                self.target_arrays,
                self.spatial_transforms if training else None,
                training,
                self.seed,
                plane,
                replace(self.read, **changes),
                labels,
                intensity,
            )
        dataset.crop.weight = entry.weight
        return dataset

    def _checked(self, dataset: CellMapDataset, split: str) -> CellMapDataset:
        """Return an existing dataset, after a check that its classes, usage and inputs match."""
        inputs, expected = list(dataset.layout.inputs), list(parse_inputs(self.input_arrays or {}))
        if dataset.layout.targets and dataset.layout.classes != tuple(self.classes or ()):
            raise CellMapValueError(
                f"{dataset.label} was made for the classes {list(dataset.classes)}, not {list(self.classes or ())}"
            )
        if dataset.is_train != (split == "train"):
            raise CellMapValueError(
                f"{dataset.label} was made with is_train={dataset.is_train}, and is listed for {split!r}"
            )
        if inputs != expected:
            raise CellMapValueError(f"{dataset.label} was made with the inputs {inputs}, not {expected}")
        return dataset

    def _check_classes(self, split: str, multi: CellMapMultiDataset) -> None:
        """Refuse or report classes that no crop annotates: they would be learnt from nothing."""
        if not multi.layout.targets:
            return
        kinds = [target.kind.name for target in multi.layout.targets.values()]
        report_masks(multi.crops, kinds, self._masks)
        nowhere = [c for c, n in multi.annotated_in().items() if n == 0]
        # A search finds more classes in the crops than those that are read.
        listed = sorted({n for c in multi.crops if c.target_path for n in c.target_path.names} | self._annotated)
        if self.labels.unannotated_classes == "error":
            refuse_unannotated(split, nowhere, listed)
            return
        absent: dict[str, list[str]] = {}
        for crop in multi.crops:
            for name in crop.without_folder:
                absent.setdefault(name, []).append(crop.label)
        new = [name for name in nowhere if name not in self._reported]
        folders = {name: crops for name, crops in absent.items() if name not in self._reported}
        self._reported |= {*new, *folders}
        report_unannotated(split, new, listed, folders, "labels" in kinds)

    @property
    def normalization(self) -> dict[str, tuple[float, float]]:
        """Offset and factor of every volume and rule opened so far, ``{normalization_key: (offset, factor)}``."""
        return {crop.raw.normalization_key: crop.raw.affine for multi in self._built.values() for crop in multi.crops}

    def restore_normalization(self, affine: Mapping[str, tuple[float, float]]) -> None:
        """Use these offsets and factors for volumes that are open, and for those opened later."""
        self._affine.update(affine)
        for multi in self._built.values():
            multi.set_affine(self._affine)

    def close(self) -> None:
        """Close every dataset."""
        for dataset in self._built.values():
            dataset.close()

    def stop(self) -> None:
        """Stop every dataset: end threads and passes of loaders; the cache stays."""
        for dataset in self._built.values():
            dataset.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _check_source(options: SplitOptions, **sources: Any) -> None:
    """Check that the crops come from one source.

    Raises:
        CellMapTypeError: several sources are set, or none.
        CellMapValueError: a folder is given without a rule that divides its crops.
    """
    set_sources = [name for name, value in sources.items() if value is not None]
    if options.manifest is not None and sources["search_path"] is None:
        raise CellMapTypeError("manifest needs search_path too: the folder that holds its datasets")
    if len(set_sources) != 1:
        raise CellMapTypeError(
            "give the crops either as csv_path or as datasets or as search_path; got "
            + (" and ".join(set_sources) or "none of them")
        )
    if options.rule == "csv" and sources["search_path"] is not None:
        raise CellMapValueError(
            "search_path does not define which crops validate; choose a rule, such as split=stratified, by_dataset, "
            "kfold or blocks"
        )


def _volumes(split: str, entries: list[CropRecord]) -> list[CropRecord]:
    """Return each raw volume once: without classes, an entry is a whole volume and not a crop of it."""
    volumes = {
        (e.input_path, str(e.normalize), e.invert, str(e.metadata)) if e.dataset is None else e.where: e
        for e in entries
    }
    if len(volumes) < len(entries):
        log.info("%s: %d crops without classes are %s", split, len(entries), plural(len(volumes), "raw volume"))
    return list(volumes.values())
