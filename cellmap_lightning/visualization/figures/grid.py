"""Images side by side."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from cellmap_lightning.visualization.figures.canvas import Array, needs_matplotlib, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    with needs_matplotlib():
        import matplotlib.style

    with matplotlib.style.context("default"):
        figure = new_figure(2.6 * len(columns), 2.8 * len(rows) + 0.4)
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
        save(figure, path)
    return figure
