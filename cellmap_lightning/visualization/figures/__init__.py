"""Contact sheets and training curves.

Figures are drawn with matplotlib's object interface on an Agg canvas. pyplot, the backend and the caller's style
settings stay untouched, so figures can be drawn during a training, in a notebook or without a display. matplotlib is
part of the optional extra ``train``; this package can be imported without it.
"""

from cellmap_lightning.visualization.figures.curves import training_curves
from cellmap_lightning.visualization.figures.grid import picture_grid
from cellmap_lightning.visualization.figures.outlines import outline_paths
from cellmap_lightning.visualization.figures.palette import outline_colors
from cellmap_lightning.visualization.figures.samples import SheetSample
from cellmap_lightning.visualization.figures.sheet import contact_sheet
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


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
