"""Results of a training run for its user: a table of scores, training curves and a contact sheet."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.visualization.display import Display, display, display_prediction, prediction_title
from cellmap_lightning.visualization.figures.curves import training_curves
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet
from cellmap_lightning.visualization.preview import sheet_sample

#: Tiles that are read to find those with the most classes.
_CANDIDATES = 24
_FILES = {
    "checkpoints/best.ckpt": "weights of the best validation",
    "checkpoints/last.ckpt": "newest state, to resume from",
    "config.yaml": "the configuration, resolved",
    "hparams.yaml": "the hyperparameters of the task, then those of stream_prefetch",
    "train.log": "the log",
    "split.csv": "the crops of each split",
    "metrics.csv": "losses and scores per step and epoch",
    "metrics.1.csv": "those of the first start; each start has a file",
    "curves.png": "the same of all starts, drawn",
    "scores.json": "the scores of the final validation",
    "samples.png": "raw, target and prediction",
}


def score_table(
    scores: Mapping[str, Mapping[str, float]], untrained: Mapping[str, Mapping[str, float]] | None, classes: list[str]
) -> str:
    """Return a table of Dice per class, beside that of the untrained network and of the best constant predictor.

    Args:
        scores: ``{class: {"dice": .., "constant": ..}}`` of the classes that occur.
        untrained: the same of the network before training.
        classes: every class.
    """
    columns = ["class", "Dice", *(["untrained"] if untrained else []), "constant"]
    rows: list[list[Any]] = []
    for name, score in scores.items():
        before = [untrained.get(name, {}).get("dice", float("nan"))] if untrained else []
        rows.append([name, score["dice"], *before, score["constant"]])
    if rows:
        rows.append(["mean", *(sum(r[i] for r in rows) / len(rows) for i in range(1, len(columns)))])
    width = max(len(str(r[0])) for r in [columns, *rows])
    lines = [f"{columns[0]:<{width}}" + "".join(f"{c:>11}" for c in columns[1:])]
    lines += [f"{r[0]:<{width}}" + "".join(f"{v:>11.3f}" for v in r[1:]) for r in rows]
    missing = [c for c in classes if c not in scores]
    if missing:
        lines.append(f"not in the validation data, so not scored: {', '.join(missing)}")
    return "\n".join(lines)


@dataclass
class _Tile:
    """A candidate for the contact sheet.

    Attributes:
        position: of the tile in the source.
        sample: its finished sample.
        target: how the target is drawn; None without one.
        rank: see `class_rank`.
        classes: numbers of the classes that occur in it.
        crop: label of its crop.
    """

    position: int
    sample: Mapping[str, torch.Tensor]
    target: Display | None
    rank: tuple[int, float]
    classes: frozenset[int]
    crop: str


def write_samples(
    source: SampleSource,
    predict: Callable[[Mapping[str, torch.Tensor]], torch.Tensor | None] | None,
    path: Path,
    *,
    title: str | None = None,
    count: int = 4,
    input_name: str | None = None,
    target_name: str | None = None,
) -> None:
    """Draw a contact sheet of tiles with the most classes, of places that differ: raw, target and prediction.

    Args:
        source: the samples to choose from.
        predict: from a finished batch of one sample to values of the target ``[1, channels, z, y, x]`` on any device,
            or to None.
        path: the PNG to write.
        title: a line at the top.
        count: samples at most.
        input_name: the input to draw; by default the first.
        target_name: the target to draw; by default the first.
    """
    input_name = input_name or next(iter(source.layout.inputs))
    target_name = target_name or next(iter(source.layout.targets), None)
    # Candidates are evenly spaced over all crops; reading every tile would take too long.
    step = max(1, source.tile_count // _CANDIDATES)
    positions = sorted({source.tile(n) for n in range(0, source.tile_count, step)})
    tiles = [_read_tile(source, p, target_name) for p in positions]
    rows = []
    for tile in _different(source, tiles, count, input_name):
        prediction = predict({name: value[None] for name, value in tile.sample.items()}) if predict else None
        rows.append(_sheet_sample(source, tile, prediction, input_name, target_name))
    kind = source.layout.targets[target_name].kind if target_name is not None else None
    contact_sheet(rows, list(source.classes), path=path, title=title, predicted=prediction_title(kind))


def _read_tile(source: SampleSource, position: int, target_name: str | None) -> _Tile:
    sample = source[position]
    target = display(source.layout.targets[target_name].kind, sample[target_name]) if target_name else None
    crop = source.locate(position)[0].label
    if target is None:
        return _Tile(position, sample, None, (0, 0.0), frozenset(), crop)
    present = (target.masks > 0.5).numpy()
    occurring = frozenset(number for number, mask in enumerate(present) if mask.any())
    return _Tile(position, sample, target, class_rank(present), occurring, crop)


def class_rank(present: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """Return a rank by the classes in a patch ``[C, ...]``; the largest is the most informative one to draw.

    The number of classes that fill more than 0.5 % of the patch comes first. Then their shares are summed, each up to
    10 %, so that one class that fills everything does not win.
    """
    shares = present.reshape(len(present), -1).mean(1)
    return int((shares > 0.005).sum()), float(shares.clip(max=0.1).sum())


def _different(source: SampleSource, tiles: Sequence[_Tile], count: int, input_name: str) -> list[_Tile]:
    """Return tiles that show different things: at most ``count``, and none that repeats another one.

    Tiles are chosen one after the other. A tile that shares more than half of its extent along every axis with a
    chosen one is never taken. Of the others, one with a class that no chosen tile has comes first, then one of the crop
    with the fewest chosen tiles, then the one with the highest rank.
    """
    chosen: list[_Tile] = []
    shown: set[int] = set()
    crops: Counter[str] = Counter()
    left = list(tiles)
    while left and len(chosen) < count:
        best = max(left, key=lambda tile: (len(tile.classes - shown), -crops[tile.crop], tile.rank, -tile.position))
        chosen.append(best)
        shown |= best.classes
        crops[best.crop] += 1
        left = [tile for tile in left if not _overlap(source, tile.position, best.position, input_name)]
    return chosen


def _overlap(source: SampleSource, one: int, other: int, name: str) -> bool:
    """Return whether the patches at two positions share more than half of their extent along every axis."""
    (a, _), (b, _) = source.locate(one), source.locate(other)
    if a is not b:
        return False
    first, second = source.get_center(one), source.get_center(other)
    extent = source.layout.inputs[name].window.extent
    return all(abs(first[axis] - second[axis]) < n / 2 for axis, n in zip(AXES, extent, strict=True))


def _sheet_sample(
    source: SampleSource, tile: _Tile, prediction: torch.Tensor | None, input_name: str, target_name: str | None
) -> SheetSample:
    """Return a row of the contact sheet; a target on other voxels than the input is left out."""
    window = source.layout.inputs[input_name].window
    target = tile.target
    if target_name is not None:
        target_window = source.layout.targets[target_name].window
        if target_window.shape != window.shape or target_window.scale.tolist() != window.scale.tolist():
            target = None
    center = source.get_center(tile.position)
    position = ", ".join(f"{axis} {center[axis]:.0f}" for axis in AXES)
    kind = source.layout.targets[target_name].kind if target_name is not None else None
    displays = {} if target is None else {"target": target}
    if prediction is not None:
        displays["prediction"] = display_prediction(kind, prediction[0], len(source.classes))
    header = f"{source.locate(tile.position)[0].label}, centre {position} nm"
    return sheet_sample(tile.sample[input_name][0], displays, tuple(window.scale.tolist()), header)


def describe_run(folder: Path, others: Mapping[str, str] | None = None) -> list[str]:
    """Return one line for each file of a run that exists.

    Args:
        folder: of the run.
        others: descriptions of files in place of the usual ones.
    """
    width = max(map(len, _FILES))
    texts = _FILES | dict(others or {})
    return [f"  {name:<{width}}  {text}" for name, text in texts.items() if (folder / name).exists()]


def write_curves(folder: Path, classes: Sequence[str] | None = None) -> None:
    """Draw the metrics of all starts of a run as ``curves.png``, if there are any.

    Args:
        folder: of the run.
        classes: the classes in the order of the samples, so that they have the same colours; the file sorts its
            columns.
    """
    files = metrics_files(folder)
    if files:
        training_curves(files, folder / "curves.png", classes=classes)


def metrics_files(folder: Path) -> list[Path]:
    """Return the metrics of each start of a run, in their order: ``metrics.1.csv``, ..., ``metrics.csv``."""
    numbered = {path: path.suffixes[0][1:] for path in folder.glob("metrics.*.csv") if len(path.suffixes) == 2}
    earlier = sorted((path for path, number in numbered.items() if number.isdigit()), key=lambda p: int(numbered[p]))
    return [path for path in (*earlier, folder / "metrics.csv") if path.exists()]
