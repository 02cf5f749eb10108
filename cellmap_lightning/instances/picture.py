"""Picture of a segmentation: three sections through the volume, the prediction beside its objects in colours."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import AXES, Shape
from cellmap_lightning.instances.source import SegmentationSource
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.visualization.figures.canvas import LINE_HEIGHT, MARGIN, TEXT, TITLE, Canvas, default_style, save
from cellmap_lightning.visualization.figures.palette import outline_colors, rgb_of

#: Voxels along an axis that are drawn at most, around the centre; and inches of the longer side of a section.
_MOST, _SIDE = 512, 3.2
_GAP = 0.15


def draw_objects(source: SegmentationSource, labels: Path, path: Path, objects: int) -> None:
    """Draw the sections through the centre of a volume, at full resolution.

    Args:
        source: the prediction.
        labels: the multiscale group of the segmentation.
        path: the file.
        objects: number of objects, for the title.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    reader = ChunkReader(read_multiscale(labels).finest, source.name, empty="missing")
    sections = [_section(source, reader, axis) for axis in range(3)]
    sizes = [_size(grey.shape, source.lattice.step, axis) for axis, (grey, _) in enumerate(sections)]
    width = 2 * MARGIN + 2 * max(w for _, w in sizes) + _GAP
    head = MARGIN + LINE_HEIGHT[TITLE] + 0.1
    height = head + sum(h + LINE_HEIGHT[TEXT] + _GAP for h, _ in sizes) + MARGIN
    with default_style():
        canvas = Canvas(width, height)
        canvas.text(MARGIN, MARGIN, f"{source.name}: {objects} objects", fontsize=TITLE, fontweight="bold")
        y = head
        for axis, ((grey, ids), (tall, wide)) in enumerate(zip(sections, sizes, strict=True)):
            plane = "".join(name for name in AXES if name != AXES[axis])
            canvas.text(MARGIN, y, f"{plane}, at the middle of {AXES[axis]}")
            y += LINE_HEIGHT[TEXT]
            images: tuple[npt.NDArray[Any], ...] = (np.repeat(grey[..., None], 3, axis=2), _coloured(grey, ids))
            for column, image in enumerate(images):
                axes = canvas.axes(MARGIN + column * (wide + _GAP), y, wide, tall, f"{plane}{column}")
                axes.imshow(image, aspect="auto", interpolation="nearest")
                axes.set_axis_off()
            y += tall + _GAP
        save(canvas.figure, path)


def _section(
    source: SegmentationSource, labels: ChunkReader, axis: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the prediction, from 0 to 1, and the ids in the middle plane along an axis."""
    count = [1 if a == axis else min(n, _MOST) for a, n in enumerate(source.lattice.shape)]
    first = [(n - c) // 2 for n, c in zip(source.lattice.shape, count, strict=True)]
    start: Shape = (first[0], first[1], first[2])
    shape: Shape = (count[0], count[1], count[2])
    values = source.read(start, shape)
    values = values.mean(axis=0) if values.ndim == 4 else values
    if source.kind == "distance":
        low, high = np.percentile(values, (1, 99))
        values = (values - low) / max(high - low, 1e-6)
    plane = np.take(np.clip(values, 0, 1), 0, axis)
    return plane, np.take(labels.read(start, shape), 0, axis).astype(np.int64)


def _size(shape: tuple[int, ...], step: tuple[float, float, float], axis: int) -> tuple[float, float]:
    """Return height and width of a section in inches, to scale."""
    sides = [n * s for n, s in zip(shape, (s for a, s in enumerate(step) if a != axis), strict=True)]
    scale = _SIDE / max(sides)
    return max(sides[0] * scale, 0.2), max(sides[1] * scale, 0.2)


def _coloured(grey: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return a section with each object in a colour that depends on its id alone, over a darkened prediction."""
    colors = np.array([rgb_of(color) for color in outline_colors(64)], np.float64)
    colors /= 255 if colors.max() > 1 else 1
    image = np.repeat(0.4 * grey[..., None], 3, axis=2).astype(np.float64)
    inside = ids > 0
    # Neighbouring ids are neighbours in space too, so that their colours are taken from different places.
    image[inside] = 0.25 * image[inside] + 0.75 * colors[(ids[inside] * 29) % len(colors)]
    edges = np.zeros(ids.shape, bool)
    edges[1:] |= ids[1:] != ids[:-1]
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    image[edges & inside] *= 0.5
    return image
