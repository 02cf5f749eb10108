"""A smooth random displacement: a uniform cubic B-spline over a grid of control points.

``u(p) = sum_k c_k B(p_z / h_z - k_z) B(p_y / h_y - k_y) B(p_x / h_x - k_x)`` with the cubic B-spline ``B`` and control
points ``c_k``, each component uniform in ``[-magnitude, magnitude]``. Since the values of ``B`` are positive and sum to
1, no point moves further than the magnitude.

``p + u(p)`` is invertible as long as no control point moves further than ``spacing / K``, with K of Choi and Lee,
"Injectivity conditions of 2D and 3D uniform cubic B-spline functions", Graphical Models 62 (2000),
doi:10.1006/gmod.2000.0531. The Jacobian determinant is linear in each row of the gradient, and so takes its least value
where every component of every control point is at its limit. The bound is tight: beyond it there are control points
that fold.
"""

from dataclasses import dataclass

import numpy as np

from cellmap_lightning.geometry.lattice import FloatArray, Shape, Vector
from cellmap_lightning.runtime.rng import CONTROLS, uniforms

#: K for one, two and three displaced axes. For one axis it is the largest sum of ``|B'|``, at the middle of a cell.
_FOLDING = {1: 1.5, 2: 2.046392675, 3: 2.479472335}
#: Bits of each coordinate of a control point in the counter of its random numbers.
_BITS = 20


def largest_magnitude(axes: int) -> float:
    """Return the magnitude, in spacings, below which a displacement of 1, 2 or 3 axes cannot fold."""
    return 1 / _FOLDING[axes]


def spline_weights(part: FloatArray) -> FloatArray:
    """Return the weights ``[4, n]`` of the control points around positions in a cell, each in [0, 1)."""
    t = part
    return np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6


@dataclass(frozen=True, eq=False)
class Displacement:
    """The displacement of one sample, a function of the distance from the patch's centre.

    Arrays of different shapes and voxel sizes around one centre are displaced alike: a control point depends on its
    place in the grid alone.

    Attributes:
        key: seed of the sample's control points.
        spacing: distance of control points along the patch's axes, nm; one lies at the centre of the patch.
        magnitude: largest displacement along each axis, nm; 0 along axes that are not displaced.

    Example:
        >>> Displacement(1, (80, 80, 80), (0, 8, 8)).controls((-1, -1, -1), (4, 4, 4)).shape
        (4, 4, 4, 3)
    """

    key: int
    spacing: Vector
    magnitude: Vector

    def controls(self, first: Shape, counts: Shape) -> FloatArray:
        """Return a box of the control points, ``[z, y, x, 3]`` in nm.

        Args:
            first: its first control point; 0 is at the centre of the patch.
            counts: control points along z, y, x.
        """
        z, y, x = (np.arange(f, f + n) & ((1 << _BITS) - 1) for f, n in zip(first, counts, strict=True))
        counters = (z[:, None, None] << 2 * _BITS) | (y[:, None] << _BITS) | x
        numbers = uniforms(self.key, CONTROLS, counters.ravel(), 3).reshape(*counts, 3)
        return (2 * numbers - 1) * self.magnitude
