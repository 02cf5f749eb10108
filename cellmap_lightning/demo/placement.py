"""Random placement of endoplasmic reticulum and vesicles in the free cytosol of the synthetic volume."""

from collections.abc import Callable, Sequence

import numpy as np

from cellmap_lightning.demo.geometry import Array, Tube
from cellmap_lightning.demo.specimen import CROPS, EXTENT

Clearance = Callable[[Array, Sequence[Tube]], Array]
"""Distance in nm from points ``[n, 3]`` to the nearest membrane, that of the tubes included."""

_VOLUME = (np.zeros(3), np.array(EXTENT))


def grow_er(rng: np.random.Generator, clearance: Clearance) -> list[Tube]:
    """Return tubules that wander through the cytosol: eight start in each large crop and 16 anywhere."""
    step, tubes = 34.0, []
    for start, stop in [*(crop.corners for crop in CROPS[:4])] * 8 + [_VOLUME] * 16:
        radius = float(rng.uniform(30, 36))
        candidates = rng.uniform(start, stop, (64, 3))
        free = candidates[clearance(candidates, ()) > radius + 16]
        if not len(free):
            continue
        nodes = [free[0]]
        heading = rng.normal(size=3)
        for _ in range(int(rng.integers(10, 22))):
            # A random walk with inertia: of twelve directions near the last one, the first that has room is taken.
            turns = heading / np.linalg.norm(heading) + 0.4 * rng.normal(size=(12, 3))
            turns *= step / np.linalg.norm(turns, axis=1, keepdims=True)
            ahead = nodes[-1] + turns
            fits = np.flatnonzero(clearance(ahead, ()) > radius + 12)
            if not fits.size:
                break
            heading = turns[fits[0]]
            nodes.append(ahead[fits[0]])
        if len(nodes) > 3:
            tubes.append(Tube(np.array(nodes), radius))
    return tubes


def place_vesicles(rng: np.random.Generator, clearance: Clearance, er: Sequence[Tube]) -> list[tuple[Array, float]]:
    """Return centres and radii of spheres: ten in each crop that annotates them, and up to 40 anywhere."""
    vesicles: list[tuple[Array, float]] = []
    corners = [crop.corners for crop in CROPS if "ves" in crop.classes]
    for low, high, count in [*((low + 45, high - 45, 10) for low, high in corners), (*_VOLUME, 40)]:
        candidates = rng.uniform(low, high, (400, 3))
        placed = 0
        for point, free in zip(candidates, clearance(candidates, er), strict=True):
            radius = float(rng.uniform(26, 38))
            apart = all(np.linalg.norm(point - p) > radius + r + 8 for p, r in vesicles)
            if free > radius + 8 and apart:
                vesicles.append((point, radius))
                placed += 1
            if placed == count:
                break
    return vesicles
