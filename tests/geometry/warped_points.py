"""The map of a sample point by point, from its formulas: splines by scipy, sections by a loop over them."""

import math

import numpy as np
from scipy.interpolate import BSpline

from cellmap_lightning.runtime.rng import SECTIONS, uniforms

CUBIC = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)


def spline(displacement, points):
    """Return ``sum_k c_k B(p_z / h_z - k_z) B(..) B(..)`` at points ``[..., 3]`` in nm."""
    at = points / displacement.spacing
    low = np.floor(at.reshape(-1, 3).min(axis=0)).astype(int) - 2
    high = np.ceil(at.reshape(-1, 3).max(axis=0)).astype(int) + 3
    controls = displacement.controls(tuple(low.tolist()), tuple((high - low).tolist()))
    parts = [np.nan_to_num(CUBIC(at[..., i, None] - np.arange(low[i], high[i]))) for i in range(3)]
    return np.einsum("...i,...j,...k,ijkc->...c", *parts, controls)


def motion(sections, number):
    """Return the shift of a section in three dimensions, and its angle in degrees, by a walk from the centre."""
    shift, angle = np.zeros(3), 0.0
    others = [i for i in range(3) if i != sections.axis]
    numbers = range(1, number + 1) if number > 0 else range(-1, number - 1, -1)
    for k in numbers if sections.lasting else [number] if number else []:
        moved, first, second, turned = drawn(sections, k)
        if moved:
            shift = np.zeros(3)
            shift[others] = first, second
            angle = turned
    return shift, angle


def drawn(sections, number):
    """Return whether a section moves, its shift along the two other axes, and its angle."""
    (u,) = uniforms(sections.key, SECTIONS, [number], 4).tolist()
    limits = sections.max_shift, sections.max_shift, sections.max_angle
    return u[0] < sections.probability, *((2 * v - 1) * limit for v, limit in zip(u[1:], limits, strict=True))


def world_points(center, shape, scale, turn, warp):
    """Return where in the volume each voxel of a patch lies, ``[z, y, x, 3]`` in nm."""
    p = (np.moveaxis(np.indices(shape), 0, -1) - (np.asarray(shape) - 1) / 2) * scale
    moved = p if warp is None or warp.displacement is None else p + spline(warp.displacement, p)
    for sections in reversed(warp.sections if warp else ()):
        b, c = (i for i in range(3) if i != sections.axis)
        numbers = np.floor(p[..., sections.axis] / sections.thickness + sections.phase).astype(int)
        for number in np.unique(numbers):
            shift, angle = motion(sections, int(number))
            here, s = numbers == number, math.sin(math.radians(angle))
            old = moved[here]
            new = old.copy()
            new[:, b] = math.cos(math.radians(angle)) * old[:, b] - s * old[:, c]
            new[:, c] = s * old[:, b] + math.cos(math.radians(angle)) * old[:, c]
            moved = moved.copy()
            moved[here] = new + shift
    return center + (moved if turn is None else moved @ np.asarray(turn).T)
