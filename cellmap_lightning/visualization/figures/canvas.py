"""Matplotlib helpers that never touch pyplot or global style: a figure laid out in inches, and how it is saved."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import missing_extra
from cellmap_lightning.io.files import make_folder
from cellmap_lightning.io.own_files import picture_metadata

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

#: Dots per inch of every figure.
DPI = 140
#: Inches at the edges of a figure.
MARGIN = 0.16
INK, GREY = "#1a1a1a", "#666666"
#: Font size of text and of titles, points, and the height of a line of each, inches.
TEXT, TITLE = 8, 11
LINE_HEIGHT = {TEXT: 0.155, TITLE: 0.22}


@contextmanager
def needs_matplotlib() -> Iterator[None]:
    """Raise `MissingExtraError` if an import inside the block fails, because matplotlib is not installed."""
    try:
        yield
    except ImportError as error:
        raise missing_extra("train", "figures need matplotlib") from error


@contextmanager
def default_style() -> Iterator[None]:
    """Apply matplotlib's default style inside the block; the caller's style is restored."""
    with needs_matplotlib():
        import matplotlib.style
    with matplotlib.style.context("default"):
        yield


class Canvas:
    """An empty white figure whose contents are placed in inches from its upper left corner.

    Args:
        width: inches.
        height: inches.

    Attributes:
        figure: the matplotlib figure.

    Example:
        >>> canvas = Canvas(4, 3)
        >>> axes = canvas.axes(0.5, 0.5, 3, 2, "image")
        >>> canvas.text(0.5, 0.2, "a title")
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)  # attaches itself; pyplot, which would keep the figure alive, is not involved

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return a position as fractions of the figure, from its lower left corner."""
        return x / self.width, 1 - y / self.height

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text, by default 8 points whose upper left corner is at ``(x, y)``; nothing in it is markup."""
        options = {"va": "top", "ha": "left", "color": INK, "fontsize": TEXT, "parse_math": False, **style}
        self.figure.text(*self.at(x, y), text, **options)

    def lines(self, y: float, lines: Sequence[str], size: int = TEXT, **style: Any) -> float:
        """Write lines of text along the left margin, the first at ``y``, and return the position below them."""
        for i, line in enumerate(lines):
            self.text(MARGIN, y + LINE_HEIGHT[size] * i, line, fontsize=size, **style)
        return y + LINE_HEIGHT[size] * len(lines)

    def rule(self, y: float) -> None:
        """Draw a line from margin to margin."""
        from matplotlib.lines import Line2D

        (x0, height), (x1, _) = self.at(MARGIN, y), self.at(self.width - MARGIN, y)
        self.figure.add_artist(Line2D([x0, x1], [height, height], color="#d0d0d0", linewidth=0.6))

    def axes(self, x: float, y: float, width: float, height: float, label: str) -> "Axes":
        """Add axes whose upper left corner is at ``(x, y)``."""
        left, bottom = self.at(x, y + height)
        return self.figure.add_axes((left, bottom, width / self.width, height / self.height), label=label)


def save(figure: "Figure", path: str | PathLike[str] | None) -> None:
    """Write a figure, unless ``path`` is None; folders are created."""
    if path is not None:
        target = Path(path)
        make_folder(target.parent)
        figure.savefig(target, dpi=DPI, facecolor="white", metadata=picture_metadata(target))


def as_pixels(figure: "Figure") -> npt.NDArray[np.uint8]:
    """Render a figure as ``[row, column, red green blue]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def wrap(text: str, width: float, points: float, *, bold: bool = False, lines: int = 3) -> list[str]:
    """Split text into at most so many lines that fit between the margins of a figure ``width`` inches wide.

    The width of a character is estimated from the font size, so that nothing has to be rendered to lay out a figure.
    """
    characters = max(20, int((width - 2 * MARGIN) / (points * (0.0098 if bold else 0.0086))))
    parts = [part for line in text.splitlines() for part in textwrap.wrap(line, characters)]
    return parts if len(parts) <= lines else [*parts[: lines - 1], parts[lines - 1][: characters - 2] + " …"]
