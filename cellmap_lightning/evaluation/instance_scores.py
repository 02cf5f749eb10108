"""Scores of predicted objects from the overlaps of their ids with those of the annotation.

Only annotated voxels count: an object that lies partly in unannotated voxels is compared with its annotated part alone,
and one that lies there as a whole is neither right nor wrong. Overlaps are collected block by block, so that memory is
that of the pairs of objects that touch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError, MissingExtraError, missing_extra
from cellmap_lightning.evaluation.numbering import Labels, Numbering, components
from cellmap_lightning.evaluation.pairs import CropPair, Ids
from cellmap_lightning.evaluation.voxel_scores import ratio

Floats = npt.NDArray[np.float64]

#: IoU from which a predicted and an annotated object match.
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


@dataclass(frozen=True)
class InstanceScore:
    """Scores of the objects of one class in one crop; see docs/evaluation.md.

    Attributes:
        objects: annotated objects.
        predicted: predicted objects.
        matched: pairs with an IoU of 0.5 or more.
        f1_50: ``2 TP / (2 TP + FP + FN)`` at that IoU.
        f1: mean of the same over `THRESHOLDS`.
        ap_50: ``TP / (TP + FP + FN)`` at an IoU of 0.5, the average precision of StarDist and Cellpose.
        ap: mean of the same over `THRESHOLDS`.
        panoptic_quality: sum of the IoU of the matched pairs over ``TP + FP / 2 + FN / 2`` (Kirillov et al. 2019).
        voi_split: conditional entropy of the prediction given the annotation, bits, over the voxels of annotated
            objects: objects that are split (Meila 2007, as in CREMI).
        voi_merge: conditional entropy of the annotation given the prediction, bits: objects that are merged.
        adapted_rand: adapted Rand error over the voxels of annotated objects, 0 for a perfect prediction
            (Arganda-Carreras et al. 2015).
    """

    objects: int
    predicted: int
    matched: int
    f1_50: float
    f1: float
    ap_50: float
    ap: float
    panoptic_quality: float
    voi_split: float
    voi_merge: float
    adapted_rand: float


INSTANCE_METRICS = tuple(field.name for field in fields(InstanceScore))


class Overlaps:
    """The voxels that each annotated object shares with each predicted one.

    Example:
        >>> overlaps = Overlaps()
        >>> overlaps.add(np.array([1, 1, 2, 0, -1]), np.array([5, 5, 6, 6, 7]))
        >>> instance_score(overlaps).matched
        2
    """

    def __init__(self) -> None:
        self._pairs = np.zeros((0, 3), np.int64)  # annotated id, predicted id, voxels
        self._new: list[Ids] = []

    def add(self, truth: Ids, predicted: Ids) -> None:
        """Add voxels.

        Args:
            truth: ids of the annotation; 0 is background, negative ids are unannotated.
            predicted: ids of the prediction of the same shape; 0 is background.
        """
        known = truth >= 0
        pairs, counts = np.unique(np.stack([truth[known], predicted[known]]), axis=1, return_counts=True)
        self._new.append(np.column_stack([pairs.T, counts]))
        if sum(map(len, self._new)) > len(self._pairs) + 100_000:
            self._merge()

    def _merge(self) -> None:
        rows = np.concatenate([self._pairs, *self._new])
        pairs, inverse = np.unique(rows[:, :2], axis=0, return_inverse=True)
        counts = np.zeros(len(pairs), np.int64)
        np.add.at(counts, inverse.ravel(), rows[:, 2])
        self._pairs, self._new = np.column_stack([pairs, counts]), []

    @property
    def pairs(self) -> Ids:
        """``[n, 3]``: annotated id, predicted id, voxels; 0 is background."""
        if self._new:
            self._merge()
        return self._pairs


def instance_score(overlaps: Overlaps) -> InstanceScore:
    """Compute the scores of predicted objects from their overlaps with annotated ones."""
    pairs = overlaps.pairs
    truth_ids, truth_index = np.unique(pairs[:, 0], return_inverse=True)
    predicted_ids, predicted_index = np.unique(pairs[:, 1], return_inverse=True)
    counts = pairs[:, 2].astype(np.float64)
    truth_sizes = np.bincount(truth_index, counts, len(truth_ids))
    predicted_sizes = np.bincount(predicted_index, counts, len(predicted_ids))
    objects, predicted = int((truth_ids > 0).sum()), int((predicted_ids > 0).sum())
    iou = counts / (truth_sizes[truth_index] + predicted_sizes[predicted_index] - counts)
    both = (pairs[:, 0] > 0) & (pairs[:, 1] > 0) & (iou >= THRESHOLDS[0])
    matched = _one_to_one(pairs[both], iou[both])
    true_positives = [int((matched >= t).sum()) for t in THRESHOLDS]
    f1 = [ratio(2 * tp, objects + predicted) for tp in true_positives]
    ap = [ratio(tp, objects + predicted - tp) for tp in true_positives]
    inside = pairs[:, 0] > 0
    split, merge, rand = _partition_errors(truth_index[inside], predicted_index[inside], counts[inside])
    return InstanceScore(
        objects, predicted, true_positives[0], f1[0], float(np.mean(f1)), ap[0], float(np.mean(ap)),
        ratio(float(matched.sum()), (objects + predicted) / 2), split, merge, rand,
    )  # fmt: skip


def matches(overlaps: Overlaps) -> tuple[int, int, int]:
    """Return the matched pairs at an IoU of 0.5, the annotated objects and the predicted ones."""
    score = instance_score(overlaps)
    return score.matched, score.objects, score.predicted


def _one_to_one(pairs: Ids, iou: Floats) -> Floats:
    """Return the IoU of the matched pairs.

    With an IoU above 0.5 each object is in one pair at most. At exactly 0.5 an object that is cut in halves is in two,
    and the first counts.
    """
    matched, used = [], (set[int](), set[int]())
    for index in np.argsort(-iou, kind="stable"):
        a, b = int(pairs[index, 0]), int(pairs[index, 1])
        if a not in used[0] and b not in used[1]:
            used[0].add(a)
            used[1].add(b)
            matched.append(float(iou[index]))
    return np.array(matched)


def _partition_errors(
    truth: npt.NDArray[np.intp], predicted: npt.NDArray[np.intp], counts: Floats
) -> tuple[float, float, float]:
    """Return the two parts of the variation of information in bits, and the adapted Rand error.

    Args:
        truth: index of the annotated object of each pair; background is left out.
        predicted: index of the predicted object, background included as one object.
        counts: voxels of each pair.
    """
    total = counts.sum()
    if not total:
        return math.nan, math.nan, math.nan
    p = counts / total
    p_truth, p_predicted = np.bincount(truth, p), np.bincount(predicted, p)
    split = float(-(p * np.log2(p / p_truth[truth])).sum())
    merge = float(-(p * np.log2(p / p_predicted[predicted])).sum())
    # Pairs of voxels that are together in both, in the prediction, and in the annotation.
    together, in_predicted, in_truth = (
        float((n * (n - 1)).sum()) for n in (counts, _sums(predicted, counts), _sums(truth, counts))
    )
    return abs(split), abs(merge), 1 - ratio(2 * together, in_predicted + in_truth)


def _sums(index: npt.NDArray[np.intp], counts: Floats) -> Floats:
    return np.bincount(index, counts).astype(np.float64)


def _components(present: Labels) -> Labels:
    """Number connected components, see `components`.

    Raises:
        MissingExtraError: scipy is not installed; the message names the metric that does without it.
    """
    try:
        return components(present)
    except MissingExtraError as e:
        what = "scores of objects need scipy for a prediction without ids"
        raise missing_extra("targets", what, "set metric=voxels") from e


def crop_overlaps(pair: CropPair, number: Numbering = _components) -> Overlaps:
    """Collect the overlaps of a crop.

    Args:
        pair: the crop.
        number: function that numbers the objects of a prediction without ids, see `components`.

    Raises:
        CellMapValueError: the annotation has no instances.
    """
    overlaps = Overlaps()
    for block in pair.numbered(number):
        assert block.ids is not None
        overlaps.add(block.truth, block.ids)
    if not pair.declares_instances and not has_instances(overlaps.pairs[:, 0]):
        raise NoInstancesError(
            f"{pair.label}: the annotation marks the class and not its instances: every voxel of it has the same id; "
            "score voxels, or give an annotation with an id for each object; cellmap-segment method=components numbers "
            "the objects of a mask"
        )
    return overlaps


class NoInstancesError(CellMapValueError):
    """An annotation without instances."""


def has_instances(ids: Iterable[int]) -> bool:
    """Return whether some ids are those of more than one object."""
    return len({int(i) for i in ids if i > 0}) > 1
