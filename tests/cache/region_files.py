"""A small region, for tests of its files and of shared memory."""

import multiprocessing

from cellmap_lightning.cache.mapped import FILLED, Layout

FORK = multiprocessing.get_context("fork")
KEY, OTHER = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
LAYOUT = Layout((10, 12, 14), (2, 3, 2), 2)


def put(mapped, index, value, flag=FILLED):
    """Fill a chunk of a mapping by hand: of 5 x 4 x 7 voxels."""
    place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, (5, 4, 7), strict=True))
    mapped.voxels[place] = value
    mapped.stamps[index] = 99
    mapped.flags[index] = flag
