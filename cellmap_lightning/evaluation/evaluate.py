"""Scores of a written prediction over the annotated voxels of each crop that it covers."""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cellmap_lightning.crops.encodings import Unknown
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError
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
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.prediction.output_checks import check_finished
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, Threshold, threshold_of
from cellmap_lightning.splits.entries import read_csv
from cellmap_lightning.validation import did_you_mean, first_few

log = logging.getLogger(__name__)

#: Groups of scores: of voxels, of surfaces in nm, and of objects.
SCORES = ("voxels", "surface", "instances")


@dataclass(frozen=True)
class CropScore:
    """Scores of one class in one crop; see docs/evaluation.md.

    Attributes:
        crop: name of the crop.
        name: name of the class.
        voxels: voxel counts and scores.
        surface: surface distances, if they were asked for.
        instances: scores of objects, likewise, and where the annotation has instances.
        trained: True if the crop was trained on; None if unknown.

    Example:
        >>> [s.voxels.dice for s in evaluate(Path("pred.zarr"), crops, ["mito"])]
    """

    crop: str
    name: str
    voxels: Score
    surface: SurfaceScore | None = None
    instances: InstanceScore | None = None
    trained: bool | None = None

    def values(self) -> dict[str, float]:
        """Return every score by name; NaN for undefined ones."""
        voxels = {metric: float(getattr(self.voxels, metric)) for metric in METRICS}
        surface = asdict(self.surface) if self.surface else dict.fromkeys(SURFACE_METRICS, math.nan)
        instances = asdict(self.instances) if self.instances else dict.fromkeys(INSTANCE_METRICS, math.nan)
        return voxels | surface | instances


def evaluate(
    output: Path,
    crops: Path,
    classes: Sequence[str],
    threshold: Threshold = DEFAULT_THRESHOLD,
    unknown: Unknown = "metadata",
    values: ValuesSetting = "auto",
    scores: Sequence[str] = ("voxels",),
    trained: Collection[Path] | None = None,
) -> list[CropScore]:
    """Compute the scores of a prediction in every crop that it covers.

    Annotations are resampled to the voxels of the prediction, like targets of a training at that voxel size.
    Unannotated voxels and voxels outside the crop are ignored.

    Args:
        output: the prediction, with one group per class.
        crops: folder of the crops, ``recon-1/labels/groundtruth``, or of a single crop.
        classes: names of the classes.
        threshold: probability from which a voxel is positive, of all classes or ``{class: probability}``.
        unknown: the stored value of unannotated voxels, if the metadata do not define it; see `LabelOptions`.
        values: the meaning of the stored values of the prediction, see `meaning_of`.
        scores: some of `SCORES`. Voxels are always scored. ``instances`` of annotations without instances are an error
            if all of them have none.
        trained: folders of the crops that were trained on, to mark them; None if unknown. See `trained_crops`.

    Raises:
        CellMapKeyError: the prediction covers no crop that annotates any of the classes.
        NoInstancesError: objects are to be scored, and no annotation has instances.
    """
    pairs = [
        CropPair(output / name, crop, name, threshold_of(threshold, name), unknown, values)
        for crop, name in annotated_classes(output, crops, classes)
    ]
    if not pairs:
        raise CellMapKeyError(
            f"nothing to evaluate {output} with: no crop in {crops} lies in it and annotates any of {list(classes)}"
        )
    results: list[CropScore] = []
    without: list[NoInstancesError] = []
    for pair in pairs:
        instances = None
        if "instances" in scores:
            try:
                instances = instance_score(crop_overlaps(pair))
            except NoInstancesError as e:
                without.append(e)
        surface = surface_score(pair) if "surface" in scores else None
        is_trained = pair.crop.resolve() in trained if trained is not None else None
        results.append(CropScore(pair.crop.name, pair.name, voxel_score(pair), surface, instances, is_trained))
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
    outside = set()
    for crop in crop_folders(crops, classes, pattern):
        for name in classes:
            if not is_group(crop / name):
                continue
            labels = read_multiscale(crop / name).finest.lattice
            if is_group(output / name) and not covers(read_multiscale(output / name).finest.lattice, labels):
                outside.add(crop.name)
            else:
                yield crop, name
    if outside:
        log.info("not evaluated, since the prediction does not cover them: %s", ", ".join(sorted(outside)))


def annotated_crops(crops: Path, name: str, prediction: Lattice) -> list[Path]:
    """Return the folders of the crops that annotate a class and lie in a prediction, sorted by name."""
    folders = [folder for folder in crop_folders(crops, [name]) if is_group(folder / name)]
    return [f for f in folders if covers(prediction, read_multiscale(f / name).finest.lattice)]


def trained_crops(path: Path) -> set[Path]:
    """Return the folders of the crops for training.

    Args:
        path: the folder of a run, which has a ``split.csv``, or a CSV of crops, see docs/data.md.

    Raises:
        CellMapError: there is no such file, or it cannot be read.
    """
    entries = read_csv(path / "split.csv" if path.is_dir() else path)
    return {Path(entry.target_path).parent.resolve() for entry in entries.get("train", []) if entry.target_path}


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
            f"the prediction {output} does not exist; give the Zarr group that has a class each"
        )
    present = sorted(p.name for p in output.iterdir() if p.is_dir() and is_group(p))
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
