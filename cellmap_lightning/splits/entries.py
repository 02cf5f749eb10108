"""Records of crops, read from a CSV or from the mapping ``datasets``."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cellmap_lightning.crops.crop_box import CropBox
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
from cellmap_lightning.io.label_ids import parse_label_map
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.io.ngff import OVERRIDE_KEYS, Overrides
from cellmap_lightning.io.store import local_path
from cellmap_lightning.sampling.strategy import check_weight
from cellmap_lightning.splits.csv_columns import Header, check_quotes, delimiter
from cellmap_lightning.validation import did_you_mean, mapping_or_none

SPLITS = ("train", "val", "test", "predict")
_USAGES = {**{s: s for s in SPLITS}, "validate": "val", "validation": "val"}
#: Keys of an entry, and columns of a CSV, that replace metadata: the code of unknown voxels, the extent, the geometry.
METADATA_KEYS = ("unknown", "box", *OVERRIDE_KEYS)
_COLUMNS = ("weight", "labels", *METADATA_KEYS)
_ENTRY_KEYS = ("raw", "gt", "labels", "normalize", "invert", "weight", *METADATA_KEYS, "storage_options")


@dataclass(frozen=True)
class CropRecord:
    """One crop of a split; see docs/data.md.

    Attributes:
        where: location of its entry, for messages.
        input_path: the raw multiscale group.
        target_path: the label groups in bracket form, or None.
        dataset: an existing dataset instead of paths.
        normalize: normalization of its raw; None for the common one.
        invert: inversion of its raw; None for the common one.
        box: the box of the whole crop in nm, if the source lists it.
        weight: relative weight in the strategy ``weighted``.
        storage_options: see `ReadOptions`.
        metadata: replacements for its metadata, ``{key: value}`` with keys of `METADATA_KEYS`; see `ReadOptions`.
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
            CellMapError: an invalid value.
        """
        return overrides_of(self.metadata)

    @property
    def crop_box(self) -> CropBox | None:
        """The part of the crop that is used; None for all of it.

        Raises:
            CellMapError: it is malformed.
        """
        box = self.metadata.get("box")
        return None if box is None else CropBox.parse(box)

    @property
    def target(self) -> TargetPath | None:
        """Path of its labels.

        Raises:
            CellMapValueError: the bracket is malformed.
        """
        if self.dataset is not None:
            return self.dataset.target_path
        return TargetPath.parse(self.target_path, self.storage_options) if self.target_path is not None else None


def overrides_of(metadata: Mapping[str, Any]) -> tuple[Overrides, Overrides]:
    """Return the overrides of a raw image and of labels, from replacements of metadata.

    Raises:
        CellMapError: an invalid value.
    """
    return Overrides.pair(**{key: value for key, value in metadata.items() if key not in ("unknown", "box")})


def table_of(rows: Sequence[tuple[CropRecord, CellMapError]]) -> str:
    """Return one line per crop: the location of its entry, and its error."""
    width = max(len(entry.where) for entry, _ in rows)
    return "\n".join(f"  {entry.where:<{width}}  {error}" for entry, error in rows)


def read_csv(path: str | Path, targets: bool = True) -> dict[str, list[CropRecord]]:
    """Read the entries of a CSV per split; see `CellMapDataSplit`.

    Args:
        path: the file.
        targets: True if crops need a target, except those for ``predict``.

    Raises:
        CellMapFileNotFoundError: the file does not exist.
        CellMapValueError: rows are invalid; the message lists all of them.
    """
    file = local_path(path)
    text = _read_text(file)
    entries: dict[str, list[CropRecord]] = {}
    problems: list[tuple[CropRecord, CellMapError]] = []
    header: Header | None = None
    reader = csv.reader(io.StringIO(text), skipinitialspace=True, delimiter=delimiter(text))
    end = 0
    for row in reader:
        line, end = end + 1, reader.line_num
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#"):
            continue
        where = f"{file.name}, line {line}"
        if header is None:
            header = _header(cells, file, line)
            if header.names:
                continue
        try:
            check_quotes(cells)
            cells, values = header.arranged(cells)
            split, entry = _row(cells, where, file.parent, targets)
            weight = _weight(values.pop("weight", ""))
            labels = _value("labels", values.pop("labels", "") or "null")
            entry = replace(entry, target_path=with_labels(entry.target_path, labels))
            metadata = {key: _value(key, cell) for key, cell in values.items() if cell}
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
    _check_repeated(entries, file)
    return entries


def _check_repeated(entries: Mapping[str, Sequence[CropRecord]], file: Path) -> None:
    """Raise an error that lists the rows that repeat a crop, which would be sampled and counted twice."""
    first: dict[Any, str] = {}
    repeated: list[tuple[CropRecord, CellMapError]] = []
    for split, records in entries.items():
        for entry in records if split != "predict" else ():
            key = (split, _normal(entry.input_path), _target_key(entry), str(entry.metadata.get("box") or ""))
            where = first.setdefault(key, entry.where)
            if where is not entry.where:
                line = where.rpartition(", ")[2]
                repeated.append((entry, CellMapValueError(f"the crop of {line} again, for {split!r}")))
    if repeated:
        raise CellMapValueError(
            f"{len(repeated)} row{'s' if len(repeated) > 1 else ''} of {file} repeat{'' if len(repeated) > 1 else 's'} "
            "the usage, raw, crop, classes and box of another row; remove the copies (a crop is sampled more often by "
            f"the column weight and data.strategy=weighted):\n{table_of(repeated)}"
        )


def _target_key(entry: CropRecord) -> Any:
    """Return the location of the labels of an entry and its classes in alphabetical order; the path if malformed."""
    try:
        target = entry.target
    except CellMapError:  # raised when the crop is opened
        return entry.target_path
    if target is None:
        return None
    return _normal(target.before), tuple(sorted(target.names)), target.label_map, _normal(target.after)


def _header(cells: Sequence[str], file: Path, line: int) -> Header:
    """Return the header that the first row is, or one without names; errors name the line."""
    try:
        return Header.parse(cells, _COLUMNS, tuple(_USAGES)) or Header()
    except CellMapError as e:
        e.args = (f"{file}, line {line}: {e}",)
        raise


#: First bytes of files that spreadsheets write in place of a CSV in UTF-8.
_NO_CSV = {
    b"PK\x03\x04": "a spreadsheet or another zip file (such as .xlsx or .ods)",
    b"\xd0\xcf\x11\xe0": "a spreadsheet of old versions of Excel (.xls)",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


def _read_text(file: Path) -> str:
    """Return the text of the CSV, without a byte order mark."""
    try:
        content = file.read_bytes()
        for begin, format_name in _NO_CSV.items():
            if content.startswith(begin):
                raise CellMapValueError(f"{file} is {format_name}, no text in UTF-8; save it as CSV in UTF-8")
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
        if "\0" in text:
            raise CellMapValueError(f"{file} holds bytes of 0, as text in UTF-16 does; save it as CSV in UTF-8")
        return text
    except (FileNotFoundError, NotADirectoryError):
        raise missing(file, "the CSV of crops") from None
    except IsADirectoryError:
        raise CellMapFileNotFoundError(f"the CSV of crops {file} is a folder") from None
    except UnicodeDecodeError as e:
        raise CellMapValueError(f"{file} is not a text file in UTF-8 ({e}); save it as CSV in UTF-8") from None


def _row(cells: list[str], where: str, folder: Path, targets: bool) -> tuple[str, CropRecord]:
    """Return the split and the record of a row, without its optional columns."""
    split = _USAGES.get(cells[0].lower())
    if split is None:
        raise CellMapValueError(f"the usage {cells[0]!r} should be one of {', '.join(_USAGES)}")
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
        raise CellMapValueError(f"the target path is empty; only crops for 'predict' need none, not {split!r}")
    return split, CropRecord(where, _anchor(raw, folder), _anchor(target, folder) if target else None)


def _value(key: str, cell: str) -> Any:
    """Return the value of a cell, written as in YAML: ``null``, ``255``, ``[8, 8, 8]``, ``{raw: micrometer}``."""
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError as e:
        raise CellMapValueError(f"{key} cannot be read from {cell!r}: {str(e).splitlines()[0]}") from None


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return replacements of metadata, after a check of their values."""
    checked = dict(metadata)
    if isinstance(checked.get("unknown"), float) and checked["unknown"].is_integer():
        checked["unknown"] = int(checked["unknown"])  # pandas writes whole numbers of a column with gaps as floats
    if "unknown" in checked:
        checked["unknown"] = check_unknown(checked["unknown"])
    if checked.get("box") is not None:
        checked["box"] = str(CropBox.parse(checked["box"]))
    _ = CropRecord("", metadata=checked).overrides  # raises for invalid values
    return checked


def _weight(cell: str) -> float | None:
    """Return the value of a cell in the column ``weight``; None if it is empty."""
    try:
        value = float(cell) if cell else None
    except ValueError:
        raise CellMapValueError(f"the weight {cell!r} should be a number") from None
    return None if value is None else check_weight(value, "the weight")


def _join(zarr: str, inside: str) -> str:
    """Return the path of a group inside a container; empty if either is."""
    return f"{zarr.rstrip('/')}/{inside.strip('/')}" if zarr and inside else ""


def _anchor(path: str, folder: Path) -> str:
    """Return a relative path relative to the folder of the CSV; other paths are unchanged."""
    if "://" in path or path.startswith("~"):
        return path
    return str(folder / path)


def _normal(path: str) -> str:
    """Return a path or an address without repeated slashes, ``.`` and ``..``."""
    protocol, separator, rest = path.rpartition("://")
    return f"{protocol}{separator}{os.path.normpath(rest)}"


def read_mapping(datasets: Mapping[str, Any]) -> dict[str, list[CropRecord]]:
    """Read the entries of ``{split: [{"raw": path, "gt": path}, ...]}`` per split.

    Raises:
        CellMapKeyError: an unknown split, or an unknown or missing key of an entry.
        CellMapTypeError: no mapping, or an invalid entry.
    """
    entries: dict[str, list[CropRecord]] = {}
    if not isinstance(datasets, Mapping):
        raise CellMapTypeError(
            f"datasets must be {{train: [{{raw: path, gt: path}}, ...], validate: [...]}}, got {datasets!r}"
        )
    for name, items in datasets.items():
        split = _USAGES.get(str(name))
        if split is None:
            hint = did_you_mean(name, _USAGES, f"; there are {', '.join(SPLITS)}")
            raise CellMapKeyError(f"datasets has the split {name!r}{hint}")
        if items is None:
            continue
        if isinstance(items, Mapping | str) or not isinstance(items, Sequence):
            raise CellMapTypeError(f"datasets.{name} must be a list of entries {{raw: path, gt: path}}, got {items!r}")
        for number, item in enumerate(items):
            entries.setdefault(split, []).append(_entry(item, f"datasets.{name}[{number}]"))
    return entries


def _entry(item: Any, where: str) -> CropRecord:
    """Return the record of an entry of ``datasets``."""
    if isinstance(item, CellMapDataset):
        return CropRecord(where, item.input_path, dataset=item)
    if not isinstance(item, Mapping):
        raise CellMapTypeError(f"{where} must be {{raw: path, gt: path}}, got {item!r}")
    older = {"input_path": "raw", "raw_path": "raw", "target_path": "gt", "gt_path": "gt", "ground_truth_path": "gt"}
    unknown = [key for key in item if key not in _ENTRY_KEYS and key not in older]
    if unknown:
        hint = did_you_mean(unknown[0], _ENTRY_KEYS, f"; it has {', '.join(_ENTRY_KEYS)}")
        raise CellMapKeyError(f"{where} has no {unknown[0]!r}{hint}")
    values: dict[str, Any] = {}
    for key, value in item.items():
        name = older.get(str(key), str(key))
        if name in values:
            raise CellMapTypeError(f"{where}: {name} is given twice")
        values[name] = value
    if not values.get("raw"):
        raise CellMapKeyError(f"{where} needs 'raw', the path of the raw multiscale group")
    return CropRecord(
        where,
        str(values["raw"]),
        _target_in(where, str(values["gt"]) if values.get("gt") else None, values.get("labels")),
        normalize=values.get("normalize"),
        invert=values.get("invert"),
        weight=check_weight(values["weight"], f"{where}: weight") if values.get("weight") is not None else None,
        storage_options=mapping_or_none(f"{where}: storage_options", values.get("storage_options")),
        metadata=_checked_in(where, {key: values[key] for key in METADATA_KEYS if key in values}),
    )


def with_labels(target_path: str | None, labels: Any) -> str | None:
    """Return a target path with a label map ``{id: class}``, or the path itself without one.

    Raises:
        CellMapError: an invalid map, or a path that names classes itself.
    """
    if labels is None:
        return target_path
    label_map = parse_label_map(labels)
    if target_path is None or "[" in target_path.rpartition("/")[2] or target_path.endswith("}"):
        raise CellMapValueError(
            f"labels={dict(label_map)} needs a target path without a bracket of classes, that of the array with the "
            f"ids, got {target_path!r}"
        )
    head, chain, archive = target_path.partition("::") if "://" in target_path else (target_path, "", "")
    return f"{head.rstrip('/')}/{{{','.join(f'{i}:{name}' for i, name in label_map)}}}{chain}{archive}"


def _target_in(where: str, target_path: str | None, labels: Any) -> str | None:
    """Return a target path with its label map; errors name the entry."""
    try:
        return with_labels(target_path, labels)
    except CellMapError as e:
        e.args = (f"{where}: {e}",)
        raise


def _checked_in(where: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked replacements of metadata; errors name the entry."""
    try:
        return _checked(metadata)
    except CellMapError as e:
        e.args = (f"{where}: {e}",)
        raise
