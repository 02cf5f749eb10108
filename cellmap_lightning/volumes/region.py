"""Decoded chunks, kept for the next patch: what was decoded once is copied from then on."""

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from cellmap_lightning.volumes.geometry import Shape
from cellmap_lightning.volumes.resample import AnyArray

Decode = Callable[[tuple[int, int, int], Shape], AnyArray]

#: Bytes of decoded chunks that one collection of datasets keeps in each process.
DEFAULT_CACHE_BYTES = 2 << 30


_caches: "weakref.WeakSet[ChunkCache]" = weakref.WeakSet()


def _start_empty() -> None:
    """In a forked child: a lock may have been held, and the threads that were decoding are gone."""
    for cache in list(_caches):
        cache._reset()


# Here and not at the first use in the child, where several threads may come first at once.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_empty)


class ChunkCache:
    """Decoded chunks in memory, the least recently used dropped first.

    Threads that want the same chunk at the same time decode it once: the others wait for the one that came first, which
    is running by then and waits for nobody. A copy in another process starts empty.

    Args:
        budget: bytes to keep. A chunk larger than that is handed out and not kept.
    """

    def __init__(self, budget: int = DEFAULT_CACHE_BYTES) -> None:
        self.budget = budget
        self._reset()
        _caches.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._chunks: OrderedDict[Hashable, AnyArray] = OrderedDict()
        self._coming: dict[Hashable, threading.Event] = {}
        self.nbytes = 0
        self.decoded = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, key: Hashable, decode: Callable[[], AnyArray]) -> AnyArray:
        """The chunk of that key, decoded now if it is not kept. It is shared: copy from it, never write to it."""
        while True:
            with self._lock:
                chunk = self._chunks.get(key)
                if chunk is not None:
                    self._chunks.move_to_end(key)
                    return chunk
                coming = self._coming.get(key)
                if coming is None:
                    done = self._coming[key] = threading.Event()
                    break
            coming.wait()
        try:
            chunk = decode()
            chunk.setflags(write=False)
            with self._lock:
                self.decoded += 1
                if chunk.nbytes <= self.budget:
                    self._chunks[key] = chunk
                    self.nbytes += chunk.nbytes
                    while self.nbytes > self.budget:
                        self.nbytes -= self._chunks.popitem(last=False)[1].nbytes
            return chunk
        finally:
            with self._lock:
                del self._coming[key]
            done.set()

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._chunks.clear()
            self.nbytes = 0


class Region:
    """An array that can be read by boxes, from decoded chunks.

    Args:
        shape: voxels along z, y, x.
        chunks: voxels of a chunk.
        dtype: type of a voxel, or of each of its bytes when it has several.
        depth: bytes per voxel along a last axis; 0 for none.
        decode: from the start and the shape of a chunk to its voxels.
        cache: where decoded chunks are kept.
        key: tells this array from every other one in the cache.
    """

    def __init__(
        self,
        shape: Shape,
        chunks: Shape,
        dtype: np.dtype[Any],
        decode: Decode,
        cache: ChunkCache,
        key: Hashable,
        depth: int = 0,
    ) -> None:
        self.shape, self.chunks, self.dtype = shape, chunks, dtype
        self.decode, self.cache, self.key, self.depth = decode, cache, key, depth

    def read_into(self, start: tuple[int, int, int], out: AnyArray) -> None:
        """Copy the box at ``start`` with the shape of ``out``, inside the array, into ``out`` (any strides)."""
        stop = [a + n for a, n in zip(start, out.shape, strict=False)]
        spans = [range(a // c, -(-b // c)) for a, b, c in zip(start, stop, self.chunks, strict=True)]
        for index in itertools.product(*spans):
            origin = [i * c for i, c in zip(index, self.chunks, strict=True)]
            chunk = self.cache.get((self.key, index), lambda origin=origin: self._decode(origin))  # type: ignore[misc]
            source, target = [], []
            for axis in range(3):
                lo = max(start[axis], origin[axis])
                hi = min(stop[axis], origin[axis] + self.chunks[axis])
                source.append(slice(lo - origin[axis], hi - origin[axis]))
                target.append(slice(lo - start[axis], hi - start[axis]))
            out[tuple(target)] = chunk[tuple(source)]

    def _decode(self, origin: list[int]) -> AnyArray:
        z, y, x = (min(c, n - o) for c, n, o in zip(self.chunks, self.shape, origin, strict=True))
        return self.decode((origin[0], origin[1], origin[2]), (z, y, x))
