"""A picture of a prediction: the whole of it, and places where it can be judged voxel by voxel.

Everything is read by its place in nm, from each volume's own metadata, so that a shift between raw, annotations and
prediction would be seen. What is read is bounded, however large the volume.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.image import CellMapImage, choose_level
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.evaluation.evaluate import holds
from cellmap_lightning.geometry.lattice import AXES, LATTICE_TOLERANCE, FloatArray, Lattice, Shape
from cellmap_lightning.io.meanings import meaning_of
from cellmap_lightning.io.ngff import Overrides, read_multiscale
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet

log = logging.getLogger(__name__)

Masks = npt.NDArray[np.bool_]

#: Voxels of a place along z, y and x at most: an xy slice is shown in 320 pixels.
_PLACE = (48, 192, 192)
#: Places that are shown.
_PLACES = 3
#: Tiles of a crop that are looked at to find the one worth showing.
_LOOKS = 8
#: Parts of a prediction along an axis, at most, of which the fullest are shown.
_CELLS = 16
#: Voxels of the whole, of all classes together; of raw, those of the level that it is read from.
_WHOLE, _RAW = 2**25, 2**27


@dataclass(frozen=True, eq=False)
class _Place:
    """What one row shows.

    Attributes:
        name: where it is, for people.
        patch: its voxels; where they begin does not count.
        center: centre, nm.
        target: what is annotated there, ``[C, z, y, x]``, or None.
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
    threshold: float = 0.5,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Draw raw with the outlines of what was predicted, and of what was annotated where a crop lies in it.

    Args:
        output: the prediction, with one group per class.
        raw: the raw multiscale group.
        classes: names of the classes.
        path: the picture, as for `contact_sheet`.
        crops: folder of the crops, ``recon-1/labels/groundtruth``.
        threshold: probability from which a voxel is of the class.
        metadata: what replaces the metadata of raw; keyword arguments of `Overrides.parse`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    samples = samples_of(output, raw, classes, crops, threshold, metadata)
    contact_sheet(samples, list(classes), path=path, title=output.name, predicted=f"prediction ≥ {threshold:g}")


def samples_of(
    output: Path,
    raw: str,
    classes: Sequence[str],
    crops: Path | None = None,
    threshold: float = 0.5,
    metadata: Mapping[str, Any] | None = None,
) -> list[SheetSample]:
    """What `draw_prediction` draws; the arguments are the same.

    The first is all that was predicted, at a level of the pyramid that is small enough; it is left out where a single
    place shows it all, and where raw has no such level. The others are places at full resolution: in crops that
    annotate one of the classes, else where most was predicted.
    """
    image = read_multiscale(str(output / classes[0]))
    lattice = image.finest.lattice
    z, y, x = (min(n, m) for n, m in zip(lattice.shape, _PLACE, strict=True))
    shape: Shape = (z, y, x)
    small = [level for level in image.levels if math.prod(level.lattice.shape) * len(classes) <= _WHOLE]
    whole = small[0].lattice if small else None
    samples: list[SheetSample] = []
    masks: Masks | None = None
    if whole is not None:
        masks = _masks(output, classes, whole, whole.box.center, threshold)
        if shape != lattice.shape and _affordable(raw, whole, metadata or {}):
            samples.append(_sample(raw, whole, whole.box.center, masks, None, "all that was predicted", metadata or {}))
    places = list(islice(_annotated(output, classes, lattice, shape, crops), _PLACES))
    if not places:
        patch = Lattice(lattice.origin, lattice.step, shape)
        centers = _fullest(masks, lattice, shape)
        places = [_Place(f"place {number}", patch, center) for number, center in enumerate(centers, 1)]
    for place in places:
        found = _masks(output, classes, place.patch, place.center, threshold)
        where = ", ".join(f"{a} {v:.0f}" for a, v in zip(AXES, place.center, strict=True))
        header = f"{place.name}, centre {where} nm"
        samples.append(_sample(raw, place.patch, place.center, found, place.target, header, metadata or {}))
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
    values = CellMapImage(
        raw, "raw", patch.step, patch.shape, pad=True, pad_value=0, interpolation="linear", **metadata
    )
    return SheetSample(_read(values, center), target, masks.astype(np.float32), patch.step, header)


def _read(image: CellMapImage, center: FloatArray) -> npt.NDArray[np.float32]:
    out = np.empty(image.window.shape, np.float32)
    image.read_into(center, out)
    return out


def _masks(output: Path, classes: Sequence[str], patch: Lattice, center: FloatArray, threshold: float) -> Masks:
    """Where each class was predicted, ``[C, z, y, x]``."""
    found = np.empty((len(classes), *patch.shape), bool)
    for name, mask in zip(classes, found, strict=True):
        image = CellMapImage(str(output / name), name, patch.step, patch.shape, pad=True, pad_value=0)
        mask[:] = _read(image, center) >= meaning_of(image.image, name).least(threshold)
    return found


def _affordable(raw: str, whole: Lattice, metadata: Mapping[str, Any]) -> bool:
    """Whether raw has a level from which the whole can be drawn without reading a large part of the disk."""
    level = choose_level(read_multiscale(raw, Overrides.parse(**metadata)), whole.step, "raw")
    voxels = math.prod(whole.box.extent / level.lattice.step)
    if voxels > _RAW:
        log.info("%s has no level as coarse as that of the overview, which is left out", raw)
    return voxels <= _RAW


def _annotated(
    output: Path, classes: Sequence[str], lattice: Lattice, most: Shape, crops: Path | None
) -> Iterator[_Place]:
    """Of each crop that lies in the prediction, the place where most is annotated."""
    for crop in sorted(p for p in crops.glob("*") if p.is_dir()) if crops is not None and crops.is_dir() else ():
        there = [n for n in classes if any((crop / n / file).is_file() for file in (".zattrs", "zarr.json"))]
        labels = [read_multiscale(str(crop / name)).finest.lattice for name in there]
        if not labels or not all(holds(lattice, one) for one in labels):
            continue
        room = np.floor(np.min([one.box.extent for one in labels], axis=0) / lattice.step + LATTICE_TOLERANCE)
        z, y, x = np.clip(room, 1, most).astype(int).tolist()
        patch = Lattice(lattice.origin, lattice.step, (z, y, x))
        window = {"shape": list(patch.shape), "scale": list(patch.step)}
        with CellMapDataset(
            str(output / classes[0]), f"{crop}/[{','.join(there)}]", list(classes), {"found": window},
            {"labels": window},
            read=ReadOptions(pad=True, cache="none", missing_raw="warn"),
            labels=LabelOptions(too_coarse="upsample"), intensity=IntensityOptions(raw_value_transforms=None),
        ) as dataset:  # fmt: skip
            ranked = []
            for number in range(0, dataset.tile_count, max(1, dataset.tile_count // _LOOKS)):
                position = dataset.tile(number)
                shares = (dataset[position]["labels"] == 1).flatten(1).float().mean(1)
                ranked.append((int((shares > 0.005).sum()), float(shares.clamp(max=0.1).sum()), position))
            best = max(ranked)[2]
            target = dataset[best]["labels"].numpy().reshape(len(classes), *patch.shape)
            center = dataset.get_center(best)
        yield _Place(crop.name, patch, np.array([center[axis] for axis in AXES]), target)


def _fullest(masks: Masks | None, lattice: Lattice, shape: Shape) -> list[FloatArray]:
    """Centres of places, on the voxels of the prediction, in which most classes and most voxels were predicted.

    Args:
        masks: where each class was predicted, at any resolution; None for the middle alone.
        lattice: the voxels of the prediction.
        shape: voxels of a place.
    """
    middle = (
        np.asarray(lattice.box.lower) + (np.subtract(lattice.shape, shape) // 2 + np.divide(shape, 2)) * lattice.step
    )
    if masks is None:
        return [middle]
    cells = np.floor_divide(lattice.shape, shape).clip(1, _CELLS)
    ranked: list[tuple[int, float, tuple[int, ...]]] = []
    for cell in np.ndindex(*cells.tolist()):
        ends = [np.floor(np.multiply(np.add(cell, n), masks.shape[1:]) / cells).astype(int) for n in (0, 1)]
        part = masks[:, *(slice(a, max(a + 1, b)) for a, b in zip(*ends, strict=True))]
        shares = part.reshape(len(masks), -1).mean(1)
        ranked.append((int((shares > 0.005).sum()), float(shares.clip(max=0.1).sum()), cell))
    ranked.sort(key=lambda row: row[:2], reverse=True)
    found = []
    for _, _, cell in ranked[:_PLACES]:
        start = (np.add(cell, 0.5) / cells * lattice.shape - np.divide(shape, 2)).round()
        start = start.clip(0, np.subtract(lattice.shape, shape))
        found.append(np.asarray(lattice.box.lower) + (start + np.divide(shape, 2)) * lattice.step)
    return found
