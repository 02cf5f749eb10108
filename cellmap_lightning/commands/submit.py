"""The job of ``cellmap-submit``: predictions as labels in a Zarr v2 group, on the voxels that the challenge scores."""

import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.evaluation.challenge import INSTANCE_CLASSES, listed_crops
from cellmap_lightning.evaluation.matched import check_holds, matched, stored_meaning
from cellmap_lightning.evaluation.numbering import Numbering, check_least_volume, least_voxels, numbering, without_small
from cellmap_lightning.io.meanings import ValuesSetting, check_values, prediction_attributes
from cellmap_lightning.io.writer import codec_of, create_level, make_room, write_group
from cellmap_lightning.splits.manifests import ManifestRow

log = logging.getLogger(__name__)

#: Voxels of a chunk of the submission.
_CHUNK = (64, 64, 64)


def submit(
    predictions: str | Path,
    manifest: str | Path,
    out: str | Path,
    *,
    crops: str | int | Sequence[str | int] = "test",
    threshold: float = 0.5,
    instance_classes: Sequence[str] = INSTANCE_CLASSES,
    instances: str | Numbering | None = None,
    min_volume: float | Mapping[str, float] = 0,
    values: ValuesSetting = "auto",
    allow_missing: bool = False,
    overwrite: bool = False,
) -> tuple[Path, list[str]]:
    """Write ``<out>/<crop>/<class>`` and zip it beside it.

    Args:
        predictions: folder of ``<dataset>.zarr/<crop>/<class>``, as ``cellmap-predict crops=test`` writes it.
        manifest: the challenge's list of crops and classes, with the voxels of each.
        out: the Zarr group to write, ``submission.zarr``.
        crops: see `listed_crops`.
        threshold: probability from which a voxel is of the class.
        instance_classes: classes whose objects are numbered; the others are 0 and 1.
        instances: what numbers the objects of a boolean volume ``[z, y, x]``, or where it is, as
            ``package.module.function``; by default `components`. Stored ids are kept as they are.
        min_volume: nm³ that an object must have at least, for all ``instance_classes`` or ``{class: nm³}``. Smaller
            ones are left out.
        values: what stored values mean; a kind takes precedence over the metadata of predictions, see `meaning_of`.
        allow_missing: go on without what was not predicted.
        overwrite: replace a Zarr group that is at ``out``.

    Returns:
        The zip file, and what the manifest lists and nobody predicted, as ``dataset/crop/class``.

    Raises:
        CellMapFileNotFoundError: nothing was predicted, or something is missing.
        CellMapValueError: a prediction does not hold its crop, or its values could mean several things.
    """
    out = Path(out)
    if out.suffix != ".zarr":
        raise CellMapValueError(f"out={out}: the name of a submission ends with .zarr")
    wanted = listed_crops(manifest, crops)
    number = numbering(instances)
    values, min_volume = check_values(values), check_least_volume(min_volume)
    found: list[tuple[ManifestRow, Path]] = []
    missing: list[str] = []
    for crop in wanted:
        for row in crop.rows:
            path = crop.within(predictions) / row.name
            if any((path / name).is_file() for name in (".zattrs", "zarr.json")):
                found.append((row, path))
            else:
                missing.append(f"{crop.dataset}/{crop.name}/{row.name}")
    if not found or (missing and not allow_missing):
        raise CellMapFileNotFoundError(
            f"{len(missing)} of {len(missing) + len(found)} classes of crops that {Path(manifest).name} lists are not "
            f"in {predictions}: {', '.join(missing)}" + ("; allow_missing=true goes on without them" if found else "")
        )
    meanings = []
    for row, path in found:  # before anything is written
        check_holds(row, path)
        meanings.append(stored_meaning(row, path, values))
    make_room(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_group(out)
    for (row, path), meaning in zip(found, meanings, strict=True):
        write_group(out / row.crop)
        lattice, numbered = row.lattice, row.name in instance_classes
        labels = matched(row, path, threshold, number if numbered else None, meaning)
        if numbered:
            least = least_voxels(min_volume, row.name, float(np.prod(lattice.step)))
            labels = without_small(labels, least)
            labels = labels.astype(np.min_scalar_type(int(labels.max())))
        else:
            labels = labels.astype(np.uint8)
        array = create_level(
            out / row.crop / row.name, lattice.shape, labels.dtype, _CHUNK, 2, codec_of("zstd", 2),
            attributes={
                "voxel_size": list(lattice.step), "translation": list(lattice.origin), "shape": list(lattice.shape),
                "cellmap": prediction_attributes(row.name, "ids" if numbered else "mask"),
            },
        )  # fmt: skip
        array[...] = labels
        log.info("%s/%s: %s voxels, %s", row.crop, row.name, list(lattice.shape), labels.dtype)
    return _zipped(out), missing


def _zipped(out: Path) -> Path:
    """The group as a zip file with its crops at the top. Chunks are compressed already."""
    path = out.with_suffix(".zip")
    partial = path.with_suffix(".zip.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in out.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(out))
    os.replace(partial, path)  # noqa: PTH105
    return path
