"""Picture of a prediction: an overview, and places, all at full resolution.

Raw, annotations and prediction are read by position in nm, each by its metadata, so that a shift between them is
visible. The amount of data that is read is bounded, however large the volume is.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.crop_box import restricted
from cellmap_lightning.crops.encodings import Unknown, check_unknown
from cellmap_lightning.crops.image import CellMapImage
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.evaluation.crop_parts import CropPart, parts_of, physical_box
from cellmap_lightning.evaluation.evaluate import covers, crop_folders, is_group
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
from cellmap_lightning.io.images import image_exists
from cellmap_lightning.io.meanings import meaning_of
from cellmap_lightning.io.ngff import Multiscale, Overrides, read_multiscale
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, Threshold, threshold_of
from cellmap_lightning.splits.entries import CropRecord
from cellmap_lightning.training.report import class_rank
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet

log = logging.getLogger(__name__)

Masks = npt.NDArray[np.bool_]

#: Maximum shape of a place, voxels: an xy slice is drawn on 320 pixels.
_PLACE = (48, 192, 192)
#: Rows and columns of the overview, voxels, at most: each is a pixel of the panel.
_OVERVIEW = (320, 320)
#: Number of places in the picture.
_PLACES = 3
#: Tiles of a crop that are read to find the one with the most classes.
_CANDIDATES = 8
#: Maximum number of cells along an axis, among which the densest ones are drawn.
_CELLS = 16
#: Splits of a training in the order in which their crops are shown; None: crops of none, or of an unknown one.
_ORDER = ("val", "test", None, "train")
#: Their names in headers.
_USAGES: dict[str | None, str] = {"val": "validation", "test": "test", "train": "trained on"}
#: Maximum voxels, of all classes together, of the overview and of the level in which the densest places are looked for.
_WHOLE = 2**25


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
    crops: Path | Sequence[Path] | None = None,
    threshold: Threshold = DEFAULT_THRESHOLD,
    metadata: Mapping[str, Any] | None = None,
    known: Sequence[str] = (),
    trained: Mapping[Path, Sequence[CropPart]] | None = None,
    entries: Sequence[tuple[str, CropRecord]] = (),
) -> None:
    """Draw raw with the outlines of the prediction, and of the annotation where the prediction covers a crop.

    Args:
        output: the prediction, with one group per class.
        raw: the raw multiscale group.
        classes: names of the classes.
        path: the file, as for `contact_sheet`.
        crops: folder of the crops, ``recon-1/labels/groundtruth``, or of one crop; or several such folders.
        threshold: probability from which a voxel is positive, of all classes or ``{class: probability}``.
        metadata: replacements of the metadata of raw; keyword arguments of `Overrides.parse`.
        known: every class of the training, so that a class has its colour in all pictures of a run.
        trained: parts of the crops that a training used, each shown by itself; see `trained_crops`.
        entries: split and entry of further crops, which may be stored anywhere and in any format; see `run_crops`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    samples = samples_of(output, raw, classes, crops, threshold, metadata, trained, entries)
    names = list(known) if set(classes) <= set(known) else list(classes)
    palette = dict(zip(names, outline_colors(len(names)), strict=True))
    limits = ", ".join(f"{value:g}" for value in dict.fromkeys(threshold_of(threshold, name) for name in classes))
    contact_sheet(
        samples, list(classes), path=path, title=output.name, predicted=f"prediction ≥ {limits}",
        colors=[palette[name] for name in classes],
    )  # fmt: skip


def samples_of(
    output: Path,
    raw: str,
    classes: Sequence[str],
    crops: Path | Sequence[Path] | None = None,
    threshold: Threshold = DEFAULT_THRESHOLD,
    metadata: Mapping[str, Any] | None = None,
    trained: Mapping[Path, Sequence[CropPart]] | None = None,
    entries: Sequence[tuple[str, CropRecord]] = (),
) -> list[SheetSample]:
    """Return the rows of `draw_prediction`; the arguments are the same.

    All rows are at full resolution. The first one is an overview: the whole prediction, or a part that has as many
    voxels as a panel has pixels, where most was predicted. It is left out if it shows no more than a place, or if no
    level of the prediction is small enough to find that part. The others are places: in crops that annotate one of the
    classes, those for validation first and those that were trained on last, else where most was predicted.
    """
    metadata = metadata or {}
    image = read_multiscale(str(output / classes[0]))
    lattice = image.finest.lattice
    shape = _at_most(lattice, _PLACE)
    masks = _whole_masks(output, classes, image, threshold)
    samples: list[SheetSample] = []
    if masks is not None:
        deepest = max(1, _WHOLE // (len(classes) * math.prod(_OVERVIEW)))
        overview = Lattice(lattice.origin, lattice.step, _at_most(lattice, (deepest, *_OVERVIEW)))
        if shape != overview.shape:
            center = _densest_places(masks, lattice, overview.shape)[0]
            shown = _masks(output, classes, overview, center, threshold)
            samples.append(
                _sample(raw, overview, center, shown, None, _overview_header(overview, lattice, center), metadata)
            )
    folders = [crops] if isinstance(crops, Path) else list(crops or ())
    places = _annotated_places(classes, lattice, shape, folders, trained, entries)
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


def _at_most(lattice: Lattice, most: Shape) -> Shape:
    """Return the shape of the largest part of a lattice that has at most so many voxels along each axis."""
    z, y, x = (min(n, m) for n, m in zip(lattice.shape, most, strict=True))
    return z, y, x


def _whole_masks(output: Path, classes: Sequence[str], image: Multiscale, threshold: Threshold) -> Masks | None:
    """Return the masks of the whole prediction, ``[C, z, y, x]``, at its finest level that is small enough; else None.

    Args:
        output: the prediction.
        classes: names of the classes.
        image: the prediction of one of them, whose levels are those of all.
        threshold: see `draw_prediction`.
    """
    for level in image.levels:
        if math.prod(level.lattice.shape) * len(classes) <= _WHOLE:
            return _masks(output, classes, level.lattice, level.lattice.box.center, threshold)
    return None


def _annotated_places(
    classes: Sequence[str],
    lattice: Lattice,
    most: Shape,
    folders: Sequence[Path],
    trained: Mapping[Path, Sequence[CropPart]] | None,
    entries: Sequence[tuple[str, CropRecord]],
) -> list[_Place]:
    """Return the best place of each of the first crops that the prediction covers, by their ranks.

    Args:
        classes: names of the classes.
        lattice: the voxels of the prediction.
        most: shape of a place at most, voxels.
        folders: folders of crops, or of one crop; those that do not exist have none.
        trained: see `draw_prediction`.
        entries: see `draw_prediction`.
    """
    crops = [crop for folder in folders if folder.is_dir() for crop in crop_folders(folder, classes)]
    annotated = merge(
        _in_folders(classes, crops, trained, entries), _listed(classes, entries, crops), key=lambda crop: crop.rank
    )
    covered = (crop for crop in annotated if all(covers(lattice, box) for box in crop.lattices))
    return [_best_place(classes, lattice, most, crop) for crop in islice(covered, _PLACES)]


def _sample(
    raw: str,
    patch: Lattice,
    center: FloatArray,
    masks: Masks,
    target: npt.NDArray[np.float32] | None,
    header: str,
    metadata: Mapping[str, Any],
) -> SheetSample:
    """Return a row with raw, read at the voxels of the patch; chunks that are not stored show the fill value.

    The prediction read and reported them in the same way (see `CellMapDataSplit`).
    """
    values = CellMapImage(
        raw, "raw", patch.step, patch.shape, pad=True, pad_value=0, interpolation="linear",
        overrides=Overrides.parse(**metadata), missing_raw="fill",
    )  # fmt: skip
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


def _overview_header(overview: Lattice, lattice: Lattice, center: FloatArray) -> str:
    if overview.shape == lattice.shape:
        return "whole prediction"
    part, whole = (" × ".join(map(str, lattice.shape)) for lattice in (overview, lattice))
    lower, upper = (center + sign * np.multiply(overview.shape, overview.step) / 2 for sign in (-1, 1))
    box = " ".join(f"{axis} {a:.0f}..{b:.0f}" for axis, a, b in zip(AXES, lower, upper, strict=True))
    return f"overview, {part} of {whole} voxels (z, y, x), where most was predicted: {box} nm"


@dataclass(frozen=True, eq=False)
class _Annotated:
    """A crop, or a part of one, that annotates some of the classes.

    Attributes:
        name: its name, for the header.
        folder: location of the crop.
        images: the label image of each of these classes.
        part: the part of the crop.
        usage: the split of the training that it belongs to; None if it is in none, or unknown.
        unknown: the stored value of unannotated voxels, where the metadata do not define it.
    """

    name: str
    folder: Path
    images: Mapping[str, Multiscale]
    part: CropPart
    usage: str | None = None
    unknown: Unknown = "metadata"

    @property
    def header(self) -> str:
        """The name, with the box of a part and what the training used it for."""
        name = self.name if self.part.box is None else f"{self.name} [{self.part.box}]"
        return f"{name}, {_USAGES[self.usage]}" if self.usage in _USAGES else name

    @property
    def rank(self) -> int:
        """The rank of its usage: where a prediction can be judged comes first."""
        return _rank(self.usage)

    @property
    def lattices(self) -> list[Lattice]:
        """The voxels of the labels inside of the part."""
        images = self.images
        if self.part.box is not None:
            images = restricted(self.name, images, self.part.box)[0]
        return [image.finest.lattice for image in images.values()]


def _rank(usage: str | None) -> int:
    return _ORDER.index(usage)


def _in_folders(
    classes: Sequence[str],
    crops: Sequence[Path],
    trained: Mapping[Path, Sequence[CropPart]] | None,
    entries: Sequence[tuple[str, CropRecord]],
) -> Iterator[_Annotated]:
    """Yield the parts of crops with a group per class, by their ranks; metadata are read one by one."""
    usages = {folder: split for split, folder in _folders(entries) if split in ("val", "test")}
    parts: list[tuple[str | None, Path, list[str], CropPart]] = []
    for crop in crops:
        annotated = [name for name in classes if is_group(crop / name)]
        of_crop = parts_of(crop, annotated, trained, None) if annotated else []
        parts += [("train" if p.trained else usages.get(crop.resolve()), crop, annotated, p) for p in of_crop]
    for usage, crop, annotated, part in sorted(parts, key=lambda row: _rank(row[0])):
        yield _Annotated(crop.name, crop, {name: read_multiscale(crop / name) for name in annotated}, part, usage)


def _folders(entries: Sequence[tuple[str, CropRecord]]) -> Iterator[tuple[str, Path]]:
    """Yield split and folder of the crops of entries that are on this machine."""
    for split, entry in entries:
        if entry.target is not None and isinstance(entry.target.crop, Path):
            yield split, entry.target.crop.resolve()


def _listed(
    classes: Sequence[str], entries: Sequence[tuple[str, CropRecord]], crops: Sequence[Path]
) -> Iterator[_Annotated]:
    """Yield the crops of entries that are not among the folders of crops, by their ranks."""
    shown = {crop.resolve() for crop in crops}
    for split, entry in sorted(entries, key=lambda row: _rank(row[0])):
        target = entry.target
        if target is None or not isinstance(target.crop, Path) or target.crop.resolve() in shown:
            continue
        try:
            names = [name for name in classes if name in target.names and image_exists(target.of(name))]
            images = {name: target.read(name, entry.overrides[1]) for name in names}
            unknown = check_unknown(entry.metadata.get("unknown", "metadata"))
            part = CropPart(physical_box(entry), split == "train")
            if images:
                yield _Annotated(target.label, target.crop, images, part, split, unknown)
        except CellMapError as e:  # since the training, a volume may have been moved or changed
            log.warning("the picture does not show the annotation of %s: %s", target.label, e)


def _best_place(classes: Sequence[str], lattice: Lattice, most: Shape, crop: _Annotated) -> _Place:
    """Return the place with the most annotated classes of a crop, or of a part of it.

    Args:
        classes: names of the classes.
        lattice: the voxels of the prediction.
        most: shape of a place at most, voxels.
        crop: the crop.
    """
    annotations = {
        name: Annotation(crop.folder, name, lattice.step, crop.unknown, crop.part.box, image)
        for name, image in crop.images.items()
    }
    room = np.min([annotation.box.extent for annotation in annotations.values()], axis=0) / lattice.step
    z, y, x = np.clip(np.floor(room + LATTICE_TOLERANCE), 1, most).astype(int).tolist()
    patch = Lattice(lattice.origin, lattice.step, (z, y, x))
    ranked = []
    starts = _tile_starts(next(iter(annotations.values())).box, lattice, patch.shape)
    for start in starts[:: max(1, len(starts) // _CANDIDATES)]:
        target = np.full((len(classes), *patch.shape), np.nan, np.float32)
        for name, annotation in annotations.items():
            ids = annotation.read(lattice, start, patch.shape)
            target[classes.index(name)] = np.where(ids < 0, np.nan, ids > 0)
        ranked.append((class_rank(target == 1), start, target))
    _, start, target = max(ranked, key=lambda row: row[:2])
    center = np.asarray(lattice.origin) + (np.add(start, np.subtract(patch.shape, 1) / 2)) * lattice.step
    return _Place(crop.header, patch, center, target)


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
