"""matplotlib, politely: its object interface on an Agg canvas, without pyplot, the backend or the caller's style."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

#: Dots per inch of every figure.
DPI = 140
#: Inches at the edges of a figure.
MARGIN = 0.16
INK, GREY = "#1a1a1a", "#666666"


@contextmanager
def needs_matplotlib() -> Iterator[None]:
    """Say plainly that matplotlib is missing, where something is imported that needs it."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            'Figures need matplotlib, which is not installed: pip install "cellmap-lightning[train]".'
        ) from error


def new_figure(width: float, height: float) -> "Figure":
    """An empty white figure, ``width`` by ``height`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | PathLike[str] | None) -> None:
    """Write a figure, unless ``path`` is None; folders are made."""
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=DPI, facecolor="white")


def as_pixels(figure: "Figure") -> npt.NDArray[np.uint8]:
    """A figure as ``[row, column, red green blue]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def wrap(text: str, width: float, points: float, *, bold: bool = False, lines: int = 3) -> list[str]:
    """Lines of text of so many points that fit between the margins of a figure ``width`` inches wide."""
    characters = max(20, int((width - 2 * MARGIN) / (points * (0.0098 if bold else 0.0086))))
    parts = [part for line in text.splitlines() for part in textwrap.wrap(line, characters)]
    return parts if len(parts) <= lines else [*parts[: lines - 1], parts[lines - 1][: characters - 2] + " …"]
