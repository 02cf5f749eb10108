"""`cellmap_data.utils.figs`: a figure for each class, for loggers. `figures.contact_sheet` shows more in less room."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cellmap_lightning.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def get_fig_dict(
    input_data: torch.Tensor,
    target_data: torch.Tensor,
    outputs: torch.Tensor,
    classes: Sequence[str],
    batch_size: int | None = None,
    fig_size: float = 3,
    clim: Sequence[float] | None = None,
    colorbar: bool = True,
    colorbar_size: float = 0.1,
    gt_clim: Sequence[float] | None = (0, 1),
) -> dict[str, "Figure"]:
    """For each class a figure: the whole input, the part that is predicted, target and prediction, a row per sample.

    Args:
        input_data: ``[N, 1, (z,) y, x]``; of a volume the middle slice is shown.
        target_data: ``[N, C, (z,) y, x]``.
        outputs: the same of the model.
        classes: names of the channels.
        batch_size: rows at most.
        fig_size: inches of a panel.
        clim: lowest and highest value of raw and of predictions; by default their own.
        colorbar: show what the colours of the prediction mean.
        colorbar_size: width of that over the width of a panel.
        gt_clim: lowest and highest value of the target.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as e:
        raise missing_extra("train", "pictures need matplotlib") from e
    rows = len(input_data) if batch_size is None else min(batch_size, len(input_data))
    low, high = clim if clim is not None else (None, None)
    found = {}
    for channel, name in enumerate(classes):
        widths = [1.0] * 4 + [colorbar_size] * bool(colorbar)
        figure = Figure(figsize=(fig_size * sum(widths), fig_size * rows), layout="constrained")
        grid = figure.subplots(rows, len(widths), width_ratios=widths, squeeze=False)
        for row in range(rows):
            raw = _middle(input_data[row, 0])
            target, output = _middle(target_data[row, channel]), _middle(outputs[row, channel])
            y, x = (max(0, (a - b) // 2) for a, b in zip(raw.shape, output.shape, strict=True))
            height, width = output.shape
            panels: list[tuple[str, npt.NDArray[Any], dict[str, Any]]] = [
                ("Full FOV", raw, {"cmap": "gray", "vmin": low, "vmax": high}),
                ("Raw", raw[y : y + height, x : x + width], {"cmap": "gray", "vmin": low, "vmax": high}),
                (f"GT {name}", target, {} if gt_clim is None else {"vmin": gt_clim[0], "vmax": gt_clim[1]}),
                (f"Pred. {name}", output, {"vmin": low, "vmax": high}),
            ]
            for axes, (title, values, how) in zip(grid[row], panels, strict=False):
                image = axes.imshow(values, **how)
                axes.set_title(title)
                axes.set_axis_off()
            grid[row, 0].add_patch(Rectangle((x - 0.5, y - 0.5), width, height, edgecolor="r", facecolor="none"))
            if colorbar:
                figure.colorbar(image, cax=grid[row, 4])
        found[name] = figure
    return found


def fig_to_image(fig: "Figure") -> npt.NDArray[np.uint8]:
    """A figure as ``[height, width, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def get_image_dict(
    input_data: torch.Tensor,
    target_data: torch.Tensor,
    outputs: torch.Tensor,
    classes: Sequence[str],
    batch_size: int | None = None,
    fig_size: float = 3,
    clim: Sequence[float] | None = None,
    colorbar: bool = True,
) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the figures of `get_fig_dict`, which has the same arguments, as images."""
    figures = get_fig_dict(input_data, target_data, outputs, classes, batch_size, fig_size, clim, colorbar)
    return {name: fig_to_image(figure) for name, figure in figures.items()}


def _middle(value: torch.Tensor) -> npt.NDArray[Any]:
    """The middle slice, ``[y, x]``."""
    found = value.detach().to(torch.float32).cpu().numpy()
    return found[found.shape[0] // 2] if found.ndim == 3 else found
