"""Picture of a segmentation: three sections through the volume, each in the plane with the most objects.

Each shows raw beside raw with outlines of the objects, or without raw the prediction beside the objects in colours.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.image import CellMapImage
from cellmap_lightning.geometry.lattice import AXES, Lattice, Shape
from cellmap_lightning.instances.source import SegmentationSource
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Encoding, read_encoding, read_multiscale
from cellmap_lightning.visualization.figures.canvas import (
    DPI,
    LINE_HEIGHT,
    MARGIN,
    TEXT,
    TITLE,
    Canvas,
    default_style,
    save,
)
from cellmap_lightning.visualization.figures.palette import outline_colors, rgb_of
from cellmap_lightning.visualization.figures.panels import draw_scale_bar
from cellmap_lightning.visualization.figures.slices import contrast_limits
from cellmap_lightning.wording import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Voxels along an axis that are drawn at most, around the centre; and inches of the longer side of a section.
_MOST, _SIDE = 512, 3.2
#: Pixels that an outline is thick at least: thinner ones have gaps where voxels are smaller than pixels.
_OUTLINE = 1.5
_GAP = 0.15
#: Height and width in inches from which a section has room for a scale bar.
_ROOM = (0.4, 0.6)


def draw_objects(
    source: SegmentationSource,
    labels: Path,
    path: Path,
    objects: int,
    raw: str | None = None,
    table: Path | None = None,
) -> "Figure":
    """Draw a section along each axis, in the plane with the most objects, at full resolution.

    Of planes with equally many it is the one with the largest boxes of objects, and of those the nearest to the middle.

    Args:
        source: the prediction.
        labels: the multiscale group of the segmentation.
        path: the file.
        objects: number of objects, for the title.
        raw: the raw multiscale group; None to draw the prediction.
        table: the list of objects, ``<out>-objects.csv``; None for the planes in the middle.

    Returns:
        The figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    stored = read_multiscale(labels)
    reader = ChunkReader(stored.finest, source.name, empty="missing")
    encoding = read_encoding(stored, stored.finest)
    fullest = _fullest_planes(table, source.lattice)
    sections = [_section(source, reader, axis, raw, encoding, fullest) for axis in range(3)]
    sizes = [_size(grey.shape, source.lattice.step, axis) for axis, (grey, _) in enumerate(sections)]
    width = 2 * MARGIN + 2 * max(w for _, w in sizes) + _GAP
    head = MARGIN + LINE_HEIGHT[TITLE] + 0.1
    height = head + sum(h + LINE_HEIGHT[TEXT] + _GAP for h, _ in sizes) + MARGIN
    with default_style():
        canvas = Canvas(width, height)
        canvas.text(MARGIN, MARGIN, f"{source.name}: {plural(objects, 'object')}", fontsize=TITLE, fontweight="bold")
        y = head
        for axis, ((grey, ids), (tall, wide)) in enumerate(zip(sections, sizes, strict=True)):
            plane = "".join(name for name in reversed(AXES) if name != AXES[axis])
            nm_at = source.lattice.origin[axis] + fullest[axis] * source.lattice.step[axis]
            canvas.text(MARGIN, y, f"{plane}, at {AXES[axis]} = {nm_at:,.0f} nm")
            nm = [size for name, size in zip(AXES, source.lattice.step, strict=True) if name != AXES[axis]]
            y += LINE_HEIGHT[TEXT]
            marked = _coloured(grey, ids) if raw is None else _outlined(grey, ids, (tall, wide))
            images: tuple[npt.NDArray[Any], ...] = (np.repeat(grey[..., None], 3, axis=2), marked)
            for column, image in enumerate(images):
                axes = canvas.axes(MARGIN + column * (wide + _GAP), y, wide, tall, f"{plane}{column}")
                axes.imshow(image, aspect="auto", interpolation="nearest")
                axes.set_axis_off()
                if column == 0 and tall >= _ROOM[0] and wide >= _ROOM[1]:
                    draw_scale_bar(axes, grey.shape, nm, wide)
            y += tall + _GAP
        save(canvas.figure, path)
    return canvas.figure


def _drawn(shape: Shape) -> tuple[list[int], list[int]]:
    """Return the first voxel and the number of voxels along each axis of the part of a volume that is drawn."""
    count = [min(n, _MOST) for n in shape]
    return [(n - c) // 2 for n, c in zip(shape, count, strict=True)], count


def _fullest_planes(table: Path | None, lattice: Lattice) -> list[int]:
    """Return the plane along each axis with the most objects, in the part that is drawn; see `draw_objects`.

    An object is connected, and so it lies in each plane between the ends of its box.
    """
    first, count = _drawn(lattice.shape)
    if table is None:
        return [n // 2 for n in lattice.shape]
    changes = np.zeros((3, 2, max(count) + 1))  # of the number of objects, and of the areas of their boxes, per plane
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            nm = np.array([[float(row[f"{end}_{axis}_nm"]) for axis in AXES] for end in ("min", "max")])
            planes = np.rint((nm - lattice.origin) / lattice.step + 0.5).astype(np.int64) - first
            low, high = np.clip(planes, 0, count)
            sides = high - low
            for axis in range(3 if sides.all() else 0):  # other objects lie outside of what is drawn
                change = np.array([1.0, np.prod(np.delete(sides, axis))])
                changes[axis, :, low[axis]] += change
                changes[axis, :, high[axis]] -= change
    fullest = []
    for axis, n in enumerate(count):
        objects, areas = np.rint(np.cumsum(changes[axis], axis=1)[:, :n])
        aside = np.abs(np.arange(n) - n // 2)
        fullest.append(first[axis] + int(np.lexsort((aside, -areas, -objects))[0]))
    return fullest


def _section(
    source: SegmentationSource,
    labels: ChunkReader,
    axis: int,
    raw: str | None,
    encoding: Encoding | None,
    fullest: Sequence[int],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return raw or the prediction, from 0 to 1, and the ids in the chosen plane along an axis."""
    first, count = _drawn(source.lattice.shape)
    first[axis], count[axis] = fullest[axis], 1
    start: Shape = (first[0], first[1], first[2])
    shape: Shape = (count[0], count[1], count[2])
    values = _prediction(source, start, shape) if raw is None else _raw(raw, source.lattice, start, shape)
    plane = np.take(np.clip(values, 0, 1), 0, axis)
    ids = labels.read(start, shape)
    ids = ids if encoding is None else np.where(encoding.present(ids), ids, 0)
    return plane, np.take(ids, 0, axis).astype(np.int64)


def _prediction(source: SegmentationSource, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
    """Return the prediction in a box, from 0 to 1."""
    values = source.read(start, shape)
    values = values.mean(axis=0) if values.ndim == 4 else values
    if source.kind == "distance":
        low, high = np.percentile(values, (1, 99))
        values = (values - low) / max(high - low, 1e-6)
    return values


def _raw(raw: str, lattice: Lattice, start: Shape, shape: Shape) -> npt.NDArray[np.float32]:
    """Return raw in a box of voxels of the prediction, read by position, from 0 to 1."""
    image = CellMapImage(raw, "raw", lattice.step, shape, pad=True, pad_value=0, interpolation="linear")
    values = np.empty(shape, np.float32)
    middle = np.add(start, np.subtract(shape, 1) / 2)
    image.read_into(np.asarray(lattice.origin) + middle * np.asarray(lattice.step), values)
    low, high = contrast_limits(values)
    return (values - np.float32(low)) / np.float32(high - low)


def _size(shape: tuple[int, ...], step: tuple[float, float, float], axis: int) -> tuple[float, float]:
    """Return height and width of a section in inches, to scale."""
    sides = [n * s for n, s in zip(shape, (s for a, s in enumerate(step) if a != axis), strict=True)]
    scale = _SIDE / max(sides)
    return max(sides[0] * scale, 0.2), max(sides[1] * scale, 0.2)


def _coloured(grey: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return a section with each object in a colour that depends on its id alone, over a darkened prediction."""
    image = np.repeat(0.4 * grey[..., None], 3, axis=2).astype(np.float64)
    inside = ids > 0
    image[inside] = 0.25 * image[inside] + 0.75 * _colors(ids[inside])
    edges = np.zeros(ids.shape, bool)
    edges[1:] |= ids[1:] != ids[:-1]
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    image[edges & inside] *= 0.5
    return image


def _outlined(
    grey: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], size: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """Return a section with the outline of each object, inside of it, in a colour that depends on its id alone.

    Args:
        grey: raw, from 0 to 1.
        ids: the ids.
        size: height and width of the section in inches.
    """
    image = np.repeat(grey[..., None], 3, axis=2).astype(np.float64)
    edges = np.zeros(ids.shape, bool)
    for here, marks, length in ((ids, edges, size[0]), (ids.T, edges.T, size[1])):
        for shift in range(1, 1 + math.ceil(_OUTLINE * len(here) / (length * DPI))):
            other = here[shift:] != here[:-shift]
            marks[shift:] |= other
            marks[:-shift] |= other
    edges &= ids > 0
    image[edges] = _colors(ids[edges])
    return image


def _colors(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the colour of each id; neighbouring ids, which are neighbours in space too, have different ones."""
    colors = np.array([rgb_of(color) for color in outline_colors(64)], np.float64)
    return colors[(ids * 29) % len(colors)]
