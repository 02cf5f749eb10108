"""Contact sheets of samples: raw beside the outlines of targets and predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.validation import int_at_least, one_of
from cellmap_lightning.visualization.figures.canvas import (
    GREY,
    LINE_HEIGHT,
    MARGIN,
    TEXT,
    TITLE,
    Array,
    Canvas,
    default_style,
    save,
    wrap,
)
from cellmap_lightning.visualization.figures.legend import UNKNOWN_TEXT, Legend, legend_entries
from cellmap_lightning.visualization.figures.outlines import Overlay
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.panels import Panel
from cellmap_lightning.visualization.figures.samples import OUTLINED, Cut, SheetSample, sample_arrays
from cellmap_lightning.visualization.figures.slices import THRESHOLD, best_row, best_slice, contrast_limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SheetSample", "contact_sheet"]

# Inches: four columns are 10 in = 1400 px wide.
_GAP = 0.2
_COLUMN = {1: 4.4, 2: 3.9, 3: 3.1, 4: 2.27}
_TALLEST = 1.6  # height of a panel over the width of a column, at most
_BELOW = 0.24  # below the panels of a row
_PANEL_TITLE = 0.17  # from a panel's title to the panel


@dataclass(frozen=True, eq=False)
class _Row:
    """One sample with the planes that are drawn of it.

    Attributes:
        xy: the xy slice.
        xz: the xz slice; None for a sample of one slice.
        z: index of the xy slice; None likewise.
        y: index of the row at which xz cuts it.
        limits: intensities of black and white.
        occurring: indices of the classes with a voxel.
        header: text above the row.
        facts: a second line of text: slices, voxel size, unknown classes.
    """

    xy: Cut
    xz: Cut | None
    z: int | None
    y: int
    limits: tuple[float, float]
    occurring: set[int]
    header: str
    facts: str

    @property
    def cuts(self) -> list[Cut]:
        """The planes."""
        return [self.xy] if self.xz is None else [self.xy, self.xz]


def contact_sheet(
    samples: Sequence[SheetSample],
    classes: Sequence[str],
    *,
    path: str | PathLike[str] | None = None,
    title: str | None = None,
    max_rows: int = 6,
    overlay: Overlay = "outline",
    predicted: str = f"prediction ≥ {THRESHOLD:g}",
    colors: Sequence[str] | None = None,
    unknown: str = UNKNOWN_TEXT,
) -> "Figure":
    """Draw samples with the outlines of targets and predictions.

    Each row is one sample: the xy slice of the raw data; the same with the target; the same with the prediction; and an
    xz slice with both, at its true aspect ratio. The xy slice is the one that shows most classes, see `best_slice`; the
    xz slice cuts it along the row between the small triangles, see `best_row`. Target outlines are solid and prediction
    outlines dashed, both exactly on the borders of voxels. Where a mask touches the edge of the image its outline runs
    along that edge. Where outlines coincide, the one of the larger object shows as a rim on either side. Voxels that
    are unknown for every class are dimmed and hatched; those that are unknown for one class, which is annotated
    elsewhere in the sample, are hatched in its colour. A sample without a target or a prediction has fewer panels.

    Args:
        samples: the samples, in order.
        classes: names of the classes, in the order of the first axis of targets and predictions. The n-th class has the
            n-th of `outline_colors` in every sheet.
        path: file to write (``.png``, ``.pdf`` or ``.svg``), or None.
        title: a line above everything.
        max_rows: number of samples that are drawn at most; the title notes if there are more.
        overlay: ``"outline"``, or ``"fill"`` to tint the insides as well.
        predicted: title of the panels of predictions.
        colors: one for each class, as ``"#rrggbb"``, instead of those of `outline_colors`.
        unknown: text of the legend for voxels that are unknown for every class.

    Returns:
        The figure, 1400 px wide with four columns.

    Raises:
        CellMapValueError: there is no sample, or shapes, scales or class names do not fit together.
        MissingExtraError: matplotlib is not installed.
    """
    if isinstance(classes, str):
        raise CellMapTypeError(f"classes must be a sequence of names, not the single text {classes!r}")
    if not samples:
        raise CellMapValueError("A contact sheet needs at least one sample, got none")
    int_at_least("max_rows", max_rows, 1)
    one_of("overlay", overlay, ("outline", "fill"))
    rows = [_row(sample, classes, number) for number, sample in enumerate(samples[:max_rows])]
    notes = [title] if title else []
    if len(samples) > max_rows:
        notes.append(f"the first {max_rows} of {len(samples)} samples")
    with default_style():
        figure = _draw_sheet(rows, classes, " — ".join(notes), overlay, predicted, colors, unknown)
        save(figure, path)
    return figure


def _row(sample: SheetSample, classes: Sequence[str], number: int) -> _Row:
    arrays = sample_arrays(sample, len(classes), f"Sample {number} of the contact sheet")
    target = arrays.stacks.get("target")
    nz, ny, _ = arrays.raw.shape
    z = best_slice(target, arrays.stacks.get("prediction"), arrays.raw.shape)
    xy = arrays.cut(z)
    y = best_row(xy.masks.get("target"), xy.masks.get("prediction"), ny)
    is_flat = nz == 1
    facts = [] if is_flat else [f"xy at z={z} of 0–{nz - 1}", f"xz at y={y} of 0–{ny - 1}"]
    facts.append(" × ".join(f"{s:g}" for s in (arrays.scale[1:] if is_flat else arrays.scale)) + " nm per voxel")
    facts += [] if target is None else _unknown_facts(target, classes)
    return _Row(
        xy=xy,
        xz=None if is_flat else arrays.cut(slice(None), y),
        z=None if is_flat else z,
        y=y,
        limits=contrast_limits(arrays.raw),
        occurring=arrays.occurring,
        header=sample.header,
        facts="   ·   ".join(facts),
    )


def _unknown_facts(target: Array, classes: Sequence[str]) -> list[str]:
    """Return which classes are unknown at voxels where another class is known."""
    if not len(target):
        return []
    somewhere = ~np.isnan(target[0])
    for channel in target[1:]:  # one class at a time: a patch with 48 classes is large
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


# -- drawing


class _Block:
    """A row laid out: its lines of text and the sizes of its panels, in inches.

    Args:
        row: the row.
        column: width of a column.
        width: width of the figure.
    """

    def __init__(self, row: _Row, column: float, width: float) -> None:
        self.row = row
        self.header = wrap(row.header, width, TEXT, bold=True)
        self.facts = wrap(row.facts, width, TEXT)
        self.head = LINE_HEIGHT[TEXT] * (len(self.header) + len(self.facts)) + 0.27
        fits = []
        for cut in row.cuts:
            nm_high, nm_wide = cut.extent_nm
            fits.append(min(column / nm_wide, _TALLEST * column / nm_high))
        # Both planes have one scale, unless xz would become too tall.
        self.inches_per_nm = {"xy": fits[0], "xz": min(fits)}
        tallest = max(self.size("xz" if cut is row.xz else "xy", cut)[0] for cut in row.cuts)
        self.height = self.head + tallest + _BELOW

    def size(self, plane: str, cut: Cut) -> tuple[float, float]:
        """Return height and width of a panel."""
        high, wide = (nm * self.inches_per_nm[plane] for nm in cut.extent_nm)
        return high, wide


def _draw_sheet(
    rows: Sequence[_Row],
    classes: Sequence[str],
    title: str,
    overlay: Overlay,
    predicted: str,
    palette: Sequence[str] | None,
    unknown: str,
) -> "Figure":
    colors = list(palette) if palette is not None else outline_colors(len(classes))
    columns = ["raw", *(name for name in OUTLINED if any(name in row.xy.masks for row in rows))]
    columns += ["xz"] if any(row.xz is not None for row in rows) else []
    column = _COLUMN[len(columns)]
    width = 2 * MARGIN + len(columns) * column + (len(columns) - 1) * _GAP

    # Everything is laid out from the top first, then drawn on a figure of just that height.
    title_lines = wrap(title, width, TITLE, bold=True)
    occurring = set().union(*(row.occurring for row in rows))
    cuts = [cut for row in rows for cut in row.cuts]
    legend = Legend(legend_entries(cuts, occurring, classes, colors, unknown), width)
    blocks = [_Block(row, column, width) for row in rows]
    top = MARGIN * 0.7 + LINE_HEIGHT[TITLE] * len(title_lines)
    canvas = Canvas(width, top + legend.height + sum(block.height for block in blocks) - 0.04)

    canvas.lines(MARGIN * 0.7, title_lines, TITLE, fontweight="bold")
    legend.draw(canvas, top)
    y = top + legend.height
    for number, block in enumerate(blocks):
        if number:
            canvas.rule(y - 0.02)
        below = canvas.lines(y + 0.05, block.header, fontweight="bold")
        canvas.lines(below, block.facts, color=GREY)
        for i, kind in enumerate(kind for kind in columns if _has_panel(kind, block.row)):
            left, panel_top = MARGIN + i * (column + _GAP), y + block.head
            canvas.text(left, panel_top - _PANEL_TITLE, _panel_title(kind, block.row, predicted))
            panel = _panel(canvas, block, kind, left, panel_top, f"{number}:{kind}")
            panel.draw(classes, colors, overlay)
        y += block.height
    return canvas.figure


def _has_panel(kind: str, row: _Row) -> bool:
    """Return True if a sample has something to draw in a column."""
    if kind == "xz":
        return row.xz is not None
    return kind not in OUTLINED or kind in row.xy.masks


def _panel(canvas: Canvas, block: _Block, kind: str, x: float, y: float, label: str) -> Panel:
    """Return the panel at ``(x, y)``, with its scale bar and its marks at the other plane."""
    row = block.row
    plane = "xz" if kind == "xz" else "xy"
    cut = row.xz if plane == "xz" and row.xz is not None else row.xy
    high, wide = block.size(plane, cut)
    if kind in OUTLINED:
        shown: tuple[str, ...] = (kind,)
    else:
        shown = OUTLINED if kind == "xz" else ()
    panel = Panel(canvas.axes(x, y, wide, high, label), cut, shown, row.limits, wide)
    if kind == "raw" or (kind == "xz" and block.inches_per_nm["xy"] != block.inches_per_nm["xz"]):
        panel.draw_scale_bar()
    if kind == "raw" and row.xz is not None:
        panel.mark_line(row.y)
    if kind == "xz" and row.z is not None:
        panel.mark_line(row.z)
    return panel


def _panel_title(kind: str, row: _Row, predicted: str) -> str:
    if kind == "xz":
        return f"xz  y={row.y}" + (": " + ", ".join(row.xy.masks) if row.xy.masks else "")
    at = "" if row.z is None else f"  z={row.z}"
    return {"raw": f"raw{at}", "target": "target", "prediction": predicted}[kind]
