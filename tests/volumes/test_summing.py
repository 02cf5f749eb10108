"""Overlapping patches, summed a few planes at a time, for one block or several below each other."""

import numpy as np
import pytest

from cellmap_lightning.volumes.blending import Tiling
from cellmap_lightning.volumes.summing import BlockMemory, PatchSum, StoredBlock
from cellmap_lightning.volumes.values import StoredValues

SHAPE, PATCH = (70, 24, 20), (8, 12, 10)
BLENDS = [("average", 0.25), ("gaussian", 0.5), ("average", 0.75)]


class Counting(BlockMemory):
    """How much is taken at a time."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0

    def take(self, shape, dtype):
        found = super().take(shape, dtype)
        self.held += found.nbytes
        self.most = max(self.most, self.held)
        return found

    def give_back(self, array):
        self.held -= array.nbytes
        super().give_back(array)


def blocks_of(tiling, said, lengths, first=0, memory=None):
    """What blocks of some lengths along z become, the first of which begins at a plane."""
    memory = memory or BlockMemory()
    shape = (SHAPE[0] - first, *SHAPE[1:])
    total = PatchSum((first, 0, 0), shape, 2, tiling, tiling.weights(), memory)
    parts, found, end = tiling.parts((0, 0, 0), SHAPE), [], first
    for length in lengths:
        block = StoredBlock((length, *SHAPE[1:]), 2, StoredValues("float32"), BlockMemory(), "it")
        total.into(block, length)
        end += length
        while parts and parts[0].start[0] < end:
            part = parts.pop(0)
            if part.hi[0] > first:
                total.add(part, said(part.start))
        total.end()
        found.append(block.finish()[0])
    total.release()
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize(("blend", "overlap"), BLENDS)
def test_no_more_is_held_than_is_counted(blend, overlap):
    tiling, planes = Tiling(SHAPE, PATCH, blend, overlap), Counting()
    whole = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)

    def cut(start):
        return whole[:, *(slice(a, a + n) for a, n in zip(start, PATCH, strict=True))]

    np.testing.assert_allclose(blocks_of(tiling, cut, [70], memory=planes), whole, atol=1e-6)
    assert planes.held == 0
    weights = (2 * SHAPE[1] + PATCH[1] * (PATCH[0] if blend == "gaussian" else 1)) * SHAPE[2] * 4
    assert planes.most <= PatchSum.nbytes(SHAPE, 2, tiling) - weights < whole.nbytes / 3


@pytest.mark.parametrize(("blend", "overlap"), BLENDS)
@pytest.mark.parametrize("lengths", [[7] * 10, [1, 2, 3, 30, 34], [66, 4], [1] * 70])
def test_blocks_below_each_other_are_the_volume_cut(blend, overlap, lengths):
    """Blocks that are shorter than a patch too, in which none begins."""
    tiling = Tiling(SHAPE, PATCH, blend, overlap)
    rng = np.random.default_rng(1)  # each patch says something else of a voxel
    said = {part.start: rng.random((2, *PATCH), dtype=np.float32) for part in tiling.parts((0, 0, 0), SHAPE)}
    one = blocks_of(tiling, said.get, [70])
    assert np.array_equal(blocks_of(tiling, said.get, lengths), one)
    first = lengths[0]
    assert np.array_equal(blocks_of(tiling, said.get, lengths[1:], first), one[:, first:])
