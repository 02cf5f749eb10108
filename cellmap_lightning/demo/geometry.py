"""Closed-form shapes of the synthetic volume, and boxes of label voxels to paint them into.

Positions are nm from the volume's corner (not from the centre of voxel 0), in the order z y x.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellmap_lightning.demo.specimen import LABEL_SCALE, Material

Array = NDArray[Any]
Window = tuple[slice, slice, slice]


class Ripple:
    """A smooth random function of two coordinates: a sum of five plane waves.

    Args:
        rng: draws directions, wavelengths, phases and amplitudes.
        amplitude: bound of the absolute value, nm.
        wavelengths: the shortest and the longest, nm.

    Example:
        >>> ripple = Ripple(np.random.default_rng(0), 55, (350, 800))
        >>> height = ripple(z[:, None], y[None, :])
    """

    def __init__(self, rng: np.random.Generator, amplitude: float, wavelengths: tuple[float, float]) -> None:
        n = 5
        angle = rng.uniform(0, np.pi, n)
        self._k = 2 * np.pi / rng.uniform(*wavelengths, n) * np.stack([np.sin(angle), np.cos(angle)])
        self._phase = rng.uniform(0, 2 * np.pi, n)
        self._amplitude = amplitude * rng.dirichlet(np.full(n, 4.0))

    def _waves(self, u: Array, v: Array) -> Iterator[tuple[float, float, float, tuple[Array, ...]]]:
        """Yield amplitude, wave numbers along u and v, and the sine and cosine of u and of v for each wave."""
        ku, kv = (k.reshape(-1, *[1] * u.ndim) for k in self._k)
        phase = ku * u.astype(np.float64) + self._phase.reshape(ku.shape)
        along = kv * v.astype(np.float64)
        sines = zip(np.sin(phase), np.cos(phase), np.sin(along), np.cos(along), strict=True)
        yield from zip(self._amplitude, *self._k, sines, strict=True)

    # sin(a + b) = sin a cos b + cos a sin b: on a grid, sines are evaluated along its axes and only products per point.
    def __call__(self, u: Array, v: Array) -> Array:
        """Return the value in nm, float64, at every pair of the broadcast coordinates."""
        total = np.zeros(np.broadcast_shapes(u.shape, v.shape))
        for amplitude, _, _, (su, cu, sv, cv) in self._waves(u, v):
            total += (amplitude * su) * cv
            total += (amplitude * cu) * sv
        return total

    def steepness(self, u: Array, v: Array) -> Array:
        """Return the component of the surface's unit normal along the height axis: 1 where it is flat."""
        du = np.zeros(np.broadcast_shapes(u.shape, v.shape))
        dv = du.copy()
        for amplitude, ku, kv, (su, cu, sv, cv) in self._waves(u, v):
            slope = (amplitude * cu) * cv - (amplitude * su) * sv
            du += ku * slope
            dv += kv * slope
        return np.asarray(1 / np.sqrt(1 + du * du + dv * dv))


@dataclass(frozen=True)
class Tube:
    """A bent capsule: all points within ``radius`` nm of the polyline through ``nodes``.

    Example:
        >>> Tube(parabola((250, 230, 230), (370, 420, 460), (0, 70, -50)), radius=92).box
    """

    nodes: Array
    radius: float

    @cached_property
    def boxes(self) -> list[tuple[list[float], list[float]]]:
        """Bounding box of each piece, lower and upper corner."""
        a, b = self.nodes[:-1], self.nodes[1:]
        low, high = np.minimum(a, b) - self.radius, np.maximum(a, b) + self.radius
        return [*zip(low.tolist(), high.tolist(), strict=True)]

    @cached_property
    def box(self) -> tuple[list[float], list[float]]:
        """Bounding box, lower and upper corner."""
        low, high = self.nodes.min(0) - self.radius, self.nodes.max(0) + self.radius
        return low.tolist(), high.tolist()


def tube_distance(points: Array, tubes: Sequence[Tube]) -> Array:
    """Return the distance in nm of points ``[n, 3]`` from the nearest tube's surface, negative inside."""
    start = np.concatenate([tube.nodes[:-1] for tube in tubes])
    along = np.concatenate([np.diff(tube.nodes, axis=0) for tube in tubes])
    radius = np.repeat([tube.radius for tube in tubes], [len(tube.nodes) - 1 for tube in tubes])
    # Distance to the nearest point of each segment, whose position along it is clipped to the segment's ends.
    to = points[:, None] - start
    t = np.clip((to * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return np.asarray((np.sqrt(((to - t[..., None] * along) ** 2).sum(-1)) - radius).min(1))


def parabola(a: Sequence[float], b: Sequence[float], bend: Sequence[float], pieces: int = 8) -> Array:
    """Return nodes ``[pieces + 1, 3]`` of the parabola from ``a`` to ``b`` whose middle is displaced by ``bend``."""
    t = np.linspace(0, 1, pieces + 1)[:, None]
    return np.asarray(np.asarray(a) * (1 - t) + np.asarray(b) * t + 4 * t * (1 - t) * np.asarray(bend))


class VoxelBox:
    """A box of label voxels with the coordinates of their centres.

    Args:
        start: the first voxel, z y x.
        shape: number of voxels, z y x.

    Attributes:
        material: `Material` of each voxel, at first cytosol.
        owner: number of the mitochondrion or vesicle that each voxel belongs to, counted from 1; 0 for none.

    Example:
        >>> box = VoxelBox((0, 0, 0), (8, 64, 64))
        >>> window = box.window((0, 0, 0), (10, 50, 50))
        >>> box.material[window] = Material.ECS
    """

    def __init__(self, start: Sequence[int], shape: Sequence[int]) -> None:
        self.start, self.shape = tuple(start), tuple(shape)
        self.axes = [
            ((np.arange(o, o + n) + 0.5) * s).astype(np.float32)
            for o, n, s in zip(start, shape, LABEL_SCALE, strict=True)
        ]
        self.material = np.full(self.shape, Material.CYTO, np.uint8)
        self.owner = np.zeros(self.shape, np.uint8)

    def window(self, low: Sequence[float], high: Sequence[float]) -> Window | None:
        """Return the index of the voxels whose centres lie in ``[low, high]`` nm, or None if the box has none."""
        parts = []
        for start, n, s, lo, hi in zip(self.start, self.shape, LABEL_SCALE, low, high, strict=True):
            # The centre of voxel i is at (i + 0.5) s.
            first = max(math.ceil(lo / s - 0.5) - start, 0)
            last = min(math.floor(hi / s - 0.5) + 1 - start, n)
            if first >= last:
                return None
            parts.append(slice(first, last))
        return parts[0], parts[1], parts[2]

    def at(self, window: Window) -> tuple[Array, Array, Array]:
        """Return the coordinates of a window, float32, as arrays that broadcast against each other."""
        z, y, x = (axis[part] for axis, part in zip(self.axes, window, strict=True))
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def along(self, window: Window, tube: Tube) -> tuple[Array, Array]:
        """Return squared distance from a tube's axis and position along it in nm, for every voxel of a window.

        Voxels beyond the bounding box of every piece have an infinite distance.
        """
        shape = tuple(part.stop - part.start for part in window)
        nearest = np.full(shape, np.inf, np.float32)
        position = np.zeros(shape, np.float32)
        passed = 0.0
        for (low, high), a, b in zip(tube.boxes, tube.nodes[:-1], tube.nodes[1:], strict=True):
            length = float(np.sqrt(((b - a) ** 2).sum()))
            part = self.window(low, high)
            if part is not None:
                inner = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, window, strict=True))
                to = [axis - origin for axis, origin in zip(self.at(part), a.tolist(), strict=True)]
                ez, ey, ex = ((b - a) / length).tolist()
                dot = to[0] * ez + to[1] * ey + to[2] * ex
                t = np.clip(dot, 0, length)
                # |to - t e|^2 for the unit vector e, without an array for the foot of the perpendicular.
                square = (to[0] * to[0] + to[1] * to[1] + to[2] * to[2]) + t * (t - 2 * dot)
                closer = square < nearest[inner]
                np.copyto(nearest[inner], square, where=closer)
                np.copyto(position[inner], t + passed, where=closer)
            passed += length
        return nearest, position
