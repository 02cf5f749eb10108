"""A small synthetic FIB-SEM volume, stored like the field's own data, for demonstrations and tests.

A cartoon of three cells with extracellular space between them, a nucleus in its envelope, bent mitochondria with
cristae, a network of endoplasmic reticulum and vesicles. All of it is closed-form geometry in nm, so the raw volume
(voxels of 5.24 x 4 x 4 nm) and the labels (2.62 x 2 x 2 nm) come from one function: a raw voxel is the mean of the
eight label voxels in it, plus texture and noise, and the two agree to the voxel.

The difficulties of real data are here too: half-voxel offsets between label and raw lattices, a crop off the lattice of
the coarser raw level, crops at the volume's border and smaller than a patch, a class that is annotated and absent,
classes without a group, ``unknown`` voxels, instance ids that pass through and beyond 255, an array without attributes.
The two membranes of a mitochondrion and the plasma membrane are drawn 20 to 24 nm thick, so that they survive at the
usual training scale of about 8 nm.

Example:
    >>> volume = write_volume("demo.zarr")
    >>> volume.label_path("crop1", "mito")
    'demo.zarr/recon-1/labels/groundtruth/crop1/mito'
"""

import csv
import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellmap_lightning.demo.labels import write_crop
from cellmap_lightning.demo.scene import Scene
from cellmap_lightning.demo.specimen import CLASS_IDS, CROPS, RAW_SCALE, TRAIN_CLASSES
from cellmap_lightning.demo.staging import (
    inventory,
    is_complete,
    move_into_place,
    read_marker,
    remove_stale,
    staged_path,
)
from cellmap_lightning.demo.texture import paint_raw
from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.writer import ArrayOptions, ZarrFormat, write_group, write_multiscale
from cellmap_lightning.validation import int_at_least, one_of

__all__ = ["CLASS_IDS", "TRAIN_CLASSES", "SyntheticVolume", "demo_csv", "write_volume"]

# Incremented whenever the same seed gives other voxels or files, so that a stale volume is replaced.
_VERSION = 1
RAW = "recon-1/em/fibsem-uint8"
GROUNDTRUTH = "recon-1/labels/groundtruth"


@dataclass(frozen=True)
class SyntheticVolume:
    """Paths and contents of a volume that `write_volume` wrote.

    Attributes:
        path: the ``.zarr`` group.
        csv_path: the CSV beside it, one row per crop.
        raw_path: the raw multiscale group.
        crops: names of the crops, in the order of the CSV.
        classes: all classes that are annotated in at least one crop.
        annotated: the annotated classes of each crop; a class that is missing there has no group.
        usage: ``"train"`` or ``"validate"`` for each crop.

    Example:
        >>> write_volume("demo.zarr").crops
        ('crop1', 'crop2', 'crop3', 'crop4', 'crop5')
    """

    path: str
    csv_path: str
    raw_path: str
    crops: tuple[str, ...]
    classes: tuple[str, ...]
    annotated: Mapping[str, tuple[str, ...]] = field(hash=False)
    usage: Mapping[str, str] = field(hash=False)

    @classmethod
    def at(cls, path: Path) -> "SyntheticVolume":
        """Return the description of a volume at ``path``; nothing is read or written."""
        return cls(
            path=str(path),
            csv_path=str(path.with_suffix(".csv")),
            raw_path=f"{path}/{RAW}",
            crops=tuple(c.name for c in CROPS),
            classes=tuple(name for name in CLASS_IDS if any(name in c.classes for c in CROPS)),
            annotated={c.name: c.classes for c in CROPS},
            usage={c.name: c.usage for c in CROPS},
        )

    def label_path(self, crop: str, name: str) -> str:
        """Return the path of the multiscale group of a class, or of ``"all"``, in a crop."""
        return f"{self.path}/{GROUNDTRUTH}/{crop}/{name}"


def write_volume(
    path: str | os.PathLike[str], *, seed: int = 0, zarr_format: ZarrFormat = 2, overwrite: bool = False
) -> SyntheticVolume:
    """Write the volume and its CSV.

    The raw volume has 128 x 320 x 320 voxels of 5.24 x 4 x 4 nm, three levels and voxel 0 centred on 0; the labels have
    half the voxel size. The write is atomic: an interrupted one leaves nothing at ``path``.

    Args:
        path: the ``.zarr`` group to write; the CSV is written beside it, with the same stem.
        seed: of the scene. The positions of the crops, and the classes that they contain, do not depend on it.
        zarr_format: 2 for OME-NGFF 0.4, 3 for OME-NGFF 0.5 with sharded raw.
        overwrite: replace a synthetic volume that is at ``path``. Nothing else is ever replaced.

    Returns:
        Paths and contents of the volume.

    Raises:
        CellMapFileExistsError: something is at ``path`` and ``overwrite`` is False or it is not a synthetic volume.
        CellMapValueError: ``path`` does not end in ``.zarr``, or the seed or the format is invalid.
    """
    group, marker = _check(path, seed, zarr_format)
    if group.exists() and not overwrite:
        raise CellMapFileExistsError(f"{group} exists already; choose another path or pass overwrite=True")
    _refuse_foreign(group)
    _write(group, marker, force=True)
    return SyntheticVolume.at(group)


def demo_csv(path: str | os.PathLike[str], *, seed: int = 0, zarr_format: ZarrFormat = 2) -> str:
    """Return the CSV of a synthetic volume, writing the volume unless a complete one is there.

    Safe to call from several processes at once. A volume of another seed, format or version, or one that has lost
    files, is replaced; nothing else is.

    Args:
        path: the ``.zarr`` group; the CSV is beside it, with the same stem.
        seed: of the scene, as for `write_volume`.
        zarr_format: 2 or 3, as for `write_volume`.

    Returns:
        Path of the CSV.

    Raises:
        CellMapFileExistsError: something else is at ``path`` or at the path of the CSV.
        CellMapValueError: ``path`` does not end in ``.zarr``, or the seed or the format is invalid.
    """
    group, marker = _check(path, seed, zarr_format)
    table = group.with_suffix(".csv")
    if not is_complete(group, marker):
        _refuse_foreign(group)
        _write(group, marker, force=False)
    elif not table.exists():
        _write_csv(group)
    return str(table)


def _check(path: str | os.PathLike[str], seed: int, zarr_format: int) -> tuple[Path, dict[str, Any]]:
    """Return the path, and the attributes by which a volume with these settings is recognized."""
    group = Path(path)
    if group.suffix != ".zarr":
        raise CellMapValueError(f"{group} must end in .zarr: it names the volume, and its CSV is written beside it")
    int_at_least("seed", seed, 0)
    one_of("zarr_format", zarr_format, (2, 3))
    return group, {"version": _VERSION, "seed": seed, "zarr_format": zarr_format}


def _refuse_foreign(path: Path) -> None:
    """Raise if writing would replace anything but a synthetic volume and its CSV."""
    marker = read_marker(path)
    if path.exists() and marker is None and not (path.is_dir() and not any(path.iterdir())):
        raise CellMapFileExistsError(
            f"{path} exists and is not a synthetic volume, so it is not replaced; choose another path"
        )
    table = path.with_suffix(".csv")
    if table.exists() and marker is None and table.read_text(encoding="utf-8") != _csv_text(path):
        raise CellMapFileExistsError(
            f"{table} exists and is not the CSV of a synthetic volume, so it is not replaced; choose another path"
        )


def _write(path: Path, marker: Mapping[str, Any], force: bool) -> None:
    """Write the volume atomically; without ``force`` a complete one that another process wrote meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    seed, zarr_format = marker["seed"], marker["zarr_format"]
    staged = staged_path(path)
    try:
        write_group(staged, {"synthetic": dict(marker)}, zarr_format)
        for parent in ("recon-1", "recon-1/em", "recon-1/labels", GROUNDTRUTH):
            write_group(staged / parent, zarr_format=zarr_format)
        scene = Scene(seed)
        write_multiscale(
            staged / RAW,
            paint_raw(scene, seed),
            scale=RAW_SCALE,
            translation=(0.0, 0.0, 0.0),
            levels=3,
            storage=ArrayOptions(
                zarr_format=zarr_format, chunks=(64, 128, 128), shards=(128, 256, 256) if zarr_format == 3 else None
            ),
        )
        for crop in CROPS:
            write_crop(scene, staged / GROUNDTRUTH / crop.name, crop, zarr_format)
        # The inventory comes last: a volume without it, or with other files, is incomplete.
        write_group(staged, {"synthetic": {**marker, **inventory(staged)}}, zarr_format)
        move_into_place(staged, path, lambda: not force and is_complete(path, marker))
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _write_csv(path)


def _csv_text(path: Path) -> str:
    text = io.StringIO()
    rows = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for crop in CROPS:
        labels = f"{GROUNDTRUTH}/{crop.name}/[{','.join(crop.classes)}]"
        rows.writerow([crop.usage, path.name, RAW, path.name, labels])
    return text.getvalue()


def _write_csv(path: Path) -> None:
    table = path.with_suffix(".csv")
    staged = staged_path(table)
    staged.write_text(_csv_text(path), encoding="utf-8")
    staged.replace(table)
