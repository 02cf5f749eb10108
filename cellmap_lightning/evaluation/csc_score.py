"""Score of the CellMap Segmentation Challenge for label volumes in memory.

Counts of each class are summed over crops before they are divided. The rules are those of the challenge's scorer of
June 2026, including unexpected ones; ``docs/challenge.md`` lists them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError, missing_extra

Labels = npt.NDArray[Any]

#: Base of the boundary score: it falls by 1 % per distance of one voxel diagonal.
_BASE = 1.01
#: A crop with more predicted objects per true one than ``10 + 50 exp(-n / 5)`` is skipped for the class.
_RATIO, _RATIO_OF_FEW, _FEW = 10.0, 50.0, 5.0
#: A crop with more pairs of overlapping objects is skipped as well.
MOST_PAIRS = 5_000_000
#: Costs of the matching are integers: this times 1 - IoU.
_COST = 1_000_000


@dataclass(frozen=True)
class Counts:
    """Counts of one class, of one crop or of several.

    Attributes:
        tp: true positives: matched objects, or voxels in both volumes.
        fp: false positives: objects or voxels of the prediction alone.
        fn: false negatives: objects or voxels of the annotation alone.
        boundary: sum of the normalized Hausdorff distances of objects, each from 0 to 1.
        distances: number of these distances.

    Example:
        >>> semantic_counts(prediction, truth) + semantic_counts(other_prediction, other_truth)
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    boundary: float = 0.0
    distances: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.boundary + other.boundary,
            self.distances + other.distances,
        )  # fmt: skip


@dataclass(frozen=True)
class CropCounts:
    """Counts of one class in one crop; see ``docs/challenge.md`` for the rules.

    Attributes:
        crop: the crop.
        name: the class.
        counts: its counts.
        status: ``scored``, ``missing`` (not submitted) or ``skipped`` (too many objects).
        trained: True if the crop, or a part of it, was trained on; None if unknown.
        folder: folder of the crop; None if unknown.
    """

    crop: str
    name: str
    counts: Counts
    status: str = "scored"
    trained: bool | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class ClassScore:
    """The score of one class over all crops; see ``docs/challenge.md`` for the rules.

    Attributes:
        name: the class.
        instances: True if objects are scored, False if voxels are.
        counts: the sum over crops.
        crops: number of scored crops.
    """

    name: str
    instances: bool
    counts: Counts
    crops: int

    @property
    def f1(self) -> float:
        """``2 tp / (2 tp + fp + fn)`` of objects; 1 where there is no object, NaN for voxels."""
        whole = 2 * self.counts.tp + self.counts.fp + self.counts.fn
        return math.nan if not self.instances else self._ratio(2 * self.counts.tp, whole)

    @property
    def boundary(self) -> float:
        """The mean of the normalized Hausdorff distances; 1 where there is no object, NaN for voxels."""
        return math.nan if not self.instances else self._ratio(self.counts.boundary, self.counts.distances)

    @property
    def score(self) -> float:
        """The geometric mean of `f1` and `boundary` for objects, ``tp / (tp + fp + fn)`` for voxels."""
        if self.instances:
            return math.sqrt(self.f1 * self.boundary)
        whole = self.counts.tp + self.counts.fp + self.counts.fn
        return self.counts.tp / whole if whole else 1.0

    def _ratio(self, part: float, whole: int) -> float:
        empty = not (self.counts.tp or self.counts.fp or self.counts.fn or self.counts.distances)
        return 1.0 if empty else part / whole if whole else 0.0


@dataclass(frozen=True)
class ChallengeScore:
    """The challenge's score.

    Attributes:
        classes: the score of each class.
        crops: the counts of each class in each crop.

    Example:
        >>> score = pooled([CropCounts("crop1", "mito", instance_counts(labels, truth, [8, 8, 8]))], ["mito"])
        >>> score.overall
    """

    classes: tuple[ClassScore, ...]
    crops: tuple[CropCounts, ...]

    @property
    def instance(self) -> float:
        """The mean over classes whose objects are scored; 0 without such a class."""
        return _mean([c.score for c in self.classes if c.instances])

    @property
    def semantic(self) -> float:
        """The mean over the other classes; 0 without such a class."""
        return _mean([c.score for c in self.classes if not c.instances])

    @property
    def overall(self) -> float:
        """The geometric mean of `instance` and `semantic`."""
        return math.sqrt(self.instance * self.semantic)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def pooled(crops: Iterable[CropCounts], instance_classes: Sequence[str]) -> ChallengeScore:
    """Return the score from counts of crops."""
    rows = tuple(crops)
    sums: dict[str, tuple[Counts, int]] = {}
    for row in rows:
        counts, number = sums.get(row.name, (Counts(), 0))
        sums[row.name] = counts + row.counts, number + (row.status == "scored")
    classes = tuple(ClassScore(name, name in instance_classes, *sums[name]) for name in sums)
    return ChallengeScore(classes, rows)


def semantic_counts(prediction: Labels, truth: Labels) -> Counts:
    """Return the counts of voxels above 0.

    Raises:
        CellMapValueError: the volumes have different shapes.
    """
    _check_shapes(prediction, truth)
    predicted, true = prediction > 0, truth > 0
    tp = int(np.count_nonzero(predicted & true))
    return Counts(tp, int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp)


def missing_counts(truth: Labels, instances: bool) -> Counts:
    """Return the counts of a class that is not submitted: each object, or each voxel of the crop, is missed."""
    if not instances:
        return Counts(fn=truth.size)
    objects = len(_ids(truth))
    return Counts(fn=objects, distances=objects)


def instance_counts(prediction: Labels, truth: Labels, voxel_size: Sequence[float]) -> Counts | None:
    """Return the counts of objects; None where there are too many for the challenge to score the crop.

    Args:
        prediction: ids ``[z, y, x]``, 0 for background. Disconnected parts of an id count as objects.
        truth: ids of the annotation.
        voxel_size: nm.

    Raises:
        CellMapValueError: the volumes have different shapes, or the annotation has negative ids.
        MissingExtraError: connected-components-3d or scipy is not installed.
    """
    _check_shapes(prediction, truth)
    if truth.size and truth.min() < 0:
        raise CellMapValueError(f"ids of an annotation must be at least 0, got {int(truth.min())}")
    predicted, count = _components(prediction)
    ids = _ids(truth)
    true = _renumbered(truth, ids)
    highest = int(ids[-1]) if len(ids) else 0
    if count and highest and count / highest > _RATIO + _RATIO_OF_FEW * math.exp(-highest / _FEW):
        return None
    pairs = _overlaps(true, predicted, len(ids), count)
    if len(pairs[0]) > MOST_PAIRS:
        return None
    matches = _matches(*pairs)
    distances = _hausdorff(true, predicted, ids, matches, voxel_size)
    tp = len(matches)
    longest = np.float32(_longest(voxel_size, truth.shape))
    distances = np.concatenate([distances, np.full(count - tp, longest, np.float32)])
    normalized = _BASE ** (-distances.astype(np.float64) / np.linalg.norm(voxel_size))
    return Counts(tp, count - tp, len(ids) - tp, float(normalized.sum()), len(distances))


def _check_shapes(prediction: Labels, truth: Labels) -> None:
    if prediction.shape != truth.shape:
        raise CellMapValueError(
            f"prediction and annotation must have the same shape, got {list(prediction.shape)} and {list(truth.shape)} "
            "voxels"
        )


def _components(prediction: Labels) -> tuple[Labels, int]:
    """Number connected components of voxels with the same id, with 26-connectivity."""
    try:
        import cc3d
    except ImportError as e:
        raise missing_extra("challenge", "metric=csc needs connected-components-3d") from e
    components, count = cc3d.connected_components(np.ascontiguousarray(prediction), return_N=True)
    return components, int(count)


def _ids(labels: Labels) -> npt.NDArray[np.int64]:
    """Return the sorted ids above 0; small ids are counted instead of sorted, which is faster."""
    small = labels.size and labels.min() >= 0 and labels.max() < 1 << 24
    values = np.flatnonzero(np.bincount(labels.ravel().astype(np.int64))) if small else np.unique(labels)
    ids: npt.NDArray[np.int64] = values[values != 0].astype(np.int64)
    return ids


def _renumbered(labels: Labels, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return labels with the index of each id, from 1 on, in place of the id."""
    if len(ids) and ids[-1] < 1 << 24:
        table = np.zeros(int(ids[-1]) + 1, np.int32)
        table[ids] = np.arange(1, len(ids) + 1)
        return table[labels]
    return np.where(labels != 0, np.searchsorted(ids, labels) + 1, 0).astype(np.int32)


def _overlaps(
    true: Labels, predicted: Labels, true_count: int, predicted_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the pairs of objects that overlap, counted from 0, and their intersection over union."""
    both = (true > 0) & (predicted > 0)
    # One integer per pair, so that one sort counts the shared voxels of all pairs.
    keys = (true[both].astype(np.int64) - 1) * predicted_count + (predicted[both].astype(np.int64) - 1)
    pairs, shared = np.unique(keys, return_counts=True)
    rows, columns = np.divmod(pairs, max(1, predicted_count))
    true_sizes = np.bincount(true.ravel(), minlength=true_count + 1)[1:]
    predicted_sizes = np.bincount(predicted.ravel(), minlength=predicted_count + 1)[1:]
    overlap = shared / (true_sizes[rows] + predicted_sizes[columns] - shared)
    return rows, columns, overlap.astype(np.float32)


def _matches(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], overlap: npt.NDArray[np.float32]
) -> dict[int, int]:
    """Return the matching of least cost, ``{predicted: true}``; an unmatched object costs more than any pair.

    Each true object has an additional column for "no match", so that a full matching of rows exists.
    """
    if not len(rows):
        return {}
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    trues, row = np.unique(rows, return_inverse=True)
    candidates, column = np.unique(columns, return_inverse=True)
    # A sparse matrix has no explicit zeros: 1 is added to all costs, and since every row is matched once, the optimum
    # is the same.
    cost = ((1.0 - overlap.astype(np.float64)) * _COST).astype(np.int64) + 1
    unmatched = np.arange(len(trues))
    weights = np.concatenate([cost, np.full(len(trues), _COST + 2)]).astype(np.float64)
    entries = np.concatenate([row, unmatched]), np.concatenate([column, len(candidates) + unmatched])
    costs = csr_array((weights, entries), shape=(len(trues), len(candidates) + len(trues)))
    matched_rows, matched_columns = min_weight_full_bipartite_matching(costs)
    real = matched_columns < len(candidates)
    return dict(zip(candidates[matched_columns[real]].tolist(), trues[matched_rows[real]].tolist(), strict=True))


def _longest(voxel_size: Sequence[float], shape: Sequence[int]) -> float:
    """Return half the shortest edge of a crop, nm: the distance of an unmatched object."""
    return float(min(s * n / 2 for s, n in zip(voxel_size, shape, strict=True)))


def _hausdorff(
    true: Labels,
    predicted: Labels,
    ids: npt.NDArray[np.int64],
    matches: Mapping[int, int],
    voxel_size: Sequence[float],
) -> npt.NDArray[np.float32]:
    """Return the Hausdorff distance of each true object, nm."""
    from scipy.ndimage import distance_transform_edt, find_objects

    longest = _longest(voxel_size, true.shape)
    boxes = find_objects(predicted)
    members = _members(ids, matches, len(boxes))
    distances = np.full(len(ids), longest, np.float32)
    for index, box in enumerate(find_objects(true)):
        if not members[index]:
            continue
        # Distances are computed in the bounding box of both, which contains the nearest voxel of each.
        parts = [box, *(boxes[number - 1] for number in members[index])]
        window = tuple(
            slice(min(p.start for p in axis), max(p.stop for p in axis)) for axis in zip(*parts, strict=True)
        )
        a, b = true[window] == index + 1, np.isin(predicted[window], members[index])
        farthest = max(
            distance_transform_edt(~b, sampling=voxel_size)[a].max(),
            distance_transform_edt(~a, sampling=voxel_size)[b].max(),
        )
        distances[index] = min(farthest, longest)
    return distances


def _members(ids: npt.NDArray[np.int64], matches: Mapping[int, int], count: int) -> list[list[int]]:
    """Return the numbers, from 1 on, of the predicted objects that the scorer compares with each true object.

    The scorer renumbers matched objects to the id of their true object, and unmatched ones keep their number. So an
    unmatched object whose number happens to be a true id is compared with that object as well.
    """
    members: list[list[int]] = [[] for _ in ids]
    for predicted, index in matches.items():
        members[index].append(predicted + 1)
    for index, value in enumerate(ids.tolist()):
        if value <= count and value - 1 not in matches:
            members[index].append(value)
    return members
