"""How good a prediction that was written is, over the voxels that somebody annotated."""

import csv
import logging
import math
from collections.abc import Sequence
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
#: Voxels of the patches that are compared at a time.
_PATCH = (64, 64, 64)


@dataclass(frozen=True)
class Score:
    """One class in one crop, in voxels of the prediction.

    Attributes:
        crop: name of the crop.
        name: name of the class.
        known: voxels that are annotated.
        tp: those where both say that the class is there.
        fp: those where only the prediction does.
        fn: those where only the annotation does.
    """

    crop: str
    name: str
    known: int
    tp: int
    fp: int
    fn: int

    @property
    def dice(self) -> float:
        """2 tp / (2 tp + fp + fn); NaN where the class is nowhere, as for those that follow."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Intersection over union, tp / (tp + fp + fn)."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Part of what was predicted that is there, tp / (tp + fp)."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Part of what is there that was predicted, tp / (tp + fn)."""
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
    """Compare a prediction with every crop that it holds whole.

    Annotations are read at the voxels of the prediction, as targets of a training at that scale would be; voxels that
    are unknown, or lie outside the crop, do not count.

    Args:
        output: the prediction, with one group per class.
        crops: folder of the crops, ``recon-1/labels/groundtruth``.
        classes: names of the classes.
        threshold: probability from which a voxel is of the class.
        unknown: the code of unknown voxels where the metadata of annotations leave it open; see `CellMapDataset`.
        values: what the stored values of the prediction mean, see `meaning_of`.

    Raises:
        CellMapKeyError: the prediction holds no crop that annotates any of the classes.
    """
    scores, outside = [], set()
    for crop in sorted(p for p in crops.glob("*") if p.is_dir()):
        for name in classes:
            if not any((crop / name / file).is_file() for file in (".zattrs", "zarr.json")):
                continue
            if not holds(read_multiscale(output / name).finest.lattice, read_multiscale(crop / name).finest.lattice):
                outside.add(crop.name)
                continue
            scores.append(_compare(output / name, crop, name, threshold, unknown, values))
    if outside:
        log.info("not evaluated, since the prediction does not hold them whole: %s", ", ".join(sorted(outside)))
    if not scores:
        raise CellMapKeyError(
            f"nothing to evaluate {output} with: no crop in {crops} lies in it and annotates any of {list(classes)}"
        )
    return scores


def holds(found: Lattice, labels: Lattice) -> bool:
    """Whether a crop lies in a prediction, but for half a voxel of that."""
    slack = np.asarray(found.step) / 2
    lower, upper = np.subtract(found.box.lower, slack), np.add(found.box.upper, slack)
    return bool((labels.box.lower >= lower).all() and (labels.box.upper <= upper).all())


def _compare(group: Path, crop: Path, name: str, threshold: float, unknown: Unknown, values: ValuesSetting) -> Score:
    image = read_multiscale(group)
    level, least = image.finest, meaning_of(image, f"{group}", values).least(threshold)
    window = {"shape": list(_PATCH), "scale": list(level.scale)}
    known = tp = fp = fn = 0
    with CellMapDataset(
        str(group), f"{crop}/[{name}]", [name], {"found": window}, {"labels": window},
        # Where nothing was predicted, no chunk is stored.
        read=ReadOptions(pad=True, max_workers=1, cache="none", missing_raw="warn"),
        labels=LabelOptions(too_coarse="upsample", unknown=unknown),
        intensity=IntensityOptions(raw_value_transforms=None),
    ) as dataset:  # fmt: skip
        for batch in CellMapDataLoader(dataset, is_train=False, rank=0, world=1):
            truth = batch["labels"]
            there = batch["found"] >= least
            annotated = ~torch.isnan(truth)
            positive = truth == 1
            known += int(annotated.sum())
            tp += int((there & positive).sum())
            fp += int((there & annotated & ~positive).sum())
            fn += int((~there & positive).sum())
    return Score(crop.name, name, known, tp, fp, fn)


def write_csv(scores: Sequence[Score], path: Path) -> None:
    """One row per crop and class; what is not defined is left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["crop", "class", "annotated_voxels", "tp", "fp", "fn", *METRICS])
        for score in scores:
            values = [getattr(score, metric) for metric in METRICS]
            shown = ["" if math.isnan(v) else f"{v:.6f}" for v in values]
            writer.writerow([score.crop, score.name, score.known, score.tp, score.fp, score.fn, *shown])


def table(scores: Sequence[Score]) -> str:
    """The same for people."""
    width = max(len(s.crop) for s in scores) + 2, max(5, *(len(s.name) for s in scores)) + 2
    lines = ["crop".ljust(width[0]) + "class".ljust(width[1]) + "".join(f"{m:>11}" for m in METRICS)]
    for score in scores:
        values = "".join(f"{getattr(score, m):>11.3f}" for m in METRICS)
        lines.append(score.crop.ljust(width[0]) + score.name.ljust(width[1]) + values)
    return "\n".join(lines)


def draw(scores: Sequence[Score], path: Path) -> None:
    """One panel per score, crops against classes, with the numbers.

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
