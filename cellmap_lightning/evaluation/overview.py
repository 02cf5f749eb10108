"""Picture of a prediction: an overview of the whole, and places at full resolution.

Raw, annotations and prediction are read by position in nm, each by its metadata, so that a shift between them is
visible. The amount of data that is read is bounded, however large the volume is.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.image import CellMapImage, choose_level
from cellmap_lightning.evaluation.evaluate import covers, is_group
from cellmap_lightning.evaluation.pairs import Annotation
from cellmap_lightning.geometry.lattice import (
    AXES,
    EDGE_TOLERANCE,
    LATTICE_TOLERANCE,
    Box,
    FloatArray,
    Lattice,
    Shape,
)
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.meanings import meaning_of
from cellmap_lightning.io.ngff import Overrides, read_multiscale
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, Threshold, threshold_of
from cellmap_lightning.training.report import class_rank
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet

log = logging.getLogger(__name__)

Masks = npt.NDArray[np.bool_]

#: Maximum shape of a place, voxels: an xy slice is drawn on 320 pixels.
_PLACE = (48, 192, 192)
#: Number of places in the picture.
_PLACES = 3
#: Tiles of a crop that are read to find the one with the most classes.
_CANDIDATES = 8
#: Maximum number of cells along an axis, among which the densest ones are drawn.
_CELLS = 16
#: Maximum voxels of the overview, of all classes together, and of the level of raw that it is read from.
_WHOLE, _RAW = 2**25, 2**27


@dataclass(frozen=True, eq=False)
class _Place:
    """The content of one row.

    Attributes:
        name: name of the crop or place, for the header.
        patch: shape and voxel size; the origin is ignored.
        center: centre, nm.
        target: the annotation, ``[C, z, y, x]``, or None.
    """

    name: str
    patch: Lattice
    center: FloatArray
    target: npt.NDArray[np.float32] | None = None


def draw_prediction(
    output: Path,
    raw: str,
    classes: Sequence[str],
    path: Path,
    crops: Path | None = None,
    threshold: Threshold = DEFAULT_THRESHOLD,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Draw raw with the outlines of the prediction, and of the annotation where the prediction covers a crop.

    Args:
        output: the prediction, with one group per class.
        raw: the raw multiscale group.
        classes: names of the classes.
        path: the file, as for `contact_sheet`.
        crops: folder of the crops, ``recon-1/labels/groundtruth``.
        threshold: probability from which a voxel is positive, of all classes or ``{class: probability}``.
        metadata: replacements of the metadata of raw; keyword arguments of `Overrides.parse`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    samples = samples_of(output, raw, classes, crops, threshold, metadata)
    limits = ", ".join(f"{value:g}" for value in dict.fromkeys(threshold_of(threshold, name) for name in classes))
    contact_sheet(samples, list(classes), path=path, title=output.name, predicted=f"prediction ≥ {limits}")


def samples_of(
    output: Path,
    raw: str,
    classes: Sequence[str],
    crops: Path | None = None,
    threshold: Threshold = DEFAULT_THRESHOLD,
    metadata: Mapping[str, Any] | None = None,
) -> list[SheetSample]:
    """Return the rows of `draw_prediction`; the arguments are the same.

    The first row is the whole prediction, at a level of the pyramid that is small enough. It is left out if a single
    place contains the whole prediction, or if raw has no such level. The others are places at full resolution: in
    crops that annotate one of the classes, else where most was predicted.
    """
    metadata = metadata or {}
    image = read_multiscale(str(output / classes[0]))
    lattice = image.finest.lattice
    z, y, x = (min(n, m) for n, m in zip(lattice.shape, _PLACE, strict=True))
    shape: Shape = (z, y, x)
    samples: list[SheetSample] = []
    masks: Masks | None = None
    affordable = [level for level in image.levels if math.prod(level.lattice.shape) * len(classes) <= _WHOLE]
    if affordable:
        whole = affordable[0].lattice
        masks = _masks(output, classes, whole, whole.box.center, threshold)
        if shape != lattice.shape and _raw_is_affordable(raw, whole, metadata):
            samples.append(_sample(raw, whole, whole.box.center, masks, None, "whole prediction", metadata))
    places = list(islice(_annotated_places(classes, lattice, shape, crops), _PLACES))
    if not places:
        patch = Lattice(lattice.origin, lattice.step, shape)
        centers = _densest_places(masks, lattice, shape)
        places = [_Place(f"place {number}", patch, center) for number, center in enumerate(centers, 1)]
    for place in places:
        place_masks = _masks(output, classes, place.patch, place.center, threshold)
        position = ", ".join(f"{axis} {value:.0f}" for axis, value in zip(AXES, place.center, strict=True))
        header = f"{place.name}, centre {position} nm"
        samples.append(_sample(raw, place.patch, place.center, place_masks, place.target, header, metadata))
    return samples


def _sample(
    raw: str,
    patch: Lattice,
    center: FloatArray,
    masks: Masks,
    target: npt.NDArray[np.float32] | None,
    header: str,
    metadata: Mapping[str, Any],
) -> SheetSample:
    """Return a row with raw, read at the voxels of the patch."""
    values = CellMapImage(
        raw, "raw", patch.step, patch.shape, pad=True, pad_value=0, interpolation="linear", **metadata
    )
    return SheetSample(_read(values, center), target, masks.astype(np.float32), patch.step, header)


def _read(image: CellMapImage, center: FloatArray) -> npt.NDArray[np.float32]:
    out = np.empty(image.window.shape, np.float32)
    image.read_into(center, out)
    return out


def _masks(output: Path, classes: Sequence[str], patch: Lattice, center: FloatArray, threshold: Threshold) -> Masks:
    """Return the mask of each predicted class, ``[C, z, y, x]``."""
    masks = np.empty((len(classes), *patch.shape), bool)
    for name, mask in zip(classes, masks, strict=True):
        image = CellMapImage(str(output / name), name, patch.step, patch.shape, pad=True, pad_value=0)
        mask[:] = _read(image, center) >= meaning_of(image.image, name).least(threshold_of(threshold, name))
    return masks


def _raw_is_affordable(raw: str, whole: Lattice, metadata: Mapping[str, Any]) -> bool:
    """Return whether raw has a level that is coarse enough to read the whole of it for the overview."""
    level = choose_level(read_image(raw, Overrides.parse(**metadata)), whole.step, "raw")
    voxels = math.prod(whole.box.extent / level.lattice.step)
    if voxels > _RAW:
        log.info("%s has no level that is coarse enough for the overview, which is left out", raw)
    return voxels <= _RAW


def _annotated_places(classes: Sequence[str], lattice: Lattice, most: Shape, crops: Path | None) -> Iterator[_Place]:
    """Yield the place with the most annotated classes of each crop that the prediction covers."""
    if crops is None or not crops.is_dir():
        return
    for crop in sorted(p for p in crops.glob("*") if p.is_dir()):
        annotated = [name for name in classes if is_group(crop / name)]
        labels = [read_multiscale(str(crop / name)).finest.lattice for name in annotated]
        if not labels or not all(covers(lattice, one) for one in labels):
            continue
        room = np.floor(np.min([one.box.extent for one in labels], axis=0) / lattice.step + LATTICE_TOLERANCE)
        z, y, x = np.clip(room, 1, most).astype(int).tolist()
        patch = Lattice(lattice.origin, lattice.step, (z, y, x))
        annotations = {name: Annotation(crop, name, lattice.step) for name in annotated}
        ranked = []
        starts = _tile_starts(annotations[annotated[0]].box, lattice, patch.shape)
        for start in starts[:: max(1, len(starts) // _CANDIDATES)]:
            target = np.full((len(classes), *patch.shape), np.nan, np.float32)
            for name, annotation in annotations.items():
                ids = annotation.read(lattice, start, patch.shape)
                target[classes.index(name)] = np.where(ids < 0, np.nan, ids > 0)
            ranked.append((class_rank(target == 1), start, target))
        _, start, target = max(ranked, key=lambda row: row[:2])
        center = np.asarray(lattice.origin) + (np.add(start, np.subtract(patch.shape, 1) / 2)) * lattice.step
        yield _Place(crop.name, patch, center, target)


def _tile_starts(box: Box, lattice: Lattice, shape: Shape) -> list[Shape]:
    """Return the first voxels of the patches that tile a box; the last ones along each axis end with it."""
    first = np.ceil((np.asarray(box.lower) - lattice.origin) / lattice.step - EDGE_TOLERANCE).astype(int)
    end = np.floor((np.asarray(box.upper) - lattice.origin) / lattice.step - EDGE_TOLERANCE).astype(int) + 1
    along = [
        sorted({min(start, max(low, high - size)) for start in range(low, max(high, low + 1), size)})
        for low, high, size in zip(first.tolist(), end.tolist(), shape, strict=True)
    ]
    return [(z, y, x) for z, y, x in product(*along)]


def _densest_places(masks: Masks | None, lattice: Lattice, shape: Shape) -> list[FloatArray]:
    """Return centres of the places with the most predicted classes and voxels, on voxels of the prediction.

    Args:
        masks: mask of each class over the whole prediction, at any resolution; None for its centre alone.
        lattice: the voxels of the prediction.
        shape: shape of a place, voxels.
    """
    lower, half = np.asarray(lattice.box.lower), np.divide(shape, 2)
    if masks is None:
        return [lower + (np.subtract(lattice.shape, shape) // 2 + half) * lattice.step]
    # The prediction is divided into a grid of cells of about the shape of a place, which are ranked.
    cells = np.floor_divide(lattice.shape, shape).clip(1, _CELLS)
    ranked: list[tuple[tuple[int, float], tuple[int, ...]]] = []
    for cell in np.ndindex(*cells.tolist()):
        ends = [np.floor(np.multiply(np.add(cell, n), masks.shape[1:]) / cells).astype(int) for n in (0, 1)]
        part = masks[:, *(slice(a, max(a + 1, b)) for a, b in zip(*ends, strict=True))]
        ranked.append((class_rank(part), cell))
    ranked.sort(key=lambda row: row[0], reverse=True)
    centers = []
    for _, cell in ranked[:_PLACES]:
        start = (np.add(cell, 0.5) / cells * lattice.shape - half).round()
        start = start.clip(0, np.subtract(lattice.shape, shape))
        centers.append(lower + (start + half) * lattice.step)
    return centers
