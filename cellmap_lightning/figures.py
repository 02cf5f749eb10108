"""Figures for people: contact sheets of samples and curves of a training.

Both are drawn with matplotlib's object interface on an Agg canvas. Neither touches pyplot, the backend or the caller's
style settings, so they may be called in the middle of a training, in a notebook or without a display. matplotlib comes
with the optional extra ``train``; this module can be imported without it.
"""

import csv
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapTypeError, CellMapValueError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as MplPath

__all__ = [
    "SheetSample",
    "best_row",
    "best_slice",
    "contact_sheet",
    "contrast_limits",
    "outline_colors",
    "outline_paths",
    "scale_bar_nm",
    "training_curves",
]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
Overlay = Literal["outline", "fill"]

THRESHOLD = 0.5
"""A voxel belongs to a class where its probability is greater than this."""

# Inches, points and dots per inch of the sheets: four columns are 10 in = 1400 px wide.
_DPI = 140
_MARGIN = 0.16
_GAP = 0.2
_ENTRY = 0.168  # height of a line of the legend
_COLUMN = {1: 4.4, 2: 3.9, 3: 3.1, 4: 2.27}
_TALLEST = 1.6  # height of a panel over the width of a column, at most
_LINE = 0.9  # points
_RIM = 1.5  # points by which an outline is widened for each other one on top of it
_INK, _GREY = "#1a1a1a", "#666666"
_MEAN = "mean of classes"
_DASHES = (0, (3.0, 1.2))


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


# ---------------------------------------------------------------------------------------------------------------------
# Pure helpers


def scale_bar_nm(extent_nm: float) -> float:
    """Choose a round length for a scale bar.

    Args:
        extent_nm: Width of the image in nm.

    Returns:
        The greatest of 1, 2 and 5 times a power of ten, in nm, that is at most 0.4 of the width.
    """
    if not (math.isfinite(extent_nm) and extent_nm > 0):
        raise CellMapValueError(f"The width of an image must be a positive number of nm, not {extent_nm}.")
    limit = 0.4 * extent_nm * (1 + 1e-9)
    power = math.floor(math.log10(limit))
    return max(
        factor * 10.0**exponent
        for exponent in (power - 1, power)
        for factor in (1, 2, 5)
        if factor * 10.0**exponent <= limit
    )


def contrast_limits(raw: FloatArray) -> tuple[float, float]:
    """Find the intensities to show as black and white.

    Args:
        raw: Intensities of any shape.

    Returns:
        The 0.5 and the 99.5 percentile of the finite values. Exact zeros are left out where they look like padding:
        where they are more than 2 % of the voxels but not nearly all of them. The two always differ.
    """
    values = np.asarray(raw).ravel()
    values = values[:: max(1, values.size // 2_000_000)].astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    content = values[values != 0]
    if 0.005 * values.size < content.size < 0.98 * values.size and np.unique(content[:10_000]).size > 2:
        values = content
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if high > low:
        return low, high
    low, high = float(values.min()), float(values.max())
    if high > low:
        return low, high
    pad = max(1.0, abs(low))  # one value everywhere: mid-grey
    return low - pad, high + pad


def best_slice(target: FloatArray | None, prediction: FloatArray | None, shape: Sequence[int]) -> int:
    """Choose the xy slice that shows most.

    The slice with most classes in the target wins, then with most foreground in the target, then with most classes and
    foreground in the prediction, then with most annotated voxels, then the one nearest to the middle.

    Args:
        target: ``[class, z, y, x]`` with 0, 1 and NaN, or None.
        prediction: Probabilities ``[class, z, y, x]``, or None.
        shape: Number of voxels ``(z, y, x)``.

    Returns:
        Index of the slice along z, in voxels.
    """
    n = shape[0]
    keys: list[Array] = []
    known = np.zeros(n, dtype=np.int64)
    for stack in (target, prediction):
        classes, voxels = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        if stack is not None:
            for channel in stack:  # one class at a time: a patch with 48 classes is large
                inside = (channel > THRESHOLD).sum(axis=(1, 2))
                classes += inside > 0
                voxels += inside
                if stack is target:
                    known += (~np.isnan(channel)).sum(axis=(1, 2))
        keys += [classes, voxels]
    return _greatest([*keys, known])


def best_row(target: BoolArray | None, prediction: BoolArray | None, rows: int) -> int:
    """Choose the row of an xy slice where an xz slice shows most.

    The row wins in which the number of classes times the number of pixels inside any class is greatest, so that it
    crosses objects rather than grazes them; a class that fills more than nine tenths of the slice lends no pixels. The
    prediction decides where the target does not, then the distance to the middle.

    Args:
        target: Masks ``[class, y, x]``, or None.
        prediction: Masks ``[class, y, x]``, or None.
        rows: Number of rows.

    Returns:
        Index of the row, in voxels.
    """
    keys: list[Array] = []
    for masks in (target, prediction):
        if masks is not None:
            classes = masks.any(axis=2).sum(axis=0)
            objects = masks[masks.mean(axis=(1, 2)) < 0.9]
            keys += [classes * objects.any(axis=0).sum(axis=1), classes]
    return _greatest([*keys, np.zeros(rows)])


def _greatest(keys: Sequence[Array]) -> int:
    """Index of the greatest by the first key, then by the next ones, then nearest to the middle, then the first."""
    index = np.arange(len(keys[0]))
    order = np.lexsort([-index, -np.abs(2 * index - (len(index) - 1)), *keys[::-1]])
    return int(order[-1])


def outline_paths(mask: npt.ArrayLike) -> list[npt.NDArray[np.float64]]:
    """Trace the border of a mask along the edges of its pixels.

    Args:
        mask: Boolean ``[y, x]``. Pixel ``(j, i)`` covers ``[i - 0.5, i + 0.5]`` by ``[j - 0.5, j + 0.5]``.

    Returns:
        Closed polygons ``[corner, 2]`` as (x, y) in pixels, the first corner repeated at the end. Every coordinate is
        a half-integer: the corners are corners of pixels. Holes run the other way round than outer borders. Where the
        mask touches the edge of the image the polygon runs along that edge.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _needs_matplotlib():
        from contourpy import LineType, contour_generator

    inside = np.asarray(mask, dtype=bool)
    if inside.ndim != 2:
        raise CellMapValueError(f"A mask to be outlined has two axes, y and x; this one has shape {inside.shape}.")
    if not inside.any():
        return []
    height, width = inside.shape
    generator = contour_generator(
        x=np.arange(-1, width + 1),
        y=np.arange(-1, height + 1),
        z=np.pad(inside, 1).astype(np.float64),
        line_type=LineType.Separate,
    )
    paths = []
    for line in generator.lines(0.5):
        # The contour goes from the middle of one pixel edge to the middle of the next one. Between the middles of a
        # vertical and a horizontal edge lies the corner that both share; two edges in line need no point between.
        points = np.asarray(line, dtype=np.float64)
        a, b = points[:-1], points[1:]
        a_vertical, b_vertical = a[:, 0] % 1 == 0.5, b[:, 0] % 1 == 0.5
        x = np.where(a_vertical, a[:, 0], b[:, 0])
        y = np.where(a_vertical, b[:, 1], a[:, 1])
        corners = np.stack([x, y], axis=1)[a_vertical != b_vertical]
        paths.append(np.concatenate([corners, corners[:1]]))
    return paths


def outline_colors(n: int) -> list[str]:
    """Colours for ``n`` classes that stay apart on grey images and for colour-blind readers.

    The first six are from the palette of Okabe and Ito; each further one is as far as can be from all before it, to
    normal sight as well as with red or green blindness. The first colours do not depend on ``n``.

    Args:
        n: Number of classes.

    Returns:
        ``n`` colours as ``"#rrggbb"``, all different up to n = 400.
    """
    if n < 0:
        raise CellMapValueError(f"The number of colours must not be negative; it is {n}.")
    palette = _palette(64 if n <= 64 else 400)
    return [palette[i % len(palette)] for i in range(n)]


@lru_cache(maxsize=2)
def _palette(n: int) -> tuple[str, ...]:
    base = ["#56b4e9", "#e69f00", "#00c48c", "#f0e442", "#ff6a3d", "#e583c0"]
    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(grid / 255.0)[0]
    # Neither greyish, which the raw image is, nor so dark as a membrane.
    grid = grid[(lab[:, 0] > 0.62) & (lab[:, 0] < 0.95) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.085)]
    chosen = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in base])
    views, nearest = _oklab(grid / 255.0), np.full(len(grid), np.inf)
    for view in np.moveaxis(_oklab(chosen / 255.0), 1, 0):
        nearest = np.minimum(nearest, _distance(views, view))
    colors = list(base)
    while len(colors) < n:
        best = int(nearest.argmax())
        colors.append("#{:02x}{:02x}{:02x}".format(*grid[best]))
        nearest = np.minimum(nearest, _distance(views, views[:, best]))
    return tuple(colors)


def _distance(views: Array, one: Array) -> Array:
    """Distance of each colour of ``views`` (``[sight, colour, 3]``) to ``one``, blind sights counting half as much."""
    apart = np.linalg.norm(views - one[:, None], axis=-1)
    result: Array = np.minimum(apart[0], 2 * apart[1:].min(axis=0))
    return result


def _oklab(rgb: Array) -> Array:
    """Colours ``[colour, 3]`` in 0..1 as OKLab ``[sight, colour, 3]``: normal, protanopia, deuteranopia (Machado)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    sights = np.array(
        [
            [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
            [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        ]
    )
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    seen = np.clip(np.einsum("sij,nj->sni", sights, linear), 0, 1)
    result: Array = np.cbrt(seen @ to_lms.T) @ to_lab.T
    return result


# ---------------------------------------------------------------------------------------------------------------------
# matplotlib, politely


@contextmanager
def _needs_matplotlib() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            'Figures need matplotlib, which is not installed: pip install "cellmap-lightning[train]".'
        ) from error


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | PathLike[str] | None) -> None:
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=_DPI, facecolor="white")


# ---------------------------------------------------------------------------------------------------------------------
# The contact sheet


@dataclass(frozen=True, eq=False)
class _Cut:
    """One plane of a sample: what is drawn in a panel."""

    raw: Array  # [row, column]
    target: BoolArray | None  # [class, row, column]
    prediction: BoolArray | None
    unknown: BoolArray | None  # [row, column], unknown for every class
    nm: tuple[float, float]  # size of a pixel (row, column)

    @property
    def extent_nm(self) -> tuple[float, float]:
        return self.raw.shape[0] * self.nm[0], self.raw.shape[1] * self.nm[1]


@dataclass(frozen=True, eq=False)
class _Row:
    """One sample, checked and cut."""

    xy: _Cut
    xz: _Cut | None
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
    with _needs_matplotlib():
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
        _save(figure, path)
    return figure


def picture_grid(
    rows: Sequence[Sequence[Array]],
    columns: Sequence[str],
    headers: Sequence[str],
    *,
    path: str | PathLike[str] | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw images side by side, each row in the grey values of its first one.

    Args:
        rows: images ``[z, y, x]``, of which the middle slice is drawn, or ``[y, x]``.
        columns: what the images of a column are.
        headers: what each row is.
        path: where to write the figure, or None.
        title: a line above everything.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _needs_matplotlib():
        import matplotlib.style

    with matplotlib.style.context("default"):
        figure = _new_figure(2.6 * len(columns), 2.8 * len(rows) + 0.4)
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for number, images in enumerate(rows):
            flat = [image[len(image) // 2] if image.ndim == 3 else image for image in images]
            for axis, image, column in zip(axes[number], flat, columns, strict=True):
                axis.imshow(image, cmap="gray", vmin=flat[0].min(), vmax=flat[0].max())
                axis.set_axis_off()
                axis.set_title(column if number == 0 else "", fontsize=9)
            axes[number][0].text(0, 1.01, "" if number == 0 else headers[number], transform=axes[number][0].transAxes)
        figure.suptitle(title or "", fontsize=10)
        figure.tight_layout()
        _save(figure, path)
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

    def cut(at: tuple[int | slice, ...], nm: tuple[float, float]) -> _Cut:
        t = None if target is None else target[(slice(None), *at)]
        p = None if prediction is None else prediction[(slice(None), *at)]
        return _Cut(
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
    width = 2 * _MARGIN + len(columns) * column + (len(columns) - 1) * _GAP

    # Everything is laid out in inches from the top, then drawn on a figure of just that height.
    title_lines = _wrap(title, width, 11, bold=True) if title else []
    legend = _legend_entries(rows, classes, colors)
    legend_columns, legend_rows = _legend_shape([label for _, label in legend], width)
    heights = []
    wrapped = []
    for row in rows:
        scale = _inches_per_nm(row, column)
        tallest = max(c.extent_nm[0] * s for c, s in zip((row.xy, row.xz), scale, strict=True) if c is not None)
        lines = [_wrap(line, width, 8, bold=not i) for i, line in enumerate(row.lines)]
        wrapped.append(lines)
        heights.append((0.155 * sum(map(len, lines)) + 0.27, tallest))
    top = _MARGIN * 0.7 + 0.22 * len(title_lines) + (_ENTRY * legend_rows + 0.06 if legend else 0)
    height = top + sum(head + tallest + 0.24 for head, tallest in heights) - 0.04
    figure = _new_figure(width, height)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        options: dict[str, Any] = {"va": "top", "ha": "left", "color": _INK, "parse_math": False, **style}
        figure.text(x / width, 1 - y / height, text, **options)

    for i, line in enumerate(title_lines):
        write(_MARGIN, _MARGIN * 0.7 + 0.22 * i, line, fontsize=11, fontweight="bold")
    if legend:
        _draw_legend(
            figure, legend, legend_columns, (_MARGIN / width, 1 - (top - _ENTRY * legend_rows - 0.06) / height)
        )

    y = top
    for number, (row, lines, (head, tallest)) in enumerate(zip(rows, wrapped, heights, strict=True)):
        if number:
            figure.add_artist(_rule(_MARGIN / width, 1 - _MARGIN / width, 1 - (y - 0.02) / height))
        at = y + 0.05
        for block, color in zip(lines, (_INK, _GREY), strict=True):
            for line in block:
                write(_MARGIN, at, line, fontsize=8, color=color, fontweight="bold" if color == _INK else "normal")
                at += 0.155
        panels = y + head
        scale = _inches_per_nm(row, column)
        for i, kind in enumerate(columns):
            left = _MARGIN + i * (column + _GAP)
            cut = row.xz if kind == "xz" else row.xy
            absent = (
                cut is None
                or (kind == "target" and cut.target is None)
                or (kind == "prediction" and cut.prediction is None)
            )
            if cut is None or absent:
                write(
                    left, panels - 0.17, "no slice along z" if kind == "xz" else f"no {kind}", fontsize=8, color=_GREY
                )
                continue
            inches_per_nm = scale[1 if kind == "xz" else 0]
            h, w = (e * inches_per_nm for e in cut.extent_nm)
            axes = figure.add_axes((left / width, 1 - (panels + h) / height, w / width, h / height))
            axes.set_label(f"{number}:{kind}")
            write(left, panels - 0.17, _panel_title(kind, row), fontsize=8, color=_INK)
            _draw_panel(axes, cut, kind, row.limits, classes, colors, overlay, w)
            if kind == "raw" or (kind == "xz" and scale[0] != scale[1]):
                _draw_scale_bar(axes, cut, w)
            if kind == "raw" and row.xz is not None:
                _mark_line(axes, row.y)
            if kind == "xz" and row.z is not None:
                _mark_line(axes, row.z)
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


def _wrap(text: str, width: float, points: float, *, bold: bool = False, lines: int = 3) -> list[str]:
    characters = max(20, int((width - 2 * _MARGIN) / (points * (0.0098 if bold else 0.0086))))
    parts = [part for line in text.splitlines() for part in textwrap.wrap(line, characters)]
    return parts if len(parts) <= lines else [*parts[: lines - 1], parts[lines - 1][: characters - 2] + " …"]


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
        entries.append(({"color": _GREY, "linewidth": 1.2}, "target"))
    if any(cut.prediction is not None for cut in cuts):
        entries.append(({"color": _GREY, "linewidth": 1.2, "linestyle": _DASHES}, "prediction"))
    if any(cut.unknown is not None and cut.unknown.any() for cut in cuts):
        entries.append(({"hatch": True}, "unknown for every class"))
    return entries


def _legend_shape(labels: Sequence[str], width: float) -> tuple[int, int]:
    if not labels:
        return 1, 0
    entry = 0.55 + 0.066 * max(map(len, labels))
    columns = max(1, min(len(labels), int((width - 2 * _MARGIN) / entry)))
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
        text.set_color(_INK)


def _draw_panel(
    axes: "Axes",
    cut: _Cut,
    kind: str,
    limits: tuple[float, float],
    classes: Sequence[str],
    colors: Sequence[str],
    overlay: Overlay,
    width: float,
) -> None:
    """Draw one image with what belongs on it, ``width`` inches wide."""
    rows, columns = cut.raw.shape
    finer = columns > width * _DPI  # more voxels than pixels: average them, else show each voxel as it is
    axes.imshow(
        cut.raw,
        cmap="gray",
        vmin=limits[0],
        vmax=limits[1],
        interpolation="antialiased" if finer else "nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        aspect="auto",  # the axes have the right shape already
    )
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[], facecolor="#303030")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if kind == "raw":
        return
    if cut.unknown is not None and cut.unknown.any():
        _draw_unknown(axes, cut.unknown, light=kind == "prediction")
    points_per_pixel = width * 72 / columns
    unit = (1 / points_per_pixel, cut.nm[1] / cut.nm[0] / points_per_pixel)  # voxels per point along x and y
    if kind in ("target", "xz") and cut.target is not None:
        _draw_outlines(axes, cut.target, "target", classes, colors, overlay, unit)
    if kind in ("prediction", "xz") and cut.prediction is not None:
        both = kind == "xz" and cut.target is not None
        _draw_outlines(axes, cut.prediction, "prediction", classes, colors, "outline" if both else overlay, unit)


def _draw_unknown(axes: "Axes", unknown: BoolArray, *, light: bool) -> None:
    from matplotlib.patches import PathPatch

    path = _compound(outline_paths(unknown))
    axes.add_artist(PathPatch(path, facecolor=(0, 0, 0, 0.45), edgecolor="none", linewidth=0, zorder=1.5, gid="dimmed"))
    if not light:
        hatch = PathPatch(path, facecolor="none", edgecolor=(1, 1, 1, 0.4), hatch="///", linewidth=0, zorder=1.6)
        hatch.set_gid("unknown")
        axes.add_artist(hatch)


def _draw_outlines(
    axes: "Axes",
    masks: BoolArray,
    what: Literal["target", "prediction"],
    classes: Sequence[str],
    colors: Sequence[str],
    overlay: Overlay,
    unit: tuple[float, float],
) -> None:
    """Draw the borders of ``masks`` ``[class, row, column]``; ``unit`` is voxels per point along x and y."""
    from matplotlib.patches import PathPatch

    areas = masks.sum(axis=(1, 2))
    order = [int(c) for c in np.argsort(-areas, kind="stable") if areas[c]]  # small objects on top of large ones
    _, rows, columns = masks.shape
    dashes: Any = _DASHES if what == "prediction" else "solid"
    base = 3.0 if what == "target" else 4.0
    hug = (_LINE / 2 * unit[0], _LINE / 2 * unit[1])
    later_v = np.zeros((rows, columns + 1), dtype=np.int64)  # how many later outlines share an edge of voxels
    later_h = np.zeros((rows + 1, columns), dtype=np.int64)
    for rank, c in reversed(list(enumerate(order))):
        mask = masks[c]
        path = _compound(outline_paths(mask))
        path.vertices = _push_out(np.asarray(path.vertices), (rows, columns), hug)
        z = base + rank / (len(order) + 1)
        if overlay == "fill":
            axes.add_artist(
                PathPatch(path, facecolor=colors[c], alpha=0.22, edgecolor="none", linewidth=0, zorder=z - 1)
            )
        line = PathPatch(
            path,
            fill=False,
            edgecolor=colors[c],
            linewidth=_LINE if what == "target" else 1.15 * _LINE,
            linestyle=dashes,
            joinstyle="miter",
            capstyle="butt",
            clip_on=False,
            zorder=z,
            gid=f"{what}:{classes[c]}",
        )
        axes.add_artist(line)
        if what == "prediction":  # the gaps between its dashes show what lies below
            continue
        padded = np.pad(mask, 1)
        edges_v, edges_h = np.diff(padded[1:-1], axis=1), np.diff(padded[:, 1:-1], axis=0)
        for depth in range(1, 4):
            shared = _segments(edges_v & (later_v == depth), edges_h & (later_h == depth))
            if len(shared):
                rim = PathPatch(
                    _compound(_push_out(shared, (rows, columns), hug), closed=False),
                    fill=False,
                    edgecolor=colors[c],
                    linewidth=_LINE + _RIM * depth,
                    capstyle="projecting",
                    clip_on=False,
                    zorder=z - 0.5 / (len(order) + 1),
                    gid=f"rim:{classes[c]}",
                )
                axes.add_artist(rim)
        later_v += edges_v
        later_h += edges_h


def _segments(vertical: BoolArray, horizontal: BoolArray) -> Array:
    """Edges of voxels as lines ``[edge, end, 2]`` (x, y), from flags ``[y, x + 1]`` and ``[y + 1, x]``."""
    row, column = (index.astype(np.float64) for index in np.nonzero(vertical))
    upright = np.stack([np.stack([column - 0.5, row + s], axis=1) for s in (-0.5, 0.5)], axis=1)
    row, column = (index.astype(np.float64) for index in np.nonzero(horizontal))
    level = np.stack([np.stack([column + s, row - 0.5], axis=1) for s in (-0.5, 0.5)], axis=1)
    return np.concatenate([upright, level])


def _push_out(points: Array, shape: tuple[int, int], by: tuple[float, float]) -> Array:
    """Move points ``[..., 2]`` on the edge of the image outwards: a line along it then hides no voxel."""
    moved = points.copy()
    for axis, size in ((0, shape[1]), (1, shape[0])):
        moved[..., axis] -= by[axis] * (points[..., axis] == -0.5)
        moved[..., axis] += by[axis] * (points[..., axis] == size - 0.5)
    return moved


def _compound(lines: Sequence[Array] | Array, *, closed: bool = True) -> "MplPath":
    """One path of many lines ``[point, 2]``; the last point of a closed one is its first."""
    from matplotlib.path import Path as MplPath

    ends = np.cumsum([len(line) for line in lines])
    codes = np.full(ends[-1], MplPath.LINETO, dtype=np.uint8)
    codes[[0, *ends[:-1]]] = MplPath.MOVETO
    if closed:
        codes[ends - 1] = MplPath.CLOSEPOLY
    return MplPath(np.concatenate(list(lines)), codes)


def _draw_scale_bar(axes: "Axes", cut: _Cut, width: float) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = cut.raw.shape
    nm = scale_bar_nm(cut.extent_nm[1])
    inch = columns / width  # voxels along x
    inch_y = inch * cut.nm[1] / cut.nm[0]
    x, y = -0.5 + 0.09 * inch, rows - 0.5 - 0.09 * inch_y
    bar = Rectangle(
        (x, y - 0.035 * inch_y),
        nm / cut.nm[1],
        0.035 * inch_y,
        facecolor="white",
        edgecolor="black",
        linewidth=0.5,
        zorder=6,
        gid="scale-bar",
    )
    axes.add_artist(bar)
    label = f"{nm:g} nm" if nm < 1000 else f"{nm / 1000:g} µm"
    axes.text(
        x,
        y - 0.06 * inch_y,
        label,
        color="white",
        fontsize=8,
        ha="left",
        va="bottom",
        zorder=6,
        path_effects=[withStroke(linewidth=1.8, foreground="black")],
    )


def _mark_line(axes: "Axes", row: int) -> None:
    """Point from both sides at the row of the image where the other slice cuts it."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.figure
    for x, marker, points in ((0.0, 5, -4.0), (1.0, 4, 4.0)):
        shift = ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
        axes.plot(
            [x],
            [row],
            marker=marker,
            markersize=3.6,
            color=_INK,
            markeredgewidth=0,
            transform=axes.get_yaxis_transform() + shift,
            clip_on=False,
            zorder=7,
            gid="slice-mark",
        )


# ---------------------------------------------------------------------------------------------------------------------
# The curves of a training


def training_curves(
    metrics_csv: str | PathLike[str],
    path: str | PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> "Figure":
    """Draw the loss and the Dice of each class from the ``metrics.csv`` of Lightning's ``CSVLogger``.

    Used are the columns ``step`` (else ``epoch``, else the number of the line), ``train/loss`` (else
    ``train/loss_step``, ``train/loss_epoch``), ``val/loss``, ``val/dice`` and ``val/dice/<class>``. Any of them may be
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
    with _needs_matplotlib():
        import matplotlib.style

    table = _read_metrics(Path(metrics_csv))
    with matplotlib.style.context("default"):
        figure = _draw_curves(table, classes)
        _save(figure, path)
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
    prefix = "val/dice/"
    found = [name[len(prefix) :] for name in table if name.startswith(prefix)]
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
    figure = _new_figure(width, height)
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
        text = _wrap(f"never occurred: {', '.join(never)}", plot + names_width, 8, lines=1)
        figure.text(
            (2 * left + plot) / width,
            0.05 / height,
            text[0],
            fontsize=8,
            color=_GREY,
            va="bottom",
            parse_math=False,
        )
    return figure


def _say(axes: "Axes", text: str) -> None:
    axes.set(xticks=[], yticks=[], xlabel="")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=9)


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
    axes.plot(steps, values, color=_INK, linewidth=2.2, marker="o", markersize=4, zorder=4, gid="dice")
    ends.append((float(values[-1]), float(steps[-1]), mean, _INK))

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
            fontweight="bold" if color == _INK else "normal",
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
    lightness = float(_oklab(rgb[None])[0, 0, 0])
    factor = min(1.0, (0.62 / lightness) ** 1.5)
    return "#{:02x}{:02x}{:02x}".format(*(round(v) for v in rgb * factor * 255))
