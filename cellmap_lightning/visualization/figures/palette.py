"""Colours of classes that stay apart for colour-blind readers."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from cellmap_lightning.validation import int_at_least
from cellmap_lightning.visualization.figures.canvas import Array


def outline_colors(n: int) -> list[str]:
    """Return colours for ``n`` classes that stay apart on grey images and for colour-blind readers.

    The first six are from the palette of Okabe and Ito; each further one is the one farthest from all before it, in
    normal vision as well as with protanopia and deuteranopia. The first colours do not depend on ``n``.

    Args:
        n: number of classes.

    Returns:
        ``n`` colours as ``"#rrggbb"``, all different up to n = 400.

    Raises:
        CellMapValueError: ``n`` is negative.
    """
    int_at_least("The number of colours", n, 0)
    palette = _palette(64 if n <= 64 else 400)
    return [palette[i % len(palette)] for i in range(n)]


@lru_cache(maxsize=2)
def _palette(n: int) -> tuple[str, ...]:
    base = ["#56b4e9", "#e69f00", "#00c48c", "#f0e442", "#ff6a3d", "#e583c0"]
    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(grid / 255.0)[0]
    # Leave out greyish colours, which raw has, and those as dark as a membrane.
    grid = grid[(lab[:, 0] > 0.62) & (lab[:, 0] < 0.95) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.085)]
    # Farthest-point sampling: the next colour is the one whose nearest chosen colour is farthest away.
    views, nearest = oklab(grid / 255.0), np.full(len(grid), np.inf)
    for view in np.moveaxis(oklab(np.stack([rgb_of(color) for color in base])), 1, 0):
        nearest = np.minimum(nearest, _distance(views, view))
    colors = list(base)
    while len(colors) < n:
        best = int(nearest.argmax())
        colors.append(hex_of(grid[best]))
        nearest = np.minimum(nearest, _distance(views, views[:, best]))
    return tuple(colors)


def _distance(views: Array, one: Array) -> Array:
    """Return the distance of each of ``views`` (``[sight, colour, 3]``) to one; colour-blind sights count half."""
    apart = np.linalg.norm(views - one[:, None], axis=-1)
    result: Array = np.minimum(apart[0], 2 * apart[1:].min(axis=0))
    return result


def rgb_of(color: str) -> Array:
    """Return red, green and blue in 0..1 of a colour ``"#rrggbb"``."""
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0


def hex_of(rgb: Iterable[int]) -> str:
    """Return ``"#rrggbb"`` for red, green and blue in 0..255."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def oklab(rgb: Array) -> Array:
    """Convert sRGB colours ``[colour, 3]`` in 0..1 to OKLab ``[sight, colour, 3]``.

    Sights are normal vision, protanopia and deuteranopia, the latter two by the matrices of Machado et al. 2009.
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    sights = np.array(
        [
            [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
            [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        ]
    )
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    seen = np.clip(np.einsum("sij,nj->sni", sights, linear), 0, 1)
    result: Array = np.cbrt(seen @ to_lms.T) @ to_lab.T
    return result
