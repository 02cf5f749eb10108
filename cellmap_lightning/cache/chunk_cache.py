"""An LRU cache of decoded chunks in the memory of one process."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from cellmap_lightning.cache.locks import SingleFlight
from cellmap_lightning.geometry.resample import AnyArray

#: Bytes of decoded chunks that a process caches for arrays too large to be cached whole.
DEFAULT_CHUNK_BYTES = 2 << 30

_caches: "weakref.WeakSet[ChunkCache]" = weakref.WeakSet()


def _reset_after_fork() -> None:
    """Empty the caches of a forked child: locks may have been held, and the decoding threads do not exist there."""
    for cache in list(_caches):
        cache.after_fork()


# Registered at import: at the first use in the child, several threads could race.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


class ChunkCache:
    """A thread-safe LRU cache of decoded chunks in the memory of this process.

    A copy in another process starts empty. Concurrent requests for a chunk decode it once.

    Args:
        budget: limit in bytes. A chunk larger than that is returned and not cached.

    Example:
        >>> cache = ChunkCache(1 << 20)
        >>> cache.get("chunk 0", lambda: np.zeros((4, 4, 4)))  # doctest: +SKIP
    """

    def __init__(self, budget: int = DEFAULT_CHUNK_BYTES) -> None:
        self.budget = budget
        self.after_fork()
        _caches.add(self)

    def after_fork(self) -> None:
        """Empty the cache and replace its lock, as needed in a forked child."""
        self._once = SingleFlight()
        self._chunks: OrderedDict[Hashable, AnyArray] = OrderedDict()
        self.nbytes = 0
        self.decoded = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, key: Hashable, decode: Callable[[], AnyArray]) -> AnyArray:
        """Return the chunk of a key, decoded now if it is not cached. It is shared: copy from it, never write to it."""
        chunk = self._cached(key)
        if chunk is not None:  # the fast path, without a lock
            return chunk
        once = self._once
        chunk = once.begin(key, lambda: self._cached(key))
        if chunk is not None:
            return chunk
        try:
            chunk = decode()
            chunk.setflags(write=False)
            with once.lock:
                self.decoded += 1
                if chunk.nbytes <= self.budget:
                    self._chunks[key] = chunk
                    self.nbytes += chunk.nbytes
                    while self.nbytes > self.budget:
                        self.nbytes -= self._chunks.popitem(last=False)[1].nbytes
            return chunk
        finally:
            once.end(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._chunks

    def _cached(self, key: Hashable) -> AnyArray | None:
        chunk = self._chunks.get(key)
        if chunk is not None:
            with suppress(KeyError):  # another thread may just have evicted it
                self._chunks.move_to_end(key)
        return chunk

    def clear(self) -> None:
        """Evict everything."""
        with self._once.lock:
            self._chunks.clear()
            self.nbytes = 0
