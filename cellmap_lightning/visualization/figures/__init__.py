"""Figures for people: contact sheets of samples and curves of a training.

Both are drawn with matplotlib's object interface on an Agg canvas. Neither touches pyplot, the backend or the caller's
style settings, so they may be called in the middle of a training, in a notebook or without a display. matplotlib comes
with the optional extra ``train``; this package can be imported without it.
"""

from cellmap_lightning.visualization.figures.curves import training_curves
from cellmap_lightning.visualization.figures.grid import picture_grid
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.panels import outline_paths
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet
from cellmap_lightning.visualization.figures.slices import best_row, best_slice, contrast_limits, scale_bar_nm

__all__ = [
    "SheetSample",
    "best_row",
    "best_slice",
    "contact_sheet",
    "contrast_limits",
    "outline_colors",
    "outline_paths",
    "picture_grid",
    "scale_bar_nm",
    "training_curves",
]
