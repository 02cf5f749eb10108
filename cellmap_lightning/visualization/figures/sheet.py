"""Contact sheets of samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.visualization.figures.canvas import (
    GREY,
    INK,
    MARGIN,
    Array,
    FloatArray,
    needs_matplotlib,
    new_figure,
    save,
    wrap,
)
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.panels import DASHES, Cut, Overlay, draw_panel, draw_scale_bar, mark_line
from cellmap_lightning.visualization.figures.slices import THRESHOLD, best_row, best_slice, contrast_limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: four columns are 10 in = 1400 px wide.
_GAP = 0.2
_ENTRY = 0.168  # height of a line of the legend
_COLUMN = {1: 4.4, 2: 3.9, 3: 3.1, 4: 2.27}
_TALLEST = 1.6  # height of a panel over the width of a column, at most


@dataclass(frozen=True, eq=False)
class SheetSample:
    """One row of a contact sheet.

    Attributes:
        raw: Intensities, ``[z, y, x]``, or ``[y, x]`` for a 2D sample.
        target: 1 inside, 0 outside and NaN where nobody knows, ``[class, z, y, x]`` (2D: ``[class, y, x]``), or None.
        prediction: Probabilities of the same shape as ``target``, or None.
        scale: Size of a voxel in nm, in the order ``(z, y, x)``. A 2D sample may give ``(y, x)``.
        header: What this is: dataset, crop, box in the world, transforms. Shown above the row.
    """

    raw: FloatArray
    target: FloatArray | None
    prediction: FloatArray | None
    scale: Sequence[float]
    header: str = ""


@dataclass(frozen=True, eq=False)
class _Row:
    """One sample, checked and cut."""

    xy: Cut
    xz: Cut | None
    z: int | None
    y: int
    limits: tuple[float, float]
    occurs: set[int]
    lines: tuple[str, ...]  # the header, then what the sheet has to say about the sample
    predicted: str  # above the panel of the prediction


def contact_sheet(
    samples: Sequence[SheetSample],
    classes: Sequence[str],
    *,
    path: str | PathLike[str] | None = None,
    title: str | None = None,
    max_rows: int = 6,
    overlay: Overlay = "outline",
    predicted: str = f"prediction > {THRESHOLD:g}",
) -> "Figure":
    """Draw samples with the outlines of what was annotated and of what was predicted.

    Each row is one sample: the xy slice of the raw data; the same with the target; the same with the prediction; and an
    xz slice with both, as tall as it really is. The xy slice is the one that shows most classes, see `best_slice`; the
    xz slice cuts it along the row between the small triangles, see `best_row`. Target
    outlines are solid and prediction outlines dashed, both exactly on the borders of voxels. Where a mask touches the
    edge of the image its outline runs along that edge. Where outlines coincide, the one of the larger object
    shows as a rim on either side. What is unknown for every class is dimmed and hatched. Columns that no sample
    fills are left out.

    Args:
        samples: What to draw, in order.
        classes: Names of the classes, in the order of the first axis of targets and predictions. The n-th class has the
            n-th of `outline_colors` in every sheet.
        path: Where to write the figure (the ending says how: ``.png``, ``.pdf``, ``.svg``), or None.
        title: A line above everything.
        max_rows: Draw at most so many samples, and say so if there are more.
        overlay: ``"outline"``, or ``"fill"`` to tint the insides as well.
        predicted: What stands above the predictions.

    Returns:
        The figure, 1400 px wide with four columns.

    Raises:
        CellMapValueError: There is no sample, or shapes, scales or class names do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    with needs_matplotlib():
        import matplotlib.style

    if isinstance(classes, str):
        raise CellMapTypeError(f"classes must be a sequence of names, not the single text {classes!r}.")
    if not samples:
        raise CellMapValueError("A contact sheet needs at least one sample; there is none.")
    if max_rows < 1:
        raise CellMapValueError(f"max_rows must be at least 1; it is {max_rows}.")
    if overlay not in ("outline", "fill"):
        raise CellMapValueError(f'overlay must be "outline" or "fill", not {overlay!r}.')
    rows = [_prepare(sample, classes, number, predicted) for number, sample in enumerate(samples[:max_rows])]
    notes = [title] if title else []
    if len(samples) > max_rows:
        notes.append(f"the first {max_rows} of {len(samples)} samples")
    with matplotlib.style.context("default"):
        figure = _draw_sheet(rows, classes, " — ".join(notes), overlay)
        save(figure, path)
    return figure


def _numbers(value: Any) -> Array:
    if hasattr(value, "detach"):  # a tensor, maybe bfloat16, maybe on a GPU
        value = value.detach().cpu().float()
    return np.asarray(value)


def _prepare(sample: SheetSample, classes: Sequence[str], number: int, predicted: str) -> _Row:
    where = f"Sample {number} of the contact sheet"
    raw = _numbers(sample.raw)
    if raw.ndim not in (2, 3) or not raw.size:
        raise CellMapValueError(f"{where}: raw must be [z, y, x] or [y, x] and not empty; it has shape {raw.shape}.")
    scale = tuple(float(s) for s in sample.scale)
    if len(scale) not in {3, raw.ndim} or not all(math.isfinite(s) and s > 0 for s in scale):
        raise CellMapValueError(f"{where}: scale must be one positive number of nm for each of z, y, x; it is {scale}.")
    stacks: list[Array | None] = []
    for name, given in (("target", sample.target), ("prediction", sample.prediction)):
        stack = None if given is None else _numbers(given)
        if stack is not None and stack.shape != (len(classes), *raw.shape):
            raise CellMapValueError(
                f"{where}: {name} must have one channel for each of the {len(classes)} classes and then the shape of "
                f"raw, {raw.shape}; it has shape {stack.shape}."
            )
        if stack is not None and raw.ndim == 2:
            stack = stack[:, None]
        stacks.append(stack)
    target, prediction = stacks
    if raw.ndim == 2:
        raw = raw[None]
    nz, ny, _ = raw.shape
    sz, sy, sx = scale if len(scale) == 3 else (1.0, *scale)
    z = best_slice(target, prediction, raw.shape)

    def cut(at: tuple[int | slice, ...], nm: tuple[float, float]) -> Cut:
        t = None if target is None else target[(slice(None), *at)]
        p = None if prediction is None else prediction[(slice(None), *at)]
        return Cut(
            raw=raw[at],
            target=None if t is None else t > THRESHOLD,
            prediction=None if p is None else p > THRESHOLD,
            unknown=None if t is None or not len(t) else np.asarray(np.isnan(t).all(axis=0), dtype=bool),
            nm=nm,
        )

    xy = cut((z,), (sy, sx))
    y = best_row(xy.target, xy.prediction, ny)
    occurs = {
        c
        for stack in (target, prediction)
        if stack is not None
        for c, channel in enumerate(stack)
        if (channel > THRESHOLD).any()
    }
    facts = []
    if nz > 1:
        facts += [f"xy at z={z} of 0–{nz - 1}", f"xz at y={y} of 0–{ny - 1}"]
    facts.append(" × ".join(f"{s:g}" for s in (scale if nz > 1 else (sy, sx))) + " nm per voxel")
    facts += _unknown_facts(target, classes)
    return _Row(
        xy=xy,
        xz=cut((slice(None), y), (sz, sx)) if nz > 1 else None,
        z=z if nz > 1 else None,
        y=y,
        limits=contrast_limits(raw),
        occurs=occurs,
        lines=(sample.header, "   ·   ".join(facts)),
        predicted=predicted,
    )


def _unknown_facts(target: Array | None, classes: Sequence[str]) -> list[str]:
    """Say which classes are unknown where another class is known."""
    if target is None or not len(target):
        return []
    somewhere = ~np.isnan(target[0])
    for channel in target[1:]:
        somewhere |= ~np.isnan(channel)
    total = int(somewhere.sum())
    if not total:
        return ["nothing is annotated here"]
    whole, partly = [], []
    for name, channel in zip(classes, target, strict=True):
        missing = int((np.isnan(channel) & somewhere).sum())
        if missing == total:
            whole.append(name)
        elif missing:
            percent = 100 * missing / total
            partly.append(f"{name} ({'<1' if percent < 1 else f'{min(percent, 99):.0f}'} %)")
    facts = []
    for word, names in (("unknown", whole), ("partly unknown", partly)):
        if names:
            more = f" + {len(names) - 6} more" if len(names) > 7 else ""
            facts.append(f"{word}: " + ", ".join(names[:6] if more else names) + more)
    return facts


def _draw_sheet(rows: Sequence[_Row], classes: Sequence[str], title: str, overlay: Overlay) -> "Figure":
    colors = outline_colors(len(classes))
    columns: list[str] = ["raw"]
    columns += ["target"] if any(row.xy.target is not None for row in rows) else []
    columns += ["prediction"] if any(row.xy.prediction is not None for row in rows) else []
    columns += ["xz"] if any(row.xz is not None for row in rows) else []
    column = _COLUMN[len(columns)]
    width = 2 * MARGIN + len(columns) * column + (len(columns) - 1) * _GAP

    # Everything is laid out in inches from the top, then drawn on a figure of just that height.
    title_lines = wrap(title, width, 11, bold=True) if title else []
    legend = _legend_entries(rows, classes, colors)
    legend_columns, legend_rows = _legend_shape([label for _, label in legend], width)
    heights = []
    wrapped = []
    for row in rows:
        scale = _inches_per_nm(row, column)
        tallest = max(c.extent_nm[0] * s for c, s in zip((row.xy, row.xz), scale, strict=True) if c is not None)
        lines = [wrap(line, width, 8, bold=not i) for i, line in enumerate(row.lines)]
        wrapped.append(lines)
        heights.append((0.155 * sum(map(len, lines)) + 0.27, tallest))
    top = MARGIN * 0.7 + 0.22 * len(title_lines) + (_ENTRY * legend_rows + 0.06 if legend else 0)
    height = top + sum(head + tallest + 0.24 for head, tallest in heights) - 0.04
    figure = new_figure(width, height)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        options: dict[str, Any] = {"va": "top", "ha": "left", "color": INK, "parse_math": False, **style}
        figure.text(x / width, 1 - y / height, text, **options)

    for i, line in enumerate(title_lines):
        write(MARGIN, MARGIN * 0.7 + 0.22 * i, line, fontsize=11, fontweight="bold")
    if legend:
        _draw_legend(figure, legend, legend_columns, (MARGIN / width, 1 - (top - _ENTRY * legend_rows - 0.06) / height))

    y = top
    for number, (row, lines, (head, tallest)) in enumerate(zip(rows, wrapped, heights, strict=True)):
        if number:
            figure.add_artist(_rule(MARGIN / width, 1 - MARGIN / width, 1 - (y - 0.02) / height))
        at = y + 0.05
        for block, color in zip(lines, (INK, GREY), strict=True):
            for line in block:
                write(MARGIN, at, line, fontsize=8, color=color, fontweight="bold" if color == INK else "normal")
                at += 0.155
        panels = y + head
        scale = _inches_per_nm(row, column)
        for i, kind in enumerate(columns):
            left = MARGIN + i * (column + _GAP)
            cut = row.xz if kind == "xz" else row.xy
            absent = (
                cut is None
                or (kind == "target" and cut.target is None)
                or (kind == "prediction" and cut.prediction is None)
            )
            if cut is None or absent:
                write(left, panels - 0.17, "no slice along z" if kind == "xz" else f"no {kind}", fontsize=8, color=GREY)
                continue
            inches_per_nm = scale[1 if kind == "xz" else 0]
            h, w = (e * inches_per_nm for e in cut.extent_nm)
            axes = figure.add_axes((left / width, 1 - (panels + h) / height, w / width, h / height))
            axes.set_label(f"{number}:{kind}")
            write(left, panels - 0.17, _panel_title(kind, row), fontsize=8, color=INK)
            draw_panel(axes, cut, kind, row.limits, classes, colors, overlay, w)
            if kind == "raw" or (kind == "xz" and scale[0] != scale[1]):
                draw_scale_bar(axes, cut, w)
            if kind == "raw" and row.xz is not None:
                mark_line(axes, row.y)
            if kind == "xz" and row.z is not None:
                mark_line(axes, row.z)
        y = panels + tallest + 0.24
    return figure


def _rule(x0: float, x1: float, y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([x0, x1], [y, y], color="#d0d0d0", linewidth=0.6)


def _inches_per_nm(row: _Row, column: float) -> tuple[float, float]:
    """How large the xy and the xz panel are drawn: alike, unless one of them would become too tall."""
    fits = []
    for cut in (row.xy, row.xz or row.xy):
        height, width = cut.extent_nm
        fits.append(min(column / width, _TALLEST * column / height))
    return fits[0], min(fits)


def _panel_title(kind: str, row: _Row) -> str:
    at = "" if row.z is None else f"  z={row.z}"
    if kind != "xz":
        return {"raw": f"raw{at}", "target": "target", "prediction": row.predicted}[kind]
    drawn = [n for n, s in (("target", row.xy.target), ("prediction", row.xy.prediction)) if s is not None]
    return f"xz  y={row.y}" + (": " + ", ".join(drawn) if drawn else "")


def _legend_entries(
    rows: Sequence[_Row], classes: Sequence[str], colors: Sequence[str]
) -> list[tuple[dict[str, Any], str]]:
    """What to explain: (how it is drawn, what it is)."""
    cuts = [cut for row in rows for cut in (row.xy, row.xz) if cut is not None]
    stacks = [stack for cut in cuts for stack in (cut.target, cut.prediction) if stack is not None]
    if not stacks:
        return []
    occurs = set().union(*(row.occurs for row in rows))
    shown = {c for stack in stacks for c in np.flatnonzero(stack.any(axis=(1, 2))).tolist()}
    entries: list[tuple[dict[str, Any], str]] = [
        ({"color": colors[c], "linewidth": 2.4}, name + ("" if c in shown else " (off slice)"))
        for c, name in enumerate(classes)
        if c in occurs
    ]
    absent = len(classes) - len(occurs)
    if absent:
        entries.append(({"color": "none"}, f"+ {absent} absent"))
    if any(cut.target is not None for cut in cuts):
        entries.append(({"color": GREY, "linewidth": 1.2}, "target"))
    if any(cut.prediction is not None for cut in cuts):
        entries.append(({"color": GREY, "linewidth": 1.2, "linestyle": DASHES}, "prediction"))
    if any(cut.unknown is not None and cut.unknown.any() for cut in cuts):
        entries.append(({"hatch": True}, "unknown for every class"))
    return entries


def _legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    if not labels:
        return 1, 0
    entry = 0.55 + 0.066 * max(map(len, labels))
    columns = max(1, min(len(labels), int((width - 2 * MARGIN) / entry)))
    rows = math.ceil(len(labels) / columns)
    return math.ceil(len(labels) / rows), rows


def _draw_legend(
    figure: "Figure", entries: Sequence[tuple[dict[str, Any], str]], columns: int, corner: tuple[float, float]
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for style, _ in entries:
        if "hatch" in style:
            handles.append(Patch(facecolor="#8a8a8a", edgecolor="white", hatch="//////", linewidth=0))
        else:
            handles.append(Line2D([], [], **style))
    legend = figure.legend(
        handles,
        [f"entry {i}" for i in range(len(entries))],
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=columns,
        frameon=False,
        fontsize=8,
        handlelength=1.9,
        handletextpad=0.5,
        columnspacing=1.4,
        labelspacing=0.45,
        borderpad=0.0,
        borderaxespad=0.0,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)  # a name may hold a dollar sign or begin with an underscore
        text.set_text(label)
        text.set_color(INK)
