"""Overlapping patches, summed a few planes at a time, for one block or several below each other."""

import gc
import tracemalloc

import numpy as np
import pytest

from cellmap_lightning.prediction.accumulate import BlockMemory, PatchSum, StoredBlock
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.quantize import StoredValues

SHAPE, PATCH = (70, 24, 20), (8, 12, 10)
BLENDS = [("average", 0.25), ("gaussian", 0.5), ("average", 0.75)]


def blocks_of(tiling, said, lengths, first=0):
    """Return blocks of some lengths along z, the first one beginning at a plane."""
    memory = BlockMemory()
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


class Taken:
    """A block that takes no memory."""

    def __init__(self, shape):
        self.found = np.zeros(shape, np.float32)

    def put(self, box, values):
        self.found[:, *box] = values


@pytest.mark.parametrize(("blend", "overlap"), BLENDS)
def test_memory_estimate_is_not_exceeded(blend, overlap):
    shape, patch = (60, 192, 160), (16, 48, 40)
    tiling, block = Tiling(shape, patch, blend, overlap), Taken((2, *shape))
    whole = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    parts = tiling.parts((0, 0, 0), shape)
    gc.collect()
    tracemalloc.start()
    total = PatchSum((0, 0, 0), shape, 2, tiling, tiling.weights(), BlockMemory())
    total.into(block, shape[0])
    for part in parts:
        total.add(part, whole[:, *(slice(a, a + n) for a, n in zip(part.start, patch, strict=True))])
    total.end()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(block.found, whole, atol=1e-6)
    counted = PatchSum.nbytes(shape, 2, tiling)
    assert 0.8 * counted < peak < 1.05 * counted  # the iterators of numpy take 0.1 MB


@pytest.mark.parametrize(("blend", "overlap"), BLENDS)
@pytest.mark.parametrize("lengths", [[7] * 10, [1, 2, 3, 30, 34], [66, 4], [1] * 70])
def test_blocks_below_each_other_equal_the_whole_volume(blend, overlap, lengths):
    """Blocks that are shorter than a patch too, in which none begins."""
    tiling = Tiling(SHAPE, PATCH, blend, overlap)
    rng = np.random.default_rng(1)  # each patch says something else of a voxel
    said = {part.start: rng.random((2, *PATCH), dtype=np.float32) for part in tiling.parts((0, 0, 0), SHAPE)}
    one = blocks_of(tiling, said.get, [70])
    assert np.array_equal(blocks_of(tiling, said.get, lengths), one)
    first = lengths[0]
    assert np.array_equal(blocks_of(tiling, said.get, lengths[1:], first), one[:, first:])
