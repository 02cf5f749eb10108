"""The geometry of an output: its lattice, its region, and the blocks in which it is computed.

A block is one or several whole chunks (or shards) of the output, so that two processes never write to one file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapIndexError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, LATTICE_TOLERANCE, Box, Lattice, Shape, to_vector
from cellmap_lightning.geometry.placement import Window


def output_lattice(window: Window, volume: Box, levels: Sequence[Lattice]) -> Lattice:
    """Return the lattice of all output voxels of a volume.

    Along an axis they are the voxels of the first of ``levels`` that has the output's voxel size; without such a level
    they begin at the volume's lower edge, and the last may extend past the upper edge by less than a voxel.

    Args:
        window: a patch of the output, along the axes of the volume.
        volume: the whole volume, nm.
        levels: the levels of raw.

    Raises:
        CellMapValueError: raw is turned.
    """
    if any(level.turn is not None for level in levels):
        raise CellMapValueError(
            "raw is rotated, mirrored or sheared by its metadata (OME-NGFF 0.6), which only training reads; resample it"
        )
    origin, step, shape = [], [], []
    for axis in range(3):
        scale = float(window.scale[axis])
        lower, count = volume.lower[axis], volume.extent[axis] / scale
        for level in levels:
            # A difference of voxel sizes adds up over the voxels.
            if abs(level.step[axis] / scale - 1) * max(level.shape[axis], window.shape[axis]) < LATTICE_TOLERANCE:
                scale, lower, count = level.step[axis], level.box.lower[axis], level.shape[axis]
                break
        origin.append(lower + scale / 2)
        step.append(scale)
        shape.append(max(1, math.ceil(count - LATTICE_TOLERANCE)))
    return Lattice(to_vector(origin), to_vector(step), (shape[0], shape[1], shape[2]))


def voxels_of(lattice: Lattice, box: Box, volume: Box, where: str = "") -> tuple[Shape, Shape]:
    """Return the first voxel and the number of voxels that intersect a physical box.

    Args:
        lattice: all output voxels of a volume.
        box: the box.
        volume: the box of raw, nm. Output voxels may end up to a voxel before or after it.
        where: the path of raw, for messages.

    Raises:
        CellMapValueError: the box extends outside the volume by more than half a voxel, or shares no voxel with it.
    """
    whole = lattice.box.union(volume)
    beyond = np.maximum(np.subtract(whole.lower, box.lower), np.subtract(box.upper, whole.upper))
    if not lattice.box.intersects(box) or (beyond > (0.5 + LATTICE_TOLERANCE) * np.asarray(lattice.step)).any():
        raise CellMapValueError(_outside(lattice, box, whole, where))
    lo, hi = _indices(lattice, box)
    lo, hi = np.maximum(lo, 0), np.minimum(hi, lattice.shape)
    shape = np.maximum(1, hi - lo).tolist()
    first = lo.tolist()
    return (first[0], first[1], first[2]), (shape[0], shape[1], shape[2])


def _indices(lattice: Lattice, box: Box) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first index of the voxels that intersect a box, and the one after the last; both may be outside."""
    lower = np.subtract(box.lower, lattice.box.lower) / lattice.step
    upper = np.subtract(box.upper, lattice.box.lower) / lattice.step
    return np.floor(lower + LATTICE_TOLERANCE).astype(np.int64), np.ceil(upper - LATTICE_TOLERANCE).astype(np.int64)


def _outside(lattice: Lattice, box: Box, volume: Box, where: str) -> str:
    """Return the message for a region that lies outside a volume; it has the part inside, or what may be meant."""

    def described(part: Box) -> str:
        spans = zip(AXES, *(ends.tolist() for ends in _indices(lattice, part)), strict=True)
        return f"{part} (voxels {', '.join(f'{axis} {lo}:{hi}' for axis, lo, hi in spans)})"

    def setting(part: Box) -> str:
        ends = zip(AXES, part.lower, part.upper, strict=True)
        return f"region={{{', '.join(f'{axis}: [{lo:.10g}, {hi:.10g}]' for axis, lo, hi in ends)}}}"

    def is_inside(part: Box) -> bool:
        slack = 1e-6 * np.asarray(lattice.step)
        return bool((part.lower >= volume.lower - slack).all() and (part.upper <= volume.upper + slack).all())

    reverse = Box(box.lower[::-1], box.upper[::-1])
    intersects = volume.intersects(box)
    if intersects:
        remedy = f"give the part inside, {setting(box.intersection(volume))}"
    else:
        remedy = f"give a box in nm inside, such as {setting(volume)}"
    if is_inside(reverse):
        remedy += f", or, if its ends are in the order x, y, z, {setting(reverse)}"
    part = "partly outside" if intersects else "outside"
    return (
        f"{f'{where}: ' if where else ''}the region {described(box)} lies {part} the volume, {described(volume)}, of "
        f"voxels of {list(lattice.step)} nm, and nothing is predicted there; {remedy}"
    )


def centred_voxels(lattice: Lattice, box: Box) -> Lattice:
    """Return the voxels of a lattice, extended beyond its ends, whose centres lie in a half-open physical box.

    A box whose ends are edges of voxels, and one whose ends are their centres, then contain equally many.

    Raises:
        CellMapValueError: no voxel does, or the box does not intersect the lattice.
    """
    if not lattice.box.intersects(box):
        raise CellMapValueError(f"the bounds {box} lie outside the volume; choose ones inside {lattice.box}")
    ends = [np.subtract(end, lattice.origin) / lattice.step for end in (box.lower, box.upper)]
    first, stop = (np.ceil(end - LATTICE_TOLERANCE).astype(int) for end in ends)
    z, y, x = (stop - first).tolist()
    if min(z, y, x) < 1:
        raise CellMapValueError(
            f"the bounds {box} contain the centre of no voxel of {list(lattice.step)} nm; choose larger ones"
        )
    return Lattice(to_vector(np.add(lattice.origin, first * np.asarray(lattice.step))), lattice.step, (z, y, x))


#: Relative cost of building the whole pyramid from data on disk, as a fraction of the time of a prediction: 0.2 for a
#: model that computes nothing, almost 0 for expensive ones.
_PYRAMID_COST = 0.06


@dataclass(frozen=True)
class BlockGrid:
    """The voxels to write, in blocks that are numbered along z first, one column after the other.

    See docs/prediction.md.

    Attributes:
        whole: all output voxels of the volume.
        first: index of the first voxel to write in ``whole``.
        shape: number of voxels to write along z, y, x.
        block: voxels of a block; those at the upper end may be smaller.
    """

    whole: Lattice
    first: Shape
    shape: Shape
    block: Shape

    @property
    def lattice(self) -> Lattice:
        """The lattice of the voxels to write."""
        origin = np.add(self.whole.origin, np.multiply(self.first, self.whole.step))
        return Lattice(to_vector(origin), self.whole.step, self.shape)

    @property
    def along(self) -> Shape:
        """The number of blocks along z, y, x."""
        z, y, x = (-(-n // b) for n, b in zip(self.shape, self.block, strict=True))
        return z, y, x

    def __len__(self) -> int:
        return math.prod(self.along)

    def __getitem__(self, number: int) -> tuple[Shape, Shape]:
        """Return the start and the shape of a block in the written array.

        Raises:
            CellMapIndexError: the number is out of range.
        """
        if not 0 <= number < len(self):
            raise CellMapIndexError(f"block must be in [0, {len(self)}), got {number}")
        column, z = divmod(number, self.along[0])
        y, x = divmod(column, self.along[2])
        start = (z * self.block[0], y * self.block[1], x * self.block[2])
        shape = [min(b, n - s) for b, n, s in zip(self.block, self.shape, start, strict=True)]
        return start, (shape[0], shape[1], shape[2])

    def below(self, number: int) -> int | None:
        """Return the block directly below one, towards larger z; None at the end of a column."""
        return number + 1 if (number + 1) % self.along[0] else None

    def share(self, blocks: Sequence[int], rank: int, world: int, together: bool) -> list[int]:
        """Return the blocks that one of several processes computes, in order.

        Args:
            blocks: numbers of the unfinished blocks, in order; the same in every process.
            rank: rank of the process.
            world: number of processes.
            together: distribute whole columns, and divide only the remaining ones into runs of equal length.
        """
        if not together:
            return list(blocks[rank::world])
        # Blocks of a column share patches, so whole columns stay in one process. The rest is divided, so that all
        # processes finish at the same time.
        columns = [list(column) for _, column in groupby(blocks, key=lambda number: number // self.along[0])]
        whole = len(columns) // world * world
        rest = [number for column in columns[whole:] for number in column]
        share = [number for column in columns[rank:whole:world] for number in column]
        return share + rest[rank * len(rest) // world : (rank + 1) * len(rest) // world]

    def box(self, number: int) -> Box:
        """Return the physical box of a block, nm."""
        start, shape = self[number]
        origin = np.add(self.lattice.origin, np.multiply(start, self.whole.step))
        return Lattice(to_vector(origin), self.whole.step, shape).box

    def whole_start(self, number: int) -> Shape:
        """Return the start of a block in ``whole``."""
        z, y, x = np.add(self[number][0], self.first).tolist()
        return z, y, x


def block_shape(
    shape: Shape, unit: Shape, nbytes: Callable[[Shape], int], budget: int, patches: Callable[[int, int], int]
) -> Shape:
    """Return the voxels of a block, in whole units, so that as few patches as possible are computed.

    Large blocks compute fewer patches twice; many blocks are distributed more evenly over processes, and a restart
    repeats less. So the cost is the number of patches, plus the largest block once more, as if one process finished
    last with it. Chunks of the next level that are made from several blocks also cost reading what was written.

    The result depends only on the arguments, not on ranks or the machine, so that a prediction can be resumed anywhere.

    Args:
        shape: voxels to write.
        unit: voxels of a chunk, or of a shard.
        nbytes: maps the voxels of a block to its bytes; increases with the voxels along any axis.
        budget: largest size of a block in bytes; one unit is always allowed.
        patches: maps an axis and the length of blocks along it to the patches of all blocks along that axis.
    """
    counts = [-(-n // u) for n, u in zip(shape, unit, strict=True)]
    # For each axis and length of a block: its fraction of the axis, the number of patches, and the fraction of the next
    # level that is made from single blocks.
    along = [
        [(n / count, patches(axis, n * unit[axis]), _paired(count, n)) for n in range(1, count + 1)]
        for axis, count in enumerate(counts)
    ]

    def voxels(units: Shape) -> Shape:
        z, y, x = (n * u for n, u in zip(units, unit, strict=True))
        return z, y, x

    best, block = math.inf, (1, 1, 1)
    for units in _fitting(counts, lambda units: units == (1, 1, 1) or nbytes(voxels(units)) <= budget):
        part, computed, paired = zip(*(costs[n - 1] for costs, n in zip(along, units, strict=True)), strict=True)
        cost = math.prod(computed) * (1 + math.prod(part)) * (1 + _PYRAMID_COST * (1 - math.prod(paired)))
        if cost < best:
            best, block = cost, units
    return voxels(block)


def _paired(count: int, length: int) -> float:
    """Return the fraction of pairs among ``count`` units in a row that lie in a single block of ``length`` units."""
    pairs = range(0, count, 2)
    return sum(first // length == min(first + 1, count - 1) // length for first in pairs) / len(pairs)


def _fitting(counts: Sequence[int], fits: Callable[[Shape], bool]) -> Iterator[Shape]:
    """Yield all shapes up to ``counts`` that fit; a shape larger than one that does not fit is not tried."""
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
    """Return a box from ``{z: [lower, upper], y: .., x: ..}`` in nm.

    Raises:
        CellMapValueError: the region has another form.
    """
    rule = "region must be {z: [lower, upper], y: [lower, upper], x: [lower, upper]} in nm"
    if not isinstance(region, dict) or set(region) != set(AXES):
        raise CellMapValueError(f"{rule}, got {region!r}")
    try:
        pairs = [[float(v) for v in region[axis]] for axis in AXES]
    except (TypeError, ValueError):
        raise CellMapValueError(f"{rule}, got {region!r}") from None
    if any(len(pair) != 2 or not pair[0] < pair[1] or not all(map(math.isfinite, pair)) for pair in pairs):
        raise CellMapValueError(f"{rule}, the lower end first, got {region!r}")
    return Box(to_vector([a for a, _ in pairs]), to_vector([b for _, b in pairs]))
