"""Manifests and class lists of the CellMap Segmentation Challenge."""

import csv
from collections.abc import Sequence
from pathlib import Path

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.splits.manifests import Filter, ManifestCrop, manifest_crops
from cellmap_lightning.transforms.implied import read_table
from cellmap_lightning.validation import did_you_mean

#: Classes whose objects the challenge scores one by one; of the others it scores voxels.
INSTANCE_CLASSES = ("nuc", "vim", "ves", "endo", "lyso", "ld", "perox", "mito", "np", "mt", "cell", "instance")


def listed_crops(manifest: str | Path, crops: str | int | Sequence[str | int] = "test") -> list[ManifestCrop]:
    """Return the crops of a manifest, in its order.

    Args:
        manifest: see `manifest_rows`.
        crops: ``test`` for all of them; or names, numbers or patterns, see `Filter`.

    Raises:
        CellMapError: the manifest cannot be read, or lists no such crop.
    """
    listed = manifest_crops(manifest)
    patterns = None if crops == "test" else [crops] if isinstance(crops, str | int) else list(crops)
    selected = Filter(None, patterns, "crops").matches([crop.name for crop in listed])
    return [crop for crop, use in zip(listed, selected, strict=True) if use]


def class_names(path: str | Path, group: str | None = None) -> list[str]:
    """Read names of classes from a file of the challenge.

    Args:
        path: ``tested_classes.csv``, or a class table, whose first column has the names.
        group: a class of the table, to return its parts (``included ids``) instead of all classes.

    Raises:
        CellMapFileNotFoundError: there is no such file.
        CellMapKeyError: the table has no such class.
        CellMapValueError: the file has no names, or no ids.
    """
    if group is not None:
        table = read_table(path)
        if group not in table:
            hint = did_you_mean(group, table)
            raise CellMapKeyError(f"{path} has no class {group!r}; it has {', '.join(table)}{hint}")
        return [name for name, atoms in table.items() if len(atoms) == 1 and atoms <= table[group]]
    try:
        rows = csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines())
    except FileNotFoundError:
        raise missing(Path(path), "the list of classes") from None
    names = [row[0].strip() for row in rows if row and row[0].strip() and not row[0].startswith("#")]
    if not names or len(set(names)) < len(names):
        raise CellMapValueError(f"{path} must name classes in its first column, each once; it has {names}")
    return names
