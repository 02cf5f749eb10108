"""The cells of the synthetic volume: positions of all structures for a seed, and the material of any label voxel."""

from collections.abc import Sequence

import numpy as np

from cellmap_lightning.demo.geometry import Array, Ripple, Tube, VoxelBox, parabola, tube_distance
from cellmap_lightning.demo.placement import grow_er, place_vesicles
from cellmap_lightning.demo.specimen import EXTENT, Material

# Mean positions of the two walls between the cells, and the thickness of the plasma membrane, nm. Cell A fills small x;
# B (small y) and C (large y) share the rest.
_WALL_X, _WALL_Y, _PM = 930.0, 600.0, 20.0
_NUC_CENTRE, _NUC_RADII = (320.0, 1230.0, 160.0), (700.0, 430.0, 520.0)
# Layers of the nuclear envelope by their depth below the surface, nm, and the rim of dense chromatin under it.
_NUC_LAYERS = (
    (0.0, Material.NE_MEM), (18.0, Material.NE_LUM), (40.0, Material.NE_MEM), (58.0, Material.NUC_RIM),
    (100.0, Material.NUC),
)  # fmt: skip
_MITO_LAYERS = (
    (0, Material.MITO_MEM), (9, Material.MITO_GAP), (15, Material.MITO_MEM), (24, Material.MITO_LUM),
)  # fmt: skip
_CRISTA_PERIOD, _CRISTA = 44.0, 15.0
# Mitochondria: both ends, displacement of the middle, pieces, radius.
_MITOS = (
    ((250, 230, 230), (370, 420, 460), (0, 70, -50), 8, 92),
    ((180, 130, 480), (150, 300, 545), (-10, 0, 30), 5, 78),
    ((330, 645, 130), (310, 668, 390), (30, -25, 0), 8, 80),
    ((300, 700, 700), (470, 850, 770), (0, 40, 20), 6, 84),
    ((210, 70, 700), (190, 250, 760), (20, 0, 25), 6, 82),
    ((140, 180, 1110), (300, 360, 1130), (0, 10, 25), 6, 78),
    ((250, 800, 1140), (520, 1010, 1130), (30, 0, 10), 6, 84),
    ((560, 90, 120), (560, 300, 620), (-20, 60, 0), 8, 84),
    ((560, 560, 560), (600, 590, 750), (0, -30, 0), 5, 76),
    ((60, 560, 640), (90, 760, 800), (0, 30, -20), 6, 76),
)


class Scene:
    """Positions of all structures for one seed; `paint` evaluates any box of label voxels.

    Args:
        seed: deforms walls and nucleus, moves the mitochondria by up to 12 nm, and places the other organelles.

    Example:
        >>> material, owner = Scene(0).paint((0, 0, 0), (8, 64, 64))
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self._wall_x = Ripple(rng, 55, (350, 800))  # x over (z, y)
        self._wall_y = Ripple(rng, 50, (350, 800))  # y over (z, x)
        self._gap = Ripple(rng, 14, (200, 500))  # half the extracellular gap over (z, y)
        self._nuc_warp = [Ripple(rng, 22, (180, 420)) for _ in range(3)]
        self._crista_warp = Ripple(rng, 12, (90, 200))

        def near(point: Sequence[float]) -> list[float]:
            return [c + float(rng.uniform(-12, 12)) for c in point]

        self._mitos = [
            Tube(parabola(near(a), near(b), near(bend), pieces), radius) for a, b, bend, pieces, radius in _MITOS
        ]
        sides = rng.normal(size=(len(self._mitos), 3))
        self._sides = sides / [[np.linalg.norm(side)] for side in sides]
        self._er = grow_er(rng, self._clearance)
        self._vesicles = place_vesicles(rng, self._clearance, self._er)

    # -- distances

    def _cell_distance(self, z: Array, y: Array, x: Array) -> Array:
        """Return the distance from the extracellular space into the nearest cell, nm, positive inside; dtype of x."""
        kind = x.dtype
        wall_x = (self._wall_x(z, y) + _WALL_X).astype(kind)
        wall_y = (self._wall_y(z, x) + _WALL_Y).astype(kind)
        gap = (self._gap(z, y) + 26).astype(kind)
        to_x = (x - wall_x) * self._wall_x.steepness(z, y).astype(kind)
        to_y = np.abs((y - wall_y) * self._wall_y.steepness(z, x).astype(kind))
        # B and C end in a rounded corner: a polynomial smooth minimum of the distances from both walls.
        fold = np.maximum(70 - np.abs(to_x - to_y), 0)
        right = np.minimum(to_x, to_y) - fold * fold * (1 / 280)
        return np.asarray(np.maximum(-to_x, right) - gap)

    def _nuc_square(self, z: Array, y: Array, x: Array) -> Array:
        """Return the squared radius in units of the nucleus' radii, 1 on its surface; dtype of x."""
        total: Array = np.zeros((), x.dtype)
        # Each term depends on two coordinates, so that its ripple is evaluated on a plane.
        pairs = ((z, y), (y, x), (x, z))
        for (u, v), warp, centre, radius in zip(pairs, self._nuc_warp, _NUC_CENTRE, _NUC_RADII, strict=True):
            moved = u + warp(u, v).astype(x.dtype)
            total = total + ((moved - centre) / radius) ** 2
        return total

    def _clearance(self, points: Array, tubes: Sequence[Tube]) -> Array:
        """Return the distance in nm from points ``[n, 3]`` to the nearest membrane of a cell, the nucleus or a tube."""
        z, y, x = points.T
        nucleus = (np.sqrt(self._nuc_square(z, y, x)) - 1) * _NUC_RADII[1]
        outside = np.minimum(self._cell_distance(z, y, x) - _PM, nucleus)
        return np.asarray(np.minimum(outside, tube_distance(points, [*self._mitos, *tubes])))

    # -- voxels

    def paint(self, start: Sequence[int], shape: Sequence[int]) -> tuple[Array, Array]:
        """Evaluate a box of label voxels.

        Args:
            start: first voxel of the box, z y x.
            shape: its shape in label voxels.

        Returns:
            The material of every voxel, and the number of the object that it belongs to (0 for none), counted from 1
            within mitochondria and within vesicles; both uint8.
        """
        box = VoxelBox(start, shape)
        self._paint_cells(box)
        self._paint_nucleus(box)
        for number, tube in enumerate(self._mitos):
            self._paint_mito(box, number, tube)
        self._paint_er(box)
        self._paint_vesicles(box)
        return box.material, box.owner

    def _paint_cells(self, box: VoxelBox) -> None:
        # Left of the wall's leftmost excursion all is inside cell A, which is two thirds of the volume.
        window = box.window((0.0, 0.0, _WALL_X - 120), EXTENT)
        if window is not None:
            depth = self._cell_distance(*box.at(window))
            material = box.material[window]
            material[depth < _PM] = Material.PM
            material[depth < 0] = Material.ECS

    def _paint_nucleus(self, box: VoxelBox) -> None:
        low, high = ([c + sign * (r + 30) for c, r in zip(_NUC_CENTRE, _NUC_RADII, strict=True)] for sign in (-1, 1))
        window = box.window(low, high)
        if window is not None:
            square = self._nuc_square(*box.at(window))
            for depth, layer in _NUC_LAYERS:
                box.material[window][square < (1 - depth / _NUC_RADII[1]) ** 2] = layer

    def _paint_mito(self, box: VoxelBox, number: int, tube: Tube) -> None:
        window = box.window(*tube.box)
        if window is None:
            return
        square, position = box.along(window, tube)
        material, radius = box.material[window], tube.radius
        box.owner[window][square < radius**2] = number + 1
        for depth, layer in _MITO_LAYERS:
            material[square < (radius - depth) ** 2] = layer
        # Cristae: sheets across the axis that start from alternating sides and stop short of the other wall.
        z, y, x = box.at(window)
        cz, cy, cx = tube.nodes.mean(0).tolist()
        sz, sy, sx = self._sides[number].tolist()
        lateral = (z - cz) * sz + (y - cy) * sy + (x - cx) * sx
        phase = position + self._crista_warp(y, x).astype(np.float32) + self._crista_warp(z, y).astype(np.float32)
        phase *= 1 / _CRISTA_PERIOD
        turn = np.floor(phase)
        sheet = (phase - turn) < _CRISTA / _CRISTA_PERIOD
        reach = np.where(turn % 2 == 0, lateral, -lateral) < 0.3 * radius
        material[sheet & reach & (square < (radius - 20) ** 2)] = Material.MITO_MEM

    def _paint_er(self, box: VoxelBox) -> None:
        # All membranes before all lumina, so that crossing tubules open into each other as a network does.
        lumina = []
        for tube in self._er:
            window = box.window(*tube.box)
            if window is not None:
                square, _ = box.along(window, tube)
                box.material[window][square < tube.radius**2] = Material.ER_MEM
                lumina.append((window, square < (tube.radius - 14) ** 2))
        for window, lumen in lumina:
            box.material[window][lumen] = Material.ER_LUM

    def _paint_vesicles(self, box: VoxelBox) -> None:
        for number, (centre, radius) in enumerate(self._vesicles):
            window = box.window((centre - radius).tolist(), (centre + radius).tolist())
            if window is not None:
                z, y, x = (axis - c for axis, c in zip(box.at(window), centre.tolist(), strict=True))
                square = z * z + y * y + x * x
                inside = square < radius**2
                box.owner[window][inside] = number + 1
                box.material[window][inside] = Material.VES_MEM
                box.material[window][square < (radius - 13) ** 2] = Material.VES_LUM
