"""Table of the runs of a sweep, printed when the last of them has ended."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cellmap_lightning.commands.run_folder import hydra_folder

#: File of a run with its monitored metric and its scores, which the table is made of.
SCORES = "scores.json"


class SweepTable(Callback):
    """A callback of Hydra that prints the runs of a sweep with their scores.

    A row is a run with what it changes; runs that differ in ``data.fold`` alone have a row with their mean and standard
    deviation below them. ``configs/train.yaml`` uses it; see ``docs/runs.md``.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table of the runs in the folder of the sweep."""
        table = sweep_table(hydra_folder(config, "hydra.sweep.dir"))
        if table:
            print(f"\nruns\n{table}")


def sweep_table(folder: Path) -> str:
    """Return the table of the runs in a folder, one folder each; empty where none has scores.

    Args:
        folder: the folder of a sweep.
    """
    runs = {path.name: (_overrides(path), _scores(path)) for path in sorted(folder.glob("*"), key=_natural)}
    runs = {name: (overrides, scores) for name, (overrides, scores) in runs.items() if overrides or scores}
    if not any(scores for _, scores in runs.values()):
        return ""
    changed = _changed(runs)
    metric = next(str(scores["monitor"]) for _, scores in runs.values() if scores)
    classes = list(dict.fromkeys(name for _, scores in runs.values() for name in scores.get("classes", {})))
    rows = [["run", *changed, metric, *classes]]
    groups: dict[tuple[str, ...], list[list[float]]] = {}
    for name, (overrides, scores) in runs.items():
        cells, values = [overrides.get(key, "") for key in changed], _values(scores, classes)
        rows.append([name, *cells, *map(_number, values)])
        of_folds = ["all folds" if key == "data.fold" else cell for key, cell in zip(changed, cells, strict=True)]
        groups.setdefault(tuple(of_folds), []).append(values)
    if "data.fold" in changed:
        for group, scored in groups.items():
            rows.append(["mean ± sd", *group, *(_mean(column) for column in zip(*scored, strict=True))])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of a table, with the width of a column that of its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else 1 << 30, path.name)


def _changed(runs: Mapping[str, tuple[Mapping[str, str], Any]]) -> list[str]:
    """Return the keys whose values differ between runs."""
    keys = dict.fromkeys(key for overrides, _ in runs.values() for key in overrides)
    return [key for key in keys if len({overrides.get(key) for overrides, _ in runs.values()}) > 1]


def _overrides(run: Path) -> dict[str, str]:
    """Return what the command line of a run sets."""
    file = run / ".hydra" / "overrides.yaml"
    listed = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return dict(str(item).lstrip("+~").partition("=")[::2] for item in listed or ())


def _scores(run: Path) -> dict[str, Any]:
    file = run / SCORES
    scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return scores


def _values(scores: Mapping[str, Any], classes: Sequence[str]) -> list[float]:
    """Return the monitored metric of a run and its score of each class; NaN where it has none."""
    by_class = scores.get("classes", {})
    values = [scores.get("value"), *(by_class.get(name) for name in classes)]
    return [math.nan if value is None else float(value) for value in values]


def _number(value: float) -> str:
    return "failed" if math.isnan(value) else f"{value:.3f}"


def _mean(values: tuple[float, ...]) -> str:
    """Return mean and standard deviation (of a sample) of the runs that have a score."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    mean = sum(known) / len(known)
    spread = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1)) if len(known) > 1 else 0.0
    return f"{mean:.3f} ± {spread:.3f}"


def write_scores(folder: Path, monitor: str, value: float | None, classes: Mapping[str, Mapping[str, float]]) -> None:
    """Write the scores of a run to its folder.

    Args:
        folder: the folder of the run.
        monitor: name of the monitored metric.
        value: its value; None where nothing was validated. NaN and infinity, which JSON has not, are written as null.
        classes: scores of each class; the first of them is written.
    """
    first = {name: _finite(next(iter(scores.values()))) for name, scores in classes.items() if scores}
    content = {"monitor": monitor, "value": _finite(value), "classes": first}
    (folder / SCORES).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
