"""In which blocks a volume is predicted."""

import math

import pytest

from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.blocks import block_shape

UNIT = (64, 64, 64)


def blocks(shape, blend="trim", budget=256 << 20, voxel=2, unit=UNIT, patch=UNIT):
    tiling = Tiling(shape, patch, blend)
    found = block_shape(
        shape, unit, lambda block: voxel * math.prod(block), budget,
        lambda axis, length: tiling.count(axis, 0, shape[axis], length),
    )  # fmt: skip
    assert all(n % u == 0 for n, u in zip(found, unit, strict=True))
    assert found == unit or voxel * math.prod(found) <= budget
    counted = [tiling.count(axis, 0, shape[axis], found[axis]) for axis in range(3)]
    return found, math.prod(counted) / math.prod(tiling.count(axis, 0, shape[axis], shape[axis]) for axis in range(3))


@pytest.mark.parametrize("budget", [1, 64**3 * 2, 64**3 * 7, 10**7, 10**8])
@pytest.mark.parametrize("blend", ["trim", "average", "gaussian"])
@pytest.mark.parametrize("shape", [(500, 700, 300), (64, 64, 64), (30, 1000, 70), (1, 900, 900)])
def test_blocks_are_whole_units_within_the_budget(shape, blend, budget):
    blocks(shape, blend, budget, patch=(1 if shape[0] == 1 else 64, 64, 64))


@pytest.mark.parametrize("blend", ["trim", "average", "gaussian"])
def test_more_memory_means_fewer_patches(blend):
    found = [blocks((1024, 1024, 1024), blend, budget << 20)[1] for budget in (1, 8, 64, 512)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1.3
    assert found[0] > 1.8 * found[-1]


def test_patches_that_end_where_blocks_do_are_computed_once():
    """48 of 64 voxels are used: three chunks are four patches."""
    found, again = blocks((512, 512, 512))
    assert found == (192, 192, 192)
    assert again == 1


def test_blocks_of_equal_cost_hold_whole_chunks_of_the_next_level():
    """Patches of one chunk and no context: blocks of any length compute the same."""
    tiling = Tiling((1024, 1024, 1024), UNIT, "trim", 0.0)

    def cut(shape):
        return block_shape(
            shape, UNIT, math.prod, 1 << 40, lambda axis, length: tiling.count(axis, 0, shape[axis], length)
        )

    assert cut((1024, 1024, 1024)) == (128, 128, 128)
    assert cut((1024, 64, 1024)) == (128, 64, 128)


def test_blocks_are_divided_if_that_costs_few_patches():
    """Two processes could not help each other with a block and its crumbs."""
    for blend in ("trim", "average", "gaussian"):
        found, _ = blocks((512, 512, 512), blend)
        assert math.prod(found) <= 512**3 / 8
