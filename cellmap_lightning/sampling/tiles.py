"""Orders of the tiles of an evaluation: all tiles, or a subset stratified by class.

All orders are deterministic and low-discrepancy: strides by about the golden ratio around a circle, in which each
place falls into one of the largest gaps between the previous ones, so that every prefix of an order is spread evenly.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.runtime.rng import ORDER, hashes

IntArray = npt.NDArray[np.int64]

#: Largest difference between the golden ratio and the stride.
_SEARCH_RADIUS = 64


def golden_stride(count: int) -> int:
    """Return the stride that visits each of ``count`` places of a circle once, in the most even order.

    Among the numbers around the golden ratio of ``count`` that are coprime to it, this is the one whose continued
    fraction has the smallest maximal term, which bounds the ratio of the gaps between the visited places.
    """
    middle = round(count * (math.sqrt(5) - 1) / 2)

    def unevenness(stride: int) -> tuple[float, int]:
        a, b, largest = count, stride, 0
        while b:
            largest = max(largest, a // b)
            a, b = b, a % b
        return (largest if a == 1 else math.inf), abs(stride - middle)

    return min(range(max(1, middle - _SEARCH_RADIUS), min(count, middle + _SEARCH_RADIUS) + 1), key=unevenness)


def halved(number: int, grid: Shape) -> int:
    """Return a tile of a grid by its number in k-d order: the grid is halved repeatedly along its longest axis.

    Tiles with close numbers are close to each other, so that tiles spread over the numbers are spread over the grid.

    Args:
        number: number in k-d order.
        grid: tiles along z, y, x.

    Returns:
        The tile's number in the order z, y, x.
    """
    lower, shape = [0, 0, 0], list(grid)
    while max(shape) > 1:
        axis = shape.index(max(shape))
        half = shape[axis] // 2
        before = half * (math.prod(shape) // shape[axis])
        if number < before:
            shape[axis] = half
        else:
            number -= before
            lower[axis] += half
            shape[axis] -= half
    return (lower[0] * grid[1] + lower[1]) * grid[2] + lower[2]


class TileOrder(Sequence[int]):
    """All tiles of several crops, in an order with every part spread over the crops and inside each crop.

    Tiles are computed on access, since a list of all of them may be too large.

    Args:
        grids: tiles along z, y and x of each crop.

    Example:
        >>> TileOrder([(1, 2, 4)])[:4]
        [0, 3, 4, 7]
    """

    def __init__(self, grids: Sequence[Shape]) -> None:
        self._grids = tuple(grids)
        self._offsets = [0, *accumulate(math.prod(grid) for grid in self._grids)]
        self._stride = golden_stride(self._offsets[-1])

    def __len__(self) -> int:
        return self._offsets[-1]

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        """Return the tile at an index of the order, numbered through all crops."""
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        number = range(len(self))[index] * self._stride % len(self)
        crop = bisect_right(self._offsets, number) - 1
        return self._offsets[crop] + halved(number - self._offsets[crop], self._grids[crop])


def _walk(tiles: Sequence[int] | IntArray, seed: int, number: int) -> Iterator[int]:
    """Return all tiles in a low-discrepancy order that starts at a random place."""
    start = int(hashes(seed, ORDER, [number], 1)[0, 0])
    stride = 1 if isinstance(tiles, TileOrder) else golden_stride(len(tiles))
    return (int(tiles[(start + n * stride) % len(tiles)]) for n in range(len(tiles)))


def stratified(strata: Sequence[IntArray], everything: TileOrder, count: int, seed: int) -> list[int]:
    """Select tiles with an equal share, as far as possible, of each stratum and of all tiles together.

    Strata take turns, the smallest first, so that every prefix of the selection is stratified as well.

    Args:
        strata: numbers of the tiles of each stratum, not empty.
        everything: all tiles.
        count: number of tiles to select, at most all.
        seed: seed of the first tile of each stratum.
    """
    order = sorted(range(len(strata)), key=lambda index: len(strata[index]))
    walks = [*(_walk(strata[index], seed, index) for index in order), _walk(everything, seed, len(strata))]
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        for walk in list(walks):
            tile = next((t for t in walk if t not in chosen), None)
            if tile is None:
                walks.remove(walk)
            elif len(chosen) < count:
                chosen[tile] = None
    return list(chosen)
