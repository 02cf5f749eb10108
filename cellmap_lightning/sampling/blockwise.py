"""A volume as the patches of its blocks: what a prediction reads."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cellmap_lightning.sampling.dataset import CellMapDataset
from cellmap_lightning.sampling.source import Draw, Samples
from cellmap_lightning.volumes.blending import Part, Tiling
from cellmap_lightning.volumes.blocks import BlockGrid
from cellmap_lightning.volumes.geometry import Lattice, Shape
from cellmap_lightning.volumes.placement import Placement, Window


@dataclass(frozen=True)
class BlockBatch:
    """One batch of one block.

    Attributes:
        block: number of the block.
        parts: its patches, in the order of the batch.
        first: whether it is the first batch of its block.
        last: whether it is the last.
    """

    block: int
    parts: tuple[Part, ...]
    first: bool
    last: bool


def patch_placement(tiling: Tiling, whole: Lattice, window: Window) -> Placement:
    """The positions that patches of a tiling have: one for each voxel that a patch may start at."""
    lo, hi = tiling.bounds()
    step = np.asarray(whole.step)
    z, y, x = (b - a + 1 for a, b in zip(lo, hi, strict=True))
    first = np.asarray(whole.box.lower) + step * lo + step * window.shape / 2
    return Placement(first, step, (z, y, x), window.shape, (False, False, False))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What one process predicts: its blocks, in batches that never reach over the end of a block.

    Which blocks these are follows from their numbers alone, and which patches make a batch from the block and the
    batch size: a run that goes on computes the same batches.

    Attributes:
        grid: the blocks.
        tiling: their patches.
        batch_size: patches of a batch at most.
        blocks: numbers of the blocks, in their order.
    """

    grid: BlockGrid
    tiling: Tiling
    batch_size: int
    blocks: Sequence[int]
    _lowest: tuple[int, int, int] = field(init=False)
    _counts: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        lo, hi = self.tiling.bounds()
        z, y, x = (b - a + 1 for a, b in zip(lo, hi, strict=True))
        object.__setattr__(self, "_lowest", lo)
        object.__setattr__(self, "_counts", (z, y, x))

    def parts(self, block: int) -> list[Part]:
        """The patches of a block."""
        return self.tiling.parts(self.grid.whole_start(block), self.grid[block][1])

    def batches(self) -> Iterator[BlockBatch]:
        """Every batch, one after the other."""
        for block in self.blocks:
            parts = self.parts(block)
            for at in range(0, len(parts), self.batch_size):
                last = at + self.batch_size >= len(parts)
                yield BlockBatch(block, tuple(parts[at : at + self.batch_size]), at == 0, last)

    def position(self, part: Part) -> int:
        """The position of a patch in `patch_placement`."""
        z, y, x = (s - lo for s, lo in zip(part.start, self._lowest, strict=True))
        return (z * self._counts[1] + y) * self._counts[2] + x

    def __iter__(self) -> Iterator[list[int]]:
        """The positions of each batch, as a batch sampler gives them."""
        for batch in self.batches():
            yield [self.position(part) for part in batch.parts]

    def patches(self, block: Shape | None = None) -> int:
        """Patches of all blocks of all processes; with blocks of another shape, if one is given."""
        axes = zip(self.grid.first, self.grid.shape, block or self.grid.block, strict=True)
        return math.prod(self.tiling.count(axis, *lengths) for axis, lengths in enumerate(axes))

    @property
    def redundancy(self) -> float:
        """Patches that are computed for each that would be if everything were one block."""
        return self.patches() / self.patches(self.grid.shape)

    @property
    def computed(self) -> float:
        """Voxels that the model computes for each that is written."""
        return self.patches() * math.prod(self.tiling.patch) / math.prod(self.grid.shape)


class PatchSamples(Samples):
    """Samples that are numbered by their positions.

    Args:
        dataset: a volume whose placement is that of `patch_placement`.
        seed: of what is random in value transforms.
        pin: read into page-locked memory.
    """

    def __init__(self, dataset: CellMapDataset, seed: int = 0, pin: bool = False) -> None:
        super().__init__(dataset, 1, False, seed, pin, range(1))

    def _draw(self, samples: Sequence[int]) -> list[Draw]:
        return [Draw(n, n, None) for n in samples]


class Stream:
    """The batches of a loader, for a Trainer that takes them as they come.

    It is no `DataLoader`, which Lightning would take apart to predict and deal out over the ranks in its own way; and
    it has no length, since a process whose blocks are all finished has no batch.

    Args:
        loader: the loader.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)
