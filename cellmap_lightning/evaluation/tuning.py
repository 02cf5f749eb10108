"""Parameters of a segmentation that score best on annotated crops.

The search is a coordinate descent over short lists: each parameter in turn takes the value of its list with the best
score while the others stay, until a round changes nothing. It ends after at most `MAX_ROUNDS` rounds, and computes no
combination twice. Crops are segmented in memory, one after the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cellmap_lightning.crops.encodings import Unknown
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.csc_score import (
    ClassScore,
    Counts,
    instance_counts,
    missing_counts,
    semantic_counts,
)
from cellmap_lightning.evaluation.instance_scores import Overlaps, has_instances, matches
from cellmap_lightning.evaluation.numbering import remove_small
from cellmap_lightning.evaluation.pairs import Annotation, Ids, voxels_inside
from cellmap_lightning.geometry.lattice import Vector
from cellmap_lightning.instances.options import InputKind, Method, SegmentationOptions
from cellmap_lightning.instances.segmenter import BlockSegmenter
from cellmap_lightning.instances.source import Floats, SegmentationSource

MAX_ROUNDS = 4
METRICS = ("dice", "f1", "csc")
#: Probabilities and affinities that are tried, and distances in longest sides of a voxel.
_PROBABILITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_DISTANCES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
#: Distances of seeds that are tried, in longest sides of a voxel.
_SEEDS = (2.0, 4.0, 8.0, 16.0, 32.0)
#: Minimum volumes that are tried, in voxels.
_VOLUMES = (0, 10, 30, 100, 300, 1000, 3000)


@dataclass(frozen=True, eq=False)
class TuningCrop:
    """The values of a prediction in an annotated crop, and its annotation on the same voxels.

    Attributes:
        name: name of the crop.
        values: as from `SegmentationSource.read`.
        truth: ids of the annotation ``[z, y, x]``, -1 where it is unannotated.
    """

    name: str
    values: Floats
    truth: Ids


@dataclass(frozen=True)
class TuningResult:
    """The parameters with the best score, and their scores.

    Attributes:
        options: the parameters.
        score: their score on the crops of the search.
        default: the score of the default parameters on these crops.
        held_out: their score on the other crops; NaN without any.
        held_out_default: the score of the default parameters on the other crops.
        combinations: number of combinations that were computed.
    """

    options: SegmentationOptions
    score: float
    default: float
    held_out: float
    held_out_default: float
    combinations: int


def candidates(kind: InputKind, method: Method, voxel_size: Vector, instances: bool) -> dict[str, list[float]]:
    """Return the values of each parameter that are tried.

    Args:
        kind: the kind of the prediction.
        method: the method.
        voxel_size: nm.
        instances: whether objects are scored, or voxels alone.
    """
    longest, voxel = max(voxel_size), math.prod(voxel_size)
    thresholds = [d * longest for d in _DISTANCES] if kind == "distance" else list(_PROBABILITIES)
    lists = {"threshold": thresholds}
    if kind == "mask":
        lists = {}
    if method in ("watershed", "agglomeration"):
        lists["seed_distance"] = [n * longest for n in _SEEDS]
    if method == "agglomeration":
        lists["merge_threshold"] = list(_PROBABILITIES)
    if not instances:
        lists = {name: values for name, values in lists.items() if name == "threshold"}
    lists["min_volume"] = [n * voxel for n in _VOLUMES]
    return lists


def _silent(text: str) -> None:
    """Do nothing with a text."""


def _with(options: SegmentationOptions, name: str, value: Any) -> SegmentationOptions:
    return replace(options, **{name: value})


class Tuner:
    """The search for the parameters of one class; see docs/evaluation.md.

    Args:
        source: the prediction.
        crops: the crops of the search.
        held_out: other crops, to report the score on.
        metric: ``dice`` of voxels, ``f1`` of objects at an IoU of 0.5, or ``csc``, the challenge's score of the class;
            each of the sum of the counts over crops.
        options: the parameters at which the search begins; its method is not changed.
        instances: for ``csc``: whether objects are scored; True for the others but ``dice``.

    Raises:
        CellMapKeyError: an unknown metric.
        CellMapValueError: objects are to be scored, and no crop of the search has instances.

    Example:
        >>> Tuner(source, crops[:2], crops[2:], "f1").run().options.threshold  # doctest: +SKIP
    """

    def __init__(
        self,
        source: SegmentationSource,
        crops: Sequence[TuningCrop],
        held_out: Sequence[TuningCrop],
        metric: str,
        options: SegmentationOptions | None = None,
        instances: bool = True,
    ) -> None:
        if metric not in METRICS:
            raise CellMapKeyError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.source, self.crops, self.held_out, self.metric = source, crops, held_out, metric
        self.instances = metric == "f1" or (metric == "csc" and instances)
        start = options or SegmentationOptions()
        method = start.method_for(source.kind, f"{source.path}")
        threshold = start.threshold
        if threshold is None:
            threshold = 0.0 if source.kind == "distance" else 0.5
        self.start = replace(start, method=method, threshold=threshold)
        if self.instances and not any(has_instances(np.unique(crop.truth)) for crop in crops):
            raise CellMapValueError(
                f"{source.name}: no annotation of {', '.join(crop.name for crop in crops)} has instances, which "
                f"metric={metric} needs; use metric=dice, or number the objects of the masks with cellmap-segment "
                "method=components and give them as truth"
            )
        self._scores: dict[SegmentationOptions, float] = {}

    @property
    def lists(self) -> dict[str, list[float]]:
        """The values of each parameter that are tried."""
        method = self.start.method or get_args(Method)[0]
        return candidates(self.source.kind, method, self.source.lattice.step, self.instances)

    def run(self, progress: Callable[[str], None] = _silent) -> TuningResult:
        """Search, and return the best parameters.

        Args:
            progress: called after each combination, with its parameters and score.
        """
        best = self.start
        default = self._score(best, progress)
        for _ in range(MAX_ROUNDS):
            before = best
            for name, values in self.lists.items():
                options = [_with(best, name, value) for value in values]
                # The present value wins a tie, so that the result is the one nearest to the start.
                best = max([best, *options], key=lambda one: self._score(one, progress))
            if best == before:
                break
        return TuningResult(
            best, self._score(best, progress), default, self.score(best, self.held_out),
            self.score(self.start, self.held_out), len(self._scores),
        )  # fmt: skip

    def _score(self, options: SegmentationOptions, progress: Callable[[str], None]) -> float:
        if options not in self._scores:
            score = self.score(options, self.crops)
            self._scores[options] = -math.inf if math.isnan(score) else score
            parameters = {name: getattr(options, name) for name in self.lists}
            progress(f"{', '.join(f'{n} {v:g}' for n, v in parameters.items() if v is not None)}: {score:.3f}")
        return self._scores[options]

    def score(self, options: SegmentationOptions, crops: Sequence[TuningCrop]) -> float:
        """Return the score of some parameters on some crops; NaN without crops."""
        segmenter = BlockSegmenter.of(self.source, options)
        least = math.ceil(options.min_volume / math.prod(self.source.lattice.step) - 1e-9)
        counts = Counts()
        for crop in crops:
            labels = remove_small(np.asarray(segmenter(crop.values)), least)
            counts = counts + self._counts(labels, crop)
        if not crops:
            return math.nan
        if self.metric == "csc":
            return ClassScore(self.source.name, self.instances, counts, len(crops)).score
        whole = 2 * counts.tp + counts.fp + counts.fn
        return 2 * counts.tp / whole if whole else math.nan

    def _counts(self, labels: Any, crop: TuningCrop) -> Counts:
        """Return the counts of one crop: objects, or voxels."""
        if self.metric == "f1":
            overlaps = Overlaps()
            overlaps.add(crop.truth, labels.astype(np.int64))
            tp, objects, predicted = matches(overlaps)
            return Counts(tp, predicted - tp, objects - tp)
        known = crop.truth >= 0
        labels, truth = np.where(known, labels, 0), np.where(known, crop.truth, 0)
        if not self.instances:
            return semantic_counts(labels, truth)
        counts = instance_counts(labels, truth, self.source.lattice.step)
        # A crop with too many objects is skipped by the challenge; here it counts as missed.
        return counts if counts is not None else missing_counts(truth, True)


def read_crop(
    source: SegmentationSource, crop: Path, name: str, unknown: Unknown = "metadata", label: str | None = None
) -> TuningCrop:
    """Read the prediction and the annotation of a crop.

    Args:
        source: the prediction.
        crop: folder of the crop.
        name: the class.
        unknown: see `LabelOptions`.
        label: name of the crop; None for that of its folder.

    Raises:
        CellMapValueError: the prediction has no voxel in the crop.
        CellMapError: one of them cannot be read.
    """
    annotation = Annotation(crop, name, source.lattice.step, unknown)
    first, shape = voxels_inside(source.lattice, annotation.box)
    if 0 in shape:
        raise CellMapValueError(
            f"{label or crop.name}/{name}: the prediction {source.path} has no voxel in {annotation.box}"
        )
    return TuningCrop(label or crop.name, source.read(first, shape), annotation.read(source.lattice, first, shape))


def check_alike(sources: Mapping[str, SegmentationSource]) -> None:
    """Check that predictions of several crops may have the same parameters.

    Args:
        sources: the prediction of each crop, by the name of the crop.

    Raises:
        CellMapValueError: their kinds, voxel sizes or offsets differ.
    """
    (first, one), *others = sources.items()
    for name, source in others:
        for what, a, b in (
            ("kind", one.kind, source.kind),
            ("voxel size", list(one.lattice.step), list(source.lattice.step)),
            ("offsets", one.offsets, source.offsets),
        ):
            if a != b:
                raise CellMapValueError(
                    f"{one.name}: the {what} of the predictions must be the same in all crops, got {a} in {first} and "
                    f"{b} in {name}; choose crops that were predicted in the same way, with crops=[...]"
                )


def settings_of(options: SegmentationOptions, names: Sequence[str]) -> Mapping[str, Any]:
    """Return the method and some parameters, as `cellmap-segment` and `cellmap-submit` take them."""
    values = {name: getattr(options, name) for name in names}
    return {"method": options.method, **{n: round(float(v), 6) for n, v in values.items() if v is not None}}
