"""Crops of the CellMap Segmentation Challenge, found by its folder layout or listed by its manifests."""

import csv
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.crops.crop_name import CropName
from cellmap_lightning.crops.spelling import closest_class
from cellmap_lightning.errors import (
    CellMapFileNotFoundError,
    CellMapKeyError,
    CellMapTypeError,
    CellMapValueError,
)
from cellmap_lightning.geometry.lattice import Box, Lattice, to_vector
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.io.store import Remote, StorePath, children, exists, local_path, parse_location
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import plural

RAW = "recon-1/em/fibsem-uint8"
GROUNDTRUTH = "recon-1/labels/groundtruth"
_COLUMNS = ("crop_name", "dataset", "class_label", "voxel_size", "translation", "shape")


@dataclass(frozen=True)
class ListedCrop:
    """A crop found in a folder or listed by a manifest; see docs/data.md.

    Attributes:
        where: its source, for messages.
        raw: the raw multiscale group.
        folder: the group of its classes.
        classes: the classes that it annotates.
        box: its box in nm, if the manifest lists it.
        rows: the voxels of its classes, if the manifest lists them.
    """

    where: str
    raw: str
    folder: str
    classes: tuple[str, ...]
    box: Box | None = None
    rows: "tuple[ManifestRow, ...]" = ()


def find_crops(root: str | Path, options: Mapping[str, Any] | None = None) -> list[ListedCrop]:
    """Find all crops below ``root``, in ``<dataset>/<dataset>.zarr`` or ``<dataset>.zarr``, sorted by name.

    Raises:
        CellMapFileNotFoundError: the folder does not exist, or has no crops.
        CellMapValueError: a dataset exists twice.
    """
    volumes = _volumes(root, options)
    crops = []
    for volume in volumes.values():
        labels = volume / GROUNDTRUTH
        for crop in sorted((name for name in children(labels) if name.startswith("crop")), key=_natural):
            classes = tuple(children(labels / crop))
            where = f"search_path, {CropName(volume.stem, crop)}"
            crops.append(ListedCrop(where, str(volume / RAW), str(labels / crop), classes))
    if not crops:
        content = (
            f"none in {_some(list(volumes))}" if volumes else f"it has {_some(children(parse_location(root, options)))}"
        )
        raise CellMapFileNotFoundError(
            f"search_path {root} holds no crops: they are looked for in <dataset>/<dataset>.zarr/{GROUNDTRUTH}/crop* "
            f"and <dataset>.zarr/{GROUNDTRUTH}/crop*; {content}"
        )
    return crops


def _root(root: str | Path, options: Mapping[str, Any] | None = None) -> StorePath:
    folder = parse_location(root, options)
    return folder if isinstance(folder, Remote) else folder.absolute()


def _volumes(root: str | Path, options: Mapping[str, Any] | None = None) -> dict[str, StorePath]:
    """Return the volume of each dataset below a folder; none for a remote store that cannot list its content."""
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
            raise CellMapValueError(f"the dataset {volume.stem} exists twice: {volumes[volume.stem]} and {volume}")
        volumes[volume.stem] = volume
    return volumes


@dataclass(frozen=True)
class ManifestRow:
    """A class of a crop in a manifest; see docs/data.md.

    Attributes:
        dataset: name of the dataset.
        crop: name of the crop; ``crop234`` for the number 234.
        name: name of the class.
        lattice: lattice of its voxels.
    """

    dataset: str
    crop: str
    name: str
    lattice: Lattice

    @property
    def label(self) -> str:
        """Name of the class of the crop, for messages."""
        return CropName(self.dataset, self.crop).of(self.name)


@dataclass(frozen=True)
class ManifestCrop:
    """A crop of a manifest, with the voxels of each class; see docs/data.md.

    Attributes:
        name: dataset and name of the crop.
        rows: its classes and their voxels.

    Example:
        >>> for crop in manifest_crops("test_crop_manifest.csv"):
        ...     print(crop.name, crop.classes)
    """

    name: CropName
    rows: tuple[ManifestRow, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the listed classes."""
        return tuple(row.name for row in self.rows)

    def box(self, margin: Sequence[float] = (0, 0, 0)) -> Box:
        """Return the bounding box of all classes, with a margin in nm."""
        box = reduce(Box.union, (row.lattice.box for row in self.rows))
        return Box(to_vector(np.subtract(box.lower, margin)), to_vector(np.add(box.upper, margin)))

    def within(self, folder: str | Path) -> Path:
        """Return the path of its prediction, ``<folder>/<dataset>.zarr/<crop>``."""
        return Path(folder) / f"{self.name.dataset}.zarr" / self.name.crop


def manifest_rows(path: str | Path) -> list[ManifestRow]:
    """Read the rows of a manifest such as ``train_crop_manifest.csv`` or ``test_crop_manifest.csv``.

    Args:
        path: a CSV with the columns ``crop_name, dataset, class_label, voxel_size, translation, shape``; lists are
            ``[z;y;x]``, lengths nm, and a translation is the centre of voxel 0.

    Raises:
        CellMapFileNotFoundError: the file does not exist.
        CellMapValueError: it is not a manifest, has invalid rows, or lists a class of a crop twice.
    """
    file = local_path(path)
    rows: dict[tuple[str, str, str], ManifestRow] = {}
    for number, row in enumerate(_table(file, _COLUMNS), 2):
        crop = row["crop_name"] or ""
        key = (row["dataset"] or "", f"crop{crop}" if crop.isdigit() else crop, row["class_label"] or "")
        try:
            if not all(key):
                raise ValueError("crop_name, dataset and class_label are needed")
            step, origin, size = (to_vector(_numbers(row[name])) for name in _COLUMNS[3:])
            if min(step) <= 0 or any(n < 1 or n != int(n) for n in size):
                raise ValueError(f"voxel_size {list(step)} and shape {list(size)} must be positive, a shape whole")
            manifest_row = ManifestRow(*key, Lattice(origin, step, (int(size[0]), int(size[1]), int(size[2]))))
            if rows.setdefault(key, manifest_row) != manifest_row:
                raise ValueError(f"{'/'.join(key)} is listed before, with other voxels")
        except ValueError as e:
            raise CellMapValueError(f"{file.name}, line {number} cannot be read: {e}") from None
    return list(rows.values())


def manifest_crops(path: str | Path) -> list[ManifestCrop]:
    """Return the crops of a manifest, in its order; see `manifest_rows` for the arguments and errors."""
    rows: dict[CropName, list[ManifestRow]] = {}
    for row in manifest_rows(path):
        rows.setdefault(CropName(row.dataset, row.crop), []).append(row)
    return [ManifestCrop(name, tuple(of_crop)) for name, of_crop in rows.items()]


def _table(file: Path, columns: Sequence[str]) -> list[dict[str, str | None]]:
    """Read the rows of a CSV with these columns."""
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (FileNotFoundError, NotADirectoryError):
        raise missing(file, "the manifest") from None
    except (IsADirectoryError, UnicodeDecodeError) as e:
        raise CellMapValueError(f"the manifest {file} is not a text file ({e})") from None
    lacking = [name for name in columns if not rows or name not in rows[0]]
    if lacking:
        raise CellMapValueError(
            f"the manifest {file} needs rows with the columns {', '.join(columns)}; it has "
            + (", ".join(map(str, rows[0])) if rows else "no rows")
        )
    return rows


def similar_dataset(name: str, names: Sequence[str]) -> str:
    """Return the end of a line with the closest name of a dataset, such as ``"; did you mean 'jrc_mus-liver'?"``.

    Datasets such as jrc_mus-liver-2 and -3 differ in a number alone, and are others.
    """
    closest = closest_class(name, [other for other in names if _digits(other) == _digits(name)])
    return f"; did you mean {closest!r}?" if closest is not None else ""


def _digits(name: str) -> list[str]:
    return [sign for sign in name if sign.isdigit()]


def raw_of(root: str | Path, crops: Iterable[CropName]) -> dict[str, str]:
    """Return the raw volume of each dataset of some crops, in the challenge's folders below ``root``.

    Raises:
        CellMapFileNotFoundError: the folder does not exist, or a dataset is not in it.
    """
    volumes = _volumes(root)
    of_dataset: dict[str, list[str]] = {}
    for name in crops:
        of_dataset.setdefault(name.dataset, []).append(name.crop.removeprefix("crop"))
    others = [name for name in volumes if name not in of_dataset]
    absent = [
        f"  {name}: {plural(len(of), 'crop')}{similar_dataset(name, others)}"
        for name, of in of_dataset.items()
        if name not in volumes
    ]
    if absent:
        there = [crop for name, of in of_dataset.items() if name in volumes for crop in of]
        hint = f"; crops=[{','.join(there)}] takes those of the datasets that are there" if there else ""
        raise CellMapFileNotFoundError(
            f"search_path {root} does not hold {len(absent)} of the {plural(len(of_dataset), 'dataset')} of these "
            "crops:\n" + "\n".join(absent) + f"\nit holds {_some(list(volumes))}{hint}"
        )
    return {name: str(volumes[name] / RAW) for name in of_dataset}


def read_manifest(path: str | Path, root: str | Path, options: Mapping[str, Any] | None = None) -> list[ListedCrop]:
    """Read the crops of a manifest, sorted by name.

    Args:
        path: one row per crop and class, see `manifest_rows`; or one per crop with the columns ``crop_number,
            collection, alignment, crop_url, em_url`` (``manifest.csv``), with the classes in its folder.
        root: the folder of the datasets, see `find_crops`.
        options: see ``storage_options`` of `ReadOptions`.

    Raises:
        CellMapFileNotFoundError: the file or the folder does not exist.
        CellMapValueError: it is not a manifest, or has invalid rows.
    """
    file = local_path(path)
    volumes, nested = _volumes(root, options), _root(root, options)
    if file.is_file() and file.read_bytes().removeprefix(b"\xef\xbb\xbf").startswith(b"crop_number"):
        return _listed_by_number(file, volumes, nested)
    crops = []
    for crop in sorted(manifest_crops(file), key=lambda crop: (crop.name.dataset, _natural(crop.name.crop))):
        dataset = crop.name.dataset
        volume = volumes.get(dataset, nested / dataset / f"{dataset}.zarr")
        crops.append(
            ListedCrop(
                f"{file.name}, {crop.name}",
                str(volume / RAW),
                str(volume / GROUNDTRUTH / crop.name.crop),
                tuple(sorted(crop.classes)),
                crop.box(),
                crop.rows,
            )
        )
    return crops


def _listed_by_number(file: Path, volumes: dict[str, StorePath], nested: StorePath) -> list[ListedCrop]:
    """Read the crops of a ``manifest.csv``, which does not list classes."""
    crops = []
    rows = _table(file, ("crop_number", "collection", "alignment", "crop_url", "em_url"))
    for row in sorted(rows, key=lambda row: (row["collection"] or "", _natural(row["crop_number"] or ""))):
        dataset, crop = row["collection"] or "", f"crop{row['crop_number']}"
        volume = volumes.get(dataset, nested / dataset / f"{dataset}.zarr")
        folder = volume / GROUNDTRUTH / crop
        crops.append(
            ListedCrop(
                f"{file.name}, {CropName(dataset, crop)}", str(volume / RAW), str(folder), tuple(children(folder))
            )
        )
    return crops


def _numbers(text: str | None) -> list[float]:
    """Parse ``[z;y;x]``."""
    values = [float(part) for part in (text or "").strip().strip("[]").split(";")]
    if len(values) != 3 or not np.isfinite(values).all():
        raise ValueError(f"three numbers [z;y;x] are needed, got {text!r}")
    return values


def _natural(name: str) -> tuple[float, str]:
    """Return a key for natural sorting, in which crop9 comes before crop10."""
    digits = re.search(r"\d+$", name)
    return (float(digits[0]) if digits else math.inf, name)


class Filter:
    """A filter of crops by dataset and by name; see docs/data.md.

    Args:
        only_datasets: names or patterns such as ``jrc_mus-*``; None for all.
        only_crops: names (``crop234``), numbers (234), names with the dataset (``jrc_hela-2/crop1``), or patterns of
            these; None for all.
        what: name of the setting of ``only_crops``, for messages.

    Raises:
        CellMapTypeError: the value is not a list of names.
        CellMapValueError: the list is empty.
    """

    def __init__(
        self, only_datasets: Sequence[Any] | None, only_crops: Sequence[Any] | None, what: str = "only_crops"
    ) -> None:
        self.what = what
        self.datasets = self._patterns("only_datasets", only_datasets)
        self.crops = self._patterns(what, only_crops)

    @staticmethod
    def _patterns(what: str, values: Sequence[Any] | None) -> list[str] | None:
        if values is None:
            return None
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise CellMapTypeError(f"{what} must be a list of names or patterns, got {values!r}")
        patterns = [str(value) for value in values]
        if not patterns:
            raise CellMapValueError(f"{what} is an empty list, so that no crop is left; null is for all")
        return patterns

    def __bool__(self) -> bool:
        return self.datasets is not None or self.crops is not None

    def matches(self, crops: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each crop, (dataset, name), True if it matches the filters.

        Raises:
            CellMapKeyError: a pattern matches no crop.
        """
        is_match = [True] * len(crops)
        if self.datasets is not None:
            self._check("only_datasets", self.datasets, [[dataset] for dataset, _ in crops])
            is_match = [any(fnmatchcase(dataset, p) for p in self.datasets) for dataset, _ in crops]
        if self.crops is not None:
            # Patterns of crops must match within the datasets that are left.
            aliases = [_aliases(*crop) if left else [] for crop, left in zip(crops, is_match, strict=True)]
            self._check(self.what, self.crops, aliases)
            is_match = [any(fnmatchcase(name, p) for p in self.crops for name in names) for names in aliases]
        return is_match

    @staticmethod
    def _check(what: str, patterns: Sequence[str], aliases: Sequence[Sequence[str]]) -> None:
        """Check that each pattern matches one of the names that crops have."""
        known = list(dict.fromkeys(name for names in aliases for name in names))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                close = difflib.get_close_matches(pattern, known, 3, 0.5)
                full = list(dict.fromkeys(names[-1] for names in aliases if names))
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {_some(full)}"
                raise CellMapKeyError(f"{what}: {pattern!r} matches nothing; {hint}")


def _aliases(dataset: str, crop: str) -> list[str]:
    """Return the names by which a crop can be selected, the full name last."""
    number = crop.removeprefix("crop")
    return [crop, *([number] if number.isdigit() else []), str(CropName(dataset, crop))]


def _some(names: Sequence[str]) -> str:
    """Return at most twelve names, for messages."""
    return first_few(names, 12) if names else "nothing"
