"""Colours of classes."""

from functools import lru_cache

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures.canvas import Array


def outline_colors(n: int) -> list[str]:
    """Colours for ``n`` classes that stay apart on grey images and for colour-blind readers.

    The first six are from the palette of Okabe and Ito; each further one is as far as can be from all before it, to
    normal sight as well as with red or green blindness. The first colours do not depend on ``n``.

    Args:
        n: Number of classes.

    Returns:
        ``n`` colours as ``"#rrggbb"``, all different up to n = 400.
    """
    if n < 0:
        raise CellMapValueError(f"The number of colours must not be negative; it is {n}.")
    palette = _palette(64 if n <= 64 else 400)
    return [palette[i % len(palette)] for i in range(n)]


@lru_cache(maxsize=2)
def _palette(n: int) -> tuple[str, ...]:
    base = ["#56b4e9", "#e69f00", "#00c48c", "#f0e442", "#ff6a3d", "#e583c0"]
    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(grid / 255.0)[0]
    # Neither greyish, which the raw image is, nor so dark as a membrane.
    grid = grid[(lab[:, 0] > 0.62) & (lab[:, 0] < 0.95) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.085)]
    chosen = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in base])
    views, nearest = oklab(grid / 255.0), np.full(len(grid), np.inf)
    for view in np.moveaxis(oklab(chosen / 255.0), 1, 0):
        nearest = np.minimum(nearest, _distance(views, view))
    colors = list(base)
    while len(colors) < n:
        best = int(nearest.argmax())
        colors.append("#{:02x}{:02x}{:02x}".format(*grid[best]))
        nearest = np.minimum(nearest, _distance(views, views[:, best]))
    return tuple(colors)


def _distance(views: Array, one: Array) -> Array:
    """Distance of each colour of ``views`` (``[sight, colour, 3]``) to ``one``, blind sights counting half as much."""
    apart = np.linalg.norm(views - one[:, None], axis=-1)
    result: Array = np.minimum(apart[0], 2 * apart[1:].min(axis=0))
    return result


def oklab(rgb: Array) -> Array:
    """Colours ``[colour, 3]`` in 0..1 as OKLab ``[sight, colour, 3]``: normal, protanopia, deuteranopia (Machado)."""
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
