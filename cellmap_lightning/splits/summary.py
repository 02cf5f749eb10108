"""The crops of a split as a CSV, and as a table of classes."""

import csv
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cellmap_lightning.io.store import absolute, local_path
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.splits.crop_metadata import CropMetadata
from cellmap_lightning.splits.entries import METADATA_KEYS, SPLITS, CropRecord

log = logging.getLogger(__name__)


def write_csv(entries: Mapping[str, Sequence[CropRecord]], path: str | Path) -> None:
    """Write the crops of every split as a CSV of ``usage, raw, target`` with absolute paths, and what entries say.

    Args:
        entries: the crops of each split.
        path: the file to write.

    Read again with ``split="csv"`` it gives the same splits. How single entries are normalized or inverted has no
    place in a CSV; that is logged. Credentials in addresses are hidden.
    """
    rows, own = [], []
    every = [entry for listed in entries.values() for entry in listed]
    columns = [key for key in METADATA_KEYS if any(key in entry.metadata for entry in every)]
    weighted = any(entry.weight is not None for entry in every)
    for split in SPLITS:
        for entry in entries.get(split, []):
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
    file = local_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["usage", "raw", "target", *(["weight"] if weighted else []), *columns])
        writer.writerows(rows)


def class_table(
    entries: Mapping[str, Sequence[CropRecord]],
    classes: Sequence[str],
    read: Callable[[Sequence[CropRecord]], list[CropMetadata | None]],
) -> str:
    """Return a table of the crops of each split that hold each class, and of the foreground voxels in them.

    Args:
        entries: the crops of each split.
        classes: the classes.
        read: reads the metadata of crops.

    Voxels are those of the finest level. ``-`` where no crop says how many, ``>=`` where some do not.
    """
    shown = [split for split in ("train", "val", "test") if entries.get(split)]
    holdings = {split: [h or CropMetadata({}) for h in read(entries[split])] for split in shown}
    rows = [["class", *(cell for split in shown for cell in (split, "voxels"))]]
    for name in classes:
        row = [name]
        for split in shown:
            counts = [h.voxels[name] for h in holdings[split] if name in h.classes]
            known = [count for count in counts if count is not None]
            at_least = ">=" if len(known) < len(counts) else ""
            row += [str(len(counts)), f"{at_least}{sum(known):.3g}" if known else "-" if counts else "0"]
        rows.append(row)
    rows.append(["crops", *(cell for split in shown for cell in (str(len(entries[split])), ""))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        (
            f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    )
