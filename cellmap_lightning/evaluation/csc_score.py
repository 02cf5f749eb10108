"""The score of the CellMap Segmentation Challenge, of label volumes in memory.

Counts of each class are summed over crops before anything is divided. The rules are those of the challenge's scorer of
June 2026, including the ones that look odd; they are listed in ``docs/challenge.md``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError, MissingExtraError

Labels = npt.NDArray[Any]

#: The distance, in diagonals of a voxel, by which the boundary score falls by 1 %.
_BASE = 1.01
#: A crop with more predicted objects per true one than ``10 + 50 exp(-n / 5)`` is left out of the class.
_RATIO, _RATIO_OF_FEW, _FEW = 10.0, 50.0, 5.0
#: A crop with more pairs of overlapping objects is left out as well.
MOST_PAIRS = 5_000_000
#: Costs of the matching are whole numbers.
_COST = 1_000_000


@dataclass(frozen=True)
class Counts:
    """Counts of one class, of one crop or of several.

    Attributes:
        tp: objects that are matched, or voxels that both volumes hold.
        fp: objects or voxels of the prediction alone.
        fn: objects or voxels of the annotation alone.
        boundary: sum of the normalized Hausdorff distances of objects, each from 0 to 1.
        distances: number of these.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0
    boundary: float = 0.0
    distances: int = 0

    def __add__(self, more: "Counts") -> "Counts":
        return Counts(
            self.tp + more.tp, self.fp + more.fp, self.fn + more.fn, self.boundary + more.boundary,
            self.distances + more.distances,
        )  # fmt: skip


@dataclass(frozen=True)
class CropCounts:
    """Counts of one class in one crop.

    Attributes:
        crop: the crop.
        name: the class.
        counts: its counts.
        status: ``scored``, ``missing`` (not submitted) or ``skipped`` (too many objects).
    """

    crop: str
    name: str
    counts: Counts
    status: str = "scored"


@dataclass(frozen=True)
class ClassScore:
    """The score of one class over all crops.

    Attributes:
        name: the class.
        instances: whether its objects are scored, rather than its voxels.
        counts: the sum over crops.
        crops: number of crops that were scored.
    """

    name: str
    instances: bool
    counts: Counts
    crops: int

    @property
    def f1(self) -> float:
        """``2 tp / (2 tp + fp + fn)`` of objects; 1 where there are none at all, NaN for voxels."""
        whole = 2 * self.counts.tp + self.counts.fp + self.counts.fn
        return math.nan if not self.instances else self._of(2 * self.counts.tp, whole)

    @property
    def boundary(self) -> float:
        """The mean of the normalized Hausdorff distances; 1 where there is no object at all, NaN for voxels."""
        return math.nan if not self.instances else self._of(self.counts.boundary, self.counts.distances)

    @property
    def score(self) -> float:
        """The geometric mean of both for objects, ``tp / (tp + fp + fn)`` for voxels."""
        if self.instances:
            return math.sqrt(self.f1 * self.boundary)
        whole = self.counts.tp + self.counts.fp + self.counts.fn
        return self.counts.tp / whole if whole else 1.0

    def _of(self, part: float, whole: int) -> float:
        nothing = not (self.counts.tp or self.counts.fp or self.counts.fn or self.counts.distances)
        return 1.0 if nothing else part / whole if whole else 0.0


@dataclass(frozen=True)
class ChallengeScore:
    """The challenge's score.

    Attributes:
        classes: the score of each class.
        crops: the counts that they consist of.
    """

    classes: tuple[ClassScore, ...]
    crops: tuple[CropCounts, ...]

    @property
    def instance(self) -> float:
        """The mean over classes of objects; 0 where there is none."""
        return _mean([c.score for c in self.classes if c.instances])

    @property
    def semantic(self) -> float:
        """The mean over the other classes; 0 where there is none."""
        return _mean([c.score for c in self.classes if not c.instances])

    @property
    def overall(self) -> float:
        """The geometric mean of both."""
        return math.sqrt(self.instance * self.semantic)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def pooled(crops: Iterable[CropCounts], instance_classes: Sequence[str]) -> ChallengeScore:
    """Return the score of counts of crops."""
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
    there, true = prediction > 0, truth > 0
    tp = int(np.count_nonzero(there & true))
    return Counts(tp, int(np.count_nonzero(there)) - tp, int(np.count_nonzero(true)) - tp)


def missing_counts(truth: Labels, instances: bool) -> Counts:
    """Return the counts of a class that is not submitted: each object, or each voxel of the crop, is missed."""
    if not instances:
        return Counts(fn=truth.size)
    objects = len(_ids(truth))
    return Counts(fn=objects, distances=objects)


def instance_counts(prediction: Labels, truth: Labels, voxel_size: Sequence[float]) -> Counts | None:
    """Return the counts of objects; None where there are too many for the challenge to score the crop.

    Args:
        prediction: ids ``[z, y, x]``, 0 for background. Parts of an object that do not touch count as objects.
        truth: ids of the annotation.
        voxel_size: nm.

    Raises:
        CellMapValueError: the volumes have different shapes, or the annotation has negative ids.
        MissingExtraError: connected-components-3d or scipy is not installed.
    """
    _check_shapes(prediction, truth)
    if truth.size and truth.min() < 0:
        raise CellMapValueError(f"the ids of an annotation must be at least 0, got {int(truth.min())}")
    found, count = _components(prediction)
    ids = _ids(truth)
    true = _renumbered(truth, ids)
    highest = int(ids[-1]) if len(ids) else 0
    if count and highest and count / highest > _RATIO + _RATIO_OF_FEW * math.exp(-highest / _FEW):
        return None
    pairs = _overlaps(true, found, len(ids), count)
    if len(pairs[0]) > MOST_PAIRS:
        return None
    matches = _matches(*pairs)
    distances = _hausdorff(true, found, ids, matches, voxel_size)
    tp = len(matches)
    longest = np.float32(_longest(voxel_size, truth.shape))
    distances = np.concatenate([distances, np.full(count - tp, longest, np.float32)])
    normalized = _BASE ** (-distances.astype(np.float64) / np.linalg.norm(voxel_size))
    return Counts(tp, count - tp, len(ids) - tp, float(normalized.sum()), len(distances))


def _check_shapes(prediction: Labels, truth: Labels) -> None:
    if prediction.shape != truth.shape:
        raise CellMapValueError(
            f"a prediction of {list(prediction.shape)} voxels cannot be scored with an annotation of "
            f"{list(truth.shape)}; both must have the same shape"
        )


def _components(prediction: Labels) -> tuple[Labels, int]:
    """Number objects: voxels with the same id that share a face, an edge or a corner."""
    try:
        import cc3d
    except ImportError as e:
        raise MissingExtraError(
            'metric=csc needs connected-components-3d: pip install "cellmap-lightning[challenge]"'
        ) from e
    found, count = cc3d.connected_components(np.ascontiguousarray(prediction), return_N=True)
    return found, int(count)


def _ids(labels: Labels) -> npt.NDArray[np.int64]:
    """Return the ids above 0, in order."""
    small = labels.size and labels.min() >= 0 and labels.max() < 1 << 24
    found = np.flatnonzero(np.bincount(labels.ravel().astype(np.int64))) if small else np.unique(labels)
    ids: npt.NDArray[np.int64] = found[found != 0].astype(np.int64)
    return ids


def _renumbered(labels: Labels, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return labels with the place of each id, from 1 on."""
    if len(ids) and ids[-1] < 1 << 24:
        table = np.zeros(int(ids[-1]) + 1, np.int32)
        table[ids] = np.arange(1, len(ids) + 1)
        return table[labels]
    places = np.where(labels != 0, np.searchsorted(ids, labels) + 1, 0)
    return places.astype(np.int32)


def _overlaps(
    true: Labels, found: Labels, trues: int, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the pairs of objects that overlap, counted from 0, and their intersection over union."""
    both = (true > 0) & (found > 0)
    keys = (true[both].astype(np.int64) - 1) * count + (found[both].astype(np.int64) - 1)
    pairs, shared = np.unique(keys, return_counts=True)
    rows, columns = np.divmod(pairs, max(1, count))
    sizes = np.bincount(true.ravel(), minlength=trues + 1)[1:], np.bincount(found.ravel(), minlength=count + 1)[1:]
    overlap = shared / (sizes[0][rows] + sizes[1][columns] - shared)
    return rows, columns, overlap.astype(np.float32)


def _matches(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], overlap: npt.NDArray[np.float32]
) -> dict[int, int]:
    """Return the matching of least cost, ``{predicted: true}``; an object that is not matched costs more than any pair.

    Each true object has a column of its own that stands for no match, so that a full matching of rows exists.
    """
    if not len(rows):
        return {}
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    trues, row = np.unique(rows, return_inverse=True)
    founds, column = np.unique(columns, return_inverse=True)
    # One more than the cost, since zeros would be no entries; every row has one entry, so that nothing changes.
    cost = ((1.0 - overlap.astype(np.float64)) * _COST).astype(np.int64) + 1
    none = np.arange(len(trues))
    weights = np.concatenate([cost, np.full(len(trues), _COST + 2)]).astype(np.float64)
    places = np.concatenate([row, none]), np.concatenate([column, len(founds) + none])
    table = csr_array((weights, places), shape=(len(trues), len(founds) + len(trues)))
    chosen_rows, chosen = min_weight_full_bipartite_matching(table)
    real = chosen < len(founds)
    pairs = zip(founds[chosen[real]].tolist(), trues[chosen_rows[real]].tolist(), strict=True)
    return dict(pairs)


def _longest(voxel_size: Sequence[float], shape: Sequence[int]) -> float:
    """Return half the shortest edge of a crop, nm: the distance of an object that is not matched."""
    return float(min(s * n / 2 for s, n in zip(voxel_size, shape, strict=True)))


def _hausdorff(
    true: Labels,
    found: Labels,
    ids: npt.NDArray[np.int64],
    matches: Mapping[int, int],
    voxel_size: Sequence[float],
) -> npt.NDArray[np.float32]:
    """Return the Hausdorff distance of each true object, nm."""
    from scipy.ndimage import distance_transform_edt, find_objects

    longest = _longest(voxel_size, true.shape)
    members: dict[int, list[int]] = {number: [] for number in range(len(ids))}
    for predicted, number in matches.items():
        members[number].append(predicted + 1)
    boxes = find_objects(found)
    for number, value in enumerate(ids.tolist()):
        # The scorer leaves its numbers to objects without a match, and so one may share that of a true object.
        if value <= len(boxes) and value - 1 not in matches:
            members[number].append(value)
    distances = np.full(len(ids), longest, np.float32)
    for number, box in enumerate(find_objects(true)):
        if not members[number]:
            continue
        parts = [box, *(boxes[predicted - 1] for predicted in members[number])]
        window = tuple(
            slice(min(p.start for p in axis), max(p.stop for p in axis)) for axis in zip(*parts, strict=True)
        )
        a, b = true[window] == number + 1, np.isin(found[window], members[number])
        far = max(
            distance_transform_edt(~b, sampling=voxel_size)[a].max(),
            distance_transform_edt(~a, sampling=voxel_size)[b].max(),
        )
        distances[number] = min(far, longest)
    return distances
