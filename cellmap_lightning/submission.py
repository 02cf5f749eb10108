"""What ``cellmap-submit`` does: predictions, on the voxels that the challenge scores, as labels in a Zarr v2 group.

Every voxel is evaluated once, at its centre: probabilities are interpolated linearly (the mean over the voxel where it
is coarser than the prediction) and then compared with the threshold; labels are those of the nearest voxel.
"""

import importlib
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.challenge import INSTANCE_CLASSES, listed_crops
from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileNotFoundError,
    CellMapTypeError,
    CellMapValueError,
    MissingExtraError,
)
from cellmap_lightning.sampling.layout import ManifestRow
from cellmap_lightning.volumes.chunk_cache import ChunkCache
from cellmap_lightning.volumes.geometry import Shape, box_map
from cellmap_lightning.volumes.image import StoredImage
from cellmap_lightning.volumes.ngff import Encoding, read_encoding, read_multiscale
from cellmap_lightning.volumes.resample import evaluate
from cellmap_lightning.volumes.writer import codec_of, create_level, make_room, write_group

log = logging.getLogger(__name__)

Labels = npt.NDArray[Any]
#: Voxels of a chunk of the submission, and of what is resampled at a time.
_CHUNK = (64, 64, 64)
_BLOCK = (128, 256, 256)


def submit(
    predictions: str | Path,
    manifest: str | Path,
    out: str | Path,
    *,
    crops: str | int | Sequence[str | int] = "test",
    threshold: float = 0.5,
    instance_classes: Sequence[str] = INSTANCE_CLASSES,
    instances: str | Callable[[Labels], Labels] | None = None,
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
        allow_missing: go on without what was not predicted.
        overwrite: replace a Zarr group that is at ``out``.

    Returns:
        The zip file, and what the manifest lists and nobody predicted, as ``dataset/crop/class``.

    Raises:
        CellMapFileNotFoundError: nothing was predicted, or something is missing.
        CellMapValueError: a prediction does not hold its crop.
    """
    out = Path(out)
    if out.suffix != ".zarr":
        raise CellMapValueError(f"out={out}: the name of a submission ends with .zarr")
    wanted = listed_crops(manifest, crops)
    label = _function(instances)
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
    for row, path in found:  # before anything is written
        _check_holds(row, path)
    make_room(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_group(out)
    for row, path in found:
        write_group(out / row.crop)
        values = resampled(row, path, threshold, row.name in instance_classes, label)
        lattice = row.lattice
        array = create_level(
            out / row.crop / row.name, lattice.shape, values.dtype, _CHUNK, 2, codec_of("zstd", 2),
            attributes={
                "voxel_size": list(lattice.step), "translation": list(lattice.origin), "shape": list(lattice.shape),
            },
        )  # fmt: skip
        array[...] = values
        log.info("%s/%s: %s voxels, %s", row.crop, row.name, list(lattice.shape), values.dtype)
    return _zipped(out), missing


def resampled(
    row: ManifestRow, path: Path, threshold: float, numbered: bool, label: Callable[[Labels], Labels]
) -> Labels:
    """A prediction on the voxels of a manifest, as labels in the smallest unsigned type."""
    image = read_multiscale(path)
    level = image.finest
    source = StoredImage(level, ChunkCache(), f"{row.crop}/{row.name}").region
    is_labels = "annotation" in dict(image.attributes.get("cellmap", {}))
    most = np.iinfo(level.array.dtype).max if level.array.dtype.kind == "u" else 1
    encoding = (read_encoding(image, level) or Encoding(0, None)) if is_labels else None
    kind = level.array.dtype if is_labels else np.dtype(np.float32)
    annotation = dict(image.attributes.get("cellmap", {})).get("annotation", {})
    ids = numbered and annotation.get("annotation_type", {}).get("type") == "instance_segmentation"
    result: Labels = np.zeros(row.lattice.shape, kind if ids else bool)
    for start in product(*(range(0, n, b) for n, b in zip(row.lattice.shape, _BLOCK, strict=True))):
        ends = [min(a + b, n) for a, b, n in zip(start, _BLOCK, row.lattice.shape, strict=True)]
        z, y, x = (b - a for a, b in zip(start, ends, strict=True))
        shape: Shape = (z, y, x)
        part = np.empty(shape, kind)
        amap = box_map(row.lattice, (start[0], start[1], start[2]), shape, level.lattice)
        evaluate(source, amap, part, method="nearest" if is_labels else "linear", fill=0)
        if encoding is None:
            part = part >= threshold * most
        else:
            there = encoding.present(part)
            part = np.where(there, part, 0) if ids else there
        result[tuple(slice(a, b) for a, b in zip(start, ends, strict=True))] = part
    if not numbered:
        return result.astype(np.uint8)
    numbers = result if ids else np.asarray(label(result))
    if numbers.shape != result.shape or numbers.dtype.kind not in "iub" or (numbers.size and numbers.min() < 0):
        raise CellMapTypeError(
            f"{row.crop}/{row.name}: instances must give whole numbers from 0 on of the shape {list(result.shape)}, "
            f"got {numbers.dtype} {list(numbers.shape)}"
        )
    return numbers.astype(np.min_scalar_type(int(numbers.max())))


def components(present: Labels) -> Labels:
    """Objects as connected components of voxels that share a face: a plain baseline, which joins what touches."""
    try:
        from scipy import ndimage
    except ImportError as e:
        raise MissingExtraError('components need scipy: pip install "cellmap-lightning[targets]"') from e
    numbers: Labels = ndimage.label(present)[0]
    return numbers


def _function(given: str | Callable[[Labels], Labels] | None) -> Callable[[Labels], Labels]:
    if given is None:
        return components
    if callable(given):
        return given
    module, _, name = given.rpartition(".")
    try:
        found: Callable[[Labels], Labels] = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as e:
        raise CellMapTypeError(f"instances={given}: there is no such function ({e})") from None
    return found


def _check_holds(row: ManifestRow, path: Path) -> None:
    where = f"{row.dataset}/{row.crop}/{row.name}"
    try:
        box = read_multiscale(path).finest.lattice.box
    except CellMapError as e:
        raise CellMapValueError(f"{where} cannot be read, or its prediction is not finished: {e}") from e
    first = np.asarray(row.lattice.origin)
    last = first + np.multiply(row.lattice.step, np.subtract(row.lattice.shape, 1))
    slack = 1e-3 * np.asarray(row.lattice.step)
    if (first < box.lower - slack).any() or (last > box.upper + slack).any():
        raise CellMapValueError(
            f"{where}: the prediction {path} lies in {box}, which does not hold all of {row.lattice.box}"
        )


def _zipped(out: Path) -> Path:
    """The group as a zip file with its crops at the top. Chunks are compressed already."""
    path = out.with_suffix(".zip")
    partial = path.with_suffix(".zip.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in out.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(out))
    os.replace(partial, path)  # noqa: PTH105
    return path
