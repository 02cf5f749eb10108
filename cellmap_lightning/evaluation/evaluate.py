"""Scores of a written prediction over the annotated voxels of each crop that it covers."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from cellmap_lightning.crops.crop_box import CropBox, image_part
from cellmap_lightning.crops.encodings import Unknown
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError
from cellmap_lightning.evaluation.crop_names import crop_names
from cellmap_lightning.evaluation.crop_parts import CropPart, parts_of
from cellmap_lightning.evaluation.instance_scores import (
    INSTANCE_METRICS,
    InstanceScore,
    NoInstancesError,
    crop_overlaps,
    instance_score,
)
from cellmap_lightning.evaluation.pairs import CropPair
from cellmap_lightning.evaluation.surface_scores import SURFACE_METRICS, SurfaceScore, surface_score
from cellmap_lightning.evaluation.voxel_scores import METRICS, Score, voxel_score
from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.meanings import ValuesSetting
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.store import LISTING
from cellmap_lightning.prediction.output_checks import check_finished
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, Threshold, threshold_of
from cellmap_lightning.validation import did_you_mean, first_few

log = logging.getLogger(__name__)

#: Groups of scores: of voxels, of surfaces in nm, and of objects.
SCORES = ("voxels", "surface", "instances")


@dataclass(frozen=True)
class CropScore:
    """Scores of one class in one crop; see docs/evaluation.md.

    Attributes:
        crop: name of the crop, see `crop_names`.
        name: name of the class.
        voxels: voxel counts and scores.
        surface: surface distances, if they were asked for.
        instances: scores of objects, likewise, and where the annotation has instances.
        trained: True if the crop was trained on; None if unknown.
        box: the part of the crop that was scored; None for all of it.
        folder: folder of the crop; None if unknown.

    Example:
        >>> [s.voxels.dice for s in evaluate(Path("pred.zarr"), crops, ["mito"])]
    """

    crop: str
    name: str
    voxels: Score
    surface: SurfaceScore | None = None
    instances: InstanceScore | None = None
    trained: bool | None = None
    box: CropBox | None = None
    folder: Path | None = None

    @property
    def label(self) -> str:
        """Name of the crop, with the part that was scored."""
        return self.crop if self.box is None else f"{self.crop} [z y x {self.box}]"

    def values(self) -> dict[str, float]:
        """Return every score by name; NaN for undefined ones."""
        voxels = {metric: float(getattr(self.voxels, metric)) for metric in METRICS}
        surface = asdict(self.surface) if self.surface else dict.fromkeys(SURFACE_METRICS, math.nan)
        instances = asdict(self.instances) if self.instances else dict.fromkeys(INSTANCE_METRICS, math.nan)
        return voxels | surface | instances


def evaluate(
    output: Path,
    crops: Path | Sequence[Path],
    classes: Sequence[str],
    threshold: Threshold = DEFAULT_THRESHOLD,
    unknown: Unknown = "metadata",
    values: ValuesSetting = "auto",
    scores: Sequence[str] = ("voxels",),
    trained: Mapping[Path, Sequence[CropPart]] | None = None,
    box: CropBox | None = None,
) -> list[CropScore]:
    """Compute the scores of a prediction in every crop that it covers.

    Annotations are resampled to the voxels of the prediction, like targets of a training at that voxel size.
    Unannotated voxels and voxels outside the crop are ignored.

    Args:
        output: the prediction, with one group per class.
        crops: folder of the crops, ``recon-1/labels/groundtruth``, or of a single crop; or several such folders.
        classes: names of the classes.
        threshold: probability from which a voxel is positive, of all classes or ``{class: probability}``.
        unknown: the stored value of unannotated voxels, if the metadata do not define it; see `LabelOptions`.
        values: the meaning of the stored values of the prediction, see `meaning_of`.
        scores: some of `SCORES`. Voxels are always scored. ``instances`` of annotations without instances are an error
            if all of them have none.
        trained: parts of the crops that a training used, to score each by itself and to mark those that were trained
            on; None if unknown. See `trained_crops`.
        box: the part of each crop that is scored; None for the parts of ``trained``, or else all of it.

    Raises:
        CellMapKeyError: the prediction covers no crop that annotates any of the classes.
        CellMapValueError: a crop is given twice.
        NoInstancesError: objects are to be scored, and no annotation has instances.
    """
    folders = [crops] if isinstance(crops, Path) else list(crops)
    places = [place for f in folders for place in annotated_parts(output, f, classes, trained=trained, box=box)]
    pairs = [
        CropPair(output / name, crop, name, threshold_of(threshold, name), unknown, values, part.box)
        for crop, name, part in places
    ]
    if not pairs:
        raise CellMapKeyError(
            f"nothing to evaluate {output} with: no crop in {first_few(folders)} lies in it and annotates any of "
            f"{list(classes)}"
        )
    names = crop_names(crop for crop, _, _ in places)
    results: list[CropScore] = []
    without: list[NoInstancesError] = []
    for pair, (_, _, part) in zip(pairs, places, strict=True):
        instances = None
        if "instances" in scores:
            try:
                instances = instance_score(crop_overlaps(pair))
            except NoInstancesError as e:
                without.append(e)
        surface = surface_score(pair) if "surface" in scores else None
        voxels = voxel_score(pair)
        crop = pair.crop
        results.append(CropScore(names[crop], pair.name, voxels, surface, instances, part.trained, part.box, crop))
    if len(without) == len(pairs):
        raise without[0]
    for error in without:
        log.info("objects are not scored: %s", error)
    return results


def annotated_classes(
    output: Path, crops: Path, classes: Sequence[str], pattern: str = "*"
) -> Iterator[tuple[Path, str]]:
    """Yield the annotated crops and classes that a prediction covers; those that it does not cover are logged.

    Args:
        output: the prediction, with one group per class; a class without a group is yielded.
        crops: folder of the crops, or of a single crop.
        classes: names of the classes.
        pattern: glob pattern of the names of crops.
    """
    for crop, name, _ in annotated_parts(output, crops, classes, pattern):
        yield crop, name


def annotated_parts(
    output: Path,
    crops: Path,
    classes: Sequence[str],
    pattern: str = "*",
    trained: Mapping[Path, Sequence[CropPart]] | None = None,
    box: CropBox | None = None,
) -> Iterator[tuple[Path, str, CropPart]]:
    """Yield crops, classes and parts of these that a prediction covers; parts that it does not cover are logged.

    Args:
        output: the prediction, with one group per class; a class without a group is yielded.
        crops: folder of the crops, or of a single crop.
        classes: names of the classes.
        pattern: glob pattern of the names of crops.
        trained: see `evaluate`.
        box: see `evaluate`.

    Raises:
        CellMapValueError: the box reaches outside a crop.
    """
    outside = set()
    for crop in crop_folders(crops, classes, pattern):
        annotated = [name for name in classes if is_group(crop / name)]
        parts = parts_of(crop, annotated, trained, box) if annotated else []
        for name, part in product(annotated, parts):
            labels = read_multiscale(crop / name)
            inside = labels if part.box is None else image_part(labels, part.box.physical(labels.finest.lattice))
            if inside is None:
                continue  # the class is annotated elsewhere in the crop
            if is_group(output / name) and not covers(
                read_multiscale(output / name).finest.lattice, inside.finest.lattice
            ):
                outside.add(crop.name if part.box is None else f"{crop.name} [z y x {part.box}]")
            else:
                yield crop, name, part
    if outside:
        log.info("not evaluated, since the prediction does not cover them: %s", ", ".join(sorted(outside)))


def crop_folders(crops: Path, classes: Sequence[str], pattern: str = "*") -> list[Path]:
    """Return the folders of crops in a folder, which may be a crop itself."""
    if any(is_group(crops / name) for name in classes):
        return [crops]
    return sorted(p for p in crops.glob(pattern) if p.is_dir())


def check_prediction(output: Path, classes: Sequence[str] | None) -> list[str]:
    """Return the classes of a prediction that are to be scored, after a check.

    Args:
        output: the prediction, with one group per class.
        classes: the requested classes; None for all of them.

    Raises:
        CellMapFileNotFoundError: there is no prediction.
        CellMapValueError: it is not finished.
        CellMapKeyError: a class was not predicted.
    """
    if not output.is_dir():
        raise CellMapFileNotFoundError(
            f"the prediction {output} does not exist{similar_path(output)}; give the Zarr group that has a class each"
        )
    present = sorted(p.name for p in output.iterdir() if p.is_dir() and is_group(p) and p.name != LISTING)
    if not present:
        raise CellMapFileNotFoundError(f"the prediction {output} has no group per class")
    check_finished(output, *(output / name for name in present))
    for name in classes or ():
        if name not in present:
            raise CellMapKeyError(
                f"the prediction {output} has no class {name!r}; it has {first_few(present, 12)}"
                + did_you_mean(name, present)
            )
    return list(classes or present)


def is_group(path: Path) -> bool:
    """Return whether a folder is a Zarr group of either format."""
    return any((path / file).is_file() for file in (".zattrs", "zarr.json"))


def covers(prediction: Lattice, crop: Lattice) -> bool:
    """Return whether a prediction covers a crop, up to half a voxel of the prediction."""
    slack = np.asarray(prediction.step) / 2
    lower, upper = np.subtract(prediction.box.lower, slack), np.add(prediction.box.upper, slack)
    return bool((crop.box.lower >= lower).all() and (crop.box.upper <= upper).all())
