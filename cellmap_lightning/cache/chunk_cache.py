"""Decoded chunks in the memory of one process, the least recently used dropped first."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from cellmap_lightning.cache.locks import SingleFlight
from cellmap_lightning.geometry.resample import AnyArray

#: Bytes of decoded chunks that a process keeps of arrays that are too large to be kept whole.
DEFAULT_CHUNK_BYTES = 2 << 30

_caches: "weakref.WeakSet[ChunkCache]" = weakref.WeakSet()


def _start_empty() -> None:
    """In a forked child: a lock may have been held, and the threads that were decoding are gone."""
    for cache in list(_caches):
        cache._after_fork()


# Here and not at the first use in the child, where several threads may come first at once.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_empty)


class ChunkCache:
    """Decoded chunks in the memory of this process, the least recently used dropped first.

    A copy in another process starts empty.

    Args:
        budget: bytes to keep. A chunk larger than that is handed out and not kept.
    """

    def __init__(self, budget: int = DEFAULT_CHUNK_BYTES) -> None:
        self.budget = budget
        self._after_fork()
        _caches.add(self)

    def _after_fork(self) -> None:
        self._once = SingleFlight()
        self._chunks: OrderedDict[Hashable, AnyArray] = OrderedDict()
        self.nbytes = 0
        self.decoded = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, key: Hashable, decode: Callable[[], AnyArray]) -> AnyArray:
        """The chunk of that key, decoded now if it is not kept. It is shared: copy from it, never write to it."""
        ready = self._kept(key)
        if ready is not None:  # the fast path: cached already
            return ready
        once = self._once
        kept = once.begin(key, lambda: self._kept(key))
        if kept is not None:
            found: AnyArray = kept
            return found
        try:
            chunk = decode()
            chunk.setflags(write=False)
            with once._lock:
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

    def _kept(self, key: Hashable) -> AnyArray | None:
        chunk = self._chunks.get(key)
        if chunk is not None:
            with suppress(KeyError):  # another thread may just have dropped it
                self._chunks.move_to_end(key)
        return chunk

    def clear(self) -> None:
        """Drop everything."""
        with self._once._lock:
            self._chunks.clear()
            self.nbytes = 0
