"""The job of ``cellmap-submit``: labels in a Zarr v2 group, on the voxels that the challenge scores."""

import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cellmap_lightning.commands.submit_instances import InstanceMethods, Methods, tuned_methods
from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.evaluation.challenge import INSTANCE_CLASSES, listed_crops
from cellmap_lightning.evaluation.evaluate import is_group
from cellmap_lightning.evaluation.numbering import (
    Labels,
    MinVolume,
    Numbering,
    check_min_volume,
    min_voxels,
    numbering,
    remove_small,
)
from cellmap_lightning.evaluation.prediction_labels import check_covers, prediction_labels, stored_meaning
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.io.meanings import Meaning, ValuesSetting, check_values, prediction_attributes
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.ngff import read_attributes, read_multiscale
from cellmap_lightning.io.store import children
from cellmap_lightning.io.writer import check_room, codec_of, create_level, make_room, write_group
from cellmap_lightning.prediction.channels import UNTRAINED, untrained_text
from cellmap_lightning.prediction.output_checks import check_finished
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD
from cellmap_lightning.splits.manifests import ManifestRow, manifest_rows
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: Chunk shape of the submission, voxels.
_CHUNK = (64, 64, 64)
_IDS = Meaning("ids")


def submit(
    predictions: str | Path,
    manifest: str | Path,
    out: str | Path,
    *,
    crops: str | int | Sequence[str | int] = "test",
    threshold: float | None = None,
    instance_classes: Sequence[str] = INSTANCE_CLASSES,
    instances: str | Numbering | Methods | None = None,
    min_volume: float | Mapping[str, float] | None = None,
    tuned: str | Path | None = None,
    values: ValuesSetting = "auto",
    allow_missing: bool = False,
    overwrite: bool = False,
) -> tuple[Path, list[str]]:
    """Write labels to ``<out>/<crop>/<class>``, and a zip file beside ``out``.

    Args:
        predictions: folder of ``<dataset>.zarr/<crop>/<class>``, as ``cellmap-predict crops=test`` writes it.
        manifest: the challenge's list of crops and classes, with the voxels of each.
        out: the Zarr group to write, ``submission.zarr``.
        crops: see `listed_crops`.
        threshold: probability from which a voxel is positive; None for that of ``tuned``, else 0.5.
        instance_classes: classes whose objects are numbered; the others are written as 0 and 1.
        instances: function that numbers the objects of a boolean volume ``[z, y, x]``, or its name as
            ``package.module.function``; by default `components`. Stored ids are used unchanged. Or ``{class: options}``
            with the options of a segmentation method, see `InstanceMethods`, and `components` for other classes.
        min_volume: minimum volume of an object, nm³, for all ``instance_classes`` or as ``{class: nm³}``. Smaller
            objects are removed. None for that of ``tuned``, else 0.
        tuned: a file of ``cellmap-tune`` with the method and the parameters of some classes, also of semantic ones,
            whose mask is that of the objects. ``instances``, ``threshold`` and ``min_volume`` replace its values.
        values: the meaning of stored values; a kind takes precedence over the metadata, see `meaning_of`.
        allow_missing: leave out crops and classes without a prediction, instead of an error.
        overwrite: replace an existing Zarr group at ``out``, and an existing zip file beside it.

    Returns:
        The zip file, and the listed classes without a prediction, as ``dataset/crop/class``.

    Raises:
        CellMapFileNotFoundError: there is no prediction, or some are missing.
        CellMapFileExistsError: ``out`` or the zip file exists; see ``overwrite``.
        CellMapValueError: a prediction does not cover its crop, or the meaning of its values is ambiguous.

    Example:
        >>> submit("predictions", "test_crop_manifest.csv", "submission.zarr", instances=my_function)
    """
    out = Path(out)
    if out.suffix != ".zarr":
        raise CellMapValueError(f"out={out}: the name of a submission must end with .zarr")
    methods = instances if isinstance(instances, Mapping) else {}
    segmented = InstanceMethods(methods, instance_classes, out)
    if tuned is not None:
        listed = list(dict.fromkeys(row.name for row in manifest_rows(manifest)))
        methods = tuned_methods(tuned, instances, threshold, min_volume, listed)
        segmented = InstanceMethods(methods, [*instance_classes, *listed], out)
    number = numbering(None if isinstance(instances, Mapping) else instances)
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    values, min_volume = check_values(values), check_min_volume(0 if min_volume is None else min_volume)
    _check_output(out, overwrite)
    rows, missing = _predicted_rows(Path(predictions), Path(manifest), crops, allow_missing)
    others = sorted({row.name for row, _ in rows if row.name not in segmented}) if tuned is not None else []
    if others:
        log.info("tuned=%s: it has no parameters of %s; threshold %g is used", tuned, ", ".join(others), threshold)
    _report_voxel_sizes(rows)
    _report_untrained(rows)
    meanings = _checked_meanings(rows, segmented, values)  # all are checked before anything is written
    make_room(out, overwrite)
    make_folder(out.parent)
    write_group(out)
    empty = []
    for (row, path), meaning in zip(rows, meanings, strict=True):
        numbered = row.name in instance_classes
        if row.name in segmented:
            labels = segmented.labels(row, path, values)
        else:
            labels = prediction_labels(row, path, threshold, number if numbered else None, meaning)
        removed = ""
        if numbered:
            labels, removed = _without_small(labels, row, min_volume)
            labels = labels.astype(np.min_scalar_type(int(labels.max())))
        else:
            labels = (labels > 0).astype(np.uint8)
        _write_labels(out, row, labels, "ids" if numbered else "mask")
        log.info("%s/%s: %s%s", row.crop, row.name, _content(labels, numbered), removed)
        if not labels.any():
            empty.append(f"{row.crop}/{row.name}{removed}")
    if empty:
        log.warning(
            "%s of %s classes of crops are EMPTY, all their voxels are 0: %s; are threshold and values right?",
            len(empty), len(rows), ", ".join(empty),
        )  # fmt: skip
    return _zip(out), missing


def _check_output(out: Path, overwrite: bool) -> None:
    """Check that the group and the zip file may be written.

    Raises:
        CellMapFileExistsError: one of them exists and ``overwrite`` is not set, or is of another kind.
    """
    check_room(out, overwrite)
    path = out.with_suffix(".zip")
    if path.exists() and not (overwrite and path.is_file()):
        remedy = "choose another out" if path.is_dir() else "choose another out or pass overwrite=True"
        raise CellMapFileExistsError(f"{path}, the zip file beside out={out}, exists already; {remedy}")


def _checked_meanings(
    rows: Sequence[tuple[ManifestRow, Path]], segmented: InstanceMethods, values: ValuesSetting
) -> list[Meaning]:
    """Return the meaning of the stored values of each prediction, after a check that it covers its crop.

    Raises:
        CellMapValueError: see `submit`.
    """
    meanings = []
    for row, path in rows:
        check_covers(row, path)
        segmented.check(row, path, values)
        meanings.append(stored_meaning(row, path, values) if row.name not in segmented else _IDS)
    return meanings


def _report_voxel_sizes(rows: Sequence[tuple[ManifestRow, Path]]) -> None:
    """Log the crops whose predictions have other voxel sizes than the manifest asks for; they are resampled."""
    differing: dict[tuple[str, str], list[str]] = {}
    for row, path in rows:
        try:
            step = read_multiscale(path).finest.lattice.step
        except CellMapError:
            continue  # reported by the check of what it covers
        if not np.allclose(step, row.lattice.step, rtol=SCALE_TOLERANCE, atol=0):
            sizes = f"{list(step)} nm, and the manifest asks for {list(row.lattice.step)} nm"
            differing.setdefault((row.crop, sizes), []).append(row.name)
    for (crop, sizes), names in differing.items():
        log.info("%s: predictions of %s have voxels of %s: they are resampled", crop, first_few(names), sizes)


def _report_untrained(rows: Sequence[tuple[ManifestRow, Path]]) -> None:
    """Warn of classes that no crop of the training annotated, as the prediction records."""
    marked = set()
    for row, path in rows:
        attributes, _ = read_attributes(path) or ({}, None)
        block = attributes.get("cellmap")
        if isinstance(block, Mapping) and block.get(UNTRAINED):
            marked.add(row.name)
    if marked:
        log.warning("%s; their labels mean nothing", untrained_text(sorted(marked)))


def _without_small(labels: Labels, row: ManifestRow, min_volume: MinVolume) -> tuple[Labels, str]:
    """Return objects of at least the minimum volume, and the number of those removed as text; empty for none."""
    minimum = min_voxels(min_volume, row.name, float(np.prod(row.lattice.step)))
    left = remove_small(labels, minimum)
    if left is labels:
        return labels, ""
    removed = _objects(labels) - _objects(left)
    return left, f" ({removed} below {minimum} voxels, removed by min_volume)" if removed else ""


def _objects(labels: Labels) -> int:
    ids = np.unique(labels)
    return int(np.count_nonzero(ids))


def _content(labels: Labels, numbered: bool) -> str:
    """Return the share of the voxels that are positive, and the number of objects, as text."""
    share = f"{np.count_nonzero(labels) / labels.size:.2%} of {list(labels.shape)} voxels"
    objects = _objects(labels) if numbered else 0
    return f"{share}, {plural(objects, 'object')}, {labels.dtype}" if numbered else f"{share}, {labels.dtype}"


def _predicted_rows(
    predictions: Path, manifest: Path, crops: str | int | Sequence[str | int], allow_missing: bool
) -> tuple[list[tuple[ManifestRow, Path]], list[str]]:
    """Return the rows of a manifest with their predictions, and the names of those that have none."""
    rows: list[tuple[ManifestRow, Path]] = []
    missing: list[str] = []
    for crop in listed_crops(manifest, crops):
        for row in crop.rows:
            folder = crop.within(predictions)
            path = folder / row.name
            check_finished(folder, path)
            if is_group(path):
                rows.append((row, path))
            else:
                missing.append(row.label)
    if not rows or (missing and not allow_missing):
        hint = (
            "; the same cellmap-predict completes what was interrupted, allow_missing=true leaves them out"
            if rows
            else _layout_hint(predictions)
        )
        hint = _other_names(predictions, missing) + hint
        raise CellMapFileNotFoundError(
            f"{len(missing)} of {len(missing) + len(rows)} classes of crops that {manifest.name} lists are not "
            f"in {predictions}: {', '.join(missing) if rows else first_few(missing, 12)}{hint}"
        )
    return rows, missing


def _other_names(predictions: Path, missing: Sequence[str]) -> str:
    """Return the middle of the error for predictions that are there under another name of the dataset."""
    folders = [folder for folder in predictions.glob("*.zarr") if folder.is_dir()]
    found = {}
    for label in missing:
        dataset, crop, _ = label.split("/")
        if (predictions / f"{dataset}.zarr" / crop).is_dir():
            continue
        elsewhere = [str(folder / crop) for folder in sorted(folders) if (folder / crop).is_dir()]
        if elsewhere:
            found[f"{dataset}.zarr/{crop}"] = " and ".join(elsewhere)
    named = [f"{place} for {wanted}" for wanted, place in found.items()]
    return f"; there is {first_few(named)}: is the dataset right in the manifest?" if named else ""


def _layout_hint(predictions: Path) -> str:
    """Return the end of the error for a folder in which no prediction was found."""
    hint = (
        "; they are looked for in <predictions>/<dataset>.zarr/<crop>/<class>, as cellmap-predict crops=... writes them"
    )
    if not predictions.is_dir():
        return f"{hint}; {predictions} does not exist{similar_path(predictions)}"
    volume = next((p for p in (predictions, *predictions.parents) if p.suffix == ".zarr"), None)
    if volume is not None:
        return f"{hint}: give the folder above {volume.name}, predictions={volume.parent}"
    names = children(predictions)
    return f"{hint}: give the folder above <dataset>.zarr; {predictions} holds {first_few(names, 12) or 'no folders'}"


def _write_labels(out: Path, row: ManifestRow, labels: Labels, meaning: Literal["ids", "mask"]) -> None:
    lattice = row.lattice
    write_group(out / row.crop)
    array = create_level(
        out / row.crop / row.name, lattice.shape, labels.dtype, _CHUNK, 2, codec_of("zstd", 2),
        attributes={
            "voxel_size": list(lattice.step), "translation": list(lattice.origin), "shape": list(lattice.shape),
            "cellmap": prediction_attributes(row.name, meaning),
        },
    )  # fmt: skip
    array[...] = labels


def _zip(out: Path) -> Path:
    """Write the group as a zip file with the crops at its top."""
    path = out.with_suffix(".zip")
    partial = path.with_suffix(".zip.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # chunks are compressed already
        for file in sorted(p for p in out.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(out))
    os.replace(partial, path)  # noqa: PTH105
    return path
