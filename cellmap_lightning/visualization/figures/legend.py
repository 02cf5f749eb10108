"""The legend of a contact sheet: classes that occur, and how targets, predictions and unknown voxels are drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellmap_lightning.visualization.figures.canvas import GREY, INK, MARGIN, TEXT, Canvas
from cellmap_lightning.visualization.figures.outlines import DASHES
from cellmap_lightning.visualization.figures.panels import PARTLY_HATCH, UNKNOWN_HATCH
from cellmap_lightning.visualization.figures.samples import Cut

#: Height of a line of the legend, inches.
_LINE = 0.168


@dataclass(frozen=True)
class LegendEntry:
    """One entry: its text, and the line or hatched patch before it."""

    label: str
    line: dict[str, Any] | None = None
    """Style of the line; None for a hatched patch."""
    hatch: dict[str, Any] = field(default_factory=dict)
    """Style of the patch."""


#: Text for voxels that are unknown for every class.
UNKNOWN_TEXT = "unknown for every class"


def legend_entries(
    cuts: Sequence[Cut],
    occurring: set[int],
    classes: Sequence[str],
    colors: Sequence[str],
    unknown: str = UNKNOWN_TEXT,
) -> list[LegendEntry]:
    """Return the entries for the planes that are drawn; none if there is neither target nor prediction.

    Args:
        cuts: the planes.
        occurring: indices of the classes with a voxel in a sample, on its planes or not.
        classes: names of the classes.
        colors: colour of each class.
        unknown: text for voxels that are unknown for every class.
    """
    names = {name for cut in cuts for name in cut.masks}
    if not names:
        return []
    shown = {c for cut in cuts for m in cut.masks.values() for c in np.flatnonzero(m.any(axis=(1, 2))).tolist()}
    entries = [
        LegendEntry(classes[c] + ("" if c in shown else " (off slice)"), {"color": colors[c], "linewidth": 2.4})
        for c in sorted(occurring)
    ]
    absent = len(classes) - len(occurring)
    if absent:
        entries.append(LegendEntry(f"+ {absent} absent", {"color": "none"}))
    for name, style in (("target", "solid"), ("prediction", DASHES)):
        if name in names:
            entries.append(LegendEntry(name, {"color": GREY, "linewidth": 1.2, "linestyle": style}))
    if any(cut.unknown is not None and cut.unknown.any() for cut in cuts):
        patch = {"facecolor": "#4c4c4c", "edgecolor": "white", "hatch": UNKNOWN_HATCH}
        entries.append(LegendEntry(unknown, hatch=patch))
    for c in sorted({c for cut in cuts for c in cut.partly}):
        patch = {"facecolor": "#8a8a8a", "edgecolor": colors[c], "hatch": PARTLY_HATCH}
        entries.append(LegendEntry(f"{classes[c]} unknown", hatch=patch))
    return entries


class Legend:
    """Entries arranged in as many columns as fit.

    Args:
        entries: the entries, perhaps none.
        width: width of the figure, inches.

    Attributes:
        height: inches.

    Example:
        >>> legend = Legend(legend_entries(cuts, {0}, ["mito"], ["#56b4e9"]), canvas.width)
        >>> legend.draw(canvas, 0.2)
    """

    def __init__(self, entries: Sequence[LegendEntry], width: float) -> None:
        self.entries = entries
        self.height = 0.0
        if entries:
            entry_width = 0.55 + 0.066 * max(len(entry.label) for entry in entries)
            fitting = max(1, min(len(entries), int((width - 2 * MARGIN) / entry_width)))
            lines = math.ceil(len(entries) / fitting)
            self._columns = math.ceil(len(entries) / lines)
            self.height = _LINE * lines + 0.06

    def draw(self, canvas: Canvas, y: float) -> None:
        """Draw the legend at the left margin, its upper edge at ``y`` inches."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        if not self.entries:
            return
        handles: list[Any] = [
            Patch(linewidth=0.5, **entry.hatch) if entry.line is None else Line2D([], [], **entry.line)
            for entry in self.entries
        ]
        legend = canvas.figure.legend(
            handles,
            [f"entry {i}" for i in range(len(handles))],  # replaced below, without markup
            loc="upper left",
            bbox_to_anchor=canvas.at(MARGIN, y),
            ncols=self._columns,
            frameon=False,
            fontsize=TEXT,
            handlelength=1.9,
            handletextpad=0.5,
            columnspacing=1.4,
            labelspacing=0.45,
            borderpad=0.0,
            borderaxespad=0.0,
        )
        for text, entry in zip(legend.get_texts(), self.entries, strict=True):
            text.set_parse_math(False)  # a name may hold a dollar sign or begin with an underscore
            text.set_text(entry.label)
            text.set_color(INK)
