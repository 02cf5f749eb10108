"""One image with outlines, hatching, a scale bar and marks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cellmap_lightning.visualization.figures.canvas import DPI, INK, TEXT, BoolArray
from cellmap_lightning.visualization.figures.outlines import Overlay, compound_path, draw_outlines, outline_paths
from cellmap_lightning.visualization.figures.samples import Cut
from cellmap_lightning.visualization.figures.slices import scale_bar_label, scale_bar_nm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Hatching of voxels that are unknown for every class, and of those that are unknown for one, in its colour.
UNKNOWN_HATCH, PARTLY_HATCH = "////", "\\\\\\\\"


class Panel:
    """One plane of a sample drawn on axes whose unit is a voxel.

    Args:
        axes: the axes, of the plane's aspect ratio.
        cut: the plane.
        shown: the outlines to draw: ``target`` and ``prediction``; none for raw alone.
        limits: intensities of black and white.
        width: width of the axes, inches.

    Example:
        >>> panel = Panel(axes, cut, ("target",), (0, 255), width=2.0)
        >>> panel.draw(["mito"], ["#56b4e9"], "outline")
    """

    def __init__(self, axes: "Axes", cut: Cut, shown: Sequence[str], limits: tuple[float, float], width: float) -> None:
        self._axes, self._cut, self._shown, self._width = axes, cut, shown, width
        rows, columns = cut.raw.shape
        has_more_voxels_than_pixels = columns > width * DPI
        axes.imshow(
            cut.raw,
            cmap="gray",
            vmin=limits[0],
            vmax=limits[1],
            # Average voxels that are smaller than a pixel, else show each voxel as it is.
            interpolation="antialiased" if has_more_voxels_than_pixels else "nearest",
            extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
            aspect="auto",  # the axes have the right shape already
        )
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[], facecolor="#303030")
        for spine in axes.spines.values():
            spine.set_visible(False)

    def draw(self, classes: Sequence[str], colors: Sequence[str], overlay: Overlay) -> None:
        """Draw the outlines, dim and hatch what is unknown for every class, and hatch what is unknown for one."""
        cut = self._cut
        if not self._shown:
            return
        if cut.unknown is not None and cut.unknown.any():
            self._draw_unknown(cut.unknown, hatched="target" in self._shown)
        for number, mask in cut.partly.items() if "target" in self._shown else ():
            self._hatch(mask, PARTLY_HATCH, colors[number], f"unknown:{classes[number]}")
        points_per_voxel = self._width * 72 / cut.raw.shape[1]
        unit = (1 / points_per_voxel, cut.nm[1] / cut.nm[0] / points_per_voxel)
        colored = [name for name in self._shown if name in cut.pictures]
        if len(self._shown) == 1 and colored:  # of two on one plane, outlines tell them apart
            rows, columns = cut.raw.shape
            extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
            image = self._axes.imshow(
                cut.pictures[colored[0]], interpolation="nearest", extent=extent, aspect="auto", zorder=1.4
            )
            image.set_gid(f"picture:{colored[0]}")
            return
        drawn = [name for name in self._shown if name in cut.masks]
        for name in drawn:
            # Of two on one image the target alone is filled, so that the tints do not mix.
            fill = overlay if name == drawn[0] else "outline"
            draw_outlines(self._axes, cut.masks[name], name, classes, colors, fill, unit)

    def _draw_unknown(self, unknown: BoolArray, *, hatched: bool) -> None:
        from matplotlib.patches import PathPatch

        path = compound_path(outline_paths(unknown))
        dark = PathPatch(path, facecolor=(0, 0, 0, 0.45), edgecolor="none", linewidth=0, zorder=1.5, gid="dimmed")
        self._axes.add_artist(dark)
        if hatched:
            self._hatch(unknown, UNKNOWN_HATCH, "white", "unknown")

    def _hatch(self, mask: BoolArray, hatch: str, color: str, gid: str) -> None:
        """Hatch a mask, with a thin border: without one, a band of a few pixels shows no line of the hatching."""
        from matplotlib.patches import PathPatch

        style = {"facecolor": "none", "edgecolor": color, "alpha": 0.75, "linewidth": 0.5, "clip_on": True}
        patch = PathPatch(compound_path(outline_paths(mask)), hatch=hatch, zorder=1.6, gid=gid, **style)
        self._axes.add_artist(patch)

    def draw_scale_bar(self) -> None:
        """Draw a bar of a round length in the lower left corner."""
        draw_scale_bar(self._axes, self._cut.raw.shape, self._cut.nm, self._width)

    def mark_line(self, row: int) -> None:
        """Point from both sides at the row of the image where the other plane cuts it."""
        from matplotlib.transforms import ScaledTranslation

        for x, marker, points in ((0.0, 5, -4.0), (1.0, 4, 4.0)):
            shift = ScaledTranslation(points / 72, 0, self._axes.figure.dpi_scale_trans)
            self._axes.plot(
                [x],
                [row],
                marker=marker,
                markersize=3.6,
                color=INK,
                markeredgewidth=0,
                transform=self._axes.get_yaxis_transform() + shift,
                clip_on=False,
                zorder=7,
                gid="slice-mark",
            )


def draw_scale_bar(axes: "Axes", shape: Sequence[int], nm: Sequence[float], width: float) -> None:
    """Draw a bar of a round length in the lower left corner of an image whose unit is a voxel.

    Args:
        axes: the axes of the image.
        shape: rows and columns of the image.
        nm: height and width of a voxel, nm.
        width: width of the axes, inches.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = shape
    length = scale_bar_nm(columns * nm[1])
    inch = columns / width  # in voxels along x; along y an inch has other voxels unless they are cubes
    inch_y = inch * nm[1] / nm[0]
    x, y = -0.5 + 0.09 * inch, rows - 0.5 - 0.09 * inch_y
    bar = Rectangle(
        (x, y - 0.035 * inch_y),
        length / nm[1],
        0.035 * inch_y,
        facecolor="white",
        edgecolor="black",
        linewidth=0.5,
        zorder=6,
        gid="scale-bar",
    )
    axes.add_artist(bar)
    axes.text(
        x,
        y - 0.06 * inch_y,
        scale_bar_label(length),
        color="white",
        fontsize=TEXT,
        ha="left",
        va="bottom",
        zorder=6,
        path_effects=[withStroke(linewidth=1.8, foreground="black")],
    )
