"""What a run leaves behind for its user: scores, curves and a contact sheet."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.visualization.figures.curves import training_curves
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet
from cellmap_lightning.visualization.preview import by_class

#: Tiles that are looked at to find the ones worth showing.
_CANDIDATES = 24


def score_table(
    scores: Mapping[str, Mapping[str, float]], untrained: Mapping[str, Mapping[str, float]] | None, classes: list[str]
) -> str:
    """Dice per class as text, beside that of the untrained network and of the best constant predictor.

    Args:
        scores: ``{class: {"dice": .., "constant": ..}}`` of the classes that occur.
        untrained: the same of the network before training.
        classes: every class.
    """
    columns = ["class", "Dice", *(["untrained"] if untrained else []), "constant"]
    rows: list[list[Any]] = []
    for name, score in scores.items():
        before = [untrained[name]["dice"]] if untrained and name in untrained else [float("nan")] if untrained else []
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
    """Draw a contact sheet of the tiles with the most classes: raw, target and prediction.

    Args:
        source: where the samples come from.
        predict: from a finished batch of one sample to probabilities ``[1, C, z, y, x]`` on any device, or to None.
        path: the PNG to write.
        title: a line at the top.
        count: samples at most.
        input_name: the input that is shown; by default the first.
        target_name: the target that is shown; by default the first.
    """
    input_name = input_name or next(iter(source.layout.inputs))
    target_name = target_name or next(iter(source.layout.targets), None)
    step = max(1, source.tile_count // _CANDIDATES)
    tiles = sorted({source.tile(n) for n in range(0, source.tile_count, step)})
    ranked = []
    for position in tiles:
        sample = source[position]
        target = by_class(sample[target_name], len(source.classes)) if target_name else None
        if target_name is None or target is None:
            target_name = None
            ranked.append((0.0, 0.0, position, sample))
            continue
        sample[target_name] = target
        shares = (target == 1).flatten(1).float().mean(1)
        ranked.append((float((shares > 0.005).sum()), float(shares.clamp(max=0.1).sum()), position, sample))
    ranked.sort(key=lambda r: r[:2], reverse=True)
    # Tiles that overlap what is shown already would show one place again; they come only when nothing else is left.
    chosen: list[Any] = []
    for apart in (True, False):
        for row in ranked:
            taken = any(row[2] == other[2] for other in chosen)
            near = apart and any(_overlap(source, row[2], other[2], input_name) for other in chosen)
            if len(chosen) < count and not taken and not near:
                chosen.append(row)
    shown = []
    for _, _, position, sample in chosen:
        window = source.layout.inputs[input_name].window
        predicted = predict({name: value[None] for name, value in sample.items()}) if predict else None
        center = source.get_center(position)
        dataset, _ = source.locate(position)
        place = ", ".join(f"{a} {center[a]:.0f}" for a in AXES)
        same = target_name is None or (
            source.layout.targets[target_name].window.shape == window.shape
            and source.layout.targets[target_name].window.scale.tolist() == window.scale.tolist()
        )
        shown.append(
            SheetSample(
                raw=sample[input_name][0].numpy(),
                target=sample[target_name].numpy() if target_name and same else None,
                prediction=None if predicted is None else predicted[0].float().cpu().numpy(),
                scale=tuple(window.scale.tolist()),
                header=f"{dataset.label}, centre {place} nm",
            )
        )
    contact_sheet(shown, list(source.classes), path=path, title=title)


def _overlap(source: SampleSource, one: int, other: int, name: str) -> bool:
    """Whether the patches at two positions share more than half of their extent along every axis."""
    (a, _), (b, _) = source.locate(one), source.locate(other)
    if a is not b:
        return False
    first, second = source.get_center(one), source.get_center(other)
    extent = source.layout.inputs[name].window.extent
    return all(abs(first[axis] - second[axis]) < n / 2 for axis, n in zip(AXES, extent, strict=True))


def describe_run(folder: Path) -> list[str]:
    """The files of a run that are there, one line each."""
    known: dict[str, Any] = {
        "checkpoints/best.ckpt": "weights of the best validation",
        "checkpoints/last.ckpt": "to go on from",
        "config.yaml": "the configuration, resolved",
        "split.csv": "the crops of each split",
        "metrics.csv": "losses and scores per step and epoch",
        "curves.png": "the same, drawn",
        "samples.png": "raw, target and prediction",
    }
    width = max(map(len, known))
    return [f"  {name:<{width}}  {what}" for name, what in known.items() if (folder / name).exists()]


def write_curves(folder: Path) -> None:
    """Draw ``metrics.csv`` as ``curves.png``, if there are metrics."""
    metrics = folder / "metrics.csv"
    if metrics.exists():
        training_curves(metrics, folder / "curves.png")
