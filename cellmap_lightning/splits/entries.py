"""The crops that a CSV or a configuration names, entry by entry."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cellmap_lightning.crops.encodings import check_unknown
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileNotFoundError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
)
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.io.ngff import OVERRIDE_KEYS, Overrides
from cellmap_lightning.io.store import local_path, missing
from cellmap_lightning.sampling.strategy import check_weight

SPLITS = ("train", "val", "test", "predict")
_USAGES = {**{s: s for s in SPLITS}, "validate": "val", "validation": "val"}
#: What an entry may say of its metadata, and as a column of a CSV.
METADATA_KEYS = ("unknown", *OVERRIDE_KEYS)
_COLUMNS = ("weight", *METADATA_KEYS)
_ENTRY_KEYS = ("raw", "gt", "normalize", "invert", "weight", *METADATA_KEYS, "storage_options")


@dataclass(frozen=True)
class CropRecord:
    """One crop of a split.

    Attributes:
        where: where it was named, for messages.
        input_path: the raw multiscale group.
        target_path: the label groups in bracket form, or None.
        dataset: a dataset that was given ready-made.
        normalize: how its raw is normalized, when not as the others.
        invert: whether it is inverted, when not as the others.
        box: where it lies, in nm, if that was said where it was named.
        weight: how often it is drawn by the strategy ``weighted``.
        storage_options: see `CellMapDataset`.
        metadata: what replaces its metadata, ``{key: value}``, the keys among `METADATA_KEYS`; see `CellMapDataset`.
    """

    where: str
    input_path: str = ""
    target_path: str | None = None
    dataset: CellMapDataset | None = None
    normalize: Any = None
    invert: bool | None = None
    weight: float | None = None
    box: Box | None = None
    storage_options: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> tuple[Overrides, Overrides]:
        """Overrides of the metadata of its raw image and of its labels.

        Raises:
            CellMapError: a value that is not one.
        """
        return Overrides.pair(**{key: value for key, value in self.metadata.items() if key != "unknown"})

    @property
    def target(self) -> TargetPath | None:
        """Where its labels lie.

        Raises:
            CellMapValueError: the bracket is malformed.
        """
        if self.dataset is not None:
            return self.dataset.target_path
        return TargetPath.parse(self.target_path, self.storage_options) if self.target_path is not None else None


def table_of(rows: Sequence[tuple[CropRecord, CellMapError]]) -> str:
    """One line per crop: where it was named, and what is wrong."""
    width = max(len(entry.where) for entry, _ in rows)
    return "\n".join(f"  {entry.where:<{width}}  {error}" for entry, error in rows)


def read_csv(path: str | Path, targets: bool = True) -> dict[str, list[CropRecord]]:
    """Entries of a CSV per split; see `CellMapDataSplit`.

    Args:
        path: the file.
        targets: whether crops need a target, unless they are for ``predict``.

    Raises:
        CellMapFileNotFoundError: there is no such file.
        CellMapValueError: rows that cannot be read, all of them in one table.
    """
    file = local_path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise missing(file, "the CSV of crops") from None
    except IsADirectoryError:
        raise CellMapFileNotFoundError(f"the CSV of crops {file} is a folder") from None
    except UnicodeDecodeError as e:
        raise CellMapValueError(f"{file} is not a text file ({e})") from None
    entries: dict[str, list[CropRecord]] = {}
    problems: list[tuple[CropRecord, CellMapError]] = []
    first: bool = True
    options: list[str] = []
    reader = csv.reader(io.StringIO(text), skipinitialspace=True)
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#"):
            continue
        header, first = first and cells[0].lower() == "usage", False
        if header:
            names = [cell.lower() for cell in cells]
            options = [name for name in names if name in _COLUMNS]
            if names[len(names) - len(options) :] != options:
                raise CellMapValueError(f"{file}: the columns {', '.join(options)} must be the last ones")
            continue
        where = f"{file.name}, line {reader.line_num}"
        try:
            split, entry = _row(cells[: len(cells) - len(options)], where, file.parent, targets)
            given = dict(zip(options, cells[len(cells) - len(options) :], strict=True))
            weight = _weight(given.pop("weight", ""))
            metadata = {key: _value(key, cell) for key, cell in given.items() if cell}
            entry = replace(entry, weight=weight, metadata=_checked(metadata))
            entries.setdefault(split, []).append(entry)
        except CellMapError as e:
            problems.append((CropRecord(where), e))
    if problems:
        raise CellMapValueError(
            f"{len(problems)} row{'s' if len(problems) > 1 else ''} of {file} cannot be read:\n" + table_of(problems)
        )
    if not entries:
        raise CellMapValueError(f"{file} names no crops: rows of 'usage, raw, target' are needed")
    return entries


def _row(cells: list[str], where: str, folder: Path, targets: bool) -> tuple[str, CropRecord]:
    split = _USAGES.get(cells[0].lower())
    if split is None:
        raise CellMapValueError(f"the usage {cells[0]!r} should be one of {', '.join(_USAGES)}")
    if any(cell.rpartition("/")[2].startswith("[") and "]" not in cell.rpartition("/")[2] for cell in cells):
        raise CellMapValueError('a bracket of classes needs quotes around its path: "…/crop1/[mito,er]"')
    if len(cells) == 5:
        raw, target = _join(cells[1], cells[2]), _join(cells[3], cells[4])
    elif len(cells) in (2, 3):
        raw, target = cells[1], cells[2] if len(cells) == 3 else ""
    else:
        raise CellMapValueError(
            f"{len(cells)} columns; 3 (usage, raw, target) or 5 (usage, zarr, raw dataset, zarr, target dataset) "
            "are needed"
        )
    if not raw:
        raise CellMapValueError("the raw path is empty")
    if not target and targets and split != "predict":
        raise CellMapValueError(f"the target path is empty; only crops for 'predict' may go without, not {split!r}")
    return split, CropRecord(where, _anchor(raw, folder), _anchor(target, folder) if target else None)


def _value(key: str, cell: str) -> Any:
    """The value of a cell, written as in YAML: ``null``, ``255``, ``[8, 8, 8]``, ``{raw: micrometer}``."""
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError as e:
        raise CellMapValueError(f"{key} cannot be read from {cell!r}: {str(e).splitlines()[0]}") from None


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same, if its values are ones that `CellMapDataset` takes."""
    found = dict(metadata)
    if isinstance(found.get("unknown"), float) and found["unknown"].is_integer():
        found["unknown"] = int(found["unknown"])  # as pandas writes a column with gaps
    if "unknown" in found:
        found["unknown"] = check_unknown(found["unknown"])
    _ = CropRecord("", metadata=found).overrides
    return found


def _weight(cell: str) -> float | None:
    """The last cell of a row under a header that says ``weight``; empty where the crop has none of its own."""
    try:
        value = float(cell) if cell else None
    except ValueError:
        raise CellMapValueError(f"the weight {cell!r} should be a number") from None
    return None if value is None else check_weight(value, "the weight")


def _join(zarr: str, inside: str) -> str:
    return f"{zarr.rstrip('/')}/{inside.strip('/')}" if zarr and inside else ""


def _anchor(path: str, folder: Path) -> str:
    """A relative path, seen from the file that names it."""
    if "://" in path or path.startswith("~"):
        return path
    return str(folder / path)


def read_mapping(datasets: Mapping[str, Any]) -> dict[str, list[CropRecord]]:
    """Entries of ``{split: [{"raw": path, "gt": path}, ...]}`` per split.

    Raises:
        CellMapKeyError: an unknown split, or an unknown or missing key of an entry.
        CellMapTypeError: an entry that is none.
    """
    entries: dict[str, list[CropRecord]] = {}
    for name, items in datasets.items():
        split = _USAGES.get(str(name))
        if split is None:
            raise CellMapKeyError(f"datasets has the split {name!r}; there are {', '.join(SPLITS)}")
        if items is None:
            continue
        if isinstance(items, Mapping | str) or not isinstance(items, Sequence):
            raise CellMapTypeError(f"datasets.{name} must be a list of entries {{raw: path, gt: path}}, got {items!r}")
        for number, item in enumerate(items):
            entries.setdefault(split, []).append(_entry(item, f"datasets.{name}[{number}]"))
    return entries


def _entry(item: Any, where: str) -> CropRecord:
    if isinstance(item, CellMapDataset):
        return CropRecord(where, item.input_path, dataset=item)
    if not isinstance(item, Mapping):
        raise CellMapTypeError(f"{where} must be {{raw: path, gt: path}}, got {item!r}")
    older = {"input_path": "raw", "raw_path": "raw", "target_path": "gt", "gt_path": "gt", "ground_truth_path": "gt"}
    unknown = [key for key in item if key not in _ENTRY_KEYS and key not in older]
    if unknown:
        raise CellMapKeyError(f"{where} has no {unknown[0]!r}; it has {', '.join(_ENTRY_KEYS)}")
    found: dict[str, Any] = {}
    for key, value in item.items():
        name = older.get(str(key), str(key))
        if name in found:
            raise CellMapTypeError(f"{where}: {name} is given twice")
        found[name] = value
    if not found.get("raw"):
        raise CellMapKeyError(f"{where} needs 'raw', the path of the raw multiscale group")
    return CropRecord(
        where,
        str(found["raw"]),
        str(found["gt"]) if found.get("gt") else None,
        None,
        found.get("normalize"),
        found.get("invert"),
        check_weight(found["weight"], f"{where}: weight") if found.get("weight") is not None else None,
        None,
        found.get("storage_options"),
        _located(where, {key: found[key] for key in METADATA_KEYS if key in found}),
    )


def _located(where: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """See `_checked`; errors name the entry."""
    try:
        return _checked(metadata)
    except CellMapError as e:
        e.args = (f"{where}: {e}",)
        raise
