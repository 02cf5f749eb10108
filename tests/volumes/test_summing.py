"""Overlapping patches of a block, summed a few planes at a time."""

import threading

import numpy as np
import pytest

from cellmap_lightning.volumes.behind import Behind
from cellmap_lightning.volumes.blending import Tiling
from cellmap_lightning.volumes.summing import BlockMemory, PatchSum, StoredBlock
from cellmap_lightning.volumes.values import StoredValues

pytestmark = pytest.mark.usefixtures("no_threads_left")


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


class Slow(StoredBlock):
    """A disk that is slower than the model."""

    def put(self, box, values):
        threading.Event().wait(0.005)
        super().put(box, values)


@pytest.mark.parametrize(("blend", "overlap"), [("average", 0.25), ("gaussian", 0.5), ("average", 0.75)])
def test_no_more_is_held_than_is_counted(blend, overlap):
    shape, patch = (70, 24, 20), (8, 12, 10)
    tiling = Tiling(shape, patch, blend, overlap)
    weights, planes, behind = tiling.weights(), Counting(), Behind()
    block = Slow(shape, 2, StoredValues("float32"), BlockMemory(), "it")
    whole = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    total = PatchSum((0, 0, 0), shape, 2, tiling, weights, block, planes, behind)
    try:
        for part in tiling.parts((0, 0, 0), shape):
            total.add(part, whole[:, *(slice(a, a + n) for a, n in zip(part.start, patch, strict=True))])
        total.end()
        behind.wait()
    finally:
        behind.close()
    np.testing.assert_allclose(block.finish()[0], whole, atol=1e-6)
    assert planes.held == 0
    counted = PatchSum.nbytes(shape, 2, tiling) - patch[0] * shape[1] * shape[2] * 4  # without the weights
    assert planes.most <= counted < whole.nbytes * (2 if overlap > 0.5 else 1)
