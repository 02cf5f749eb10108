"""Where a prediction is written: its lattice, the region of it that is wanted, and the blocks it is computed in.

A block is one or several whole chunks (or shards) of the output, so that no two writers ever touch one file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from cellmap_lightning.errors import CellMapIndexError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, LATTICE_TOLERANCE, Box, Lattice, Shape, to_vector
from cellmap_lightning.geometry.placement import Window


def output_lattice(window: Window, volume: Box, levels: Sequence[Lattice]) -> Lattice:
    """All output voxels of a volume.

    Along an axis they are the voxels of the first of ``levels`` that has the output's voxel size; where none has, they
    begin at the volume's lower edge, and the last may stick out by less than a voxel.

    Args:
        window: a patch of the output, along the axes of the volume.
        volume: the whole volume, nm.
        levels: the arrays that are read.
    """
    origin, step, shape = [], [], []
    for axis in range(3):
        scale = float(window.scale[axis])
        lower, count = volume.lower[axis], volume.extent[axis] / scale
        for level in levels:
            if abs(level.step[axis] / scale - 1) * max(level.shape[axis], window.shape[axis]) < LATTICE_TOLERANCE:
                scale, lower, count = level.step[axis], level.box.lower[axis], level.shape[axis]
                break
        origin.append(lower + scale / 2)
        step.append(scale)
        shape.append(max(1, math.ceil(count - LATTICE_TOLERANCE)))
    return Lattice(to_vector(origin), to_vector(step), (shape[0], shape[1], shape[2]))


def voxels_of(lattice: Lattice, box: Box) -> tuple[Shape, Shape]:
    """First voxel and number of voxels of those that share a volume with a physical box.

    Raises:
        CellMapValueError: there are none.
    """
    if not lattice.box.intersects(box):
        raise CellMapValueError(f"the region {box} lies outside the volume, {lattice.box}")
    lower = np.subtract(box.lower, lattice.box.lower) / lattice.step
    upper = np.subtract(box.upper, lattice.box.lower) / lattice.step
    lo = np.maximum(np.floor(lower + LATTICE_TOLERANCE), 0).astype(int).tolist()
    hi = np.minimum(np.ceil(upper - LATTICE_TOLERANCE), lattice.shape).astype(int).tolist()
    shape = [max(1, b - a) for a, b in zip(lo, hi, strict=True)]
    return (lo[0], lo[1], lo[2]), (shape[0], shape[1], shape[2])


def centred_voxels(lattice: Lattice, box: Box) -> Lattice:
    """The voxels of a lattice, continued over its ends, whose centres lie in a physical box, its upper end left out.

    A box whose ends are edges of voxels, and one whose ends are their centres, then hold equally many.

    Raises:
        CellMapValueError: there are none, or none of them is one of the lattice itself.
    """
    if not lattice.box.intersects(box):
        raise CellMapValueError(f"the bounds {box} lie outside the volume, {lattice.box}")
    ends = [np.subtract(end, lattice.origin) / lattice.step for end in (box.lower, box.upper)]
    first, stop = (np.ceil(end - LATTICE_TOLERANCE).astype(int) for end in ends)
    z, y, x = (stop - first).tolist()
    if min(z, y, x) < 1:
        raise CellMapValueError(f"the bounds {box} hold the centre of no voxel of {list(lattice.step)} nm")
    return Lattice(to_vector(np.add(lattice.origin, first * np.asarray(lattice.step))), lattice.step, (z, y, x))


#: To make all of a pyramid of what was written, in parts of the time of a prediction: a fifth of one whose model does
#: nothing, hardly anything of others.
_AGAIN = 0.06


@dataclass(frozen=True)
class BlockGrid:
    """The voxels that are written, in blocks. Their numbers go down one column after the other.

    Attributes:
        whole: all output voxels of the volume.
        first: the first that is written, counted in ``whole``.
        shape: how many are written along z, y, x.
        block: voxels of a block; those at the upper end may be smaller.
    """

    whole: Lattice
    first: Shape
    shape: Shape
    block: Shape

    @property
    def lattice(self) -> Lattice:
        """Where the written voxels are."""
        origin = np.add(self.whole.origin, np.multiply(self.first, self.whole.step))
        return Lattice(to_vector(origin), self.whole.step, self.shape)

    @property
    def along(self) -> Shape:
        """Blocks along z, y, x."""
        z, y, x = (-(-n // b) for n, b in zip(self.shape, self.block, strict=True))
        return z, y, x

    def __len__(self) -> int:
        return math.prod(self.along)

    def __getitem__(self, number: int) -> tuple[Shape, Shape]:
        """Start and shape of a block in the written array.

        Raises:
            CellMapIndexError: there is no such block.
        """
        if not 0 <= number < len(self):
            raise CellMapIndexError(f"block {number} is none of {len(self)}")
        column, z = divmod(number, self.along[0])
        y, x = divmod(column, self.along[2])
        start = (z * self.block[0], y * self.block[1], x * self.block[2])
        shape = [min(b, n - s) for b, n, s in zip(self.block, self.shape, start, strict=True)]
        return start, (shape[0], shape[1], shape[2])

    def below(self, number: int) -> int | None:
        """The block right below one, towards larger z; None where there is none."""
        return number + 1 if (number + 1) % self.along[0] else None

    def share(self, blocks: Sequence[int], rank: int, world: int, together: bool) -> list[int]:
        """Which of some blocks one of several processes computes, in order.

        Args:
            blocks: numbers of the blocks that are left, in order; the same in every process.
            rank: number of the process.
            world: how many there are.
            together: deal out whole columns, and cut only what is left of them into runs of one length.
        """
        if not together:
            return list(blocks[rank::world])
        columns = [list(column) for _, column in groupby(blocks, key=lambda number: number // self.along[0])]
        whole = len(columns) // world * world
        rest = [number for column in columns[whole:] for number in column]
        own = [number for column in columns[rank:whole:world] for number in column]
        return own + rest[rank * len(rest) // world : (rank + 1) * len(rest) // world]

    def box(self, number: int) -> Box:
        """The physical box of a block, nm."""
        start, shape = self[number]
        origin = np.add(self.lattice.origin, np.multiply(start, self.whole.step))
        return Lattice(to_vector(origin), self.whole.step, shape).box

    def whole_start(self, number: int) -> Shape:
        """Start of a block, counted in ``whole``."""
        z, y, x = np.add(self[number][0], self.first).tolist()
        return z, y, x


def block_shape(
    shape: Shape, unit: Shape, nbytes: Callable[[Shape], int], budget: int, patches: Callable[[int, int], int]
) -> Shape:
    """Voxels of a block: of whole units, so that as few patches as possible are computed.

    Large blocks compute fewer patches twice; many blocks share out better over processes, and a restart repeats less.
    So the number of patches counts, and the largest block once more, as if one process had to end alone with it. Chunks
    of the next level that are made of several blocks have to be made of what was written, which is read again.

    A function of its arguments alone, never of ranks or of the machine, so that a prediction can go on anywhere.

    Args:
        shape: voxels that are written.
        unit: voxels of a chunk, or of a shard.
        nbytes: from the voxels of a block to the bytes that it takes; more for more voxels along any axis.
        budget: bytes of a block at most; one unit is always allowed.
        patches: from an axis and the length of blocks along it to the patches of all blocks along that axis.
    """
    counts = [-(-n // u) for n, u in zip(shape, unit, strict=True)]
    # By the units of a block along an axis: its part of them, all patches, the part of the next level that blocks make.
    along = [
        [(n / count, patches(axis, n * unit[axis]), _made(count, n)) for n in range(1, count + 1)]
        for axis, count in enumerate(counts)
    ]

    def voxels(units: Shape) -> Shape:
        z, y, x = (n * u for n, u in zip(units, unit, strict=True))
        return z, y, x

    best, block = math.inf, (1, 1, 1)
    for units in _fitting(counts, lambda units: units == (1, 1, 1) or nbytes(voxels(units)) <= budget):
        part, computed, made = zip(*(found[n - 1] for found, n in zip(along, units, strict=True)), strict=True)
        cost = math.prod(computed) * (1 + math.prod(part)) * (1 + _AGAIN * (1 - math.prod(made)))
        if cost < best:
            best, block = cost, units
    return voxels(block)


def _made(count: int, length: int) -> float:
    """Of the pairs of ``count`` units in a row, which part lies in one of the blocks of ``length`` units."""
    pairs = range(0, count, 2)
    return sum(first // length == min(first + 1, count - 1) // length for first in pairs) / len(pairs)


def _fitting(counts: Sequence[int], fits: Callable[[Shape], bool]) -> Iterator[Shape]:
    """All shapes up to ``counts`` that fit, where one that is larger than another that does not fit does not either."""
    for z in range(1, counts[0] + 1):
        if not fits((z, 1, 1)):
            return
        for y in range(1, counts[1] + 1):
            if not fits((z, y, 1)):
                break
            for x in range(1, counts[2] + 1):
                if not fits((z, y, x)):
                    break
                yield z, y, x


def parse_region(region: object) -> Box:
    """A box from ``{z: [lower, upper], y: .., x: ..}`` in nm.

    Raises:
        CellMapValueError: it is none.
    """
    wanted = "a region is {z: [lower, upper], y: [lower, upper], x: [lower, upper]} in nm"
    if not isinstance(region, dict) or set(region) != set(AXES):
        raise CellMapValueError(f"{wanted}, got {region!r}")
    try:
        pairs = [[float(v) for v in region[axis]] for axis in AXES]
    except (TypeError, ValueError):
        raise CellMapValueError(f"{wanted}, got {region!r}") from None
    if any(len(pair) != 2 or not pair[0] < pair[1] or not all(map(math.isfinite, pair)) for pair in pairs):
        raise CellMapValueError(f"{wanted}, the lower end first, got {region!r}")
    return Box(to_vector([a for a, _ in pairs]), to_vector([b for _, b in pairs]))
