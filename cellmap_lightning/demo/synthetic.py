"""A small volume that looks and is stored like the field's own, for demonstrations and tests.

One cartoon of FIB-SEM: three cells with extracellular space between them, a nucleus in its envelope, bent mitochondria
with cristae, a network of endoplasmic reticulum and vesicles. All of it is closed-form geometry in nm, so the raw
volume (voxels of 5.24 x 4 x 4 nm) and the labels (2.62 x 2 x 2 nm) come from one function: a raw voxel is the mean of
the eight label voxels in it, plus texture and noise, and the two agree to the voxel.

What real data have and loaders trip over is here too: half-voxel offsets between label and raw lattices, a crop off the
lattice of the coarser raw level, crops at the volume's border and smaller than a patch, a class that is annotated and
absent, classes without a group, ``unknown`` voxels, instance ids that pass through and beyond 255, an array without
attributes. The two membranes of a mitochondrion and the plasma membrane are drawn 20 to 24 nm thick, so that they
outlive the usual training scale of about 8 nm.
"""

import contextlib
import csv
import io
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from cellmap_lightning.errors import CellMapFileExistsError, CellMapValueError
from cellmap_lightning.io.writer import downsample_mean, write_group, write_multiscale

__all__ = ["CLASS_IDS", "TRAIN_CLASSES", "SyntheticVolume", "demo_csv", "write_volume"]

Floats = NDArray[np.float32]
Labels = NDArray[np.integer[Any]]
ZarrFormat = Literal[2, 3]

# Raised whenever the same seed gives other voxels or other files, so that nobody is served last year's volume.
_VERSION = 1

CLASS_IDS: Mapping[str, int] = {
    "ecs": 1,
    "pm": 2,
    "mito_mem": 3,
    "mito_lum": 4,
    "ves_mem": 8,
    "ves_lum": 9,
    "er_mem": 16,
    "er_lum": 17,
    "cyto": 35,
    "nuc": 37,
    "ves": 41,
    "mito": 50,
    "er": 51,
}
"""The classes of the volume and their ids in the CellMap challenge."""

TRAIN_CLASSES = ("mito", "er", "nuc", "pm")
"""Classes that a small network learns from local texture; every one occurs in the training and the validation crops."""

RAW_SCALE = (5.24, 4.0, 4.0)
RAW_SHAPE = (128, 320, 320)
_SCALE = tuple(s / 2 for s in RAW_SCALE)
_SHAPE = tuple(2 * n for n in RAW_SHAPE)
_EXTENT = tuple(s * n for s, n in zip(RAW_SCALE, RAW_SHAPE, strict=True))
_RAW = "recon-1/em/fibsem-uint8"
_GROUNDTRUTH = "recon-1/labels/groundtruth"
_UNKNOWN = 255


# ------------------------------------------------------------------------------------------------------- materials
# What a label voxel can be made of. Finer than the classes, because a double membrane has two shades and one name.
(
    _ECS,
    _PM,
    _CYTO,
    _MITO_MEM,
    _MITO_GAP,
    _MITO_LUM,
    _ER_MEM,
    _ER_LUM,
    _VES_MEM,
    _VES_LUM,
    _NE_MEM,
    _NE_LUM,
    _NUC_RIM,
    _NUC,
) = range(14)

_SHADES = np.array([206, 62, 150, 58, 96, 112, 66, 190, 64, 116, 60, 188, 150, 158], np.uint8)
_IDS = np.array([1, 2, 35, 3, 3, 4, 16, 17, 8, 9, 37, 37, 37, 37], np.uint8)
_MEMBERS: Mapping[str, tuple[int, ...]] = {
    "ecs": (_ECS,),
    "pm": (_PM,),
    "mito_mem": (_MITO_MEM, _MITO_GAP),
    "mito_lum": (_MITO_LUM,),
    "ves_mem": (_VES_MEM,),
    "ves_lum": (_VES_LUM,),
    "er_mem": (_ER_MEM,),
    "er_lum": (_ER_LUM,),
    "cyto": (_CYTO,),
    "nuc": (_NE_MEM, _NE_LUM, _NUC_RIM, _NUC),
    "ves": (_VES_MEM, _VES_LUM),
    "mito": (_MITO_MEM, _MITO_GAP, _MITO_LUM),
    "er": (_ER_MEM, _ER_LUM),
}
_INSTANCES = ("mito", "nuc", "ves")


@dataclass(frozen=True)
class _Crop:
    """One annotated box, in label voxels from the volume's corner; even offsets are corners of raw voxels."""

    name: str
    usage: Literal["train", "validate"]
    offset: tuple[int, int, int]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    unknown: tuple[str, ...] = ()  # classes whose annotator stopped before the end of x
    bare: tuple[str, ...] = ()  # classes whose s0 has lost its attributes


_CROPS = (
    # Cytoplasm only: nuc is annotated here, and nowhere to be seen.
    _Crop("crop1", "train", (64, 48, 60), (128, 216, 216), ("mito", "mito_mem", "er", "nuc", "ves")),
    # Its corner is odd in raw voxels: on the lattice of raw s0, between the voxels of raw s1.
    _Crop(
        "crop2",
        "train",
        (56, 290, 20),
        (128, 216, 216),
        ("mito", "er", "er_mem", "nuc", "pm", "cyto"),
        unknown=("er", "er_mem"),
    ),
    # Touches the volume's border on three sides; nobody annotated nuc or ves.
    _Crop("crop3", "train", (0, 0, 400), (128, 216, 240), ("ecs", "pm", "mito", "er")),
    _Crop("crop4", "validate", (72, 300, 248), (128, 208, 240), ("ecs", "pm", "mito", "er", "nuc", "ves")),
    # Smaller than any sensible patch.
    _Crop("crop5", "train", (64, 40, 320), (32, 48, 48), ("mito", "mito_mem"), bare=("mito_mem",)),
)


# -------------------------------------------------------------------------------------------------------- geometry
# Positions are nm from the volume's corner (not from the centre of voxel 0), order z y x.


class _Ripple:
    """A smooth random function of two coordinates: a few plane waves, evaluable anywhere."""

    def __init__(self, rng: np.random.Generator, amplitude: float, wavelengths: tuple[float, float]) -> None:
        n = 5
        angle = rng.uniform(0, np.pi, n)
        self.k = 2 * np.pi / rng.uniform(*wavelengths, n) * np.stack([np.sin(angle), np.cos(angle)])
        self.phase = rng.uniform(0, 2 * np.pi, n)
        self.amplitude = amplitude * rng.dirichlet(np.full(n, 4.0))

    def _waves(self, u: NDArray[Any], v: NDArray[Any]) -> Iterator[tuple[float, float, float, tuple[Any, ...]]]:
        # The sine of a sum, taken apart: on a grid it costs sines of one coordinate and products of two.
        ku, kv = (k.reshape(-1, *[1] * u.ndim) for k in self.k)
        phase = ku * u + self.phase.reshape(ku.shape)
        sines = zip(np.sin(phase), np.cos(phase), np.sin(kv * v), np.cos(kv * v), strict=True)
        yield from zip(self.amplitude, *self.k, sines, strict=True)

    def __call__(self, u: NDArray[Any], v: NDArray[Any]) -> NDArray[np.float64]:
        """Value in nm at every pair of the broadcast coordinates, within plus and minus the amplitude."""
        u, v = u.astype(np.float64), v.astype(np.float64)
        total = np.zeros(np.broadcast_shapes(u.shape, v.shape))
        for a, _, _, (su, cu, sv, cv) in self._waves(u, v):
            total += (a * su) * cv
            total += (a * cu) * sv
        return total

    def steepness(self, u: NDArray[Any], v: NDArray[Any]) -> NDArray[np.float64]:
        """Length of the unit normal's share along the height axis: 1 where flat."""
        u, v = u.astype(np.float64), v.astype(np.float64)
        du = np.zeros(np.broadcast_shapes(u.shape, v.shape))
        dv = du.copy()
        for a, ku, kv, (su, cu, sv, cv) in self._waves(u, v):
            slope = (a * cu) * cv - (a * su) * sv
            du += ku * slope
            dv += kv * slope
        return np.asarray(1 / np.sqrt(1 + du * du + dv * dv))


@dataclass(frozen=True)
class _Tube:
    """A bent capsule: everything within ``radius`` nm of a polyline."""

    nodes: NDArray[np.float64]
    radius: float

    @cached_property
    def boxes(self) -> list[tuple[list[float], list[float]]]:
        """What each piece of the capsule fits into, lower and upper corner."""
        a, b = self.nodes[:-1], self.nodes[1:]
        low, high = np.minimum(a, b) - self.radius, np.maximum(a, b) + self.radius
        return [*zip(low.tolist(), high.tolist(), strict=True)]

    @cached_property
    def box(self) -> tuple[list[float], list[float]]:
        """What the whole capsule fits into."""
        low, high = self.nodes.min(0) - self.radius, self.nodes.max(0) + self.radius
        return low.tolist(), high.tolist()


def _distance(points: NDArray[np.float64], tubes: Sequence[_Tube]) -> NDArray[np.float64]:
    """Distance in nm of points ``[n, 3]`` from the nearest tube's surface, negative inside."""
    start = np.concatenate([tube.nodes[:-1] for tube in tubes])
    along = np.concatenate([np.diff(tube.nodes, axis=0) for tube in tubes])
    radius = np.repeat([tube.radius for tube in tubes], [len(tube.nodes) - 1 for tube in tubes])
    to = points[:, None] - start
    t = np.clip((to * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return np.asarray((np.sqrt(((to - t[..., None] * along) ** 2).sum(-1)) - radius).min(1))


def _curve(a: Sequence[float], b: Sequence[float], bend: Sequence[float], pieces: int = 8) -> NDArray[np.float64]:
    """Nodes of the parabola from ``a`` to ``b`` whose middle is displaced by ``bend``."""
    t = np.linspace(0, 1, pieces + 1)[:, None]
    return np.asarray(np.asarray(a) * (1 - t) + np.asarray(b) * t + 4 * t * (1 - t) * np.asarray(bend))


class _Grid:
    """The centres of a box of label voxels, and windows of it around objects."""

    def __init__(self, start: Sequence[int], shape: Sequence[int]) -> None:
        self.start, self.shape = tuple(start), tuple(shape)
        self.axes = [
            ((np.arange(o, o + n) + 0.5) * s).astype(np.float32) for o, n, s in zip(start, shape, _SCALE, strict=True)
        ]

    def window(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice] | None:
        """Index of the voxels whose centres lie in ``[low, high]`` nm; None where there are none."""
        parts = []
        for start, n, s, lo, hi in zip(self.start, self.shape, _SCALE, low, high, strict=True):
            first = max(math.ceil(lo / s - 0.5) - start, 0)
            last = min(math.floor(hi / s - 0.5) + 1 - start, n)
            if first >= last:
                return None
            parts.append(slice(first, last))
        return parts[0], parts[1], parts[2]

    def at(self, window: tuple[slice, slice, slice]) -> tuple[Floats, Floats, Floats]:
        """Coordinates of a window as arrays that broadcast against each other."""
        z, y, x = (axis[part] for axis, part in zip(self.axes, window, strict=True))
        return z[:, None, None], y[None, :, None], x[None, None, :]


def _along(grid: _Grid, window: tuple[slice, slice, slice], tube: _Tube) -> tuple[Floats, Floats]:
    """Squared distance from a tube's axis, and the position along it in nm, for every voxel of a window."""
    shape = tuple(part.stop - part.start for part in window)
    nearest = np.full(shape, np.float32(np.inf))
    position = np.zeros(shape, np.float32)
    done = 0.0
    for (low, high), a, b in zip(tube.boxes, tube.nodes[:-1], tube.nodes[1:], strict=True):
        along = b - a
        length = float(np.sqrt((along**2).sum()))
        part = grid.window(low, high)
        if part is not None:
            inner = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, window, strict=True))
            to = [axis - np.float32(origin) for axis, origin in zip(grid.at(part), a, strict=True)]
            dot = sum((d * np.float32(e / length) for d, e in zip(to, along, strict=True)), np.float32(0))
            t = np.clip(dot, np.float32(0), np.float32(length))
            # |to - t * e|^2, with e a unit vector: one array fewer than computing the foot of the perpendicular.
            square = (to[0] * to[0] + to[1] * to[1] + to[2] * to[2]) + t * (t - np.float32(2) * dot)
            closer = square < nearest[inner]
            np.copyto(nearest[inner], square, where=closer)
            np.copyto(position[inner], t + np.float32(done), where=closer)
        done += length
    return nearest, position


class _Scene:
    """Where everything is, for one seed; `paint` says what any box of label voxels is made of."""

    # Cell A fills small x; B (small y) and C (large y) share the rest.
    WALL_X, WALL_Y, PM = 930.0, 600.0, 20.0
    # Shells of the nuclear envelope, nm below the surface, and the rim of dense chromatin under it.
    SHELLS = (0.0, 18.0, 40.0, 58.0, 100.0)
    NUC_CENTRE = np.array([320.0, 1230.0, 160.0])
    NUC_RADII = np.array([700.0, 430.0, 520.0])
    CRISTA_PERIOD, CRISTA = 44.0, 15.0

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self.wall_x = _Ripple(rng, 55, (350, 800))  # x over (z, y)
        self.wall_y = _Ripple(rng, 50, (350, 800))  # y over (z, x)
        self.gap = _Ripple(rng, 14, (200, 500))  # half the extracellular gap over (z, y)
        self.nuc_warp = [_Ripple(rng, 22, (180, 420)) for _ in range(3)]
        self.crista_warp = _Ripple(rng, 12, (90, 200))

        def near(*p: float) -> list[float]:
            return [c + float(rng.uniform(-12, 12)) for c in p]

        self.mitos = [
            _Tube(_curve(near(250, 230, 230), near(370, 420, 460), near(0, 70, -50)), 92),
            _Tube(_curve(near(180, 130, 480), near(150, 300, 545), near(-10, 0, 30), 5), 78),
            _Tube(_curve(near(330, 645, 130), near(310, 668, 390), near(30, -25, 0)), 80),
            _Tube(_curve(near(300, 700, 700), near(470, 850, 770), near(0, 40, 20), 6), 84),
            _Tube(_curve(near(210, 70, 700), near(190, 250, 760), near(20, 0, 25), 6), 82),
            _Tube(_curve(near(140, 180, 1110), near(300, 360, 1130), near(0, 10, 25), 6), 78),
            _Tube(_curve(near(250, 800, 1140), near(520, 1010, 1130), near(30, 0, 10), 6), 84),
            _Tube(_curve(near(560, 90, 120), near(560, 300, 620), near(-20, 60, 0)), 84),
            _Tube(_curve(near(560, 560, 560), near(600, 590, 750), near(0, -30, 0), 5), 76),
            _Tube(_curve(near(60, 560, 640), near(90, 760, 800), near(0, 30, -20), 6), 76),
        ]
        self.sides = rng.normal(size=(len(self.mitos), 3))
        self.er = self._grow_er(rng)
        self.vesicles = self._place_vesicles(rng)

    # -- distances at single points, for finding room

    def _cell_distance(self, z: NDArray[Any], y: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
        """Distance from the extracellular space into the nearest cell, nm, positive inside; dtype of x."""
        kind = np.result_type(x)
        wall_x = (self.wall_x(z, y) + self.WALL_X).astype(kind)
        lean_x = self.wall_x.steepness(z, y).astype(kind)
        wall_y = (self.wall_y(z, x) + self.WALL_Y).astype(kind)
        lean_y = self.wall_y.steepness(z, x).astype(kind)
        gap = (self.gap(z, y) + 26).astype(kind)
        to_x = (x - wall_x) * lean_x
        to_y = np.abs((y - wall_y) * lean_y)
        # B and C end in a rounded corner: a polynomial minimum of the distances from both walls.
        soft = kind.type(70)
        fold = np.maximum(soft - np.abs(to_x - to_y), kind.type(0))
        right = np.minimum(to_x, to_y) - fold * fold * kind.type(1 / 280)
        return np.asarray(np.maximum(-to_x, right) - gap)

    def _nuc_radius(self, z: NDArray[Any], y: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
        """Squared radius in the nucleus' own units, 1 on its surface; each term needs two of the coordinates."""
        kind = np.result_type(x)
        pairs = ((z, y), (y, x), (x, z))
        total: NDArray[Any] = np.zeros((), kind)
        for (u, v), warp, centre, radius in zip(pairs, self.nuc_warp, self.NUC_CENTRE, self.NUC_RADII, strict=True):
            moved = u + warp(u, v).astype(kind)
            total = total + ((moved - kind.type(centre)) / kind.type(radius)) ** 2
        return total

    def _nuc_distance(self, z: NDArray[Any], y: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((np.sqrt(self._nuc_radius(z, y, x)) - 1) * self.NUC_RADII[1])

    def _room(self, points: NDArray[np.float64], tubes: Sequence[_Tube] = ()) -> NDArray[np.float64]:
        """Distance in nm from points ``[n, 3]`` to the nearest membrane of a cell, the nucleus or a tube."""
        z, y, x = points.T
        room = np.minimum(self._cell_distance(z, y, x) - self.PM, self._nuc_distance(z, y, x))
        return np.asarray(np.minimum(room, _distance(points, [*self.mitos, *tubes])))

    def _grow_er(self, rng: np.random.Generator) -> list[_Tube]:
        """Tubules that wander through the cytosol, from starts that give every large crop its share."""
        step, tubes = 34.0, []
        low = np.array([[c.offset[i] * _SCALE[i] for i in range(3)] for c in _CROPS[:4]])
        high = low + np.array([[c.shape[i] * _SCALE[i] for i in range(3)] for c in _CROPS[:4]])
        regions = [*zip(low, high, strict=True)] * 8 + [(np.zeros(3), np.array(_EXTENT))] * 16
        for start, stop in regions:
            radius = float(rng.uniform(30, 36))
            candidates = rng.uniform(start, stop, (64, 3))
            free = candidates[self._room(candidates) > radius + 16]
            if not len(free):
                continue
            nodes = [free[0]]
            heading = rng.normal(size=3)
            for _ in range(int(rng.integers(10, 22))):
                turns = heading / np.linalg.norm(heading) + 0.4 * rng.normal(size=(12, 3))
                turns *= step / np.linalg.norm(turns, axis=1, keepdims=True)
                ahead = nodes[-1] + turns
                fits = np.flatnonzero(self._room(ahead) > radius + 12)
                if not fits.size:
                    break
                heading = turns[fits[0]]
                nodes.append(ahead[fits[0]])
            if len(nodes) > 3:
                tubes.append(_Tube(np.array(nodes), radius))
        return tubes

    def _place_vesicles(self, rng: np.random.Generator) -> list[tuple[NDArray[np.float64], float]]:
        """Spheres in the free cytosol: ten in each crop that annotates them, and some anywhere."""
        vesicles: list[tuple[NDArray[np.float64], float]] = []
        boxes = [
            (np.array(c.offset) * _SCALE + 45, (np.array(c.offset) + c.shape) * _SCALE - 45, 10)
            for c in _CROPS
            if "ves" in c.classes
        ]
        for low, high, wanted in [*boxes, (np.zeros(3), np.array(_EXTENT), 40)]:
            candidates = rng.uniform(low, high, (400, 3))
            room = self._room(candidates, self.er)
            placed = 0
            for point, free in zip(candidates, room, strict=True):
                radius = float(rng.uniform(26, 38))
                clear = all(np.linalg.norm(point - p) > radius + r + 8 for p, r in vesicles)
                if free > radius + 8 and clear:
                    vesicles.append((point, radius))
                    placed += 1
                if placed == wanted:
                    break
        return vesicles

    # -- voxels

    def paint(self, start: Sequence[int], shape: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Fill a box of label voxels.

        Args:
            start: First voxel of the box, z y x.
            shape: Its shape in label voxels.

        Returns:
            The material of every voxel, and the number of the object that it belongs to (0 for none), counted from 1
            within mitochondria and within vesicles.
        """
        material = np.full(tuple(shape), _CYTO, np.uint8)
        owner = np.zeros(tuple(shape), np.uint8)
        # A few planes at a time stay in the processor's cache.
        step = 8
        for z in range(0, shape[0], step):
            part = slice(z, min(z + step, shape[0]))
            grid = _Grid((start[0] + z, *start[1:]), (part.stop - z, *shape[1:]))
            self._paint_cells(grid, material[part])
            self._paint_nucleus(grid, material[part])
            for number, tube in enumerate(self.mitos):
                self._paint_mito(grid, material[part], owner[part], number, tube)
            self._paint_er(grid, material[part])
            self._paint_vesicles(grid, material[part], owner[part])
        return material, owner

    def _paint_vesicles(self, grid: _Grid, material: NDArray[np.uint8], owner: NDArray[np.uint8]) -> None:
        for number, (centre, radius) in enumerate(self.vesicles):
            window = grid.window((centre - radius).tolist(), (centre + radius).tolist())
            if window is not None:
                z, y, x = (c - np.float32(o) for c, o in zip(grid.at(window), centre, strict=True))
                square = z * z + y * y + x * x
                inside = square < radius**2
                np.copyto(owner[window], np.uint8(number + 1), where=inside)
                np.copyto(material[window], np.uint8(_VES_MEM), where=inside)
                np.copyto(material[window], np.uint8(_VES_LUM), where=square < (radius - 13) ** 2)

    def _paint_cells(self, grid: _Grid, material: NDArray[np.uint8]) -> None:
        # Left of the wall's leftmost excursion everything is inside cell A, which is two thirds of the volume.
        window = grid.window((0.0, 0.0, self.WALL_X - 120), _EXTENT)
        if window is not None:
            depth = self._cell_distance(*grid.at(window))
            np.copyto(material[window], np.uint8(_PM), where=depth < self.PM)
            np.copyto(material[window], np.uint8(_ECS), where=depth < 0)

    def _paint_nucleus(self, grid: _Grid, material: NDArray[np.uint8]) -> None:
        reach = self.NUC_RADII + 30
        window = grid.window((self.NUC_CENTRE - reach).tolist(), (self.NUC_CENTRE + reach).tolist())
        if window is not None:
            square = self._nuc_radius(*grid.at(window)).astype(np.float32)
            for depth, shell in zip(self.SHELLS, (_NE_MEM, _NE_LUM, _NE_MEM, _NUC_RIM, _NUC), strict=True):
                limit = np.float32((1 - depth / self.NUC_RADII[1]) ** 2)
                np.copyto(material[window], np.uint8(shell), where=square < limit)

    def _paint_mito(
        self, grid: _Grid, material: NDArray[np.uint8], owner: NDArray[np.uint8], number: int, tube: _Tube
    ) -> None:
        r = tube.radius
        window = grid.window(*tube.box)
        if window is None:
            return
        square, position = _along(grid, window, tube)
        part = material[window]
        np.copyto(owner[window], np.uint8(number + 1), where=square < r**2)
        for depth, layer in ((0, _MITO_MEM), (9, _MITO_GAP), (15, _MITO_MEM), (24, _MITO_LUM)):
            np.copyto(part, np.uint8(layer), where=square < (r - depth) ** 2)
        # Cristae: sheets across the axis that start from alternating sides and stop short of the other wall.
        z, y, x = grid.at(window)
        side = self.sides[number] / np.linalg.norm(self.sides[number])
        centre = tube.nodes.mean(0)
        lateral = (z - np.float32(centre[0])) * np.float32(side[0]) + (y - np.float32(centre[1])) * np.float32(side[1])
        lateral = lateral + (x - np.float32(centre[2])) * np.float32(side[2])
        phase = position + self.crista_warp(y, x).astype(np.float32) + self.crista_warp(z, y).astype(np.float32)
        phase *= np.float32(1 / self.CRISTA_PERIOD)
        turn = np.floor(phase)
        sheet = (phase - turn) < np.float32(self.CRISTA / self.CRISTA_PERIOD)
        reach = np.where(turn % 2 == 0, lateral, -lateral) < np.float32(0.3 * r)
        np.copyto(part, np.uint8(_MITO_MEM), where=sheet & reach & (square < (r - 20) ** 2))

    def _paint_er(self, grid: _Grid, material: NDArray[np.uint8]) -> None:
        # All membranes before all lumina, so that crossing tubules open into each other as a network does.
        pieces = []
        for tube in self.er:
            window = grid.window(*tube.box)
            if window is not None:
                square, _ = _along(grid, window, tube)
                np.copyto(material[window], np.uint8(_ER_MEM), where=square < tube.radius**2)
                pieces.append((window, square < (tube.radius - 14) ** 2))
        for window, lumen in pieces:
            np.copyto(material[window], np.uint8(_ER_LUM), where=lumen)


# --------------------------------------------------------------------------------------------------------- texture


def _look_up(table: NDArray[np.uint8], values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``table[values]`` for bytes: the translation of byte strings is twice as fast as fancy indexing."""
    every = np.zeros(256, np.uint8)
    every[: len(table)] = table
    return np.frombuffer(values.tobytes().translate(every.tobytes()), np.uint8).reshape(values.shape)


def _smooth(field: Floats, axis: int, centre: float) -> None:
    """Blur in place along one axis with ``((1 - centre) / 2, centre, (1 - centre) / 2)``; the ends are repeated."""
    side, middle = np.float32((1 - centre) / 2), np.float32(centre)
    # Across z the whole field is one piece; along y and x a few planes at a time stay in the processor's cache.
    step = 4 if axis else len(field)
    for start in range(0, len(field), step):
        line = np.moveaxis(field[start : start + step], axis, 0)
        shares = np.moveaxis(field[start : start + step] * side, axis, 0)
        line *= middle
        line[1:] += shares[:-1]
        line[:-1] += shares[1:]
        line[0] += shares[0]
        line[-1] += shares[-1]


def _noise(rng: np.random.Generator, shape: Sequence[int], doublings: int) -> Floats:
    """Smooth random field of unit variance, by doubling coarse Gaussian noise with a cubic B-spline.

    Args:
        rng: Source of the coarse noise.
        shape: Shape of the field in voxels.
        doublings: The field varies over about ``2**doublings`` voxels.
    """
    field = rng.standard_normal([-(-n >> doublings) + 3 for n in shape], dtype=np.float32)
    for left in range(doublings - 1, -1, -1):
        for axis, n in enumerate(shape):
            source = np.moveaxis(field, axis, 0)
            fine = np.empty((2 * len(source) - 2, *source.shape[1:]), np.float32)
            fine[::2] = (source[:-1] + source[1:]) * np.float32(0.5)
            fine[1:-1:2] = source[1:-1] * np.float32(0.75) + (source[:-2] + source[2:]) * np.float32(0.125)
            fine[-1] = fine[-2]
            field = np.moveaxis(fine[: -(-n >> left) + 3], 0, axis)
    field = np.ascontiguousarray(field[tuple(slice(n) for n in shape)])
    field -= np.float32(field[::3, ::3, ::3].mean())
    field *= np.float32(1 / field[::3, ::3, ::3].std())
    return field


def _dots(rng: np.random.Generator, shape: Sequence[int], count: int) -> Floats:
    """Ribosomes: ``count`` soft spots of about 20 nm and depth 1 at random places."""
    spots = np.zeros(tuple(shape), np.float32)
    at = tuple(rng.integers(0, n, count) for n in shape)
    np.maximum.at(spots, at, rng.uniform(0.5, 1, count).astype(np.float32))
    for axis, centre in ((0, 0.5), (1, 0.5), (2, 0.5), (1, 0.5), (2, 0.5)):
        _smooth(spots, axis, centre)
    spots *= np.float32(1 / (0.5 * 0.375 * 0.375))
    return spots


def _paint_raw(scene: _Scene, seed: int) -> NDArray[np.uint8]:
    """The whole raw volume, uint8 ``RAW_SHAPE``."""
    rng = np.random.default_rng([seed, 2])
    # These two vary so slowly that voxels of twice the size are enough; a slab repeats them when it needs them.
    halves = [n // 2 for n in RAW_SHAPE]
    clumps = _noise(rng, halves, 3)
    haze = _noise(rng, halves, 2)
    grain = _noise(rng, RAW_SHAPE, 1)
    ribosomes = _dots(rng, RAW_SHAPE, 60_000)
    image = np.empty(RAW_SHAPE, np.float32)
    nothing = np.float32(0)
    step = 4

    def doubled(field: Floats, start: int) -> Floats:
        part = field[start // 2 : (start + step) // 2]
        return part.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)

    for start in range(0, RAW_SHAPE[0], step):
        slab = slice(start, start + step)
        material, _ = scene.paint((2 * start, 0, 0), (2 * step, *_SHAPE[1:]))
        part = downsample_mean(_look_up(_SHADES, material)).astype(np.float32)
        stuff = material[::2, ::2, ::2]
        fine, coarse, clump = grain[slab], doubled(haze, start), doubled(clumps, start)
        speckled = np.float32(5) * coarse + np.float32(5) * fine - np.float32(62) * ribosomes[slab]
        part += np.where(stuff == _CYTO, speckled, nothing)
        dense = clump + np.float32(0.5) * coarse
        dense += np.where(stuff == _NUC_RIM, np.float32(1), np.float32(-0.5))
        chromatin = np.float32(-38) * np.clip(dense, nothing, np.float32(1.5)) + np.float32(7) * fine
        part += np.where(stuff >= _NUC_RIM, chromatin, nothing)
        part += np.where((stuff == _MITO_LUM) | (stuff == _ER_LUM), np.float32(5) * fine, nothing)
        image[slab] = part + np.float32(3) * clump
    for axis in range(3):
        _smooth(image, axis, 0.7)
    shot = rng.standard_normal(RAW_SHAPE, dtype=np.float32)
    shot *= np.float32(7)
    image += shot
    np.rint(image, out=image)
    np.clip(image, 0, 255, out=image)
    return image.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class SyntheticVolume:
    """What `write_volume` wrote, and where.

    Attributes:
        path: The ``.zarr`` group.
        csv_path: The CSV beside it, one row per crop.
        raw_path: The raw multiscale group.
        crops: Names of the crops, in the order of the CSV.
        classes: All classes that are annotated in at least one crop.
        annotated: The annotated classes of each crop; a class that is missing there has no group.
        usage: ``"train"`` or ``"validate"`` for each crop.
    """

    path: str
    csv_path: str
    raw_path: str
    crops: tuple[str, ...]
    classes: tuple[str, ...]
    annotated: Mapping[str, tuple[str, ...]] = field(hash=False)
    usage: Mapping[str, str] = field(hash=False)

    def label_path(self, crop: str, name: str) -> str:
        """Path of the multiscale group of a class, or of ``"all"``, in a crop."""
        return f"{self.path}/{_GROUNDTRUTH}/{crop}/{name}"


def _describe(path: Path) -> SyntheticVolume:
    return SyntheticVolume(
        path=str(path),
        csv_path=str(path.with_suffix(".csv")),
        raw_path=f"{path}/{_RAW}",
        crops=tuple(c.name for c in _CROPS),
        classes=tuple(name for name in CLASS_IDS if any(name in c.classes for c in _CROPS)),
        annotated={c.name: c.classes for c in _CROPS},
        usage={c.name: c.usage for c in _CROPS},
    )


def _csv_text(path: Path) -> str:
    text = io.StringIO()
    rows = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for crop in _CROPS:
        rows.writerow(
            [crop.usage, path.name, _RAW, path.name, f"{_GROUNDTRUTH}/{crop.name}/[{','.join(crop.classes)}]"]
        )
    return text.getvalue()


def _annotation(name: str) -> dict[str, Any]:
    if name in _INSTANCES:
        kind: dict[str, Any] = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": _UNKNOWN}}
    else:
        kind = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": _UNKNOWN}}
    return {"class_name": name, "annotation_type": kind}


def _label(name: str, crop: _Crop, material: NDArray[np.uint8], owner: NDArray[np.uint8]) -> Labels:
    """The label array of a class in a crop, as an annotator would have left it."""
    members = np.isin(np.arange(len(_SHADES)), _MEMBERS[name])
    if name not in _INSTANCES:
        label = _look_up(members.astype(np.uint8), material)
        if name in crop.unknown:
            label = label.copy()
            label[:, :, crop.shape[2] * 3 // 4 :] = _UNKNOWN
        return label
    objects = _look_up(members.astype(np.uint8), material)
    if name != "nuc":
        objects = objects * owner
    present = np.zeros(256, bool)
    present[objects] = True
    numbers = np.flatnonzero(present[1:]) + 1
    # Ids need not start at 1; these pass through the code for unknown, which no voxel of this array means.
    first, kind = (_UNKNOWN - 1, np.uint16) if name == "ves" else (1, np.uint8)
    ids = np.zeros(256, kind)
    ids[numbers] = np.arange(first, first + len(numbers))
    return np.asarray(ids[objects]) if kind is np.uint16 else _look_up(ids.astype(np.uint8), objects)


def _level_attributes(name: str, bare: bool) -> Callable[[int, NDArray[Any]], dict[str, Any]]:
    def attributes(level: int, label: NDArray[Any]) -> dict[str, Any]:
        if level or bare:
            return {}
        unknown = 0 if name in _INSTANCES else int(np.count_nonzero(label == _UNKNOWN))
        counts = {"absent": label.size - int(np.count_nonzero(label)), "unknown": unknown}
        return {"cellmap": {"annotation": {**_annotation(name), "complement_counts": counts}}}

    return attributes


def _write_crop(scene: _Scene, folder: Path, crop: _Crop, zarr_format: ZarrFormat) -> None:
    material, owner = scene.paint(crop.offset, crop.shape)
    about = {
        "version": "0.1.1",
        "name": crop.name,
        "description": "Synthetic; closed-form geometry, no specimen.",
        "created_by": [],
        "created_with": ["cellmap_lightning.demo.synthetic"],
        "start_date": None,
        "end_date": None,
        "duration_days": None,
        "protocol_uri": None,
        "class_names": list(crop.classes),
    }
    write_group(folder, {"cellmap": {"annotation": about}}, zarr_format)
    # Raw voxel 0 is centred on 0, so the volume's corner is half a raw voxel, one label voxel, before it.
    translation = [s * (o - 0.5) for s, o in zip(_SCALE, crop.offset, strict=True)]
    for name in (*crop.classes, "all"):
        known = name != "all"
        write_multiscale(
            folder / name,
            _label(name, crop, material, owner) if known else _look_up(_IDS, material),
            scale=_SCALE,
            translation=translation,
            levels=3,
            mode="mode",
            zarr_format=zarr_format,
            attributes={"cellmap": {"annotation": _annotation(name)}} if known else None,
            array_attributes=_level_attributes(name, name in crop.bare) if known else None,
        )


def _inventory(path: Path) -> dict[str, int]:
    """Number and size of the files of a volume, its own root metadata excepted: those hold these two numbers."""
    files = size = 0
    for folder, _, names in os.walk(path):
        if Path(folder) != path:
            files += len(names)
            size += sum((Path(folder) / name).stat().st_size for name in names)
    return {"files": files, "bytes": size}


def _marker(path: Path) -> dict[str, Any] | None:
    """What a volume of this module says about itself; None for anything else."""
    try:
        attributes = zarr.open_group(str(path), mode="r", use_consolidated=False).attrs.asdict()
    except (OSError, ValueError, KeyError):
        return None
    marker = attributes.get("synthetic")
    return marker if isinstance(marker, dict) else None


def _is_complete(path: Path, wanted: Mapping[str, Any]) -> bool:
    marker = _marker(path)
    if marker is None or any(marker.get(key) != value for key, value in wanted.items()):
        return False
    try:
        return _inventory(path).items() <= marker.items()
    except FileNotFoundError:  # somebody is replacing it this very moment
        return False


def _sibling(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{purpose}")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a volume; an hour is far more than a write takes."""
    for purpose in ("partial", "replaced"):
        for leftover in path.parent.glob(f".{path.name}.*.{purpose}"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    shutil.rmtree(leftover)


def _put_in_place(made: Path, path: Path, accept: Callable[[], bool]) -> None:
    """Rename a finished folder to ``path``, moving aside what is there unless ``accept`` says that it will do."""
    for attempt in range(20):
        try:
            made.rename(path)
            return
        except OSError:
            # A folder in the way is expected, anything else is an error; it may also have gone in the meantime.
            if attempt == 19 or not path.parent.is_dir():
                raise
        if accept():
            shutil.rmtree(made)
            return
        aside = _sibling(path, "replaced")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            shutil.rmtree(aside)


def _write_csv(path: Path) -> None:
    made = _sibling(path.with_suffix(".csv"), "partial")
    made.write_text(_csv_text(path), encoding="utf-8")
    made.replace(path.with_suffix(".csv"))


def _write(path: Path, seed: int, zarr_format: ZarrFormat, wanted: Mapping[str, Any], force: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    made = _sibling(path, "partial")
    try:
        write_group(made, {"synthetic": dict(wanted)}, zarr_format)
        for parent in ("recon-1", "recon-1/em", "recon-1/labels", _GROUNDTRUTH):
            write_group(made / parent, zarr_format=zarr_format)
        scene = _Scene(seed)
        write_multiscale(
            made / _RAW,
            _paint_raw(scene, seed),
            scale=RAW_SCALE,
            translation=(0.0, 0.0, 0.0),
            levels=3,
            zarr_format=zarr_format,
            chunks=(64, 128, 128),
            shards=(128, 256, 256) if zarr_format == 3 else None,
        )
        for crop in _CROPS:
            _write_crop(scene, made / _GROUNDTRUTH / crop.name, crop, zarr_format)
        write_group(made, {"synthetic": {**wanted, **_inventory(made)}}, zarr_format)
        _put_in_place(made, path, lambda: not force and _is_complete(path, wanted))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _write_csv(path)


def _check(path: str | os.PathLike[str], seed: int, zarr_format: int) -> tuple[Path, dict[str, Any]]:
    place = Path(path)
    if place.suffix != ".zarr":
        raise CellMapValueError(f"{place} must end in .zarr: it names the volume, and its CSV goes beside it")
    if seed < 0 or zarr_format not in (2, 3):
        raise CellMapValueError(
            f"seed is {seed} and zarr_format {zarr_format}; a seed >= 0 and a format of 2 or 3 are possible"
        )
    return place, {"version": _VERSION, "seed": int(seed), "zarr_format": int(zarr_format)}


def _refuse_foreign(path: Path) -> None:
    """Raise if writing would replace something that this module did not write."""
    if path.exists() and _marker(path) is None and not (path.is_dir() and not any(path.iterdir())):
        raise CellMapFileExistsError(
            f"{path} exists and is no synthetic volume: it is not replaced; choose another path"
        )
    listing = path.with_suffix(".csv")
    if listing.exists() and _marker(path) is None and listing.read_text(encoding="utf-8") != _csv_text(path):
        raise CellMapFileExistsError(f"{listing} exists and is not of a synthetic volume: it is not replaced")


def write_volume(
    path: str | os.PathLike[str], *, seed: int = 0, zarr_format: ZarrFormat = 2, overwrite: bool = False
) -> SyntheticVolume:
    """Write the volume and its CSV.

    The raw volume has 128 x 320 x 320 voxels of 5.24 x 4 x 4 nm, three levels and voxel 0 centred on 0; the labels have
    half the voxel size. Everything is written to a folder beside ``path`` that is renamed at the end, so that nothing
    interrupted is ever found at ``path``.

    Args:
        path: The ``.zarr`` group to write; the CSV goes beside it, with the same stem.
        seed: The scene. The positions of the crops, and what they must contain, do not depend on it.
        zarr_format: 2 for OME-NGFF 0.4, 3 for OME-NGFF 0.5 with sharded raw.
        overwrite: Replace a synthetic volume that is at ``path``. Nothing else is ever replaced.

    Returns:
        What was written, and where.

    Raises:
        CellMapFileExistsError: If something is at ``path`` and ``overwrite`` is False or it is not of this module.
        CellMapValueError: If ``path`` does not end in ``.zarr``, or the seed or the format is impossible.
    """
    place, wanted = _check(path, seed, zarr_format)
    if place.exists() and not overwrite:
        raise CellMapFileExistsError(f"{place} exists already; choose another path or pass overwrite=True")
    _refuse_foreign(place)
    _write(place, seed, zarr_format, wanted, force=True)
    return _describe(place)


def demo_csv(path: str | os.PathLike[str], *, seed: int = 0, zarr_format: ZarrFormat = 2) -> str:
    """Return the CSV of a synthetic volume, writing the volume unless a complete one is there.

    Safe to call from several processes at once. A volume of another seed, format or version, or one that has lost
    files, is replaced; anything that is not of this module is not.

    Args:
        path: The ``.zarr`` group; the CSV goes beside it, with the same stem.
        seed: The scene, as for `write_volume`.
        zarr_format: 2 or 3, as for `write_volume`.

    Returns:
        Path of the CSV.

    Raises:
        CellMapFileExistsError: If something else is at ``path`` or at the CSV's place.
        CellMapValueError: If ``path`` does not end in ``.zarr``, or the seed or the format is impossible.
    """
    place, wanted = _check(path, seed, zarr_format)
    listing = place.with_suffix(".csv")
    if not _is_complete(place, wanted):
        _refuse_foreign(place)
        _write(place, seed, zarr_format, wanted, force=False)
    elif not listing.exists():
        _write_csv(place)
    return str(listing)
