"""Outlines of masks along the borders of voxels, as matplotlib paths."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures.canvas import Array, BoolArray, needs_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path as MplPath

Overlay = Literal["outline", "fill"]

DASHES = (0, (3.0, 1.2))
"""Dashes of the outlines of predictions."""
_LINE = 0.7  # points
_RIM = 1.5  # points by which an outline is widened for each other one on top of it
_DEEPEST = 3  # other outlines on top for which a rim is drawn, at most


def outline_paths(mask: npt.ArrayLike) -> list[npt.NDArray[np.float64]]:
    """Trace the border of a mask along the edges of its pixels.

    Args:
        mask: boolean ``[y, x]``. Pixel ``(j, i)`` covers ``[i - 0.5, i + 0.5]`` by ``[j - 0.5, j + 0.5]``.

    Returns:
        Closed polygons ``[corner, 2]`` as (x, y) in pixels, the first corner repeated at the end. Every coordinate is
        a half-integer: the corners are corners of pixels. Holes run the other way round than outer borders. Where the
        mask touches the edge of the image the polygon runs along that edge.

    Raises:
        CellMapValueError: the mask has not two axes.
        MissingExtraError: matplotlib is not installed.
    """
    with needs_matplotlib():
        from contourpy import LineType, contour_generator

    inside = np.asarray(mask, dtype=bool)
    if inside.ndim != 2:
        raise CellMapValueError(f"A mask to be outlined must have two axes, y and x; got the shape {inside.shape}")
    if not inside.any():
        return []
    height, width = inside.shape
    generator = contour_generator(
        x=np.arange(-1, width + 1),
        y=np.arange(-1, height + 1),
        z=np.pad(inside, 1).astype(np.float64),
        line_type=LineType.Separate,
    )
    paths = []
    for line in generator.lines(0.5):
        # The contour runs from the middle of one pixel edge to the middle of the next one. Between the middles of a
        # vertical and a horizontal edge lies the corner that both share; two edges in line need no point between.
        points = np.asarray(line, dtype=np.float64)
        a, b = points[:-1], points[1:]
        a_vertical, b_vertical = a[:, 0] % 1 == 0.5, b[:, 0] % 1 == 0.5
        x = np.where(a_vertical, a[:, 0], b[:, 0])
        y = np.where(a_vertical, b[:, 1], a[:, 1])
        corners = np.stack([x, y], axis=1)[a_vertical != b_vertical]
        paths.append(np.concatenate([corners, corners[:1]]))
    return paths


def compound_path(lines: Sequence[Array] | Array, *, closed: bool = True) -> "MplPath":
    """Return one path of many lines ``[point, 2]``; the last point of a closed line repeats its first."""
    from matplotlib.path import Path as MplPath

    ends = np.cumsum([len(line) for line in lines])
    codes = np.full(ends[-1], MplPath.LINETO, dtype=np.uint8)
    codes[[0, *ends[:-1]]] = MplPath.MOVETO
    if closed:
        codes[ends - 1] = MplPath.CLOSEPOLY
    return MplPath(np.concatenate(list(lines)), codes)


def draw_outlines(
    axes: "Axes",
    masks: BoolArray,
    name: str,
    classes: Sequence[str],
    colors: Sequence[str],
    overlay: Overlay,
    unit: tuple[float, float],
) -> None:
    """Draw the borders of masks, small objects on top of large ones.

    Args:
        axes: of an image whose unit is a voxel.
        masks: ``[class, row, column]``.
        name: ``target``, drawn solid with rims, or ``prediction``, drawn dashed.
        classes: names of the classes.
        colors: colour of each class.
        overlay: ``fill`` to tint the insides.
        unit: voxels per point along x and y.
    """
    from matplotlib.patches import PathPatch

    areas = masks.sum(axis=(1, 2))
    order = [int(c) for c in np.argsort(-areas, kind="stable") if areas[c]]
    is_target = name == "target"
    rims = _Rims(masks.shape[1:])
    push = (_LINE / 2 * unit[0], _LINE / 2 * unit[1])
    for rank, c in reversed(list(enumerate(order))):
        path = compound_path(outline_paths(masks[c]))
        path.vertices = _push_out(np.asarray(path.vertices), masks.shape[1:], push)
        z = (3.0 if is_target else 4.0) + rank / (len(order) + 1)
        if overlay == "fill":
            axes.add_artist(
                PathPatch(path, facecolor=colors[c], alpha=0.22, edgecolor="none", linewidth=0, zorder=z - 1)
            )
        style = {"fill": False, "edgecolor": colors[c], "clip_on": False}
        axes.add_artist(
            PathPatch(
                path,
                linewidth=_LINE if is_target else 1.15 * _LINE,
                linestyle="solid" if is_target else DASHES,
                joinstyle="miter",
                capstyle="butt",
                zorder=z,
                gid=f"{name}:{classes[c]}",
                **style,
            )
        )
        if is_target:  # below a prediction, the gaps between its dashes show other outlines
            for depth, segments in rims.add(masks[c]):
                axes.add_artist(
                    PathPatch(
                        compound_path(_push_out(segments, masks.shape[1:], push), closed=False),
                        linewidth=_LINE + _RIM * depth,
                        capstyle="projecting",
                        zorder=z - 0.5 / (len(order) + 1),
                        gid=f"rim:{classes[c]}",
                        **style,
                    )
                )


class _Rims:
    """Counts, for each edge between voxels, the outlines drawn on top, so that those below can be drawn wider.

    Args:
        shape: rows and columns of the image.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        rows, columns = shape
        self._vertical = np.zeros((rows, columns + 1), dtype=np.int64)
        self._horizontal = np.zeros((rows + 1, columns), dtype=np.int64)

    def add(self, mask: BoolArray) -> list[tuple[int, Array]]:
        """Count a mask's edges; return those that it shares with ``depth`` outlines on top, for each depth."""
        padded = np.pad(mask, 1)
        vertical, horizontal = np.diff(padded[1:-1], axis=1), np.diff(padded[:, 1:-1], axis=0)
        shared = []
        for depth in range(1, _DEEPEST + 1):
            segments = _segments(vertical & (self._vertical == depth), horizontal & (self._horizontal == depth))
            if len(segments):
                shared.append((depth, segments))
        self._vertical += vertical
        self._horizontal += horizontal
        return shared


def _segments(vertical: BoolArray, horizontal: BoolArray) -> Array:
    """Return edges of voxels as lines ``[edge, end, 2]`` (x, y), from flags ``[y, x + 1]`` and ``[y + 1, x]``."""
    row, column = (index.astype(np.float64) for index in np.nonzero(vertical))
    upright = np.stack([np.stack([column - 0.5, row + s], axis=1) for s in (-0.5, 0.5)], axis=1)
    row, column = (index.astype(np.float64) for index in np.nonzero(horizontal))
    level = np.stack([np.stack([column + s, row - 0.5], axis=1) for s in (-0.5, 0.5)], axis=1)
    return np.concatenate([upright, level])


def _push_out(points: Array, shape: Sequence[int], by: tuple[float, float]) -> Array:
    """Move points ``[..., 2]`` on the edge of the image outwards: a line along it then hides no voxel."""
    moved = points.copy()
    for axis, size in ((0, shape[1]), (1, shape[0])):
        moved[..., axis] -= by[axis] * (points[..., axis] == -0.5)
        moved[..., axis] += by[axis] * (points[..., axis] == size - 0.5)
    return moved
