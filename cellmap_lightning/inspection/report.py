"""Inspection of volumes and crops: facts, problems, costs and a proposal, as text and as JSON."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.crops.encodings import check_unknown
from cellmap_lightning.crops.image import MAX_UPSAMPLING
from cellmap_lightning.crops.options import LabelOptions, ReadOptions
from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.errors import CellMapError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Vector, to_vector
from cellmap_lightning.inspection import text
from cellmap_lightning.inspection.contradictions import contradicting_crops
from cellmap_lightning.inspection.costs import Costs, compute_costs
from cellmap_lightning.inspection.facts import (
    CropFacts,
    VolumeFacts,
    read_crop_facts,
    read_volume_facts,
)
from cellmap_lightning.inspection.formats import by_axis
from cellmap_lightning.inspection.problems import PROPOSED_CUT, Problem, find_problems
from cellmap_lightning.inspection.proposal import Proposal, propose
from cellmap_lightning.inspection.ranges import range_problems
from cellmap_lightning.inspection.refusals import refusal
from cellmap_lightning.inspection.scale_facts import at_scale
from cellmap_lightning.inspection.stale_levels import stale_labels, stale_raw
from cellmap_lightning.inspection.usages import left_out, placed
from cellmap_lightning.io.ngff import Overrides, shared_metadata
from cellmap_lightning.io.store import Remote, children, local_path, parse_location
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import SPLITS, CropRecord, read_csv, read_mapping
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW, find_crops, read_manifest
from cellmap_lightning.splits.options import SplitOptions
from cellmap_lightning.validation import first_few

#: Voxels of all labels together up to which they are counted without ``deep``: a few seconds on a disk.
COUNTED_AT_ONCE = 1 << 26
#: Settings that name crops; the proposal repeats them.
_SOURCES = ("csv_path", "search_path", "manifest", "datasets", "split", "only_datasets", "only_crops")
#: Settings that assign the crops to splits.
_SPLIT_OPTIONS = ("manifest", "split", "val_fraction", "fold", "n_folds", "only_datasets", "only_crops")


@dataclass(frozen=True)
class Inspection:
    """The results of `inspect`.

    Attributes:
        volumes: raw volumes.
        crops: annotated crops.
        problems: errors and surprises.
        proposal: settings that fit.
        costs: of the configuration, completed with the proposal where the user's has gaps.
        refused: the error if the configuration does not fit the data.
        complete: whether the user gave all of classes, scale and shape.
        split: the rule that assigns crops to splits.
        counted: whether the voxels of labels were read.

    Example:
        >>> print(inspect({"csv_path": "crops.csv"}, {}, None))
    """

    volumes: Sequence[VolumeFacts]
    crops: Sequence[CropFacts]
    problems: Sequence[Problem]
    proposal: Proposal | None
    costs: Costs | None
    refused: str | None
    complete: bool
    split: str = "csv"
    counted: bool = True

    def json(self) -> str:
        """Return everything as one JSON document, with the versions of the libraries."""
        names = ("cellmap-lightning", "torch", "lightning", "numpy", "zarr")
        document = {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "system": platform.platform(),
            **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }
        return json.dumps(document, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        parts = [text.volumes_text(self.volumes, {crop.raw for crop in self.crops})]
        if self.crops:
            parts += [
                text.crops_text(self.crops, self.split, self.proposal is not None and self.proposal.cuts),
                text.classes_text(self.crops),
                text.encodings_text(self.crops),
            ]
        parts.append(text.problems_text(self.problems, self.counted))
        if self.costs is not None:
            parts.append(text.costs_text(self.costs, self.complete))
        if self.proposal is not None:
            parts.append(
                "Proposal, to be pasted into my_configs/experiment/mine.yaml\n\n" + self.proposal.yaml.rstrip()
            )
        return "\n\n".join(part for part in parts if part)


def inspect(
    data: Mapping[str, Any],
    patch: Mapping[str, Any],
    input_path: str | None,
    deep: bool = False,
    device_bytes: int = 16 << 30,
) -> Inspection:
    """Inspect volumes and crops.

    Args:
        data: arguments of `CellMapDataModule`; classes and arrays may be missing.
        patch: ``shape`` and ``scale``, each perhaps None.
        input_path: a raw volume instead of crops; those of its ground truth are inspected too.
        deep: read voxels: values of volumes, counts that the metadata does not have, some samples. Labels of at most
            `COUNTED_AT_ONCE` voxels on this machine are read in any case.
        device_bytes: memory of the device that will train.

    Raises:
        CellMapError: the crops cannot be found.
    """
    settings = {name: value for name, value in data.items() if name != "_target_"}
    if input_path is not None:
        settings |= settings_around(input_path)
    of_folder = _split_of_folder(settings)
    settings |= of_folder
    chosen = {"scale": patch.get("scale"), "shape": patch.get("shape"), "classes": settings.get("classes")}
    pad = bool(settings.get("pad", True))
    with shared_metadata():
        splits = _splits(settings)
        volumes = _read_volumes(splits.entries, deep)
        listed = _read_listed(splits, settings)
        crops = listed.crops
        counts = deep or _are_few(listed.uncut)
        lacks = of_folder.get("split") == "blocks" or _lacks_validation(settings, splits.entries)
        planner = _Planner(volumes, listed.uncut, chosen, device_bytes, splits.classes, counts)
        rule = str(settings.get("split") or "csv")
        settings, proposal = planner.plan(settings, listed.cut_later, lacks)
        noted: list[Problem] = []
        if proposal is not None and proposal.cuts:
            noted.append(Problem("validation", first_few([crop.name for crop in listed.uncut]), PROPOSED_CUT))
        costs, refused = None, refusal(volumes, crops, chosen["classes"], proposal, input_path is None)
        if proposal is not None and refused is None:
            settings["batch_size"] = settings.get("batch_size") or proposal.batch_size
            arguments = _complete(settings, proposal.shape, proposal.scale, proposal.classes, proposal.only_datasets)
            try:
                with CellMapDataModule(**arguments) as module:
                    costs = compute_costs(module, arguments, device_bytes, deep, counts)
                    coarse = _coarser(chosen["scale"], proposal.scale)
                    crops = _usages(listed, module.splits, proposal, coarse, settings)
            except CellMapError as e:
                refused = str(e)
        crops = _at_scale_in_use(crops, proposal, counts)
        noted += [Problem("config", "", refused)] if refused is not None else []
        names = _named_classes(chosen["classes"], crops)
        # What does not fit a proposal is no fault of the data; its reasons name such crops.
        scale = to_vector(chosen["scale"]) if chosen["scale"] else None
        problems = find_problems(
            volumes, crops, names, scale, chosen["shape"], pad, settings.get("too_coarse", "drop"),
            settings.get("held_out"), splits.other_spellings,
            [
                *noted, *range_problems(volumes, splits.entries, settings),
                *(contradicting_crops(crops, names) if counts else ()),
                *(stale_labels(crops, names) if counts else ()),
                *(stale_raw(_volume_overrides(splits.entries)) if deep else ()),
            ],
        )  # fmt: skip
    complete = None not in chosen.values()
    return Inspection(volumes, crops, problems, proposal, costs, refused, complete, rule, counts)


@dataclass(frozen=True)
class _Listed:
    """The annotated crops of a configuration.

    Attributes:
        entries: split and entry of each crop, before crops are cut if ``cut_later``.
        uncut: their facts.
        crops: facts of the crops as the settings cut them.
        cut_later: True if the cut depends on a patch that is not given.
    """

    entries: Sequence[tuple[str, CropRecord]]
    uncut: Sequence[CropFacts]
    crops: Sequence[CropFacts]
    cut_later: bool


def _read_listed(splits: CellMapDataSplit, settings: Mapping[str, Any]) -> _Listed:
    """Read the facts of annotated crops, before they are cut too where the cut depends on a patch to be proposed."""
    entries = _annotated(splits.entries)
    crops = _read_crops(entries, settings)
    # How crops are cut depends on the patch, so that a patch is proposed for the crops before they are cut.
    if splits.options.blocks is None or splits.input_arrays is not None:
        return _Listed(entries, crops, crops, False)
    whole = _annotated(splits.uncut)
    return _Listed(whole, _read_crops(whole, settings), crops, True)


def _usages(
    listed: _Listed, splits: CellMapDataSplit, proposal: Proposal, coarse: str, settings: Mapping[str, Any]
) -> list[CropFacts]:
    """Return the facts of crops with the split of each in a configuration, or the reason why it is left out.

    Args:
        listed: the annotated crops.
        splits: the opened splits of the configuration.
        proposal: the proposal that completes it.
        coarse: the reason where the labels of a crop are too coarse.
        settings: arguments of `CellMapDataModule`.
    """
    only = proposal.only_datasets
    if proposal.cuts:  # the report shows the crops as they are listed
        return left_out(listed.uncut, splits, coarse, only)
    entries = [entry for _, entry in listed.entries]
    return placed(listed.crops, entries, splits, coarse, only, partial(_read_crops, settings=settings))


def _are_few(crops: Sequence[CropFacts]) -> bool:
    """Return True for labels of at most `COUNTED_AT_ONCE` voxels that are all stored on this machine."""
    local = all(not isinstance(parse_location(crop.target), Remote) for crop in crops)
    sizes = (facts.size or 0 for crop in crops for facts in crop.classes.values())
    return local and sum(sizes) <= COUNTED_AT_ONCE


def _at_scale_in_use(crops: Sequence[CropFacts], proposal: Proposal | None, deep: bool) -> Sequence[CropFacts]:
    """Return the facts of crops at the voxel size of the proposal."""
    # Without raw there is no proposal, and labels are counted at their own scale.
    in_use = proposal.scale if proposal is not None else next((c.scale for c in crops if c.scale), None)
    return crops if in_use is None else at_scale(crops, in_use, deep)


class _Planner:
    """Proposes settings, with crops that are cut where none is for validation.

    Args:
        volumes: raw volumes.
        crops: annotated crops, before they are cut.
        chosen: the user's ``scale``, ``shape`` and ``classes``, or None for each.
        device_bytes: memory of the device that trains.
        classes: classes by which crops are cut.
        deep: voxels are counted for the report.
    """

    def __init__(
        self,
        volumes: Sequence[VolumeFacts],
        crops: Sequence[CropFacts],
        chosen: Mapping[str, Any],
        device_bytes: int,
        classes: Sequence[str] | None,
        deep: bool,
    ) -> None:
        self._deep = deep
        self._volumes, self._crops, self._chosen = volumes, crops, chosen
        self._device_bytes, self._classes = device_bytes, classes

    def plan(
        self, settings: dict[str, Any], cut: bool, lacks_validation: bool
    ) -> tuple[dict[str, Any], Proposal | None]:
        """Return the settings, with the split that is proposed, and the proposal; None without a readable volume.

        Args:
            settings: arguments of `CellMapDataModule`.
            cut: whether the setting ``split`` cuts the crops for the proposed patch.
            lacks_validation: whether cutting the crops is to be proposed.
        """
        # The longest axis in nm, the default, may have too few voxels.
        for split in ["blocks", *({"blocks": {"axis": axis}} for axis in AXES)] if lacks_validation else []:
            blocks = {**settings, "split": split}
            proposal = self._propose(blocks, True, "no crop is for validation: a part of each is cut off for it")
            if proposal is not None and self._can_be_cut(blocks, proposal.shape, proposal.scale):
                return blocks, proposal
        return settings, self._propose(settings, cut)

    def _propose(self, settings: Mapping[str, Any], cut: bool, why_split: str | None = None) -> Proposal | None:
        return propose(
            self._volumes,
            self._crops,
            _source(settings),
            self._device_bytes,
            self._chosen,
            float(settings.get("max_upsampling") or MAX_UPSAMPLING),
            bool(settings.get("pad", True)),
            (lambda shape, scale: self._can_be_cut(settings, shape, scale)) if cut else None,
            why_split,
            self._deep,
        )

    def _can_be_cut(self, settings: Mapping[str, Any], shape: Sequence[int], scale: Vector) -> bool:
        """Return True if the rule ``split=blocks`` can cut all crops for a patch."""
        try:
            _ = _splits(settings, _patches(_complete(settings, shape, scale, self._classes or (), None))).entries
        except CellMapError:
            return False
        return True


def _split_of_folder(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the setting ``split`` for the crops of a folder, which unlike a CSV does not assign them to splits.

    A single crop is cut. Empty where the setting is given, or the crops are not those of a folder.
    """
    if settings.get("search_path") is None or settings.get("split", "csv") != "csv":
        return {}
    crops = _splits({**settings, "split": "blocks"}, {}).uncut.get("train", [])
    return {"split": "blocks" if len(crops) == 1 else "stratified"}


def _lacks_validation(settings: Mapping[str, Any], entries: Mapping[str, Sequence[CropRecord]]) -> bool:
    """Return True if annotated crops are for training, and none for validation, by a CSV or ``datasets``."""
    train = entries.get("train", [])
    is_listed = settings.get("split", "csv") == "csv" and not entries.get("val")
    return is_listed and bool(train) and all(entry.target_path and entry.dataset is None for entry in train)


def _named_classes(chosen: Sequence[str] | None, crops: Sequence[CropFacts]) -> list[str]:
    """Return the requested classes, or else those of the crops."""
    return list(chosen or dict.fromkeys(name for crop in crops for name in crop.classes))


def settings_around(input_path: str) -> dict[str, Any]:
    """Return settings for a raw volume, and for the crops of its ground truth if it is stored as in the challenge."""
    path = local_path(input_path).absolute()
    depth = len(Path(RAW).parts)
    entries = []
    if len(path.parents) >= depth:
        crops = path.parents[depth - 1] / GROUNDTRUTH
        for name in children(crops):
            # `all` has the ids of all classes: a copy of the others.
            groups = [group for group in children(crops / name) if group != "all"]
            classes = [
                c for c in groups if any((crops / name / c / file).exists() for file in (".zattrs", "zarr.json"))
            ]
            if classes:
                entries.append({"raw": str(path), "gt": f"{crops / name}/[{','.join(classes)}]"})
    if entries:
        return {"datasets": {"train": entries}, "split": "stratified" if len(entries) > 1 else "csv"}
    return {"datasets": {"predict": [{"raw": str(path)}]}}


def refuse(inspection: Inspection) -> None:
    """Raise the error for which the configuration is refused; to be called after the report is printed.

    Raises:
        CellMapValueError: it does not fit the data.
    """
    if inspection.refused is not None:
        raise CellMapValueError(inspection.refused)


def _splits(settings: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> CellMapDataSplit:
    """Return the splits of all crops, each with every class that it annotates.

    Args:
        settings: arguments of `CellMapDataModule`; classes and arrays may be missing.
        arrays: the arrays and the augmentation in place of those of the settings.
    """
    classes = settings.get("classes")
    if settings.get("search_path") is not None and classes is None:
        folder, manifest = settings["search_path"], settings.get("manifest")
        listed = find_crops(folder) if manifest is None else read_manifest(manifest, folder)
        classes = sorted({name for crop in listed for name in crop.classes if name != "all"})
    elif classes is None:
        csv_path = settings.get("csv_path")
        records = read_csv(csv_path) if csv_path else read_mapping(settings["datasets"])
        targets = [record.target for of_split in records.values() for record in of_split]
        classes = list(dict.fromkeys(name for target in targets if target is not None for name in target.names))

    def chosen(*names: str) -> dict[str, Any]:
        return {name: settings[name] for name in names if settings.get(name) is not None}

    return CellMapDataSplit(
        classes=classes or None,
        options=SplitOptions(**chosen(*_SPLIT_OPTIONS)),
        read=ReadOptions(**chosen("level_translations")),
        labels=LabelOptions(**chosen("unannotated_classes")),
        **chosen("csv_path", "datasets", "search_path", "seed"),
        **(_patches(settings) if arrays is None else arrays),
    )


def _coarser(chosen: Any, scale: Vector) -> str:
    """Return the reason for which crops are left out whose labels are too coarse."""
    return f"labels coarser than the {'scale' if chosen else 'proposed scale'} of {by_axis(scale)} nm"


def _annotated(entries: Mapping[str, Sequence[CropRecord]]) -> list[tuple[str, CropRecord]]:
    """Return split and entry of the crops with labels."""
    listed = [(split, entry) for split in SPLITS for entry in entries.get(split, [])]
    return [(split, entry) for split, entry in listed if entry.target_path is not None]


def _patches(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays and the augmentation, on which the split inside of crops depends; none without a patch size."""
    arrays = {name: settings.get(name) or {} for name in ("input_arrays", "target_arrays")}
    specs = [spec for of_role in arrays.values() for spec in of_role.values()]
    if not specs or not all(spec.get("shape") and spec.get("scale") for spec in specs):
        return {}
    return {**arrays, "spatial_transforms": settings.get("spatial_transforms")}


def _read_volumes(entries: Mapping[str, Sequence[CropRecord]], deep: bool) -> list[VolumeFacts]:
    overrides = _volume_overrides(entries)
    return read_volume_facts(list(overrides), deep, overrides)


def _volume_overrides(entries: Mapping[str, Sequence[CropRecord]]) -> dict[str, Overrides]:
    """Return the overrides of each raw volume, by its path."""
    return {entry.input_path: entry.overrides[0] for split in SPLITS for entry in entries.get(split, [])}


def _read_crops(entries: Sequence[tuple[str, CropRecord]], settings: Mapping[str, Any]) -> list[CropFacts]:
    tolerant = settings.get("unannotated_classes") == "unknown"
    return read_crop_facts(entries, check_unknown(settings.get("unknown", "metadata")), tolerant)


def _source(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that name the crops, without defaults."""
    named = {name: settings[name] for name in _SOURCES if settings.get(name) is not None}
    if named.get("split") == "csv":
        del named["split"]
    if settings.get("unannotated_classes") == "unknown":
        named["unannotated_classes"] = "unknown"
    return {"csv_path": None, **named}


def _complete(
    settings: Mapping[str, Any],
    shape: Sequence[int],
    scale: Vector,
    classes: Sequence[str],
    only_datasets: Sequence[str] | None,
) -> dict[str, Any]:
    """Return arguments of `CellMapDataModule`, with missing settings taken from a proposal."""
    arguments = dict(settings)
    arguments["classes"] = list(settings.get("classes") or classes) or None
    if only_datasets is not None:
        arguments["only_datasets"] = list(only_datasets)
    for kind, default in (("input_arrays", "raw"), ("target_arrays", "labels")):
        arguments[kind] = {
            name: {
                **array,
                "shape": array.get("shape") or list(shape),
                "scale": array.get("scale") or list(scale),
            }
            for name, array in (settings.get(kind) or {default: {}}).items()
        }
    if arguments["classes"] is None:
        arguments["target_arrays"] = None
    return arguments


def _plain(value: Any) -> Any:
    """Return dataclasses, mappings, sequences and NumPy scalars as values that JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
