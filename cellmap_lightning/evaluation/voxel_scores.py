"""Voxel scores of a class: Dice, IoU, precision and recall."""

import math
from dataclasses import dataclass

from cellmap_lightning.evaluation.pairs import CropPair

METRICS = ("dice", "iou", "precision", "recall")


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
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """Intersection over union, tp / (tp + fp + fn)."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Fraction of the predicted voxels that are positive, tp / (tp + fp)."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Fraction of the positive voxels that are predicted, tp / (tp + fn)."""
        return ratio(self.tp, self.tp + self.fn)


def ratio(part: float, whole: float) -> float:
    """Return a fraction; NaN of nothing."""
    return part / whole if whole else math.nan


def voxel_score(pair: CropPair) -> Score:
    """Count the voxels of a crop, block by block; unannotated ones are ignored."""
    known = tp = fp = fn = 0
    for block in pair.blocks():
        annotated, positive = block.truth >= 0, block.truth > 0
        known += int(annotated.sum())
        tp += int((block.predicted & positive).sum())
        fp += int((block.predicted & annotated & ~positive).sum())
        fn += int((~block.predicted & positive).sum())
    return Score(pair.crop.name, pair.name, known, tp, fp, fn)
