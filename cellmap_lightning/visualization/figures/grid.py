"""Images side by side."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from cellmap_lightning.visualization.figures.canvas import (
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches.
_COLUMN, _GAP = 2.4, 0.2


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
        rows: images ``[y, x]``, or ``[z, y, x]`` to draw their middle slices.
        columns: titles of the columns.
        headers: text above each row.
        path: file to write, or None.
        title: a line above everything.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    slices = [[image[len(image) // 2] if image.ndim == 3 else image for image in images] for images in rows]
    heights = [max(_COLUMN * image.shape[0] / image.shape[1] for image in images) for images in slices]
    width = 2 * MARGIN + len(columns) * _COLUMN + (len(columns) - 1) * _GAP
    title_lines = wrap(title or "", width, TITLE, bold=True)
    header_lines = [wrap(header, width, TEXT, bold=True) for header in headers]
    top = MARGIN + LINE_HEIGHT[TITLE] * len(title_lines)
    text_heights = [LINE_HEIGHT[TEXT] * (len(lines) + 1) + 0.05 for lines in header_lines]
    with default_style():
        canvas = Canvas(width, top + sum(text_heights) + sum(heights) + _GAP * (len(rows) - 1) + MARGIN)
        y = canvas.lines(MARGIN, title_lines, TITLE, fontweight="bold")
        for images, lines, height in zip(slices, header_lines, heights, strict=True):
            y = canvas.lines(y, lines, fontweight="bold")
            for number, (image, name) in enumerate(zip(images, columns, strict=True)):
                x = MARGIN + number * (_COLUMN + _GAP)
                canvas.text(x, y, name)
                below = y + LINE_HEIGHT[TEXT] + 0.05
                axes = canvas.axes(x, below, _COLUMN, _COLUMN * image.shape[0] / image.shape[1], name)
                axes.imshow(image, cmap="gray", vmin=images[0].min(), vmax=images[0].max(), aspect="auto")
                axes.set_axis_off()
            y += LINE_HEIGHT[TEXT] + 0.05 + height + _GAP
        save(canvas.figure, path)
    return canvas.figure
