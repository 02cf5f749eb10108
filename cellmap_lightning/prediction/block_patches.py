"""The patches of the blocks of a volume, in the order in which a prediction reads and computes them."""

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

#: Number of batches whose chunks are decoded ahead.
AHEAD = 8


@dataclass(frozen=True)
class BlockStart:
    """The step that begins a block; see docs/prediction.md.

    Attributes:
        block: number of the block.
        carried: the block continues from the block above it, whose patches that reach into it are not computed again.
    """

    block: int
    carried: bool = False


@dataclass(frozen=True)
class BlockBatch:
    """The step that computes one batch of a block; see docs/prediction.md.

    Attributes:
        block: number of the block.
        parts: patches, in the order of the batch.
        tiling: index of the tiling in the plan.
    """

    block: int
    parts: tuple[Part, ...]
    tiling: int = 0


@dataclass(frozen=True)
class BlockEnd:
    """The step that ends a block; see docs/prediction.md."""

    block: int


@dataclass(frozen=True)
class BlockSkip:
    """The step that skips a block; see docs/prediction.md."""

    block: int


Step = BlockStart | BlockBatch | BlockEnd | BlockSkip


def reaches_below(tilings: Sequence[Tiling]) -> bool:
    """Return True if patches reach over the lower end of a block, so that the block below can reuse their sums.

    Not with several tilings one after the other: the sums of each would have to be stored.
    """
    return len(tilings) == 1 and tilings[0].blend != "trim" and tilings[0].stride[0] < tilings[0].patch[0]


def patch_placement(tiling: Tiling, whole: Lattice, window: Window) -> Placement:
    """Return the positions of the patches of a tiling: one for each voxel at which a patch may start."""
    lo, hi = tiling.bounds()
    step = np.asarray(whole.step)
    z, y, x = (b - a + 1 for a, b in zip(lo, hi, strict=True))
    first = np.asarray(whole.box.lower) + step * lo + step * window.shape / 2
    return Placement(first, step, (z, y, x), window.shape, (False, False, False))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The blocks of a volume that one process predicts, in batches; see docs/prediction.md.

    If patches overlap along z, a patch belongs to the block that it begins in. A block directly below the last one
    continues with its sums; otherwise patches of blocks above that reach into it are computed again, in their batches.
    The composition of a batch depends only on the block that its patches belong to and on the batch size, so that a
    resumed run computes the same batches.

    Attributes:
        grid: the blocks.
        tilings: their patches; several for predictions in several planes, one tiling after the other.
        batch_size: largest number of patches in a batch.
        blocks: numbers of the blocks, in their order.
        start: number of positions before this volume, if one dataset contains several volumes.
        skips: returns True for the box of a block that is not computed.
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
        """The number of positions of its patches over all tilings, see `patch_placement`."""
        return sum(math.prod(counts) for counts in self._counts)

    def skipped(self, block: int) -> bool:
        """Return True if a block is not computed."""
        return self.skips is not None and self.skips(self.grid.box(block))

    def steps(self) -> Iterator[Step]:
        """Yield the steps of all blocks in their order."""
        above: int | None = None  # the last computed block
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
        """True if a block continues with the sums of the block above it, see `reaches_below`."""
        return reaches_below(self.tilings)

    def _batches(self, start: BlockStart, tiling: int) -> Iterator[tuple[Part, ...]]:
        """Yield the patches of a block in batches."""
        if not self.carries:
            yield from self._cut(
                self.tilings[tiling].parts(self.grid.whole_start(start.block), self.grid[start.block][1])
            )
            return
        first = self.grid.whole_start(start.block)[0]
        number = start.block % self.grid.along[0]
        if not start.carried:
            # Whole batches of the blocks above: some models depend on the composition of a batch.
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
        """The spans of patches along z, by the block that they begin in; the first block also has those from above."""
        first, length = self.grid.first[0], self.grid.shape[0]
        layers: list[list[tuple[int, int, int]]] = [[] for _ in range(self.grid.along[0])]
        for start, lo, hi in self.tilings[0].along(0, first, first + length):
            layers[(lo - first) // self.grid.block[0]].append((start, lo, hi))
        return layers

    def _beginning(self, block: int) -> list[Part]:
        """Return the patches that begin in a block, in the order z, y, x."""
        start, (_, *shape) = self.grid.whole_start(block), self.grid[block][1]
        rows, columns = (self.tilings[0].along(a, start[a], start[a] + n) for a, n in zip((1, 2), shape, strict=True))
        layers = self._layers[block % self.grid.along[0]]
        return [Part(*zip(*spans, strict=True)) for spans in product(layers, rows, columns)]

    def position(self, part: Part, tiling: int = 0) -> int:
        """Return the position of a patch in the dataset: in `patch_placement`, after those of earlier tilings."""
        # In C order over all possible starts of a patch.
        z, y, x = (s - lo for s, lo in zip(part.start, self._lowest[tiling], strict=True))
        counts = self._counts[tiling]
        return self._starts[tiling] + (z * counts[1] + y) * counts[2] + x

    def choose(self, batch: BlockBatch) -> list[int]:
        """Return the positions of the patches of a batch."""
        return [self.position(part, batch.tiling) for part in batch.parts]

    def patches(self, block: Shape | None = None) -> int:
        """Return the number of patches of all blocks in one process, by default with the blocks of the grid."""
        z, y, x = block or self.grid.block
        if self.carries:  # blocks of a column count as one
            z = self.grid.shape[0]
        axes = list(zip(self.grid.first, self.grid.shape, (z, y, x), strict=True))
        return sum(
            math.prod(tiling.count(axis, *lengths) for axis, lengths in enumerate(axes)) for tiling in self.tilings
        )

    @property
    def redundancy(self) -> float:
        """The number of patches, divided by their number if everything were one block."""
        return self.patches() / self.patches(self.grid.shape)

    @property
    def computed(self) -> float:
        """The number of voxels that the model computes, divided by the number of written ones."""
        return self.patches() * math.prod(self.tilings[0].patch) / math.prod(self.grid.shape)


class PlanBatches:
    """A batch sampler of the positions of several plans, one plan after the other; see docs/prediction.md.

    Args:
        plans: the plans.
        ahead: called with the positions of a batch `AHEAD` batches before it is requested.
    """

    def __init__(self, plans: Sequence[BlockPlan], ahead: Callable[[list[int]], None] | None = None) -> None:
        self.plans, self.ahead = plans, ahead

    def __iter__(self) -> Iterator[list[int]]:
        # The queue delays the batches, so that their chunks are decoded meanwhile.
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
                    yield plan.choose(step)


class PatchSamples(Samples):
    """Samples that are numbered by their positions; see docs/prediction.md.

    Args:
        dataset: one or several volumes with the placement of `patch_placement`.
        seed: seed of random value transforms.
        pin: read into page-locked memory.
    """

    def __init__(self, dataset: SampleSource, seed: int = 0, pin: bool = False) -> None:
        super().__init__(dataset, 1, False, seed, pin, range(1))

    def draws(self, samples: Sequence[int]) -> list[Draw]:
        """Return the samples at these positions."""
        return [Draw(n, n, None) for n in samples]
