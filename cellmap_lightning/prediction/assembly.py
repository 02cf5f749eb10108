"""The assembly of the blocks of a prediction from the values of their patches."""

from typing import Any

import numpy as np

from cellmap_lightning.prediction.accumulate import BlockMemory, MeanBlock, PatchCopy, PatchSum, StoredBlock
from cellmap_lightning.prediction.block_patches import BlockBatch, BlockPlan, BlockStart
from cellmap_lightning.prediction.quantize import StoredValues


class BlockAssembly:
    """Assembles the blocks of one volume, one after the other, in the steps of its plan; see docs/prediction.md.

    Args:
        plan: the blocks and their patches.
        values: the conversion to stored values.
        channels: channels of a patch.
        memory: pools of memory for blocks, and for the sums of overlapping patches.
    """

    def __init__(
        self, plan: BlockPlan, values: StoredValues, channels: int, memory: tuple[BlockMemory, BlockMemory]
    ) -> None:
        self.plan, self.values, self.channels = plan, values, channels
        self._block_memory, self._plane_memory = memory
        self._weights = [tiling.weights() for tiling in plan.tilings]
        self._block: StoredBlock | MeanBlock | None = None
        self._patches: PatchCopy | PatchSum | None = None
        self._tiling = 0

    def begin(self, start: BlockStart) -> None:
        """Begin a block."""
        shape, tilings, where = self.plan.grid[start.block][1], len(self.plan.tilings), f"block {start.block}"
        if tilings == 1:
            self._block = StoredBlock(shape, self.channels, self.values, self._block_memory, where)
        else:
            self._block = MeanBlock(shape, self.channels, tilings, self.values, self._block_memory, where)
        if start.carried:  # the planes that the block above has begun are its first ones
            assert isinstance(self._patches, PatchSum)
            self._patches.into(self._block, shape[0])
        else:
            self._drop_patches()

    def add(self, batch: BlockBatch, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Add the values of the patches of a batch, ``[N, C, z, y, x]``.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        if self._patches is None or self._tiling != batch.tiling:
            self._end_patches()
            self._drop_patches()
            self._patches, self._tiling = self._new_patches(batch), batch.tiling
        for part, value in zip(batch.parts, values, strict=True):
            self._patches.add(part, value)

    def end(self) -> StoredBlock | MeanBlock:
        """Finish the block and return it.

        Raises:
            CellMapValueError: see `StoredValues.store`.
        """
        self._end_patches()
        block, self._block = self._block, None
        assert block is not None
        return block

    def finish(self) -> None:
        """Release the sums of patches that reach below the last block, as there are no more blocks."""
        self._drop_patches()

    def close(self) -> None:
        """Drop all memory, including that of an unfinished block."""
        self._block = self._patches = None
        self._block_memory, self._plane_memory = BlockMemory(), BlockMemory()

    def _new_patches(self, batch: BlockBatch) -> PatchCopy | PatchSum:
        """Return the accumulation of the patches of a tiling."""
        assert self._block is not None
        grid, weights = self.plan.grid, self._weights[batch.tiling]
        start, shape = grid.whole_start(batch.block), grid[batch.block][1]
        if weights is None:
            return PatchCopy(start, self._block)
        # Sums that are carried to blocks below extend to the end of the column.
        planes = grid.first[0] + grid.shape[0] - start[0] if self.plan.carries else shape[0]
        patches = PatchSum(
            start, (planes, *shape[1:]), self.channels, self.plan.tilings[batch.tiling], weights, self._plane_memory
        )
        patches.into(self._block, shape[0])
        return patches

    def _end_patches(self) -> None:
        """Finish the block in one plane."""
        if isinstance(self._patches, PatchSum):
            self._patches.end()

    def _drop_patches(self) -> None:
        if isinstance(self._patches, PatchSum):
            self._patches.release()
        self._patches = None
