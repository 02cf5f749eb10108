"""The datasets of each split."""

import contextlib
import difflib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cellmap_lightning.batches.arrays import ArraySpecs, parse_classes, parse_inputs
from cellmap_lightning.crops.crop_labels import TooCoarseError
from cellmap_lightning.crops.opening import NotAnnotatedError
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.crops.unannotated import refuse_unannotated, report_unannotated
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.splits.division import Division
from cellmap_lightning.splits.entries import SPLITS, CropRecord, read_csv, read_mapping, table_of
from cellmap_lightning.splits.leakage import check_leakage
from cellmap_lightning.splits.manifests import ListedCrop, find_crops, read_manifest
from cellmap_lightning.splits.opening import for_all
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.splits.summary import class_table, write_csv
from cellmap_lightning.transforms.spatial import SpatialTransforms

log = logging.getLogger(__name__)


class CellMapDataSplit:
    """Datasets of each split, built when they are first needed, and kept.

    Args:
        csv_path: a CSV without or with a header, of 5 columns ``usage, zarr, raw dataset, zarr, target dataset`` or of
            3 ``usage, raw, target``; for prediction the target may be empty or left out. Relative paths are relative
            to the CSV's folder. Usages: train, val (or validate), test, predict. With a header, more columns may
            follow: ``weight`` (of the crop, for the strategy ``weighted``), ``unknown``, ``unit``, ``voxel_size``,
            ``translation`` and ``multiscale`` (see `ReadOptions`), written as in YAML, empty for the default.
        datasets: instead of it, ``{split: [{"raw": path, "gt": path}, ...]}``; an entry may also have ``normalize``,
            ``invert`` and ``weight``, and ``unknown``, ``unit``, ``voxel_size``, ``translation`` and ``multiscale``, or
            be a `CellMapDataset`.
        search_path: the crops instead of a CSV: the folder of the challenge's data, see `manifests.find_crops`.
        classes: the targets' channels; None for raw only.
        input_arrays: see `CellMapDataset`.
        target_arrays: see there.
        spatial_transforms: applied to the train split.
        seed: see `CellMapDataset`.
        options: which crops are in which split.
        read: how voxels are read and cached. Volumes to predict are not refused for missing chunks, which most programs
            leave out where a volume is empty: ``missing_raw`` of ``error`` and ``auto`` is ``warn`` there.
        labels: what stored labels mean; ``too_coarse`` is by default ``drop``: such crops are left out (logged).
        intensity: how stored values of raw become the values of inputs; intensity transforms are applied to the train
            split.

    Raises:
        CellMapFileNotFoundError: the CSV, manifest or folder does not exist.
        CellMapValueError: rows that cannot be read, all of them in one table.
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
    ) -> None:
        self.options = options or SplitOptions()
        self.read, self.labels = read or ReadOptions(), labels or LabelOptions(too_coarse="drop")
        self.intensity = intensity or IntensityOptions()
        manifest = self.options.manifest
        _check_source(self.options, csv_path=csv_path, datasets=datasets, search_path=search_path)
        SpatialTransforms(spatial_transforms)  # refused here, once, and not crop by crop
        self.classes = parse_classes(classes) if classes is not None else None
        self.seed = seed
        self.input_arrays, self.target_arrays, self.spatial_transforms = input_arrays, target_arrays, spatial_transforms
        #: Where the crops come from, for messages.
        self.source = "datasets" if datasets is not None else str(csv_path or manifest or search_path)
        self._division = Division(self.source, self.options, self.classes, target_arrays, self.labels, seed)
        storage = self.read.storage_options
        if search_path is not None:
            if manifest is None:
                crops = find_crops(search_path, storage)
            else:
                crops = read_manifest(manifest, search_path, storage)
            listed = {"train": self._listed(crops)}
        else:
            annotated = self.classes is not None
            listed = read_csv(csv_path, annotated) if csv_path is not None else read_mapping(datasets or {})
        self._given = {split: [self._with_options(e) for e in entries] for split, entries in listed.items()}
        if self.classes is None:
            self._given = {name: _volumes(name, entries) for name, entries in self._given.items()}
        self._entries: dict[str, list[CropRecord]] | None = None
        self._built: dict[str, CellMapMultiDataset] = {}
        self._affine: dict[str, tuple[float, float]] = {}
        self._lock = threading.RLock()
        self._reported: set[str] = set()  # unannotated classes

    @property
    def entries(self) -> Mapping[str, list[CropRecord]]:
        """The crops of each split. A rule divides them at first use, which reads metadata.

        Raises:
            CellMapError: the crops cannot be divided like this, or none fits a filter.
        """
        with self._lock:
            if self._entries is None:
                self._entries = self._division.divide(self._given)
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
        settings = [self.labels.unknown, *(entry.metadata.get("unknown") for entry in entries)]
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
        problems: list[tuple[CropRecord, CellMapError]] = []
        dropped: list[tuple[CropRecord, CellMapError]] = []
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
        options = self.options
        how = (options.strategy, options.balance_datasets) if split == "train" else ()
        multi = CellMapMultiDataset(datasets, *how)
        multi.set_affine(self._affine)
        self._check_classes(split, multi)
        check_leakage(split, {**self._built, split: multi}, options.leakage, options.held_out)
        return multi

    def _opened(self, entries: Sequence[CropRecord], split: str) -> list[list[CellMapDataset] | CellMapError]:
        """The datasets of each entry, or what is wrong with it."""

        def opened(entry: CropRecord) -> list[CellMapDataset] | CellMapError:
            try:
                if entry.dataset:
                    return [self._own(entry.dataset, split)]
                return [self._open(entry, split, plane) for plane in self.options.planes]
            except CellMapError as e:
                return e

        return for_all(opened, entries, f"opening {split}")

    def _with_options(self, entry: CropRecord) -> CropRecord:
        options = self.read.storage_options if entry.storage_options is None else entry.storage_options
        metadata = {"level_translations": self.read.level_translations, **entry.metadata}
        own, common = metadata.get("unknown"), self.labels.unknown
        if isinstance(own, Mapping):  # classes that it does not name are as everywhere
            everywhere = common if isinstance(common, Mapping) else {"*": common}
            metadata["unknown"] = {**everywhere, **own}
        return replace(entry, storage_options=options, metadata=metadata)

    def _listed(self, crops: Sequence[ListedCrop]) -> list[CropRecord]:
        """Entries of crops that a folder or a manifest names, with the classes that are read."""
        if self.classes is None:
            return [CropRecord(crop.where, raw) for raw, crop in {crop.raw: crop for crop in crops}.items()]
        entries = []
        for crop in crops:
            names = [name for name in self._division.read_classes(crop.classes) if name in crop.classes]
            if names:
                target = f"{crop.folder}/[{','.join(names)}]"
                entries.append(CropRecord(crop.where, crop.raw, target, box=crop.box))
        annotated = sorted({name for crop in crops for name in crop.classes})
        if not entries:
            raise CellMapValueError(
                f"none of the {len(crops)} crops of {self.source} annotates any of {', '.join(self.classes)}; they "
                f"annotate {', '.join(annotated) or 'nothing'}"
            )
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
        training = split == "train"
        if split != "predict" and self.classes is not None and entry.target_path is None:
            raise CellMapValueError(f"a crop for {split!r} needs a target; only those for 'predict' may go without")
        changes = {key: value for key, value in entry.metadata.items() if key != "unknown"}
        if entry.storage_options is not None:
            changes["storage_options"] = entry.storage_options
        if split == "predict" and self.read.missing_raw in ("error", "auto"):
            changes["missing_raw"] = "warn"
        labels, intensity = self.labels, self.intensity
        if "unknown" in entry.metadata:
            labels = replace(labels, unknown=entry.metadata["unknown"])
        if labels.too_coarse == "drop":
            labels = replace(labels, too_coarse="error")
        own = {"normalize": entry.normalize, "invert": entry.invert}
        intensity = replace(intensity, **{key: value for key, value in own.items() if value is not None})
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

    def _own(self, dataset: CellMapDataset, split: str) -> CellMapDataset:
        """A dataset that was given ready-made, if it delivers what is asked for."""
        inputs = parse_inputs(self.input_arrays or {})
        given, wanted = list(dataset.layout.inputs), list(inputs)
        if dataset.layout.targets and dataset.layout.classes != tuple(self.classes or ()):
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

    def _check_classes(self, split: str, multi: CellMapMultiDataset) -> None:
        """Refuse or report classes that no crop annotates: they would be learnt from nothing."""
        if not multi.layout.targets:
            return
        nowhere = [c for c, n in multi.annotated_in().items() if n == 0]
        listed = sorted({n for c in multi.crops if c.target_path for n in c.target_path.names})
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
        kinds = [target.kind.name for target in multi.layout.targets.values()]
        report_unannotated(split, new, listed, folders, "labels" in kinds)

    @property
    def normalization(self) -> dict[str, tuple[float, float]]:
        """Offset and factor of every volume and rule that was opened, ``{normalization_key: (offset, factor)}``."""
        return {crop.raw.normalization_key: crop.raw.affine for multi in self._built.values() for crop in multi.crops}

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


def _check_source(options: SplitOptions, **sources: Any) -> None:
    """Check that the crops come from one source.

    Raises:
        CellMapTypeError: there are several or none.
        CellMapValueError: a folder is given without a rule that divides its crops.
    """
    given = [name for name, value in sources.items() if value is not None]
    if options.manifest is not None and sources["search_path"] is None:
        raise CellMapTypeError("manifest needs search_path too: the folder that holds its datasets")
    if len(given) != 1:
        raise CellMapTypeError(
            "give the crops either as csv_path or as datasets or as search_path; got "
            + (" and ".join(given) or "none of them")
        )
    if options.split == "csv" and sources["search_path"] is not None:
        raise CellMapValueError(
            "search_path does not say which crops validate: choose a rule, such as split=stratified, "
            "by_dataset or kfold"
        )


def _volumes(split: str, entries: list[CropRecord]) -> list[CropRecord]:
    """Each raw volume once: without classes, what a row names is the whole volume and no crop of it."""
    found = {
        (e.input_path, str(e.normalize), e.invert, str(e.metadata)) if e.dataset is None else e.where: e
        for e in entries
    }
    if len(found) < len(entries):
        log.info("%s: %d crops without classes are %d raw volumes", split, len(entries), len(found))
    return list(found.values())
