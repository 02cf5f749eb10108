"""Regions over arrays in memory."""

import multiprocessing
from typing import Any

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.retrying import RetryPolicy

FORK = multiprocessing.get_context("fork")
SHAPE, CHUNKS = (21, 26, 40), (8, 16, 16)
GRID = (3, 2, 3)


def values(dtype, shape=SHAPE, depth=0, seed=0):
    """Any bits at all."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape)) * max(depth, 1) * kind.itemsize
    found = np.random.default_rng(seed).integers(0, 256, count, np.uint8).view(kind)
    return found.reshape(*shape, *([depth] if depth else []))


class Array:
    """An array in memory that is decoded by boxes; counts how often."""

    def __init__(self, data):
        self.data, self.boxes = data, []

    def __call__(self, start, shape):
        self.boxes.append((start, shape))
        return self.data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def region_of(decode, data, key="a", chunks=CHUNKS, **kwargs):
    depth = data.shape[3] if data.ndim == 4 else 0
    given = {"depth": depth, "identity": lambda: ("test", key), "name": key}
    return Region(data.shape[:3], chunks, data.dtype, decode, ChunkCache(), key, **(given | kwargs))


def level(path):
    return Level(path, "s0", (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), (0, 1, 2), 3)


V2: Any = {"name": "v2", "separator": "/"}
COUNT = 2 * 3 * 3  # chunks that are decoded at a time are of 64 voxels


def opened(path, mode="disk", budget=None, attempts=5):
    """A Zarr array as a new run finds it: its region, planned, and the store."""
    region = StoredImage(level(path), ChunkCache(), "crop1", retry_policy=RetryPolicy(attempts)).region
    store = RegionStore(mode, budget)
    store.plan([region], False, "test")
    return region, store


def whole(region):
    out = np.empty(region.shape, region.dtype)
    region.read_into((0, 0, 0), out)
    return out


def random_box(rng, size, longest=60):
    shape = tuple(int(rng.integers(1, min(n, longest) + 1)) for n in size)
    return tuple(int(rng.integers(0, n - m + 1)) for n, m in zip(size, shape, strict=True)), shape


def store_file(region, path):
    (file,) = (path.parent / "cache").rglob("*.region")
    assert file.stem == region.digest()
    return file
