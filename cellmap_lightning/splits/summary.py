"""Summaries of a split: the CSV of its crops, and the table of its classes."""

import csv
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cellmap_lightning.io.files import make_folder
from cellmap_lightning.io.store import absolute, local_path
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.splits.crop_metadata import CropMetadata
from cellmap_lightning.splits.entries import METADATA_KEYS, SPLITS, CropRecord

log = logging.getLogger(__name__)


def write_csv(entries: Mapping[str, Sequence[CropRecord]], path: str | Path) -> None:
    """Write the crops of every split as a CSV of ``usage, raw, target``, with absolute paths and settings of entries.

    Args:
        entries: the crops of each split.
        path: the file to write.

    Read with ``split="csv"`` the file gives the same splits. A CSV has no columns for the normalization and inversion
    of single entries, which is logged. Credentials in addresses are hidden.
    """
    listed = [(split, entry) for split in SPLITS for entry in entries.get(split, [])]
    columns = [key for key in METADATA_KEYS if any(key in entry.metadata for _, entry in listed)]
    weighted = any(entry.weight is not None for _, entry in listed)
    rows = []
    for split, entry in listed:
        weight = ["" if entry.weight is None else repr(entry.weight)] if weighted else []
        metadata = [_cell(entry, key) for key in columns]
        raw, target = hide_address(absolute(entry.input_path)), _target_address(entry)
        rows.append(["validate" if split == "val" else split, raw, target, *weight, *metadata])
    left_out = [e.where for _, e in listed if e.normalize is not None or e.invert is not None]
    if left_out:
        log.warning("%s has no columns for normalize and invert, which are set for %s", path, ", ".join(left_out))
    file = local_path(path)
    make_folder(file.parent)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["usage", "raw", "target", *(["weight"] if weighted else []), *columns])
        writer.writerows(rows)


def _cell(entry: CropRecord, key: str) -> str:
    """Return a replacement of metadata as the text of a cell; empty without one."""
    if key not in entry.metadata:
        return ""
    return str(entry.crop_box or "") if key == "box" else json.dumps(entry.metadata[key])


def _target_address(entry: CropRecord) -> str:
    """Return the absolute path of an entry's labels, without credentials; empty without labels."""
    target = entry.target_path
    if entry.dataset is not None and entry.dataset.target_path is not None:
        target = str(entry.dataset.target_path)
    return hide_address(absolute(target)) if target else ""


def class_table(
    entries: Mapping[str, Sequence[CropRecord]],
    classes: Sequence[str],
    read: Callable[[Sequence[CropRecord]], list[CropMetadata | None]],
) -> str:
    """Return a table of the number of crops per split with each class, and of the foreground voxels in them.

    Args:
        entries: the crops of each split.
        classes: the classes.
        read: function that reads the metadata of crops.

    Voxels are those of the finest level: ``-`` if no crop has counts, ``>=`` if some do not.
    """
    splits = [split for split in ("train", "val", "test") if entries.get(split)]
    metadata = {split: [crop or CropMetadata({}) for crop in read(entries[split])] for split in splits}
    rows = [["class", *(cell for split in splits for cell in (split, "voxels"))]]
    rows += [[name, *(cell for split in splits for cell in _class_cells(name, metadata[split]))] for name in classes]
    rows.append(["crops", *(cell for split in splits for cell in (str(len(entries[split])), ""))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _class_cells(name: str, crops: Sequence[CropMetadata]) -> tuple[str, str]:
    """Return two cells of a class: the number of crops that hold it, and its voxels in them."""
    counts = [crop.voxels[name] for crop in crops if name in crop.classes]
    known = [count for count in counts if count is not None]
    if not known:
        return str(len(counts)), "-" if counts else "0"
    at_least = ">=" if len(known) < len(counts) else ""
    return str(len(counts)), f"{at_least}{sum(known):.3g}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return a row as text: the first cell aligned to the left, the others to the right."""
    cells = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
    return f"{row[0]:<{widths[0]}}{cells}".rstrip()
