"""A volume as the patches of its blocks: what a prediction reads."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.geometry.lattice import Box, Lattice, Shape
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.loading.samples import Samples
from cellmap_lightning.prediction.blending import Part, Tiling
from cellmap_lightning.prediction.blocks import BlockGrid

#: Batches before a batch is asked for that its chunks are begun to be decoded.
AHEAD = 8


@dataclass(frozen=True)
class BlockStart:
    """A block begins.

    Attributes:
        block: its number.
        carried: whether it goes on from the block above it, whose patches that reach into it are not computed again.
    """

    block: int
    carried: bool = False


@dataclass(frozen=True)
class BlockBatch:
    """One batch of a block.

    Attributes:
        block: number of the block.
        parts: its patches, in the order of the batch.
        tiling: which of the plan's tilings.
    """

    block: int
    parts: tuple[Part, ...]
    tiling: int = 0


@dataclass(frozen=True)
class BlockEnd:
    """A block is whole."""

    block: int


@dataclass(frozen=True)
class BlockSkip:
    """A block is not computed."""

    block: int


Step = BlockStart | BlockBatch | BlockEnd | BlockSkip


def reaches_below(tilings: Sequence[Tiling]) -> bool:
    """Whether patches reach over the lower end of a block, so that the block below it can go on from there.

    With several tilings one after the other the sums of each would have to be kept.
    """
    return len(tilings) == 1 and tilings[0].blend != "trim" and tilings[0].stride[0] < tilings[0].patch[0]


def patch_placement(tiling: Tiling, whole: Lattice, window: Window) -> Placement:
    """The positions that patches of a tiling have: one for each voxel that a patch may start at."""
    lo, hi = tiling.bounds()
    step = np.asarray(whole.step)
    z, y, x = (b - a + 1 for a, b in zip(lo, hi, strict=True))
    first = np.asarray(whole.box.lower) + step * lo + step * window.shape / 2
    return Placement(first, step, (z, y, x), window.shape, (False, False, False))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What one process predicts of a volume: its blocks, in batches.

    Where patches overlap along z, a patch belongs to the block that it begins in. A block right below the one before
    goes on from there; otherwise patches of blocks above that reach into it are computed again, in their batches.
    Which patches make a batch follows from the block that they belong to and the batch size alone: a run that goes on
    computes the same batches.

    Attributes:
        grid: the blocks.
        tilings: their patches; several where they are computed in several planes, one tiling after the other.
        batch_size: patches of a batch at most.
        blocks: numbers of the blocks, in their order.
        start: number of positions before this volume, where one dataset holds several.
        skips: says which blocks are not computed.
        opens: called with the number of each block before anything of it is read.
    """

    grid: BlockGrid
    tilings: Sequence[Tiling]
    batch_size: int
    blocks: Sequence[int]
    start: int = 0
    skips: Callable[[Box], bool] | None = None
    opens: Callable[[int], object] | None = None
    _lowest: list[Shape] = field(init=False, default_factory=list)
    _counts: list[Shape] = field(init=False, default_factory=list)
    _starts: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        at = self.start
        for tiling in self.tilings:
            lo, hi = tiling.bounds()
            z, y, x = (b - a + 1 for a, b in zip(lo, hi, strict=True))
            self._lowest.append(lo)
            self._counts.append((z, y, x))
            self._starts.append(at)
            at += z * y * x

    @property
    def positions(self) -> int:
        """Positions of its patches, see `patch_placement`; over all tilings."""
        return sum(math.prod(counts) for counts in self._counts)

    def skipped(self, block: int) -> bool:
        """Whether a block is not computed."""
        return self.skips is not None and self.skips(self.grid.box(block))

    def steps(self) -> Iterator[Step]:
        """Everything that happens, one after the other."""
        above: int | None = None  # what was computed last
        for block in self.blocks:
            if self.opens is not None:
                self.opens(block)
            if self.skipped(block):
                yield BlockSkip(block)
                continue
            start = BlockStart(block, self.carries and above is not None and self.grid.below(above) == block)
            yield start
            for tiling in range(len(self.tilings)):
                for parts in self._batches(start, tiling):
                    yield BlockBatch(block, parts, tiling)
            yield BlockEnd(block)
            above = block

    @cached_property
    def carries(self) -> bool:
        """See `reaches_below`."""
        return reaches_below(self.tilings)

    def _batches(self, start: BlockStart, tiling: int) -> Iterator[tuple[Part, ...]]:
        """The patches of a block."""
        if not self.carries:
            yield from self._cut(
                self.tilings[tiling].parts(self.grid.whole_start(start.block), self.grid[start.block][1])
            )
            return
        along, first = self.grid.along[0], self.grid.whole_start(start.block)[0]
        number = start.block % along
        if not start.carried:
            for above in range(number):
                if any(hi > first for _, _, hi in self._layers[above]):
                    for parts in self._cut(self._beginning(start.block - number + above)):
                        if any(part.hi[0] > first for part in parts):
                            yield parts
        yield from self._cut(self._beginning(start.block))

    def _cut(self, parts: list[Part]) -> Iterator[tuple[Part, ...]]:
        for at in range(0, len(parts), self.batch_size):
            yield tuple(parts[at : at + self.batch_size])

    @cached_property
    def _layers(self) -> list[list[tuple[int, int, int]]]:
        """Where patches are along z, by the block that they begin in; what is above all blocks begins in the first."""
        first, length = self.grid.first[0], self.grid.shape[0]
        found: list[list[tuple[int, int, int]]] = [[] for _ in range(self.grid.along[0])]
        for start, lo, hi in self.tilings[0].along(0, first, first + length):
            found[(lo - first) // self.grid.block[0]].append((start, lo, hi))
        return found

    def _beginning(self, block: int) -> list[Part]:
        """The patches that begin in a block, in the order z, y, x."""
        start, (_, *shape) = self.grid.whole_start(block), self.grid[block][1]
        rows, columns = (self.tilings[0].along(a, start[a], start[a] + n) for a, n in zip((1, 2), shape, strict=True))
        layers = self._layers[block % self.grid.along[0]]
        return [Part(*zip(*found, strict=True)) for found in product(layers, rows, columns)]

    def position(self, part: Part, tiling: int = 0) -> int:
        """The position of a patch in the dataset: in `patch_placement`, behind those of the tilings before."""
        z, y, x = (s - lo for s, lo in zip(part.start, self._lowest[tiling], strict=True))
        counts = self._counts[tiling]
        return self._starts[tiling] + (z * counts[1] + y) * counts[2] + x

    def places(self, batch: BlockBatch) -> list[int]:
        """The positions of a batch."""
        return [self.position(part, batch.tiling) for part in batch.parts]

    def patches(self, block: Shape | None = None) -> int:
        """Patches of all blocks, computed by one process; with blocks of another shape, if one is given."""
        z, y, x = block or self.grid.block
        if self.carries:
            z = self.grid.shape[0]
        axes = list(zip(self.grid.first, self.grid.shape, (z, y, x), strict=True))
        return sum(
            math.prod(tiling.count(axis, *lengths) for axis, lengths in enumerate(axes)) for tiling in self.tilings
        )

    @property
    def redundancy(self) -> float:
        """Patches that are computed for each that would be if everything were one block."""
        return self.patches() / self.patches(self.grid.shape)

    @property
    def computed(self) -> float:
        """Voxels that the model computes for each that is written."""
        return self.patches() * math.prod(self.tilings[0].patch) / math.prod(self.grid.shape)


class PlanBatches:
    """The positions of each batch of several plans, one plan after the other, as a batch sampler gives them.

    Args:
        plans: the plans.
        ahead: called with the positions of a batch `AHEAD` batches before it is asked for.
    """

    def __init__(self, plans: Sequence[BlockPlan], ahead: Callable[[list[int]], None] | None = None) -> None:
        self.plans, self.ahead = plans, ahead

    def __iter__(self) -> Iterator[list[int]]:
        coming: deque[list[int]] = deque()
        for positions in self._all():
            if self.ahead is not None:
                self.ahead(positions)
            coming.append(positions)
            if len(coming) > (AHEAD if self.ahead is not None else 0):
                yield coming.popleft()
        yield from coming

    def _all(self) -> Iterator[list[int]]:
        for plan in self.plans:
            for step in plan.steps():
                if isinstance(step, BlockBatch):
                    yield plan.places(step)


class PatchSamples(Samples):
    """Samples that are numbered by their positions.

    Args:
        dataset: a volume whose placement is that of `patch_placement`, or several.
        seed: of what is random in value transforms.
        pin: read into page-locked memory.
    """

    def __init__(self, dataset: SampleSource, seed: int = 0, pin: bool = False) -> None:
        super().__init__(dataset, 1, False, seed, pin, range(1))

    def _draw(self, samples: Sequence[int]) -> list[Draw]:
        return [Draw(n, n, None) for n in samples]
