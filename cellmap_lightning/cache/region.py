"""Decoded voxels, kept for the next patch: what was decoded once is copied from then on.

A `Region` is an array that is read by boxes. Its collection's `RegionStore` decides where its voxels are kept: in a
mapping that processes share (see `shared`), chunk by chunk in the memory of this process, or nowhere.
"""

import hashlib
import itertools
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import DEFAULT_CHUNK_BYTES, ChunkCache
from cellmap_lightning.cache.locks import NoRoomError, SingleFlight
from cellmap_lightning.cache.mapped import Layout, Mapped
from cellmap_lightning.cache.shared_memory import FORMAT, Arena, RegionFolder
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.store import metadata_cache
from cellmap_lightning.runtime.location import CacheMode, check_mode, choose

log = logging.getLogger(__name__)

Decode = Callable[[tuple[int, int, int], Shape], AnyArray]
Stamp = Callable[[tuple[int, int, int], Shape], int]

#: Chunks that must fit into the cache of chunks, for them to be decoded before they are copied from.
_AT_ONCE = 64

#: Types that are copied voxel by voxel where voxels have several bytes.
_ITEMS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

#: Columns times rows that are copied at a time: measured.
_COLUMNS = 512

_stores: "weakref.WeakSet[RegionStore]" = weakref.WeakSet()


def _start_empty() -> None:
    """In a forked child: a lock may have been held, and the threads that were decoding are gone."""
    for store in list(_stores):
        store._after_fork()


# Here and not at the first use in the child, where several threads may come first at once.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_empty)


class Region:
    """An array that can be read by boxes, from decoded voxels.

    Args:
        shape: voxels along z, y, x.
        chunks: voxels that are decoded at a time.
        dtype: type of a voxel, or of each of its bytes when it has several.
        decode: from the start and the shape of a box to its voxels.
        cache: where decoded chunks are kept that have no other place.
        key: tells this array from every other one in the process.
        depth: bytes per voxel along a last axis; 0 for none.
        stamp: from the start and the shape of a box to a number that changes when its source does.
        identity: what its voxels follow from, for good: by it they are found again. None: by no other process.
        name: what people call it.
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
        stamp: Stamp | None = None,
        identity: Callable[[], tuple[object, ...]] | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.shape, self.chunks, self.dtype = shape, chunks, dtype
        self.decode, self.cache, self.key, self.depth = decode, cache, key, depth
        self.stamp, self.identity = stamp, identity
        #: Set by `RegionStore.plan`.
        self.store: RegionStore | None = None
        #: Read exactly what is asked for, from the source, when the voxels are not kept.
        self.direct = False
        self._lo: Shape = (0, 0, 0)
        self._hi = shape
        self._mapped: Mapped | None = None
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    def limit(self, lo: Sequence[int], hi: Sequence[int]) -> None:
        """Keep only what lies between two corners, as far as the array goes."""
        z, y, x = (min(max(0, int(a)), n - 1) for a, n in zip(lo, self.shape, strict=True))
        self._lo = (z, y, x)
        z, y, x = (min(n, max(int(b), a + 1)) for b, a, n in zip(hi, self._lo, self.shape, strict=True))
        self._hi = (z, y, x)
        self._mapped = self._digest = None

    @property
    def extent(self) -> tuple[Shape, Shape]:
        """Start and shape of what is kept."""
        z, y, x = (b - a for a, b in zip(self._lo, self._hi, strict=True))
        return self._lo, (z, y, x)

    @property
    def layout(self) -> Layout:
        """How what is kept lies in a mapping."""
        z, y, x = (b - a for a, b in zip(self._lo, self._hi, strict=True))
        gz, gy, gx = (-(-b // c) - a // c for a, b, c in zip(self._lo, self._hi, self.chunks, strict=True))
        return Layout((z, y, x), (gz, gy, gx), max(1, self.depth) * self.dtype.itemsize)

    @property
    def _first_chunk(self) -> Shape:
        """The chunk that holds the first voxel of what is kept."""
        z, y, x = (lo // c for lo, c in zip(self._lo, self.chunks, strict=True))
        return z, y, x

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * max(1, self.depth) * self.dtype.itemsize

    def _chunk(self, index: Shape) -> tuple[tuple[int, int, int], Shape]:
        """Start and shape of the part of a chunk that is kept."""
        starts, shape = [], []
        for i, c, lo, hi in zip(index, self.chunks, self._lo, self._hi, strict=True):
            first = (lo // c + i) * c
            starts.append(max(first, lo))
            shape.append(min(first + c, hi) - starts[-1])
        return (starts[0], starts[1], starts[2]), (shape[0], shape[1], shape[2])

    def digest(self) -> str:
        """Names what is kept, the same in every process and run that would keep the same."""
        digest = self._digest
        if digest is None:
            own: object = self.identity() if self.identity is not None else (os.getpid(), id(self))
            parts = (FORMAT, own, self.shape, self.chunks, str(self.dtype), self.depth, self._lo, self._hi)
            digest = self._digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
        return digest  # another thread may be closing the store, which clears it

    def read_into(self, start: tuple[int, int, int], out: AnyArray) -> None:
        """Copy the box at ``start`` with the shape of ``out``, inside the array, into ``out`` (any strides)."""
        box = self._view(start, (out.shape[0], out.shape[1], out.shape[2]))
        if box is not None:
            self._assign(out, box)
        elif self.direct:
            out[...] = self.decode(start, (out.shape[0], out.shape[1], out.shape[2]))
        else:
            self._through_cache(start, out)

    def read(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """The voxels of a box inside the array: perhaps those that are kept, so never write to them."""
        box = self._view(start, shape)
        if box is not None:
            return box
        out = np.empty((*shape, self.depth) if self.depth else shape, self.dtype)
        self.read_into(start, out)
        return out

    def _assign(self, out: AnyArray, box: AnyArray) -> None:
        item = _ITEMS.get(self.depth)
        if item is not None and out.strides[-1] == 1 and out.dtype == np.uint8:
            out, box = out.view(item)[..., 0], box.view(item)[..., 0]
        rows, size = out.strides[2], out.itemsize
        if abs(rows) > max(abs(out.strides[0]), abs(out.strides[1])):
            # Where runs of voxels become columns, a few of them at a time stay in the processor's cache.
            few = max(4, _COLUMNS // out.shape[2])
            for first in range(0, out.shape[2], few):
                out[:, :, first : first + few] = box[:, :, first : first + few]
        elif rows == -size and size <= 2 and out.shape[2] * size % 8 == 0 and box.strides[2] == size:
            # Single bytes are turned round eight at a time: as the bytes of numbers of the other byte order.
            few = 8
            out, box = out.view(f"u{size}"), box.view(f"u{size}")
            turned = np.empty((few, *out.shape[1:]), np.dtype(f">u{size}"))
            words, target = turned.view(">u8")[:, :, ::-1], out[:, :, ::-1].view(np.uint64)
            for first in range(0, len(out), few):
                count = min(few, len(out) - first)
                turned[:count] = box[first : first + few]
                target[first : first + few] = words[:count]
        else:
            out[...] = box

    def _view(self, start: tuple[int, int, int], shape: Shape) -> AnyArray | None:
        """The kept voxels of a box, filled where they were not; None where they are not kept."""
        mapped = self.attached()
        if mapped is None:
            return None
        lo, hi = self._lo, self._hi
        a0, a1, a2 = start[0] - lo[0], start[1] - lo[1], start[2] - lo[2]
        b0, b1, b2 = a0 + shape[0], a1 + shape[1], a2 + shape[2]
        if a0 < 0 or a1 < 0 or a2 < 0 or b0 > hi[0] - lo[0] or b1 > hi[1] - lo[1] or b2 > hi[2] - lo[2]:
            return None
        if not mapped.complete:
            for index in self._missing(mapped, start, shape):
                if not self._fill(mapped, index):
                    return None
        voxels = mapped.voxels[a0:b0, a1:b1, a2:b2]
        if self.depth:
            return voxels
        found: AnyArray = voxels.view(self.dtype)[..., 0]
        return found

    @property
    def kept(self) -> bool:
        """Whether its voxels have a place, so that reading them is copying once they are there."""
        mapped = self.attached()
        return mapped is not None and not mapped.full

    def missing(self, start: tuple[int, int, int], shape: Shape) -> list[Shape] | None:
        """The chunks of a box that have to be filled before it is a mere copy; None where they would not be kept.

        They are counted from the array's first voxel, however chunks are kept: that may change before they are filled.
        """
        mapped = self.attached()
        if mapped is not None:
            if mapped.full:
                return None
            a, b, c = self._first_chunk
            return [] if mapped.complete else [(z + a, y + b, x + c) for z, y, x in self._missing(mapped, start, shape)]
        if self.direct or self.cache.budget < _AT_ONCE * self.chunk_bytes:
            return None
        return [index for index in self._indices(start, shape) if (self.key, index) not in self.cache]

    def _missing(self, mapped: Mapped, start: tuple[int, int, int], shape: Shape) -> list[Shape]:
        spans = [
            slice(max(0, a // c - lo // c), max(0, -(-(a + n) // c) - lo // c))
            for a, n, c, lo in zip(start, shape, self.chunks, self._lo, strict=True)
        ]
        part = mapped.ready[tuple(spans)]
        if part.all():
            return []
        z, y, x = (span.start for span in spans)
        return [(i + z, j + y, k + x) for i, j, k in np.argwhere(~part).tolist()]

    def fill(self, index: Shape) -> None:
        """Fill a chunk that was `missing`."""
        mapped = self.attached()
        if mapped is not None:
            z, y, x = (i - first for i, first in zip(index, self._first_chunk, strict=True))
            self._fill(mapped, (z, y, x))
        elif not self.direct:
            self._cached(index)

    def _fill(self, mapped: Mapped, index: Shape) -> bool:
        """Decode a chunk and keep it, unless another thread or process does; False where there is no room."""
        if mapped.full:
            return bool(mapped.ready[index])
        once, key = mapped.once, (mapped.key, index)
        if once.begin(key, lambda: True if mapped.ready[index] or mapped.full else None):
            return bool(mapped.ready[index])
        try:
            box = self._chunk(index)
            at = [a - lo for a, lo in zip(box[0], self._lo, strict=True)]
            # Taken before the voxels: what is written meanwhile is noticed the next time.
            stamp = self.stamp(*box) if self.stamp is not None else 1
            return mapped.fill(index, at, box[1], stamp, lambda: np.asarray(self.decode(*box), self.dtype))
        finally:
            once.end(key)

    def attached(self) -> Mapped | None:
        """Its mapping, or None where it has none."""
        mapped, store = self._mapped, self.store
        if mapped is None and store is not None:  # which another thread may be closing
            mapped = store.attach(self)
        return mapped

    def _through_cache(self, start: tuple[int, int, int], out: AnyArray) -> None:
        along = []
        for first, count, size in zip(start, out.shape, self.chunks, strict=False):
            parts = []
            for i in range(first // size, -(-(first + count) // size)):
                lo, hi = max(first, i * size), min(first + count, (i + 1) * size)
                parts.append((i, slice(lo - i * size, hi - i * size), slice(lo - first, hi - first)))
            along.append(parts)
        for z, y, x in itertools.product(*along):
            out[z[2], y[2], x[2]] = self._cached((z[0], y[0], x[0]))[z[1], y[1], x[1]]

    def _indices(self, start: tuple[int, int, int], shape: Sequence[int]) -> Iterator[Shape]:
        """The chunks of a box."""
        spans = zip(start, shape, self.chunks, strict=False)
        return itertools.product(*(range(a // c, -(-(a + n) // c)) for a, n, c in spans))  # type: ignore[return-value]

    def _cached(self, index: Shape) -> AnyArray:
        """A chunk, from the cache of chunks."""
        return self.cache.get((self.key, index), partial(self._decode, index))

    def _decode(self, index: Shape) -> AnyArray:
        i, j, k = (i * c for i, c in zip(index, self.chunks, strict=True))
        z, y, x = (min(c, n - o) for c, n, o in zip(self.chunks, self.shape, (i, j, k), strict=True))
        return self.decode((i, j, k), (z, y, x))


class RegionStore:
    """Where the voxels of a collection of datasets are kept; see `location.CacheMode`.

    Args:
        mode: on disk, in memory, chunk by chunk, or nowhere.
        budget: bytes; by default what `location.choose` says, and 2 GiB of chunks.
    """

    def __init__(self, mode: CacheMode = "auto", budget: int | None = None) -> None:
        check_mode(mode, budget)
        self.mode: CacheMode = mode
        self.budget = budget
        chunks = budget or DEFAULT_CHUNK_BYTES
        self.chunks = ChunkCache(
            0 if mode == "none" else chunks if mode == "chunks" else min(chunks, DEFAULT_CHUNK_BYTES)
        )
        self.once = SingleFlight()
        self._folder: RegionFolder | None = None
        self._arena: Arena | None = None
        self._places: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._where: Path | None = None
        self._regions: list[Region] = []
        self._attached: dict[str, Mapped] = {}
        self._lock = threading.Lock()
        self.planned = False
        _stores.add(self)

    def _after_fork(self) -> None:
        self.once, self._lock = SingleFlight(), threading.Lock()
        for mapped in self._attached.values():
            mapped.once = self.once

    def __getstate__(self) -> dict[str, Any]:
        gone = ("once", "_lock", "_attached")
        return {name: value for name, value in self.__dict__.items() if name not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, once=SingleFlight(), _lock=threading.Lock(), _attached={})
        _stores.add(self)

    def plan(self, regions: Sequence[Region], ordered: bool, name: str) -> None:
        """Decide once what is kept where: every process that shares it must begin with the same plan.

        Args:
            regions: all regions of the collection.
            ordered: patches are read one beside the other, so that chunks that were just decoded are wanted again.
            name: what log lines call the collection.
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
                log.info("%s: nothing that is decoded is kept (cache=none)", name)
                return
            if self.mode == "chunks":
                log.info("%s: the last %.2f GB that were decoded are kept", name, self.chunks.budget / 1e9)
                return
            self._place(regions, ordered, name)

    def _place(self, regions: Sequence[Region], ordered: bool, name: str) -> None:
        location = choose(self.mode, self.budget)
        with metadata_cache():  # each folder on the way to thousands of arrays is resolved once
            keys = {region.digest(): region.layout.nbytes for region in regions}
        if location.folder is not None:
            self._folder = RegionFolder(location.folder)
            held = {path.stem: size for path, size, _ in self._folder.files()}
            location = choose(self.mode, self.budget, sum(held.values()))
        # The budget is that of the process: what other collections keep there counts.
        others: dict[str, int] = {}
        for store in list(_stores):
            if store is not self and store._where == location.folder:
                others |= store._sizes
        room = location.budget - sum(nbytes for key, nbytes in others.items() if key not in keys or not location.folder)
        kept: dict[str, int] = {}
        at = 0
        for key, nbytes in keys.items():
            if at + nbytes <= room:
                kept[key] = at
                at += nbytes
        self._places, self._where = kept, location.folder
        self._sizes = {key: keys[key] for key in kept}
        if location.folder is not None and self._folder is not None:
            over = sum(size for key, size in held.items() if key not in kept and key not in others) + at - room
            removed = self._folder.evict(over, set(kept) | set(others)) if over > 0 else 0
            if removed:
                log.info("%s: %.1f MB of older regions were removed from %s", name, removed / 1e6, location.folder)
        else:
            self._arena = Arena(max(at, 1))
            self.chunks.budget = min(max(room - at, 0), DEFAULT_CHUNK_BYTES)
        total = sum(keys.values())
        where = f"in {location.folder}" if location.folder is not None else "in memory"
        log.info(
            "%s: decoded voxels are kept %s: %.2f GB expected, at most %.2f GB allowed (%s)",
            name, where, total / 1e9, location.budget / 1e9, location.why,
        )  # fmt: skip
        if len(kept) < len(keys):
            # Of chunks picked at random, as many are found again as fit: too few to pay for decoding whole chunks.
            rest = total - at
            direct = not ordered and self.chunks.budget < rest / 2
            log.warning(
                "%s: %d of %d arrays (%.2f GB) do not fit into the %.2f GB of the cache that are left and are %s; "
                "raise cache_bytes, or set CELLMAP_CACHE_DIR to a larger disk",
                name, len(keys) - len(kept), len(keys), rest / 1e9, max(room, 0) / 1e9,
                "read from the source each time" if direct else "kept chunk by chunk in memory",
            )  # fmt: skip
            for region in regions:
                region.direct = direct and region.digest() not in kept

    def attach(self, region: Region) -> Mapped | None:
        """The mapping of a region, or None where it has none."""
        if not self._places:
            return None
        key = region.digest()
        with self._lock:  # with which another thread may be closing
            at = self._places.get(key)
            if at is None or (self._folder is None and self._arena is None):
                region.store = None  # asked once
                return None
            mapped = self._attached.get(key)
            if mapped is None:
                if self._folder is not None:
                    try:
                        mapped = self._folder.attach(key, region.layout, region.name)
                    except NoRoomError as e:
                        self._folder.complain(e)
                        self._places.pop(key, None)
                        region.store = None
                        return None
                else:
                    assert self._arena is not None
                    mapped = self._arena.attach(key, region.layout, at, region.name)
                mapped.once = self.once
                self._attached[key] = mapped
            region._mapped = mapped  # with the lock held: `close` clears it
            return mapped

    def close(self) -> None:
        """Write to disk what is kept there, and give everything back. A later use starts anew."""
        with self._lock:
            for mapped in self._attached.values():
                mapped.sync()
                if self._folder is not None:
                    self._folder.release(mapped.key)
            for region in self._regions:
                region.store, region._mapped, region._digest, region.direct = None, None, None, False
            self._attached, self._places, self._sizes, self._regions, self.planned = {}, {}, {}, [], False
            if self._arena is not None:
                self._arena.close()
            self._arena = self._folder = None
            self.chunks.clear()

    @property
    def decoded(self) -> int:
        """Chunks that this process decoded and kept."""
        return sum(mapped.decoded for mapped in list(self._attached.values()))

    @property
    def mapped(self) -> npt.NDArray[np.bool_]:
        """For every region of the plan, whether its voxels are kept whole."""
        return np.array([region.digest() in self._places for region in self._regions])
