"""Which tiles an evaluation goes through, and in which order: all of them, or a few in which every class has its share.

Nothing here is random: orders are strides around a circle by about its golden section, each of which lands in one of
the largest gaps that the others have left, so that every beginning of an order is spread evenly.
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

#: How far from the golden section a stride is looked for.
_AROUND = 64


def golden_stride(count: int) -> int:
    """The stride that visits each of ``count`` places of a circle once, as evenly at every moment as there is one.

    Of the numbers around the golden section of ``count`` that share no factor with it, that whose continued fraction
    has the smallest largest term: by such a term the gaps between the places visited can differ.
    """
    middle = round(count * (math.sqrt(5) - 1) / 2)

    def unevenness(stride: int) -> tuple[float, int]:
        a, b, largest = count, stride, 0
        while b:
            largest = max(largest, a // b)
            a, b = b, a % b
        return (largest if a == 1 else math.inf), abs(stride - middle)

    return min(range(max(1, middle - _AROUND), min(count, middle + _AROUND) + 1), key=unevenness)


def halved(number: int, grid: Shape) -> int:
    """The ``number``-th tile of a grid that is halved along its longest axis again and again.

    Numbers that are near each other are tiles that are near each other, so that what is spread over the numbers is
    spread over the grid.

    Returns:
        Its number in the order z, y, x.
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
    """All tiles of several crops, in an order of which every part is spread over the crops and inside each of them.

    A tile is worked out when it is asked for: there may be more of them than memory should hold.

    Args:
        grids: tiles along z, y and x of each crop.
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
        """The tile at a place of the order, its number counted through the crops."""
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        at = range(len(self))[index] * self._stride % len(self)
        crop = bisect_right(self._offsets, at) - 1
        return self._offsets[crop] + halved(at - self._offsets[crop], self._grids[crop])


def _walk(tiles: Sequence[int] | IntArray, seed: int, number: int) -> Iterator[int]:
    """All of them, spread, from a place that the seed decides."""
    start = int(hashes(seed, ORDER, [number], 1)[0, 0])
    stride = 1 if isinstance(tiles, TileOrder) else golden_stride(len(tiles))
    return (int(tiles[(start + n * stride) % len(tiles)]) for n in range(len(tiles)))


def stratified(strata: Sequence[IntArray], everything: TileOrder, count: int, seed: int) -> list[int]:
    """Tiles of which each stratum has its share, as far as it goes, and all tiles together have one as well.

    Strata take turns, the smallest first, so that every beginning is shared out too.

    Args:
        strata: numbers of the tiles of each, none empty.
        everything: all tiles.
        count: how many, at most all.
        seed: where in each stratum to begin.
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
