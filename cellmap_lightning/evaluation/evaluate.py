"""Voxel scores of a written prediction over annotated voxels: Dice, IoU, precision and recall of each crop."""

import csv
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cellmap_lightning.crops.encodings import Unknown
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapKeyError, MissingExtraError
from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.meanings import ValuesSetting, meaning_of
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.loading.dataloader import CellMapDataLoader

log = logging.getLogger(__name__)

METRICS = ("dice", "iou", "precision", "recall")
#: Shape of the blocks that are compared at a time, voxels.
_PATCH = (64, 64, 64)


@dataclass(frozen=True)
class Score:
    """Voxel counts of one class in one crop, at the voxel size of the prediction.

    Attributes:
        crop: name of the crop.
        name: name of the class.
        known: annotated voxels.
        tp: true positives.
        fp: false positives.
        fn: false negatives.

    Example:
        >>> Score("crop1", "mito", known=100, tp=30, fp=10, fn=10).dice
        0.75
    """

    crop: str
    name: str
    known: int
    tp: int
    fp: int
    fn: int

    @property
    def dice(self) -> float:
        """2 tp / (2 tp + fp + fn); NaN where the class occurs in neither, likewise for the other scores."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Intersection over union, tp / (tp + fp + fn)."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Fraction of the predicted voxels that are positive, tp / (tp + fp)."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Fraction of the positive voxels that are predicted, tp / (tp + fn)."""
        return _ratio(self.tp, self.tp + self.fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def evaluate(
    output: Path,
    crops: Path,
    classes: Sequence[str],
    threshold: float = 0.5,
    unknown: Unknown = "metadata",
    values: ValuesSetting = "auto",
) -> list[Score]:
    """Compute the scores of a prediction in every crop that it covers.

    Annotations are resampled to the voxels of the prediction, like targets of a training at that voxel size.
    Unannotated voxels and voxels outside the crop are ignored.

    Args:
        output: the prediction, with one group per class.
        crops: folder of the crops, ``recon-1/labels/groundtruth``.
        classes: names of the classes.
        threshold: probability from which a voxel is positive.
        unknown: the stored value of unannotated voxels, if the metadata do not define it; see `LabelOptions`.
        values: the meaning of the stored values of the prediction, see `meaning_of`.

    Raises:
        CellMapKeyError: the prediction covers no crop that annotates any of the classes.
    """
    scores = [
        _compare(output / name, crop, name, threshold, unknown, values)
        for crop, name in annotated_classes(output, crops, classes)
    ]
    if not scores:
        raise CellMapKeyError(
            f"nothing to evaluate {output} with: no crop in {crops} lies in it and annotates any of {list(classes)}"
        )
    return scores


def annotated_classes(
    output: Path, crops: Path, classes: Sequence[str], pattern: str = "*"
) -> Iterator[tuple[Path, str]]:
    """Yield the annotated crops and classes that a prediction covers; those that it does not cover are logged.

    Args:
        output: the prediction, with one group per class; a class without a group is yielded.
        crops: folder of the crops.
        classes: names of the classes.
        pattern: glob pattern of the names of crops.
    """
    outside = set()
    for crop in sorted(p for p in crops.glob(pattern) if p.is_dir()):
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


def is_group(path: Path) -> bool:
    """Return whether a folder is a Zarr group of either format."""
    return any((path / file).is_file() for file in (".zattrs", "zarr.json"))


def covers(prediction: Lattice, crop: Lattice) -> bool:
    """Return whether a prediction covers a crop, up to half a voxel of the prediction."""
    slack = np.asarray(prediction.step) / 2
    lower, upper = np.subtract(prediction.box.lower, slack), np.add(prediction.box.upper, slack)
    return bool((crop.box.lower >= lower).all() and (crop.box.upper <= upper).all())


def _compare(group: Path, crop: Path, name: str, threshold: float, unknown: Unknown, values: ValuesSetting) -> Score:
    """Count voxels block by block, with the prediction as the raw of a dataset at its voxel size."""
    image = read_multiscale(group)
    level, least = image.finest, meaning_of(image, f"{group}", values).least(threshold)
    window = {"shape": list(_PATCH), "scale": list(level.scale)}
    known = tp = fp = fn = 0
    with CellMapDataset(
        str(group), f"{crop}/[{name}]", [name], {"prediction": window}, {"labels": window},
        # Empty chunks of a prediction are not stored.
        read=ReadOptions(pad=True, max_workers=1, cache="none", missing_raw="warn"),
        labels=LabelOptions(too_coarse="upsample", unknown=unknown),
        intensity=IntensityOptions(raw_value_transforms=None),
    ) as dataset:  # fmt: skip
        # Where tiles overlap, the loader sets the labels of all but one to NaN, so that every voxel is counted once.
        for batch in CellMapDataLoader(dataset, is_train=False, rank=0, world=1):
            truth = batch["labels"]
            predicted = batch["prediction"] >= least
            annotated = ~torch.isnan(truth)
            positive = truth == 1
            known += int(annotated.sum())
            tp += int((predicted & positive).sum())
            fp += int((predicted & annotated & ~positive).sum())
            fn += int((~predicted & positive).sum())
    return Score(crop.name, name, known, tp, fp, fn)


def write_csv(scores: Sequence[Score], path: Path) -> None:
    """Write one row per crop and class; undefined scores are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["crop", "class", "annotated_voxels", "tp", "fp", "fn", *METRICS])
        for score in scores:
            values = [getattr(score, metric) for metric in METRICS]
            cells = ["" if math.isnan(v) else f"{v:.6f}" for v in values]
            writer.writerow([score.crop, score.name, score.known, score.tp, score.fp, score.fn, *cells])


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a table in text."""
    width = max(len(s.crop) for s in scores) + 2, max(5, *(len(s.name) for s in scores)) + 2
    lines = ["crop".ljust(width[0]) + "class".ljust(width[1]) + "".join(f"{m:>11}" for m in METRICS)]
    for score in scores:
        values = "".join(f"{getattr(score, m):>11.3f}" for m in METRICS)
        lines.append(score.crop.ljust(width[0]) + score.name.ljust(width[1]) + values)
    return "\n".join(lines)


def draw(scores: Sequence[Score], path: Path) -> None:
    """Draw one heat map per score, crops against classes, with the numbers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtraError('pictures need matplotlib: pip install "cellmap-lightning[train]"') from e
    crops = list(dict.fromkeys(s.crop for s in scores))
    names = list(dict.fromkeys(s.name for s in scores))
    size = (1.5 + len(METRICS) * (0.7 + 0.6 * len(names)), 1.3 + 0.35 * len(crops))
    figure = Figure(figsize=size, layout="constrained")
    for number, metric in enumerate(METRICS):
        values = np.full((len(crops), len(names)), np.nan)
        for score in scores:
            values[crops.index(score.crop), names.index(score.name)] = getattr(score, metric)
        axes = figure.add_subplot(1, len(METRICS), number + 1)
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(metric)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(crops)), crops if number == 0 else [""] * len(crops))
        for row, column in np.argwhere(~np.isnan(values)).tolist():
            value = values[row, column]
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                color="black" if value > 0.6 else "white",
            )  # fmt: skip
    figure.savefig(path, dpi=150)
