"""The patches and batches of the blocks of a prediction."""

import itertools

import numpy as np
import pytest

from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.block_patches import BlockBatch, BlockEnd, BlockPlan, BlockSkip, BlockStart
from cellmap_lightning.prediction.blocks import BlockGrid


def geometries():
    """Volumes, regions, blocks and patches of all kinds."""
    rng = np.random.default_rng(0)
    for number in range(60):
        volume = tuple(int(n) for n in rng.integers(5, 40, 3))
        first = tuple(int(rng.integers(0, n // 2)) for n in volume)
        shape = tuple(int(rng.integers(1, n - f + 1)) for n, f in zip(volume, first, strict=True))
        block = tuple(int(n) for n in rng.integers(3, 20, 3))
        patch = tuple(int(n) for n in rng.integers(1, 24, 3))
        blend = ("trim", "average", "gaussian")[number % 3]
        tiling = Tiling(volume, patch, blend, float(rng.choice([0, 0.25, 0.5, 0.7])) if blend != "trim" else None)
        grid = BlockGrid(Lattice((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), volume), first, shape, block)
        yield grid, tiling, int(rng.integers(1, 6))


def plan(grid, tiling, size, blocks=None, skips=None):
    return BlockPlan(grid, [tiling], size, range(len(grid)) if blocks is None else blocks, 0, skips)


def batches(steps):
    return [step for step in steps if isinstance(step, BlockBatch)]


@pytest.mark.parametrize(("grid", "tiling", "size"), list(geometries()))
def test_every_block_has_all_its_patches_and_one_process_repeats_none_along_z(grid, tiling, size):
    whole = plan(grid, tiling, size)
    found = batches(whole.steps())
    assert sum(len(b.parts) for b in found) == whole.patches()
    assert all(len(b.parts) <= size for b in found)
    column, started = set(), []
    for step in whole.steps():
        match step:
            case BlockStart(number, carried):
                assert carried == (
                    tiling.blend != "trim" and tiling.stride[0] < tiling.patch[0] and number % grid.along[0] > 0
                )
                if not carried:
                    column = set()
            case BlockBatch(parts=parts):
                assert not column & {part.start for part in parts}
                column |= {part.start for part in parts}
            case BlockEnd(number):
                start, shape = grid.whole_start(number), grid[number][1]
                assert {part.start for part in tiling.parts(start, shape)} <= column
                started.append(number)
    assert started == list(range(len(grid)))


@pytest.mark.parametrize(("grid", "tiling", "size"), list(geometries()))
def test_resumed_plan_has_the_same_batches(grid, tiling, size):
    once = {batch.parts for batch in batches(plan(grid, tiling, size).steps())}
    for number in range(len(grid)):
        again = batches(plan(grid, tiling, size, [number]).steps())
        assert {batch.parts for batch in again} <= once
        starts = {part.start for batch in again for part in batch.parts}
        assert starts >= {part.start for part in tiling.parts(grid.whole_start(number), grid[number][1])}
        order = [part.start for batch in again for part in batch.parts]
        assert order == sorted(order) or tiling.blend == "trim"


@pytest.mark.parametrize(("grid", "tiling", "size"), list(geometries()))
def test_below_a_block_that_is_skipped_patches_are_computed_again(grid, tiling, size):
    boxes = {grid.box(number): number for number in range(len(grid))}
    steps = list(plan(grid, tiling, size, skips=lambda box: boxes[box] % 3 == 1).steps())
    alone = list(plan(grid, tiling, size, [n for n in range(len(grid)) if n % 3 != 1]).steps())
    assert [step for step in steps if not isinstance(step, BlockSkip)] == alone
    assert [step.block for step in steps if isinstance(step, BlockSkip)] == [n for n in range(len(grid)) if n % 3 == 1]
    assert not any(isinstance(s, BlockStart) and s.carried and s.block % 3 == 2 for s in steps)


def cube(block):
    return BlockGrid(Lattice((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (40, 40, 40)), (0, 0, 0), (40, 40, 40), block)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("block", [(10, 10, 10), (7, 40, 40), (40, 5, 9), (3, 20, 20), (14, 40, 20), (40, 40, 40)])
def test_blocks_are_distributed_evenly_over_processes(block, world, together):
    grid = cube(block)
    whole = list(range(len(grid)))
    shares = [grid.share(whole, rank, world, together) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if together:
        for share in shares:
            jumps = [b for a, b in itertools.pairwise(share) if b != a + 1 and b % grid.along[0]]
            assert len(jumps) <= 1, "it begins in the middle of one column at most"
    some = whole[len(whole) // 3 :: 2]  # where the rest is finished
    shares = [grid.share(some, rank, world, together) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == some


def test_columns_are_not_divided_if_there_are_enough():
    grid = cube((10, 20, 20))
    assert grid.share(range(16), 1, 2, True) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert grid.share(range(16), 1, 3, True) == [4, 5, 6, 7, 13]
    assert [grid[number][0] for number in (4, 5)] == [(0, 0, 20), (10, 0, 20)]
    assert grid.below(6) == 7
    assert grid.below(7) is None
