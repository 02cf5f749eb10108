"""One image with what belongs on it: outlines along the borders of voxels, hatching, a scale bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures.canvas import DPI, INK, Array, BoolArray, needs_matplotlib
from cellmap_lightning.visualization.figures.slices import scale_bar_nm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path as MplPath

Overlay = Literal["outline", "fill"]

_LINE = 0.9  # points
_RIM = 1.5  # points by which an outline is widened for each other one on top of it
DASHES = (0, (3.0, 1.2))
"""How the outlines of predictions are dashed."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One plane of a sample: what is drawn in a panel."""

    raw: Array  # [row, column]
    target: BoolArray | None  # [class, row, column]
    prediction: BoolArray | None
    unknown: BoolArray | None  # [row, column], unknown for every class
    nm: tuple[float, float]  # size of a pixel (row, column)

    @property
    def extent_nm(self) -> tuple[float, float]:
        """Height and width, nm."""
        return self.raw.shape[0] * self.nm[0], self.raw.shape[1] * self.nm[1]


def outline_paths(mask: npt.ArrayLike) -> list[npt.NDArray[np.float64]]:
    """Trace the border of a mask along the edges of its pixels.

    Args:
        mask: Boolean ``[y, x]``. Pixel ``(j, i)`` covers ``[i - 0.5, i + 0.5]`` by ``[j - 0.5, j + 0.5]``.

    Returns:
        Closed polygons ``[corner, 2]`` as (x, y) in pixels, the first corner repeated at the end. Every coordinate is
        a half-integer: the corners are corners of pixels. Holes run the other way round than outer borders. Where the
        mask touches the edge of the image the polygon runs along that edge.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs_matplotlib():
        from contourpy import LineType, contour_generator

    inside = np.asarray(mask, dtype=bool)
    if inside.ndim != 2:
        raise CellMapValueError(f"A mask to be outlined has two axes, y and x; this one has shape {inside.shape}.")
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
        # The contour goes from the middle of one pixel edge to the middle of the next one. Between the middles of a
        # vertical and a horizontal edge lies the corner that both share; two edges in line need no point between.
        points = np.asarray(line, dtype=np.float64)
        a, b = points[:-1], points[1:]
        a_vertical, b_vertical = a[:, 0] % 1 == 0.5, b[:, 0] % 1 == 0.5
        x = np.where(a_vertical, a[:, 0], b[:, 0])
        y = np.where(a_vertical, b[:, 1], a[:, 1])
        corners = np.stack([x, y], axis=1)[a_vertical != b_vertical]
        paths.append(np.concatenate([corners, corners[:1]]))
    return paths


def draw_panel(
    axes: "Axes",
    cut: Cut,
    kind: str,
    limits: tuple[float, float],
    classes: Sequence[str],
    colors: Sequence[str],
    overlay: Overlay,
    width: float,
) -> None:
    """Draw one image with what belongs on it, ``width`` inches wide."""
    rows, columns = cut.raw.shape
    finer = columns > width * DPI  # more voxels than pixels: average them, else show each voxel as it is
    axes.imshow(
        cut.raw,
        cmap="gray",
        vmin=limits[0],
        vmax=limits[1],
        interpolation="antialiased" if finer else "nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        aspect="auto",  # the axes have the right shape already
    )
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[], facecolor="#303030")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if kind == "raw":
        return
    if cut.unknown is not None and cut.unknown.any():
        _draw_unknown(axes, cut.unknown, light=kind == "prediction")
    points_per_pixel = width * 72 / columns
    unit = (1 / points_per_pixel, cut.nm[1] / cut.nm[0] / points_per_pixel)  # voxels per point along x and y
    if kind in ("target", "xz") and cut.target is not None:
        _draw_outlines(axes, cut.target, "target", classes, colors, overlay, unit)
    if kind in ("prediction", "xz") and cut.prediction is not None:
        both = kind == "xz" and cut.target is not None
        _draw_outlines(axes, cut.prediction, "prediction", classes, colors, "outline" if both else overlay, unit)


def _draw_unknown(axes: "Axes", unknown: BoolArray, *, light: bool) -> None:
    from matplotlib.patches import PathPatch

    path = _compound(outline_paths(unknown))
    axes.add_artist(PathPatch(path, facecolor=(0, 0, 0, 0.45), edgecolor="none", linewidth=0, zorder=1.5, gid="dimmed"))
    if not light:
        hatch = PathPatch(path, facecolor="none", edgecolor=(1, 1, 1, 0.4), hatch="///", linewidth=0, zorder=1.6)
        hatch.set_gid("unknown")
        axes.add_artist(hatch)


def _draw_outlines(
    axes: "Axes",
    masks: BoolArray,
    what: Literal["target", "prediction"],
    classes: Sequence[str],
    colors: Sequence[str],
    overlay: Overlay,
    unit: tuple[float, float],
) -> None:
    """Draw the borders of ``masks`` ``[class, row, column]``; ``unit`` is voxels per point along x and y."""
    from matplotlib.patches import PathPatch

    areas = masks.sum(axis=(1, 2))
    order = [int(c) for c in np.argsort(-areas, kind="stable") if areas[c]]  # small objects on top of large ones
    _, rows, columns = masks.shape
    dashes: Any = DASHES if what == "prediction" else "solid"
    base = 3.0 if what == "target" else 4.0
    hug = (_LINE / 2 * unit[0], _LINE / 2 * unit[1])
    later_v = np.zeros((rows, columns + 1), dtype=np.int64)  # how many later outlines share an edge of voxels
    later_h = np.zeros((rows + 1, columns), dtype=np.int64)
    for rank, c in reversed(list(enumerate(order))):
        mask = masks[c]
        path = _compound(outline_paths(mask))
        path.vertices = _push_out(np.asarray(path.vertices), (rows, columns), hug)
        z = base + rank / (len(order) + 1)
        if overlay == "fill":
            axes.add_artist(
                PathPatch(path, facecolor=colors[c], alpha=0.22, edgecolor="none", linewidth=0, zorder=z - 1)
            )
        line = PathPatch(
            path,
            fill=False,
            edgecolor=colors[c],
            linewidth=_LINE if what == "target" else 1.15 * _LINE,
            linestyle=dashes,
            joinstyle="miter",
            capstyle="butt",
            clip_on=False,
            zorder=z,
            gid=f"{what}:{classes[c]}",
        )
        axes.add_artist(line)
        if what == "prediction":  # the gaps between its dashes show what lies below
            continue
        padded = np.pad(mask, 1)
        edges_v, edges_h = np.diff(padded[1:-1], axis=1), np.diff(padded[:, 1:-1], axis=0)
        for depth in range(1, 4):
            shared = _segments(edges_v & (later_v == depth), edges_h & (later_h == depth))
            if len(shared):
                rim = PathPatch(
                    _compound(_push_out(shared, (rows, columns), hug), closed=False),
                    fill=False,
                    edgecolor=colors[c],
                    linewidth=_LINE + _RIM * depth,
                    capstyle="projecting",
                    clip_on=False,
                    zorder=z - 0.5 / (len(order) + 1),
                    gid=f"rim:{classes[c]}",
                )
                axes.add_artist(rim)
        later_v += edges_v
        later_h += edges_h


def _segments(vertical: BoolArray, horizontal: BoolArray) -> Array:
    """Edges of voxels as lines ``[edge, end, 2]`` (x, y), from flags ``[y, x + 1]`` and ``[y + 1, x]``."""
    row, column = (index.astype(np.float64) for index in np.nonzero(vertical))
    upright = np.stack([np.stack([column - 0.5, row + s], axis=1) for s in (-0.5, 0.5)], axis=1)
    row, column = (index.astype(np.float64) for index in np.nonzero(horizontal))
    level = np.stack([np.stack([column + s, row - 0.5], axis=1) for s in (-0.5, 0.5)], axis=1)
    return np.concatenate([upright, level])


def _push_out(points: Array, shape: tuple[int, int], by: tuple[float, float]) -> Array:
    """Move points ``[..., 2]`` on the edge of the image outwards: a line along it then hides no voxel."""
    moved = points.copy()
    for axis, size in ((0, shape[1]), (1, shape[0])):
        moved[..., axis] -= by[axis] * (points[..., axis] == -0.5)
        moved[..., axis] += by[axis] * (points[..., axis] == size - 0.5)
    return moved


def _compound(lines: Sequence[Array] | Array, *, closed: bool = True) -> "MplPath":
    """One path of many lines ``[point, 2]``; the last point of a closed one is its first."""
    from matplotlib.path import Path as MplPath

    ends = np.cumsum([len(line) for line in lines])
    codes = np.full(ends[-1], MplPath.LINETO, dtype=np.uint8)
    codes[[0, *ends[:-1]]] = MplPath.MOVETO
    if closed:
        codes[ends - 1] = MplPath.CLOSEPOLY
    return MplPath(np.concatenate(list(lines)), codes)


def draw_scale_bar(axes: "Axes", cut: Cut, width: float) -> None:
    """A round length in the lower left corner of an image ``width`` inches wide."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = cut.raw.shape
    nm = scale_bar_nm(cut.extent_nm[1])
    inch = columns / width  # voxels along x
    inch_y = inch * cut.nm[1] / cut.nm[0]
    x, y = -0.5 + 0.09 * inch, rows - 0.5 - 0.09 * inch_y
    bar = Rectangle(
        (x, y - 0.035 * inch_y),
        nm / cut.nm[1],
        0.035 * inch_y,
        facecolor="white",
        edgecolor="black",
        linewidth=0.5,
        zorder=6,
        gid="scale-bar",
    )
    axes.add_artist(bar)
    label = f"{nm:g} nm" if nm < 1000 else f"{nm / 1000:g} µm"
    axes.text(
        x,
        y - 0.06 * inch_y,
        label,
        color="white",
        fontsize=8,
        ha="left",
        va="bottom",
        zorder=6,
        path_effects=[withStroke(linewidth=1.8, foreground="black")],
    )


def mark_line(axes: "Axes", row: int) -> None:
    """Point from both sides at the row of the image where the other slice cuts it."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.figure
    for x, marker, points in ((0.0, 5, -4.0), (1.0, 4, 4.0)):
        shift = ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
        axes.plot(
            [x],
            [row],
            marker=marker,
            markersize=3.6,
            color=INK,
            markeredgewidth=0,
            transform=axes.get_yaxis_transform() + shift,
            clip_on=False,
            zorder=7,
            gid="slice-mark",
        )
