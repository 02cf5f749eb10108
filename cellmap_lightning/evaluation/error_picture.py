"""Picture of the crops with the lowest scores: where the prediction is right, adds and misses."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.encodings import Unknown
from cellmap_lightning.crops.image import CellMapImage
from cellmap_lightning.evaluation.evaluate import CropScore, crop_folders, is_group
from cellmap_lightning.evaluation.pairs import CropPair
from cellmap_lightning.geometry.lattice import FloatArray, Shape
from cellmap_lightning.io.meanings import ValuesSetting
from cellmap_lightning.visualization.figures.canvas import DPI, INK, default_style
from cellmap_lightning.visualization.figures.slices import contrast_limits

#: Rows of the picture, at most.
MAX_ROWS = 4
#: Colour of true positives, false positives and false negatives: apart for colour-blind readers.
_COLORS = {"right": (0.0, 0.62, 0.45), "added": (0.84, 0.37, 0.0), "missed": (0.34, 0.71, 0.91)}
_OPACITY = 0.6


def draw_worst(
    scores: Sequence[CropScore],
    output: Path,
    crops: Path | Sequence[Path],
    path: Path,
    threshold: float = 0.5,
    unknown: Unknown = "metadata",
    values: ValuesSetting = "auto",
    raw: str | None = None,
) -> None:
    """Draw the xy slice with the most wrong voxels of the crops with the lowest Dice.

    Args:
        scores: the scores, see `evaluate`; those with a defined Dice are ranked.
        output: the prediction, with one group per class.
        crops: folder of the crops, or of a single crop; or several of them.
        path: the PNG to write.
        threshold: see `evaluate`.
        unknown: see `evaluate`.
        values: see `evaluate`.
        raw: the raw multiscale group; None to draw on white.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ranked = sorted((s for s in scores if not math.isnan(s.voxels.dice)), key=lambda s: s.voxels.dice)[:MAX_ROWS]
    places, names = [crops] if isinstance(crops, Path) else crops, [s.name for s in scores]
    folders = {f.name: f for place in places for f in crop_folders(place, names) if any(is_group(f / n) for n in names)}
    with default_style():
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        columns = max(1, len(ranked))
        figure = Figure(figsize=(3.2 * columns, 3.9), layout="constrained")
        for number, score in enumerate(ranked):
            folder = score.folder or folders[score.crop]
            pair = CropPair(output / score.name, folder, score.name, threshold, unknown, values, score.box)
            z, kinds = _worst_slice(pair)
            axes = figure.add_subplot(1, columns, number + 1)
            extent = pair.voxel_size[1] / pair.voxel_size[2]
            background = _background(raw, pair, z)
            axes.imshow(
                _painted(background, kinds, 1.0 if raw is None else _OPACITY), interpolation="nearest", aspect=extent
            )
            nm = pair.center((z, 0, 0), (1, *pair.shape[1:]))[0]
            place = f"slice z={z} at {nm:,.0f} nm" + ("" if score.box is None else f", of z y x {score.box}")
            axes.set_title(f"{score.crop} {score.name}: Dice {score.voxels.dice:.2f}\n{place}", fontsize=9, color=INK)
            axes.set_xticks([])
            axes.set_yticks([])
        handles = [Patch(color=color, label=name) for name, color in _COLORS.items()]
        handles.append(Patch(facecolor=(0.6, 0.6, 0.6), label="unannotated"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        figure.savefig(path, dpi=DPI, bbox_inches="tight")


def _worst_slice(pair: CropPair) -> tuple[int, npt.NDArray[np.uint8]]:
    """Return the index of the xy slice with the most wrong voxels, without any the most of the class, and its voxels.

    Voxels are 0 for background, 1 right, 2 added, 3 missed and 4 unannotated.
    """
    wrong, positive = np.zeros((2, pair.shape[0]), np.int64)
    for block in pair.blocks():
        errors = ((block.truth > 0) != block.predicted) & (block.truth >= 0)
        slices = slice(block.start[0], block.start[0] + len(errors))
        wrong[slices] += errors.sum((1, 2))
        positive[slices] += (block.truth > 0).sum((1, 2))
    z = int((wrong if wrong.any() else positive).argmax())
    shape: Shape = (1, *pair.shape[1:])
    block = pair.block((z, 0, 0), shape)
    truth, predicted = block.truth[0], block.predicted[0]
    kinds = np.select([truth < 0, (truth > 0) & predicted, predicted, truth > 0], [4, 1, 2, 3], 0)
    return z, kinds.astype(np.uint8)


def _background(raw: str | None, pair: CropPair, z: int) -> FloatArray:
    """Return raw of a slice of a crop in 0..1; white without raw."""
    shape: Shape = (1, *pair.shape[1:])
    if raw is None:
        return np.ones(shape[1:])
    image = CellMapImage(raw, "raw", pair.voxel_size, shape, pad=True, pad_value=0, interpolation="linear")
    out = np.empty(shape, np.float32)
    image.read_into(pair.center((z, 0, 0), shape), out)
    low, high = contrast_limits(out)
    grey: FloatArray = np.clip((out[0].astype(np.float64) - low) / max(high - low, 1e-6), 0, 1)
    return grey


def _painted(background: FloatArray, kinds: npt.NDArray[np.uint8], opacity: float) -> FloatArray:
    """Return red, green and blue of a slice, ``[y, x, 3]``; at an opacity of 1 in the colours of the legend."""
    picture = np.repeat(background[:, :, None], 3, axis=2)
    for kind, color in enumerate(_COLORS.values(), 1):
        where = kinds == kind
        picture[where] = (1 - opacity) * picture[where] + opacity * np.asarray(color)
    unknown = kinds == 4
    picture[unknown] = 0.6 if opacity == 1 else 0.5 * picture[unknown] + 0.2
    return picture
