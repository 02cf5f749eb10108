"""Random displacements of whole sections, as a stack of sections has them that was cut or aligned imperfectly."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.runtime.rng import SECTIONS, uniforms


@dataclass(frozen=True, eq=False)
class Sections:
    """The displaced sections of one sample, a function of the distance from the patch's centre.

    Section 0 holds the centre of the patch and stays in place. Others move in their plane: by up to ``max_shift`` along
    each of its axes, and by up to ``max_angle`` about the centre of the patch.

    Attributes:
        key: seed of the sample's sections.
        axis: axis of the patch across the sections.
        thickness: of a section, nm.
        phase: position of the patch's centre in section 0, in [0, 1).
        probability: of a section to be displaced.
        max_shift: nm.
        max_angle: degrees.
        lasting: sections beyond a displaced one, as seen from the centre, move with it, up to the next; otherwise each
            moves alone.

    Example:
        >>> len(Sections(1, 0, 40.0, 0.5, 0.1, 16.0).motions(np.arange(-4, 4)))
        8
    """

    key: int
    axis: int
    thickness: float
    phase: float
    probability: float
    max_shift: float
    max_angle: float = 0.0
    lasting: bool = False

    def numbers(self, positions: FloatArray) -> npt.NDArray[np.int64]:
        """Return the number of the section at some positions along its axis, nm from the centre of the patch."""
        return np.floor(positions / self.thickness + self.phase).astype(np.int64)

    def motions(self, sections: npt.NDArray[np.int64]) -> FloatArray:
        """Return shift (nm along the two other axes, in the order z, y, x) and angle (degrees) of some sections.

        Args:
            sections: numbers of consecutive sections, ``[n]``.

        Returns:
            ``[n, 3]``; zeros for a section that stays in place.
        """
        low, high = min(int(sections.min(initial=0)), 0), max(int(sections.max(initial=0)), 0)
        numbers = np.arange(low, high + 1)
        drawn = uniforms(self.key, SECTIONS, numbers, 4)
        motions = (2 * drawn[:, 1:] - 1) * [self.max_shift, self.max_shift, self.max_angle]
        moved = drawn[:, 0] < self.probability
        moved[-low] = True  # section 0: nothing moves up to the first displaced section on each side of it
        motions[-low] = 0
        if self.lasting:
            distance = np.abs(numbers)
            above = np.maximum.accumulate(np.where(moved & (numbers >= 0), distance, 0))
            below = np.maximum.accumulate(np.where(moved & (numbers < 0), distance, 0)[::-1])[::-1]
            motions = motions[np.where(numbers >= 0, above, -below) - low]
        else:
            motions[~moved] = 0
        return motions[sections - low]

    def motion_matrix(self, degrees: float) -> FloatArray:
        """Return the rotation by an angle about the axis across the sections."""
        b, c = (i for i in range(3) if i != self.axis)
        matrix = np.eye(3)
        matrix[b, b] = matrix[c, c] = math.cos(math.radians(degrees))
        matrix[c, b] = math.sin(math.radians(degrees))
        matrix[b, c] = -matrix[c, b]
        return matrix

    def extended(self, half: FloatArray) -> FloatArray:
        """Return half the edge lengths (nm) of the box that holds the displaced sections of a box."""
        out = half.copy()
        others = [i for i in range(3) if i != self.axis]
        if self.max_angle:
            # A corner moves along each axis by its distance from the centre times the angle, at most to the distance.
            radius = float(np.linalg.norm(half[others]))
            turn = min(math.radians(self.max_angle), math.pi / 2)
            out[others] = np.minimum(half[others] + radius * math.sin(turn), radius)
        out[others] += self.max_shift
        return out
