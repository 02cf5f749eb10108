"""Files of scores: CSV, JSON, a table in text and a heat map."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cellmap_lightning.errors import missing_extra
from cellmap_lightning.evaluation.crop_parts import USAGE
from cellmap_lightning.evaluation.evaluate import CropScore
from cellmap_lightning.evaluation.instance_scores import INSTANCE_METRICS
from cellmap_lightning.evaluation.surface_scores import SURFACE_METRICS
from cellmap_lightning.evaluation.voxel_scores import METRICS
from cellmap_lightning.io.own_files import picture_metadata

#: Columns of the tables and of the heat map: voxel scores, and the most used ones of surfaces and objects.
_VOXELS = (*METRICS, "hausdorff_nm", "surface_distance_nm")
_OBJECTS = (*METRICS, "objects", "predicted", "matched", "f1_50", "ap", "panoptic_quality", "voi_split", "voi_merge")
_TITLES = {
    "objects": "true",
    "surface_distance_nm": "surface_nm",
    "panoptic_quality": "pq",
    "voi_split": "split",
    "voi_merge": "merge",
}
_HEAT = (*METRICS, "f1_50", "ap", "panoptic_quality")
_LEGEND = "* trained on"
_COUNTS = ("objects", "predicted", "matched")


def write_csv(scores: Sequence[CropScore], path: Path) -> None:
    """Write one row per crop and class; undefined scores are empty."""
    columns = _columns(scores, (*METRICS, *SURFACE_METRICS, *INSTANCE_METRICS))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        boxes = ["box"] if any(score.box is not None for score in scores) else []
        writer.writerow(["crop", "class", "usage", "annotated_voxels", "tp", "fp", "fn", *columns, *boxes])
        for score in scores:
            values, voxels = score.values(), score.voxels
            cells = [_cell(column, values[column]) for column in columns]
            usage = USAGE[score.trained]
            box = [score.box or ""] if boxes else []
            writer.writerow(
                [score.crop, score.name, usage, voxels.known, voxels.tp, voxels.fp, voxels.fn, *cells, *box]
            )


def _cell(column: str, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if column in _COUNTS else f"{value:.6f}"


def write_json(scores: Sequence[CropScore], path: Path) -> None:
    """Write a list with an object per crop and class; undefined and infinite scores are null."""
    rows = [
        {
            "crop": score.crop, "class": score.name, "trained": score.trained, "annotated_voxels": score.voxels.known,
            **{name: value if math.isfinite(value) else None for name, value in score.values().items()},
            "box": None if score.box is None else str(score.box),
        }
        for score in scores
    ]  # fmt: skip
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _columns(scores: Sequence[CropScore], names: Sequence[str]) -> list[str]:
    """Return the names of the scores that are defined for any crop; voxel scores always."""
    values = [score.values() for score in scores]
    return [name for name in names if name in METRICS or any(not math.isnan(row[name]) for row in values)]


def table(scores: Sequence[CropScore]) -> str:
    """Return the scores as tables in text: one of voxels and surfaces, and one of objects where they are scored."""
    voxels = _rows(scores, _columns(scores, _VOXELS))
    objects = _columns(scores, _OBJECTS)[len(METRICS) :]  # without those of voxels, which are always defined
    scored = [score for score in scores if score.instances is not None and not _is_absent(score)]
    lines = [*voxels, *(["", *_rows(scored, objects)] if scored and objects else [])]
    if any(score.trained for score in scores):
        lines.append(_LEGEND)
    return "\n".join(lines)


def _rows(scores: Sequence[CropScore], columns: Sequence[str]) -> list[str]:
    """Return the lines of a table, with the names of the columns first."""
    crops = [_marked(score) for score in scores]
    width = max(map(len, [*crops, "crop"])) + 2, max(5, *(len(s.name) for s in scores))
    values = [score.values() for score in scores]
    cells = [[_title(c) for c in columns], *([_number(c, row[c]) for c in columns] for row in values)]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    lines = ["".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells]
    rows = ["crop".ljust(width[0]) + "class".ljust(width[1]) + lines[0]]
    for crop, score, line in zip(crops, scores, lines[1:], strict=True):
        absent = f"  not in this crop; {score.voxels.fp:,} voxels are predicted"
        # Scores of a class that is not in the crop are 0 or undefined for any prediction.
        rows.append(crop.ljust(width[0]) + score.name.ljust(width[1]) + (absent if _is_absent(score) else line))
    return rows


def _marked(score: CropScore) -> str:
    """Return the name of a crop, with a mark if it was trained on."""
    return score.label + " *" * bool(score.trained)


def _is_absent(score: CropScore) -> bool:
    """Return True if no voxel of a crop is annotated as the class."""
    return score.voxels.tp + score.voxels.fn == 0


def _title(column: str) -> str:
    return _TITLES.get(column, column)


def _number(column: str, value: float) -> str:
    if column in _COUNTS:
        return "-" if math.isnan(value) else f"{value:.0f}"
    return f"{value:.1f}" if column.endswith("_nm") else f"{value:.3f}"


def draw(scores: Sequence[CropScore], path: Path) -> None:
    """Draw one heat map per score, crops against classes, with the numbers; "-" where a crop lacks a class or a score.

    Crops that were trained on are marked, as in `table`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise missing_extra("train", "pictures need matplotlib") from e
    metrics = _columns(scores, _HEAT)
    crops = list(dict.fromkeys(map(_marked, scores)))
    names = list(dict.fromkeys(s.name for s in scores))
    size = (1.5 + len(metrics) * (0.7 + 0.6 * len(names)), 1.3 + 0.35 * len(crops))
    figure = Figure(figsize=size, layout="constrained")
    for number, metric in enumerate(metrics):
        values = np.full((len(crops), len(names)), np.nan)
        for score in (score for score in scores if not _is_absent(score)):
            values[crops.index(_marked(score)), names.index(score.name)] = score.values()[metric]
        axes = figure.add_subplot(1, len(metrics), number + 1)
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(_title(metric))
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(crops)), crops if number == 0 else [""] * len(crops))
        for (row, column), value in np.ndenumerate(values):
            text, color = ("-", "black") if np.isnan(value) else (f"{value:.2f}", "black" if value > 0.6 else "white")
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    if any(score.trained for score in scores):
        figure.supxlabel(_LEGEND, x=0, ha="left", fontsize=8)
    figure.savefig(path, dpi=150, metadata=picture_metadata(path))
