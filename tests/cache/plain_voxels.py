"""Plain arrays, and patches of them by direct evaluation."""

import itertools

import numpy as np

SIGNED_PERMUTATIONS = [
    np.eye(3)[list(p)] * np.asarray(signs)
    for p in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]


class Voxels:
    """A plain array."""

    def __init__(self, array):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape[:3]

    def read(self, start, shape):
        assert all(a >= 0 and n > 0 and a + n <= m for a, n, m in zip(start, shape, self.shape, strict=True))
        return self.array[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def read_into(self, start, out):
        out[...] = self.read(start, out.shape[:3])
