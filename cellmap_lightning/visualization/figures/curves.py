"""Training curves: loss, and the Dice of each class, over steps."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellmap_lightning.visualization.figures.canvas import GREY, INK, TEXT, Array, Canvas, default_style, save, wrap
from cellmap_lightning.visualization.figures.metrics import Metrics, Series
from cellmap_lightning.visualization.figures.palette import hex_of, oklab, outline_colors, rgb_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PREFIX = "val/dice_"
_MEAN = "mean of classes"
#: Inches: width of the figure, left of each plot, above the plots, and between the names of curves and the edge.
_WIDTH, _LEFT, _TOP, _RIGHT = 10.0, 0.62, 0.4, 0.25


def training_curves(
    metrics_csv: str | PathLike[str] | Sequence[str | PathLike[str]],
    path: str | PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> "Figure":
    """Draw the loss and the Dice of each class from the ``metrics.csv`` of Lightning's ``CSVLogger``.

    The columns are ``step`` (else ``epoch``, else the number of the line), ``train/loss`` (else ``train/loss_step``,
    ``train/loss_epoch``), ``val/loss``, ``val/dice`` and ``val/dice_<class>``, or the same with ``_`` in place of the
    slash. Any of them may be missing, cells may be empty or NaN. Without ``val/dice`` the mean of the classes is drawn.
    Losses that are not finite are counted in the legend; classes without any value are named below the plot.

    Args:
        metrics_csv: the file; or those of all starts of a run, in their order, as ``[metrics.1.csv, metrics.csv]``.
        path: file to write the figure to, or None.
        classes: names in the order of the contact sheets, to get the same colours; else the order of the columns.

    Returns:
        A figure with two axes: loss and Dice over steps.

    Raises:
        CellMapFileNotFoundError: the file does not exist.
        MissingExtraError: matplotlib is not installed.
    """
    files = [metrics_csv] if isinstance(metrics_csv, str | PathLike) else metrics_csv
    metrics = Metrics([Path(file) for file in files])
    with default_style():
        figure = _draw_curves(metrics, classes or ())
        save(figure, path)
    return figure


def _draw_curves(metrics: Metrics, classes: Sequence[str]) -> "Figure":
    dice, colors = _dice_by_class(metrics, classes)
    drawn = {name: series for name, series in dice.items() if len(series)}
    never = [name for name in dice if name not in drawn]
    mean_name, mean = _mean_dice(metrics, drawn)

    # The names at the ends of the Dice curves need a column of their width, and a height at which none overlap.
    longest = 1.2 * len(_MEAN) if mean_name == _MEAN else len(mean_name)
    names_width = 0.6 + 0.068 * max([longest, *map(len, drawn)])
    plot = max(2.0, (_WIDTH - 2 * _LEFT - names_width - _RIGHT) / 2)
    bottom = 0.75 if never else 0.55
    canvas = Canvas(2 * (_LEFT + plot) + names_width + _RIGHT, max(4.2, 0.9 + 0.155 * (len(drawn) + 1)))
    plot_height = canvas.height - bottom - _TOP
    loss_axes = canvas.axes(_LEFT, _TOP, plot, plot_height, "loss")
    dice_axes = canvas.axes(2 * _LEFT + plot, _TOP, plot, plot_height, "dice")
    _style_axes(loss_axes, "loss", metrics.x_name)
    _style_axes(dice_axes, "validation Dice", metrics.x_name)

    _draw_loss(loss_axes, metrics)
    dice_axes.set_ylim(-0.02, 1.02)
    if len(mean):
        ends = _draw_dice(dice_axes, drawn, colors, mean_name, mean)
        _label_ends(dice_axes, ends, plot, plot_height)
    else:
        _write_note(dice_axes, "no val/dice in metrics.csv")
    _share_steps([axes for axes in (loss_axes, dice_axes) if axes.lines])
    if never:
        text = wrap(f"never occurred: {', '.join(never)}", plot + names_width, TEXT, lines=1)
        canvas.text(2 * _LEFT + plot, canvas.height - 0.05, text[0], color=GREY, va="bottom")
    return canvas.figure


def _dice_by_class(metrics: Metrics, classes: Sequence[str]) -> tuple[dict[str, Series], dict[str, str]]:
    """Return the Dice of each class that has a column, and the colour of its curve."""
    recorded = [name.removeprefix(_PREFIX) for name in metrics.names if name.startswith(_PREFIX)]
    # Lightning adds columns `_step` and `_epoch` for a metric that it logs both ways; they are not classes.
    recorded = [name for name in recorded if name not in ("step", "epoch") or name in classes]
    names = [*classes, *(name for name in recorded if name not in classes)]
    colors = dict(zip(names, map(_on_white, outline_colors(len(names))), strict=True))
    return {name: metrics.series(_PREFIX + name) for name in names if name in recorded}, colors


def _mean_dice(metrics: Metrics, drawn: Mapping[str, Series]) -> tuple[str, Series]:
    """Return the mean Dice that was logged, else the mean of the classes at each step, with its name."""
    mean = metrics.series("val/dice")
    if len(mean):
        return "mean", mean
    if not drawn:
        return _MEAN, mean
    steps = np.unique(np.concatenate([series.steps for series in drawn.values()]))
    by_step = [np.concatenate([series.values[series.steps == step] for series in drawn.values()]) for step in steps]
    return _MEAN, Series(steps, np.array([values.mean() for values in by_step]), 0)


def _style_axes(axes: "Axes", title: str, x_name: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
    axes.set_xlabel(x_name, fontsize=TEXT)
    axes.tick_params(labelsize=TEXT, color="#999999")
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")


def _share_steps(axes: Sequence["Axes"]) -> None:
    """Give axes the same horizontal limits, with whole steps as ticks."""
    from matplotlib.ticker import MaxNLocator

    for one in axes:
        one.set_xlim(min(a.get_xlim()[0] for a in axes), max(a.get_xlim()[1] for a in axes))
        one.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _write_note(axes: "Axes", text: str) -> None:
    axes.set(xticks=[], yticks=[], xlabel="")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)


def _draw_loss(axes: "Axes", metrics: Metrics) -> None:
    train = metrics.series("train/loss", "train/loss_step", "train/loss_epoch")
    val = metrics.series("val/loss")

    def label(name: str, lost: int) -> str:
        return name + (f"\n({lost} not finite)" if lost else "")

    if len(train):
        axes.plot(
            train.steps, train.values, color="#9ecae9", linewidth=0.8, label=label("train", train.lost), gid="train"
        )
        axes.plot(
            train.steps, _smooth(train.values), color="#2171b5", linewidth=1.6, label="train, smoothed", gid="smooth"
        )
    if len(val):
        axes.plot(
            val.steps, val.values, color="#d9480f", linewidth=1.1, marker="o", markersize=4, zorder=3,
            label=label("validation", val.lost), gid="val",
        )  # fmt: skip
    values = np.concatenate([train.values, val.values])
    if not len(values):
        lost = train.lost + val.lost
        _write_note(axes, f"no finite loss ({lost} not finite)" if lost else "no train/loss or val/loss in metrics.csv")
        return
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    # Above the curves, right of the title: within the axes it would cover some of them.
    axes.legend(
        fontsize=TEXT, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1, frameon=False,
        handlelength=1, columnspacing=0.6, handletextpad=0.4, borderpad=0.1,
    )  # fmt: skip


def _smooth(values: Array) -> Array:
    """Return the mean of the values around each one, over about a twentieth of all of them, cut off at the ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    result: Array = (total[stop] - total[start]) / (stop - start)
    return result


#: End of a curve: last value, last step, name, colour.
_End = tuple[float, float, str, str]


def _draw_dice(
    axes: "Axes", drawn: Mapping[str, Series], colors: Mapping[str, str], mean_name: str, mean: Series
) -> list[_End]:
    """Draw one curve a class and the mean, and return their ends."""
    ends = []
    for name, series in drawn.items():
        axes.plot(
            series.steps, series.values, color=colors[name], linewidth=1.1, marker="o", markersize=2.4,
            gid=f"dice:{name}",
        )  # fmt: skip
        ends.append((float(series.values[-1]), float(series.steps[-1]), name, colors[name]))
    axes.plot(mean.steps, mean.values, color=INK, linewidth=2.2, marker="o", markersize=4, zorder=4, gid="dice")
    return [*ends, (float(mean.values[-1]), float(mean.steps[-1]), mean_name, INK)]


def _label_ends(axes: "Axes", ends: Sequence[_End], width: float, height: float) -> None:
    """Write names right of the ends of curves, moved just far enough not to overlap; sizes of the axes in inches."""
    ends = sorted(ends)
    places = _spread(np.array([(value + 0.02) / 1.04 for value, *_ in ends]), 0.145 / height)
    for (value, step, name, color), place in zip(ends, places, strict=True):
        axes.annotate(
            f"{value:.2f}  {name}",
            xy=(step, value),
            xycoords="data",
            xytext=(1 + 0.16 / width, place),
            textcoords=axes.transAxes,
            fontsize=TEXT,
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
    """Move sorted places as little as possible until neighbours are ``step`` apart, within 0..1 where they fit.

    With ``step * i`` subtracted from place i, the result has to be non-decreasing: an isotonic regression, solved by
    pooling adjacent violators into groups that share the mean of their members.
    """
    groups: list[tuple[float, int]] = []  # sum over the members, number of members
    for i, place in enumerate(places):
        groups.append((float(place) - i * step, 1))
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1] = (groups[-1][0] + total, groups[-1][1] + members)
    base = np.concatenate([np.full(members, total / members) for total, members in groups])
    highest_start = max(0.0, 1 - (len(places) - 1) * step)
    result: Array = np.clip(base, 0, highest_start) + np.arange(len(places)) * step
    return result


def _on_white(color: str) -> str:
    """Return the same hue, dark enough for a line on white."""
    rgb = rgb_of(color)
    lightness = float(oklab(rgb[None])[0, 0, 0])
    factor = min(1.0, (0.62 / lightness) ** 1.5)
    return hex_of(round(v) for v in rgb * factor * 255)
