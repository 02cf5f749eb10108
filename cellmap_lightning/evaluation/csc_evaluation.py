"""The challenge's score of predictions on annotated crops of this machine."""

import csv
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.crops.encodings import LabelEncodings, Unknown
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.evaluation.challenge import INSTANCE_CLASSES
from cellmap_lightning.evaluation.crop_names import crop_names
from cellmap_lightning.evaluation.crop_parts import USAGE, CropPart, is_trained
from cellmap_lightning.evaluation.csc_score import (
    ChallengeScore,
    Counts,
    CropCounts,
    Labels,
    instance_counts,
    missing_counts,
    pooled,
    semantic_counts,
)
from cellmap_lightning.evaluation.evaluate import annotated_classes, is_group
from cellmap_lightning.evaluation.numbering import (
    MinVolume,
    Numbering,
    check_min_volume,
    min_voxels,
    numbering,
    remove_small,
)
from cellmap_lightning.evaluation.prediction_labels import prediction_labels, stored_meaning
from cellmap_lightning.io.label_values import read_labels
from cellmap_lightning.io.meanings import ValuesSetting, check_values
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.prediction.quantize import DEFAULT_THRESHOLD, Threshold, threshold_of
from cellmap_lightning.splits.manifests import ManifestRow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predicted:
    """A prediction and the crops to score it on; see ``docs/challenge.md``.

    Attributes:
        output: the prediction, with one group per class.
        crops: folder of the annotated crops, ``recon-1/labels/groundtruth``.
        classes: classes to score. One that a crop annotates and the prediction lacks counts as not submitted.
        crop: name of the only crop to score on; None for all that the prediction covers.
    """

    output: Path
    crops: Path
    classes: tuple[str, ...]
    crop: str | None = None


@dataclass(frozen=True)
class Scoring:
    """Settings of a score with the defaults of `submit`, which describes them.

    Example:
        >>> evaluate_csc([Predicted(Path("pred.zarr"), crops, ("mito",))], Scoring(threshold=0.7))
    """

    threshold: Threshold = DEFAULT_THRESHOLD
    instance_classes: Sequence[str] = INSTANCE_CLASSES
    instances: str | Numbering | None = None
    min_volume: MinVolume = 0
    values: ValuesSetting = "auto"
    unknown: Unknown = "metadata"


def evaluate_csc(
    predictions: Sequence[Predicted],
    scoring: Scoring | None = None,
    trained: Mapping[Path, Sequence[CropPart]] | None = None,
) -> ChallengeScore:
    """Return the challenge's score of predictions, with counts of each class summed over all crops.

    Predictions are resampled to the voxels of the annotation, as `submit` does. Unannotated voxels count as background
    in both.

    Args:
        predictions: predictions and their crops.
        scoring: settings.
        trained: parts of the crops that a training used, to mark these crops; None if unknown. See `trained_crops`.

    Raises:
        CellMapKeyError: no prediction covers a crop that annotates any of the classes.
        CellMapError: a prediction or an annotation cannot be read.
    """
    scoring = scoring or Scoring()
    check_values(scoring.values), check_min_volume(scoring.min_volume)
    rows = [row for prediction in predictions for row in _counts(prediction, scoring, trained)]
    if not rows:
        listed = ", ".join(str(p.output) for p in predictions)
        raise CellMapKeyError(
            f"nothing to evaluate {listed} with: no crop in {', '.join(sorted({str(p.crops) for p in predictions}))} "
            f"lies in it and annotates any of {sorted({name for p in predictions for name in p.classes})}"
        )
    names = crop_names(row.folder for row in rows if row.folder is not None)
    named = [replace(row, crop=row.crop if row.folder is None else names[row.folder]) for row in rows]
    return pooled(named, scoring.instance_classes)


def _counts(
    prediction: Predicted, scoring: Scoring, trained: Mapping[Path, Sequence[CropPart]] | None
) -> Iterator[CropCounts]:
    """Yield the counts of every class in every crop that a prediction covers."""
    pattern = prediction.crop or "*"
    for crop, name in annotated_classes(prediction.output, prediction.crops, prediction.classes, pattern):
        counts = _class_counts(prediction.output / name, crop, name, scoring)
        yield replace(counts, trained=is_trained(trained, crop), folder=crop)


def _class_counts(group: Path, crop: Path, name: str, scoring: Scoring) -> CropCounts:
    """Return the counts of one class in one crop."""
    truth, known = _annotated(crop, name, scoring.unknown)
    numbered = name in scoring.instance_classes
    if not is_group(group):
        return CropCounts(crop.name, name, missing_counts(truth, numbered), "missing")
    lattice = read_multiscale(crop / name).finest.lattice
    row = ManifestRow(crop.parent.name, crop.name, name, lattice)
    # The prediction is handled exactly as in a submission.
    number = numbering(scoring.instances) if numbered else None
    threshold, meaning = threshold_of(scoring.threshold, name), stored_meaning(row, group, scoring.values)
    labels = prediction_labels(row, group, threshold, number, meaning)
    # The annotation has 0 in unannotated voxels; the prediction is set to 0 there as well.
    if known is not None:
        labels = np.where(known, labels, 0)
    if not numbered:
        return CropCounts(crop.name, name, semantic_counts(labels, truth))
    labels = remove_small(labels, min_voxels(scoring.min_volume, name, float(np.prod(lattice.step))))
    counts = instance_counts(labels, truth, lattice.step)
    if counts is None:
        log.warning(
            "%s/%s: too many predicted objects or overlaps; the challenge skips the crop for this class",
            crop.name, name,
        )  # fmt: skip
        return CropCounts(crop.name, name, Counts(), "skipped")
    return CropCounts(crop.name, name, counts)


def _annotated(crop: Path, name: str, unknown: Unknown) -> tuple[Labels, Labels | None]:
    """Return the ids of a crop, 0 where it is unannotated, and the mask of annotated voxels; None for all."""
    image = read_multiscale(crop / name)
    level = image.finest
    encoding = LabelEncodings(crop.name, unknown).of(name, image, level)
    reader = open_reader(level, f"{crop.name}/{name}", empty=encoding.empty)
    stored = read_labels(reader, (0, 0, 0), reader.shape)
    truth = np.where(encoding.present(stored), stored, 0)
    if encoding.unknown is None:
        return truth, None
    known = stored != encoding.unknown
    return truth, None if known.all() else known


def write_csc_csv(score: ChallengeScore, path: Path) -> None:
    """Write the score: one row per class, one per crop and class, and the three means."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "crop", "status", "usage", "tp", "fp", "fn", "f1", "boundary", "score"])
        for name in ("overall", "instance", "semantic"):
            writer.writerow([name, "", "", "", "", "", "", "", "", f"{getattr(score, name):.6f}"])
        for c in score.classes:
            parts = ["" if math.isnan(v) else f"{v:.6f}" for v in (c.f1, c.boundary, c.score)]
            writer.writerow([c.name, "all", "", "", c.counts.tp, c.counts.fp, c.counts.fn, *parts])
        for row in score.crops:
            counts, usage = row.counts, USAGE[row.trained]
            writer.writerow([row.name, row.crop, row.status, usage, counts.tp, counts.fp, counts.fn, "", "", ""])


def csc_table(score: ChallengeScore) -> str:
    """Return the score as a table in text; classes whose score includes crops that were trained on are marked."""
    trained = [row for row in score.crops if row.trained]
    names = {c.name: c.name + " *" * any(row.name == c.name for row in trained) for c in score.classes}
    width = max(8, *map(len, names.values())) + 2
    head = ("crops", "tp", "fp", "fn", "f1", "boundary", "score")
    lines = ["class".ljust(width) + "".join(f"{h:>12}" for h in head)]
    for c in score.classes:
        numbers: list[Any] = [c.crops, c.counts.tp, c.counts.fp, c.counts.fn]
        parts = ["" if math.isnan(v) else f"{v:.4f}" for v in (c.f1, c.boundary, c.score)]
        lines.append(names[c.name].ljust(width) + "".join(f"{v:>12}" for v in (*numbers, *parts)))
    means: Mapping[str, float] = {"instance": score.instance, "semantic": score.semantic, "overall": score.overall}
    lines += [name.ljust(width) + f"{value:>{12 * len(head)}.4f}" for name, value in means.items()]
    if trained:
        crops, whole = (list(dict.fromkeys(row.crop for row in rows)) for rows in (trained, score.crops))
        lines.append(f"* with crops that were trained on, {len(crops)} of {len(whole)}: {', '.join(crops)}")
    notes = {"missing": "not predicted, which counts as missed", "skipped": "too many objects, skipped for the class"}
    for status, note in notes.items():
        rows = [f"{row.crop}/{row.name}" for row in score.crops if row.status == status]
        if rows:
            lines.append(f"{note}: {', '.join(rows)}")
    return "\n".join(lines)
