"""Crops as the CellMap Segmentation Challenge lays them out in folders, and as its manifest lists them."""

import csv
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import (
    CellMapFileNotFoundError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
)
from cellmap_lightning.geometry.lattice import Box, Lattice, to_vector
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.io.store import Remote, StorePath, children, exists, local_path, parse_location

RAW = "recon-1/em/fibsem-uint8"
GROUNDTRUTH = "recon-1/labels/groundtruth"
_COLUMNS = ("crop_name", "dataset", "class_label", "voxel_size", "translation", "shape")


@dataclass(frozen=True)
class ListedCrop:
    """A crop that a folder or a manifest names.

    Attributes:
        where: where it was named, for messages.
        raw: the raw multiscale group.
        folder: the group of its classes.
        classes: the classes that it annotates.
        box: where it lies, in nm, if the manifest says so.
    """

    where: str
    raw: str
    folder: str
    classes: tuple[str, ...]
    box: Box | None = None


def find_crops(root: str | Path, options: Mapping[str, Any] | None = None) -> list[ListedCrop]:
    """Every crop below ``root``, in ``<dataset>/<dataset>.zarr`` or ``<dataset>.zarr``, sorted by name.

    Raises:
        CellMapFileNotFoundError: there is no such folder, or no crop in it.
        CellMapValueError: a dataset is there twice.
    """
    volumes = _volumes(root, options)
    found = []
    for volume in volumes.values():
        labels = volume / GROUNDTRUTH
        for crop in sorted((name for name in children(labels) if name.startswith("crop")), key=_natural):
            classes = tuple(children(labels / crop))
            where = f"search_path, {volume.stem}/{crop}"
            found.append(ListedCrop(where, str(volume / RAW), str(labels / crop), classes))
    if not found:
        has = (
            f"none in {_some(list(volumes))}" if volumes else f"it has {_some(children(parse_location(root, options)))}"
        )
        raise CellMapFileNotFoundError(
            f"search_path {root} holds no crops: they are looked for in <dataset>/<dataset>.zarr/{GROUNDTRUTH}/crop* "
            f"and <dataset>.zarr/{GROUNDTRUTH}/crop*; {has}"
        )
    return found


def _root(root: str | Path, options: Mapping[str, Any] | None = None) -> StorePath:
    folder = parse_location(root, options)
    return folder if isinstance(folder, Remote) else folder.absolute()


def _volumes(root: str | Path, options: Mapping[str, Any] | None = None) -> dict[str, StorePath]:
    """The volume of each dataset below a folder; nothing where it cannot be asked what is in it."""
    folder = _root(root, options)
    if isinstance(folder, Remote) and not folder.lists:
        return {}
    if not exists(folder):
        raise missing(folder, "search_path")
    volumes: dict[str, StorePath] = {}
    for name in children(folder):
        volume = folder / name if name.endswith(".zarr") else folder / name / f"{name}.zarr"
        if not exists(volume):
            continue
        if volume.stem in volumes:
            raise CellMapValueError(f"the dataset {volume.stem} is there twice: {volumes[volume.stem]} and {volume}")
        volumes[volume.stem] = volume
    return volumes


@dataclass(frozen=True)
class ManifestRow:
    """A class of a crop, as a manifest lists it.

    Attributes:
        dataset: name of the dataset.
        crop: name of the crop; ``crop234`` where the manifest says 234.
        name: name of the class.
        lattice: its voxels.
    """

    dataset: str
    crop: str
    name: str
    lattice: Lattice


def manifest_rows(path: str | Path) -> list[ManifestRow]:
    """The rows of a manifest such as ``train_crop_manifest.csv`` or ``test_crop_manifest.csv``.

    Args:
        path: a CSV with the columns ``crop_name, dataset, class_label, voxel_size, translation, shape``; lists are
            ``[z;y;x]``, lengths nm, and a translation is the centre of voxel 0.

    Raises:
        CellMapFileNotFoundError: there is no such file.
        CellMapValueError: it is no manifest, or has rows that cannot be read, or lists a class of a crop twice.
    """
    file = local_path(path)
    found: dict[tuple[str, str, str], ManifestRow] = {}
    for number, row in enumerate(_table(file, _COLUMNS), 2):
        crop = row["crop_name"] or ""
        key = (row["dataset"] or "", f"crop{crop}" if crop.isdigit() else crop, row["class_label"] or "")
        try:
            if not all(key):
                raise ValueError("crop_name, dataset and class_label are needed")
            step, origin, size = (to_vector(_numbers(row[name])) for name in _COLUMNS[3:])
            if min(step) <= 0 or any(n < 1 or n != int(n) for n in size):
                raise ValueError(f"voxel_size {list(step)} and shape {list(size)} must be positive, a shape whole")
            found_row = ManifestRow(*key, Lattice(origin, step, (int(size[0]), int(size[1]), int(size[2]))))
            if found.setdefault(key, found_row) != found_row:
                raise ValueError(f"{'/'.join(key)} is listed before, with other voxels")
        except ValueError as e:
            raise CellMapValueError(f"{file.name}, line {number} cannot be read: {e}") from None
    return list(found.values())


def _table(file: Path, columns: Sequence[str]) -> list[dict[str, str | None]]:
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))
    except FileNotFoundError:
        raise missing(file, "the manifest") from None
    except (IsADirectoryError, UnicodeDecodeError) as e:
        raise CellMapValueError(f"the manifest {file} is no text file ({e})") from None
    lacking = [name for name in columns if not rows or name not in rows[0]]
    if lacking:
        raise CellMapValueError(
            f"the manifest {file} needs rows with the columns {', '.join(columns)}; it has "
            + (", ".join(map(str, rows[0])) if rows else "no rows")
        )
    return rows


def raw_of(root: str | Path, datasets: Iterable[str]) -> dict[str, str]:
    """The raw volume of each dataset, in the challenge's folders below ``root``.

    Raises:
        CellMapFileNotFoundError: there is no such folder, or a dataset is not in it.
    """
    volumes = _volumes(root)
    absent = [name for name in datasets if name not in volumes]
    if absent:
        raise CellMapFileNotFoundError(
            f"search_path {root} does not hold {_some(absent)}; it holds {_some(list(volumes))}"
        )
    return {name: str(volumes[name] / RAW) for name in datasets}


def read_manifest(path: str | Path, root: str | Path, options: Mapping[str, Any] | None = None) -> list[ListedCrop]:
    """The crops of a manifest, sorted by name.

    Args:
        path: one row per crop and class, see `manifest_rows`; or one per crop with the columns ``crop_number,
            collection, alignment, crop_url, em_url`` (``manifest.csv``), whose classes are those of its folder.
        root: the folder of the datasets, see `find_crops`.
        options: see `CellMapDataset`'s ``storage_options``.

    Raises:
        CellMapFileNotFoundError: there is no such file, or no such folder.
        CellMapValueError: it is no manifest, or has rows that cannot be read.
    """
    file = local_path(path)
    volumes, nested = _volumes(root, options), _root(root, options)
    if file.is_file() and file.read_bytes().removeprefix(b"\xef\xbb\xbf").startswith(b"crop_number"):
        return _listed_by_number(file, volumes, nested)
    classes: dict[tuple[str, str], list[str]] = {}
    boxes: dict[tuple[str, str], Box] = {}
    for row in manifest_rows(file):
        key, box = (row.dataset, row.crop), row.lattice.box
        classes.setdefault(key, []).append(row.name)
        boxes[key] = boxes[key].union(box) if key in boxes else box
    found = []
    for dataset, crop in sorted(classes, key=lambda key: (key[0], _natural(key[1]))):
        volume = volumes.get(dataset, nested / dataset / f"{dataset}.zarr")
        found.append(
            ListedCrop(
                f"{file.name}, {dataset}/{crop}",
                str(volume / RAW),
                str(volume / GROUNDTRUTH / crop),
                tuple(sorted(classes[dataset, crop])),
                boxes[dataset, crop],
            )
        )
    return found


def _listed_by_number(file: Path, volumes: dict[str, StorePath], nested: StorePath) -> list[ListedCrop]:
    """The crops of a ``manifest.csv``, which names no classes."""
    found = []
    rows = _table(file, ("crop_number", "collection", "alignment", "crop_url", "em_url"))
    for row in sorted(rows, key=lambda row: (row["collection"] or "", _natural(row["crop_number"] or ""))):
        dataset, crop = row["collection"] or "", f"crop{row['crop_number']}"
        volume = volumes.get(dataset, nested / dataset / f"{dataset}.zarr")
        folder = volume / GROUNDTRUTH / crop
        found.append(
            ListedCrop(f"{file.name}, {dataset}/{crop}", str(volume / RAW), str(folder), tuple(children(folder)))
        )
    return found


def _numbers(text: str | None) -> list[float]:
    values = [float(part) for part in (text or "").strip().strip("[]").split(";")]
    if len(values) != 3 or not np.isfinite(values).all():
        raise ValueError(f"three numbers [z;y;x] are needed, got {text!r}")
    return values


def _natural(name: str) -> tuple[float, str]:
    """crop9 comes before crop10."""
    digits = re.search(r"\d+$", name)
    return (float(digits[0]) if digits else math.inf, name)


class Filter:
    """Which crops are wanted, by dataset and by crop.

    Args:
        only_datasets: names or patterns such as ``jrc_mus-*``; None for all.
        only_crops: names (``crop234``), numbers (234), names with the dataset (``jrc_hela-2/crop1``), or patterns of
            these; None for all.

    Raises:
        CellMapTypeError: not a list of names.
        CellMapValueError: an empty list.
    """

    def __init__(self, only_datasets: Sequence[Any] | None, only_crops: Sequence[Any] | None) -> None:
        self.datasets = self._patterns("only_datasets", only_datasets)
        self.crops = self._patterns("only_crops", only_crops)

    @staticmethod
    def _patterns(what: str, given: Sequence[Any] | None) -> list[str] | None:
        if given is None:
            return None
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise CellMapTypeError(f"{what} must be a list of names or patterns, got {given!r}")
        patterns = [str(part) for part in given]
        if not patterns:
            raise CellMapValueError(f"{what} is an empty list, so that no crop is left; null is for all")
        return patterns

    def __bool__(self) -> bool:
        return self.datasets is not None or self.crops is not None

    def kept(self, names: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each crop, (dataset, name of the crop) is wanted.

        Raises:
            CellMapKeyError: a pattern that fits none, or nothing that fits both lists.
        """
        keep = [True] * len(names)
        if self.datasets is not None:
            self._check("only_datasets", self.datasets, [[dataset] for dataset, _ in names])
            keep = [any(fnmatchcase(dataset, p) for p in self.datasets) for dataset, _ in names]
        if self.crops is not None:
            called = [_called(*pair) if wanted else [] for pair, wanted in zip(names, keep, strict=True)]
            self._check("only_crops", self.crops, called)
            keep = [any(fnmatchcase(name, p) for p in self.crops for name in own) for own in called]
        return keep

    @staticmethod
    def _check(what: str, patterns: Sequence[str], called: Sequence[Sequence[str]]) -> None:
        known = list(dict.fromkeys(name for own in called for name in own))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                close = difflib.get_close_matches(pattern, known, 3, 0.5)
                full = list(dict.fromkeys(own[-1] for own in called if own))
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {_some(full)}"
                raise CellMapKeyError(f"{what}: nothing is called {pattern!r}; {hint}")


def _called(dataset: str, crop: str) -> list[str]:
    """What a crop may be called."""
    number = crop.removeprefix("crop")
    return [crop, *([number] if number.isdigit() else []), f"{dataset}/{crop}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
