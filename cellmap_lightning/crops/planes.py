"""Planes of flat (two-dimensional) patches in a volume."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.geometry.placement import Window

#: Axis of the volume (0 z, 1 y, 2 x) along the patch's slice, rows and columns.
_AXES = {"xy": (0, 1, 2), "xz": (1, 0, 2), "yz": (2, 0, 1)}


class Plane:
    """The orientation of a patch's axes in the volume; see docs/transforms.md.

    Args:
        name: ``xy``; or ``xz`` or ``yz``, whose rows run along z.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.axes = _AXES[name]
        self._matrix: FloatArray | None = None
        if name != "xy":
            self._matrix = np.zeros((3, 3))
            self._matrix[list(self.axes), range(3)] = 1

    @classmethod
    def parse(cls, name: Any, arrays: Mapping[str, Any]) -> "Plane":
        """Create a plane from its name.

        Raises:
            CellMapKeyError: the name is not that of a plane.
            CellMapValueError: an array has three lengths, and is therefore aligned with the volume's axes.
        """
        if name not in _AXES:
            raise CellMapKeyError(f"a plane is one of {', '.join(_AXES)}, got {name!r}")
        solid = [array for array, spec in arrays.items() if not spec.flat]
        if name != "xy" and solid:
            raise CellMapValueError(f"plane {name!r} is for shapes of two lengths (y, x); {', '.join(solid)} has three")
        return cls(name)

    def thicken(self, window: Window, stored: tuple[float, float, float]) -> Window:
        """Return a flat window as thick as the volume's finest voxels, but no thinner than its pixels are wide."""
        thickness = max(stored[self.axes[0]], float(window.scale[1:].min()))
        return Window(window.shape, [thickness, *window.scale[1:].tolist()])

    def in_volume(self, window: Window) -> Window:
        """Return the window along the volume's z, y and x."""
        order = [self.axes.index(axis) for axis in range(3)]
        return Window([window.shape[i] for i in order], [float(window.scale[i]) for i in order])

    def turn(self, turn: FloatArray | None) -> FloatArray | None:
        """Return the matrix from a patch's axes to the volume's, including its rotation; None for the identity."""
        if self._matrix is None:
            return turn
        return self._matrix if turn is None else self._matrix @ turn
