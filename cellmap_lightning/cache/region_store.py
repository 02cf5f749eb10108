"""The cache location of a collection's regions: shared memory, files, process memory, or nowhere."""

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import DEFAULT_CHUNK_BYTES, ChunkCache
from cellmap_lightning.cache.locks import NoRoomError, SingleFlight
from cellmap_lightning.cache.mapped import Mapped
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.shared_memory import Arena, RegionFolder
from cellmap_lightning.io.store import metadata_cache
from cellmap_lightning.runtime.location import CacheMode, Location, check_mode, choose
from cellmap_lightning.wording import plural, size_text

log = logging.getLogger(__name__)

_stores: "weakref.WeakSet[RegionStore]" = weakref.WeakSet()


def _reset_after_fork() -> None:
    """Replace locks in a forked child: they may have been held by threads that the child does not have."""
    for store in list(_stores):
        store.after_fork()


# Registered at import: at the first use in the child, several threads could race.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


class RegionStore:
    """The cache of a collection of datasets; see `location.CacheMode` and docs/speed.md.

    Args:
        mode: on disk, in memory, chunk by chunk, or nowhere.
        budget: bytes; by default what `location.choose` allows, and 2 GiB of chunks.

    Attributes:
        chunks: cache of single chunks, for regions without a mapping.
        folder: folder of the mapped files; None if the regions are not on disk.
        sizes: bytes of each mapped region, by its digest.
        planned: True after `plan`.
    """

    def __init__(self, mode: CacheMode = "auto", budget: int | None = None) -> None:
        check_mode(mode, budget)
        self.mode: CacheMode = mode
        self.budget = budget
        chunk_bytes = {"none": 0, "chunks": budget or DEFAULT_CHUNK_BYTES}
        self.chunks = ChunkCache(chunk_bytes.get(mode, min(budget or DEFAULT_CHUNK_BYTES, DEFAULT_CHUNK_BYTES)))
        self.folder: Path | None = None
        self.sizes: dict[str, int] = {}
        self.planned = False
        self._single_flight = SingleFlight()
        self._files: RegionFolder | None = None
        self._arena: Arena | None = None
        #: First byte of each mapped region in the arena, by its digest.
        self._offsets: dict[str, int] = {}
        self._regions: list[Region] = []
        self._attached: dict[str, Mapped] = {}
        self._lock = threading.Lock()
        _stores.add(self)

    def after_fork(self) -> None:
        """Replace the locks, as needed in a forked child."""
        self._single_flight, self._lock = SingleFlight(), threading.Lock()
        for mapped in self._attached.values():
            mapped.once = self._single_flight

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_single_flight", "_lock", "_attached")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _single_flight=SingleFlight(), _lock=threading.Lock(), _attached={})
        _stores.add(self)

    def plan(self, regions: Sequence[Region], ordered: bool, name: str) -> None:
        """Decide once where each region is cached: all processes that share the cache must start with the same plan.

        Args:
            regions: all regions of the collection.
            ordered: True if neighbouring patches are read one after the other, so that cached chunks are reused soon.
            name: name of the collection, for log lines.
        """
        with self._lock:
            if self.planned:
                return
            self._regions = list(regions)
            self.planned = True
            for region in regions:
                region.store, region.cache = self, self.chunks
            if self.mode == "none":
                for region in regions:
                    region.direct = True
                log.info("%s: decoded voxels are not cached (cache=none)", name)
            elif self.mode == "chunks":
                log.info("%s: the last %s of decoded chunks are cached", name, size_text(self.chunks.budget))
            else:
                self._map(regions, ordered, name)

    def _map(self, regions: Sequence[Region], ordered: bool, name: str) -> None:
        """Assign the regions that fit the budget to files or to shared memory; the others stay without a mapping."""
        location = choose(self.mode, self.budget)
        with metadata_cache():  # each folder on the way to thousands of arrays is resolved once
            sizes = {region.digest(): region.layout.nbytes for region in regions}
        on_disk: dict[str, int] = {}
        if location.folder is not None:
            self._files = RegionFolder(location.folder)
            on_disk = {path.stem: size for path, size, _ in self._files.files()}
            location = choose(self.mode, self.budget, sum(on_disk.values()))
        others = self._sizes_of_others(location.folder)
        room = location.budget - sum(
            nbytes for key, nbytes in others.items() if key not in sizes or location.folder is None
        )
        self._offsets, used = _allot(sizes, room)
        self.folder = location.folder
        self.sizes = {key: sizes[key] for key in self._offsets}
        if self._files is not None:
            unused = sum(size for key, size in on_disk.items() if key not in self._offsets and key not in others)
            self._evict(unused + used - room, others, name)
        else:
            self._arena = Arena(max(used, 1))
            self.chunks.budget = min(max(room - used, 0), DEFAULT_CHUNK_BYTES)
        self._report(location, sum(sizes.values()), name)
        if len(self._offsets) < len(sizes):
            rest = sum(sizes.values()) - used
            # With chunks picked at random the hit rate is the share that fits: too low to decode whole chunks for.
            direct = not ordered and self.chunks.budget < rest / 2
            log.warning(
                "%s: %d of %s (%s) do not fit into the %s of the cache that are left and are %s; "
                "raise cache_bytes, or set CELLMAP_CACHE_DIR to a larger disk",
                name, len(sizes) - len(self._offsets), plural(len(sizes), "array"), size_text(rest),
                size_text(max(room, 0)),
                "read from the source each time" if direct else "cached chunk by chunk in memory",
            )  # fmt: skip
            for region in regions:
                region.direct = direct and region.digest() not in self._offsets

    def _sizes_of_others(self, folder: Path | None) -> dict[str, int]:
        """Return the bytes of the regions that other collections of this process cache in the same place.

        The budget is that of the process, so these count against it.
        """
        sizes: dict[str, int] = {}
        for store in list(_stores):
            if store is not self and store.folder == folder:
                sizes |= store.sizes
        return sizes

    def _evict(self, excess: int, others: Mapping[str, int], name: str) -> None:
        """Remove the files of regions that are not in use, until the excess bytes are free."""
        if excess <= 0 or self._files is None:
            return
        removed = self._files.evict(excess, {*self._offsets, *others})
        if removed:
            log.info("%s: %s of older regions were removed from %s", name, size_text(removed), self.folder)

    @staticmethod
    def _report(location: Location, expected: int, name: str) -> None:
        where = f"in {location.folder}" if location.folder is not None else "in memory"
        log.info(
            "%s: decoded voxels are cached %s: %s expected, at most %s allowed (%s)",
            name, where, size_text(expected), size_text(location.budget), location.why,
        )  # fmt: skip

    def attach(self, region: Region) -> Mapped | None:
        """Return the mapping of a region; None if it has none."""
        if not self._offsets:
            return None
        key = region.digest()
        with self._lock:  # with which another thread may be closing
            offset = self._offsets.get(key)
            if offset is None or (self._files is None and self._arena is None):
                region.store = None  # asked once
                return None
            mapped = self._attached.get(key)
            if mapped is None:
                if self._files is not None:
                    try:
                        mapped = self._files.attach(key, region.layout, region.name)
                    except NoRoomError as e:
                        self._files.complain(e)
                        self._offsets.pop(key, None)
                        region.store = None
                        return None
                else:
                    assert self._arena is not None
                    mapped = self._arena.attach(key, region.layout, offset, region.name)
                mapped.once = self._single_flight
                self._attached[key] = mapped
            region.mapped = mapped  # with the lock held: `close` clears it
            return mapped

    def close(self) -> None:
        """Sync cached files to disk and release all memory; the next use plans again."""
        with self._lock:
            for mapped in self._attached.values():
                mapped.sync()
                if self._files is not None:
                    self._files.release(mapped.key)
            for region in self._regions:
                region.detach()
            self._attached, self._offsets, self.sizes, self._regions, self.planned = {}, {}, {}, [], False
            if self._arena is not None:
                self._arena.close()
            self._arena = self._files = None
            self.chunks.clear()

    @property
    def decoded(self) -> int:
        """Number of chunks that this process decoded and cached."""
        return sum(mapped.decoded for mapped in list(self._attached.values()))

    @property
    def mapped(self) -> npt.NDArray[np.bool_]:
        """Bool ``[regions]`` of the plan: True for regions that are cached as a whole."""
        return np.array([region.digest() in self._offsets for region in self._regions])


def _allot(sizes: Mapping[str, int], room: int) -> tuple[dict[str, int], int]:
    """Return the first byte of each region that fits, in the given order, and the bytes of all of them."""
    offsets: dict[str, int] = {}
    used = 0
    for key, nbytes in sizes.items():
        if used + nbytes <= room:
            offsets[key] = used
            used += nbytes
    return offsets, used
