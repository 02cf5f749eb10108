"""Blocks, put together from patches, beside plain sums over the whole volume."""

import numpy as np
import pytest

from cellmap_lightning.prediction.accumulate import BlockMemory
from cellmap_lightning.prediction.assembly import BlockAssembly
from cellmap_lightning.prediction.block_patches import BlockBatch, BlockEnd, BlockPlan, BlockStart
from cellmap_lightning.prediction.quantize import StoredValues
from tests.prediction.test_block_patches import geometries


class Counting(BlockMemory):
    """A pool that counts arrays that were not given back."""

    def __init__(self):
        super().__init__()
        self.held, self.most = 0, 0

    def take(self, shape, dtype):
        self.held += 1
        self.most = max(self.most, self.held)
        return super().take(shape, dtype)

    def give_back(self, array):
        self.held -= 1
        array.base.fill(255)  # it must not be read afterwards
        super().give_back(array)


def said(part, patch):
    """Return the output of a model for a patch, different for each voxel and patch."""
    return np.random.default_rng([s + 50 for s in part.start]).random((2, *patch), dtype=np.float32)


def run(plan, memory):
    """Every block that a plan computes."""
    blocks, found = BlockAssembly(plan, StoredValues("float32"), 2, memory), {}
    for step in plan.steps():
        match step:
            case BlockStart():
                blocks.begin(step)
            case BlockBatch(parts=parts, tiling=tiling):
                blocks.add(step, np.stack([said(part, plan.tilings[tiling].patch) for part in parts]))
            case BlockEnd(number):
                block = blocks.end()
                found[number] = block.finish()[0].copy()
                block.release()
    blocks.finish()
    return found


def whole(grid, tiling):
    """The same of all blocks, in double precision; each of them laid out for itself."""
    total = np.zeros((2, *tiling.volume))
    weights = np.zeros(tiling.volume)
    each = tiling.weights() if tiling.blend != "trim" else np.ones(tiling.patch)
    parts = {part.start: part for part in tiling.parts((0, 0, 0), tiling.volume)}.values()
    if tiling.blend == "trim":
        parts = [p for n in range(len(grid)) for p in tiling.parts(grid.whole_start(n), grid[n][1])]
    for part in parts:
        here = tuple(slice(a, b) for a, b in zip(part.lo, part.hi, strict=True))
        there = tuple(slice(a - s, b - s) for a, b, s in zip(part.lo, part.hi, part.start, strict=True))
        total[:, *here] += said(part, tiling.patch)[:, *there] * each[there]
        weights[here] += each[there]
    return total / np.maximum(weights, 1e-9)


@pytest.mark.parametrize(("grid", "tiling", "size"), list(geometries()))
def test_blocks_are_the_mean_of_their_patches_for_any_start(grid, tiling, size):
    memory = Counting(), Counting()
    once = run(BlockPlan(grid, [tiling], size, range(len(grid))), memory)
    expected = whole(grid, tiling)
    for number, block in once.items():
        at = tuple(slice(a, a + n) for a, n in zip(grid.whole_start(number), grid[number][1], strict=True))
        np.testing.assert_allclose(block, expected[:, *at], atol=2e-6)
    rng = np.random.default_rng(size)
    for _ in range(3):
        some = sorted(rng.choice(len(grid), rng.integers(1, len(grid) + 1), replace=False).tolist())
        for number, block in run(BlockPlan(grid, [tiling], size, some), memory).items():
            assert np.array_equal(block, once[number])
    assert [m.held for m in memory] == [0, 0]
    assert [m.most for m in memory] == [1, 0 if tiling.blend == "trim" else 1]


def test_several_tilings_are_averaged():
    grid, tiling, size = next(g for g in geometries() if g[1].blend == "average" and len(g[0]) > 3)
    memory = Counting(), Counting()
    plan = BlockPlan(grid, [tiling, tiling], size, range(len(grid)))
    assert not plan.carries, "the sums of each would have to be held"
    alone = run(BlockPlan(grid, [tiling], size, range(len(grid))), memory)
    for number, block in run(plan, memory).items():
        np.testing.assert_allclose(block, alone[number], atol=1e-6)
    assert [(m.held, m.most) for m in memory] == [(0, 1), (0, 1)]
