"""The curves of a training."""

import csv
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.visualization.figures.canvas import GREY, INK, Array, needs_matplotlib, new_figure, save, wrap
from cellmap_lightning.visualization.figures.palette import oklab, outline_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEAN = "mean of classes"


def training_curves(
    metrics_csv: str | PathLike[str],
    path: str | PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> "Figure":
    """Draw the loss and the Dice of each class from the ``metrics.csv`` of Lightning's ``CSVLogger``.

    Used are the columns ``step`` (else ``epoch``, else the number of the line), ``train/loss`` (else
    ``train/loss_step``, ``train/loss_epoch``), ``val/loss``, ``val/dice`` and ``val/dice_<class>``. Any of them may be
    missing, cells may be empty or NaN. Without ``val/dice`` the mean of the classes is drawn. Losses that are not
    finite are counted in the legend; classes without any value are named below the plot.

    Args:
        metrics_csv: The file.
        path: Where to write the figure, or None.
        classes: Names in the order of the contact sheets, to get the same colours; else the order of the columns.

    Returns:
        A figure with two axes: loss and Dice over steps.

    Raises:
        CellMapFileNotFoundError: There is no such file.
        MissingExtraError: matplotlib is not installed.
    """
    with needs_matplotlib():
        import matplotlib.style

    table = _read_metrics(Path(metrics_csv))
    with matplotlib.style.context("default"):
        figure = _draw_curves(table, classes)
        save(figure, path)
    return figure


def _read_metrics(path: Path) -> dict[str, Array]:
    """All columns as float arrays ``[line]``, NaN for cells that are empty or no numbers, and where cells are empty."""
    if not path.is_file():
        raise CellMapFileNotFoundError(f"There is no metrics file {path}.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name]
        lines = list(reader)
    table = {}
    for name in names:
        cells = [line.get(name) for line in lines]
        table[name] = np.array([_number(cell) for cell in cells], dtype=np.float64)
        table[f"\0{name}"] = np.array([bool(cell and cell.strip()) for cell in cells], dtype=bool)
    table["\0"] = np.arange(len(lines), dtype=np.float64)
    return table


def _number(cell: str | None) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        return math.nan


def _series(table: dict[str, Array], names: Sequence[str], x: Array) -> tuple[Array, Array, int]:
    """Steps and values of the first of ``names`` with a value, in order of the steps, and how many were not finite."""
    lost = 0
    for name in names:
        if name not in table:
            continue
        values = table[name]
        good = np.isfinite(values) & np.isfinite(x)
        lost = max(lost, int((table[f"\0{name}"] & ~np.isfinite(values)).sum()))
        if good.any():
            order = np.argsort(x[good], kind="stable")
            return x[good][order], values[good][order], int((table[f"\0{name}"] & ~np.isfinite(values)).sum())
    return np.zeros(0), np.zeros(0), lost


def _draw_curves(table: dict[str, Array], classes: Sequence[str] | None) -> "Figure":
    from matplotlib.ticker import MaxNLocator

    x_name = next((n for n in ("step", "epoch") if n in table and np.isfinite(table[n]).any()), "")
    x = table[x_name] if x_name else table["\0"]
    prefix = "val/dice_"
    found = [name[len(prefix) :] for name in table if name.startswith(prefix)]
    found = [name for name in found if name not in ("step", "epoch") or name in (classes or ())]  # of Lightning
    names = [*(classes or ()), *(n for n in found if n not in (classes or ()))]
    colors = dict(zip(names, outline_colors(len(names)), strict=True))
    dice = {name: _series(table, [prefix + name], x)[:2] for name in names if name in found}
    drawn = [name for name, (steps, _) in dice.items() if len(steps)]
    never = [name for name in dice if name not in drawn]

    height = max(4.2, 0.9 + 0.155 * (len(drawn) + 1))
    width, left = 10.0, 0.62
    has_mean = len(_series(table, ["val/dice"], x)[0]) > 0
    names_width = 0.6 + 0.068 * max([len("mean") if has_mean else 1.2 * len(_MEAN), *(len(n) for n in drawn)])
    plot = max(2.0, (width - 2 * left - names_width - 0.25) / 2)
    width = 2 * (left + plot) + names_width + 0.25
    bottom, top = 0.55 if not never else 0.75, 0.35
    figure = new_figure(width, height)
    loss_axes, dice_axes = (
        figure.add_axes((at / width, bottom / height, plot / width, (height - bottom - top) / height), label=label)
        for at, label in ((left, "loss"), (2 * left + plot, "dice"))
    )
    for axes, label in ((loss_axes, "loss"), (dice_axes, "Dice")):
        axes.set_title(label if label == "loss" else "validation Dice", fontsize=9, loc="left", fontweight="bold")
        axes.set_xlabel(x_name or "line", fontsize=8)
        axes.tick_params(labelsize=8, color="#999999")
        axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color("#999999")
    _draw_loss(loss_axes, table, x)
    _draw_dice(dice_axes, table, x, {n: (*dice[n], _on_white(colors[n])) for n in drawn}, plot, height - bottom - top)
    used = [axes for axes in (loss_axes, dice_axes) if axes.lines]
    for axes in used:  # both over the same steps
        axes.set_xlim(min(a.get_xlim()[0] for a in used), max(a.get_xlim()[1] for a in used))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if never:
        text = wrap(f"never occurred: {', '.join(never)}", plot + names_width, 8, lines=1)
        figure.text(
            (2 * left + plot) / width,
            0.05 / height,
            text[0],
            fontsize=8,
            color=GREY,
            va="bottom",
            parse_math=False,
        )
    return figure


def _say(axes: "Axes", text: str) -> None:
    axes.set(xticks=[], yticks=[], xlabel="")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)


def _draw_loss(axes: "Axes", table: dict[str, Array], x: Array) -> None:
    steps, values, lost = _series(table, ["train/loss", "train/loss_step", "train/loss_epoch"], x)
    val_steps, val_values, val_lost = _series(table, ["val/loss"], x)

    def label(name: str, count: int) -> str:
        return name + (f" ({count} not finite)" if count else "")

    if len(steps):
        axes.plot(steps, values, color="#9ecae9", linewidth=0.8, label=label("train", lost), gid="train")
        axes.plot(steps, _smooth(values), color="#2171b5", linewidth=1.6, label="train, smoothed", gid="smooth")
    if len(val_steps):
        style: dict[str, Any] = {"color": "#d9480f", "linewidth": 1.1, "marker": "o", "markersize": 4}
        axes.plot(val_steps, val_values, label=label("validation", val_lost), zorder=3, gid="val", **style)
    everything = np.concatenate([values, val_values])
    if not len(everything):
        lost += val_lost
        _say(axes, f"no finite loss ({lost} not finite)" if lost else "no train/loss or val/loss yet")
        return
    if everything.min() > 0 and everything.max() > 30 * everything.min():
        axes.set_yscale("log")
    axes.legend(fontsize=8, loc="upper right", facecolor="white", edgecolor="none", framealpha=0.75)


def _smooth(values: Array) -> Array:
    """Mean of the values around each one, over about a twentieth of all of them and never beyond the ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    result: Array = (total[stop] - total[start]) / (stop - start)
    return result


def _draw_dice(
    axes: "Axes",
    table: dict[str, Array],
    x: Array,
    curves: dict[str, tuple[Array, Array, str]],
    width: float,
    height: float,
) -> None:
    """Draw one curve a class and the mean, with the names right of their ends, ``width`` by ``height`` inches."""
    steps, values, _ = _series(table, ["val/dice"], x)
    mean = "mean"
    if not len(steps) and curves:
        mean = _MEAN
        steps = np.unique(np.concatenate([s for s, _, _ in curves.values()]))
        by_step = [np.concatenate([v[s == step] for s, v, _ in curves.values()]) for step in steps]
        values = np.array([v.mean() for v in by_step])
    axes.set_ylim(-0.02, 1.02)
    if not len(steps):
        _say(axes, "no val/dice yet")
        return
    ends = []
    for name, (at, dice, color) in curves.items():
        axes.plot(at, dice, color=color, linewidth=1.1, marker="o", markersize=2.4, gid=f"dice:{name}")
        ends.append((float(dice[-1]), float(at[-1]), name, color))
    axes.plot(steps, values, color=INK, linewidth=2.2, marker="o", markersize=4, zorder=4, gid="dice")
    ends.append((float(values[-1]), float(steps[-1]), mean, INK))

    # Names stand at the height of the ends of their curves, moved just far enough not to overlap.
    ends.sort()
    step = 0.145 / height
    places = np.array([(end[0] + 0.02) / 1.04 for end in ends])
    places = _spread(places, step)
    for (value, end, name, color), place in zip(ends, places, strict=True):
        axes.annotate(
            f"{value:.2f}  {name}",
            xy=(end, value),
            xycoords="data",
            xytext=(1 + 0.16 / width, place),
            textcoords=axes.transAxes,
            fontsize=8,
            color=color,
            va="center",
            fontweight="bold" if color == INK else "normal",
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": color,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
                "alpha": 0.6,
            },
        )


def _spread(places: Array, step: float) -> Array:
    """Move sorted ``places`` as little as need be until neighbours are ``step`` apart, within 0..1 where they fit."""
    groups: list[list[float]] = []  # [first wanted place summed over members, members]: pool those that collide
    for i, place in enumerate(places):
        groups.append([float(place) - i * step, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + members]
    base = np.concatenate([np.full(int(members), total / members) for total, members in groups])
    room = max(0.0, 1 - (len(places) - 1) * step)
    result: Array = np.clip(base, 0, room) + np.arange(len(places)) * step
    return result


def _on_white(color: str) -> str:
    """The same hue, dark enough for a line on white."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0
    lightness = float(oklab(rgb[None])[0, 0, 0])
    factor = min(1.0, (0.62 / lightness) ** 1.5)
    return "#{:02x}{:02x}{:02x}".format(*(round(v) for v in rgb * factor * 255))
