"""Arrays that are read by boxes, from decoded voxels that are cached for later reads.

A `Region` is one array. The `RegionStore` of its collection decides where its voxels are cached: in a mapping that
processes share (see `shared_memory`), chunk by chunk in the memory of one process, or nowhere.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.copying import copy_voxels
from cellmap_lightning.cache.mapped import Layout, Mapped
from cellmap_lightning.cache.shared_memory import FORMAT
from cellmap_lightning.geometry.grids import touched_cells
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray

Decode = Callable[[tuple[int, int, int], Shape], AnyArray]
Stamp = Callable[[tuple[int, int, int], Shape], int]
Check = Callable[[tuple[int, int, int], AnyArray], None]

#: Chunks that must fit into the chunk cache for chunks to be decoded ahead of the copy.
_MIN_CACHED_CHUNKS = 64


class Store(Protocol):
    """The part of a `RegionStore` that regions use."""

    def attach(self, region: "Region") -> Mapped | None:
        """Return the mapping of a region; None if it has none."""


class Region:
    """An array that is read by boxes, from decoded voxels.

    Args:
        shape: voxels along z, y, x.
        chunks: shape of a decoded chunk.
        dtype: type of a voxel, or of each byte of a voxel with several.
        decode: function from the start and shape of a box to its voxels.
        cache: cache of single chunks, used without a mapping.
        key: identity of the array within the process.
        depth: bytes per voxel along a last axis; 0 for no such axis.
        stamp: function from the start and shape of a box to a number that changes when the source does.
        identity: function that returns everything the voxels depend on, by which other processes and runs find the
            cached voxels; None if they are never shared.
        name: name in messages.
        check: function that gets the start and the voxels of each chunk that another process or run decoded, once per
            process; None for nothing to report of them.

    Attributes:
        store: store of the collection, set by `RegionStore.plan`.
        direct: True if exactly the requested box is read from the source wherever voxels are not cached.
        mapped: mapping of the cached voxels, once attached.

    Example:
        >>> region = Region((64, 64, 64), (32, 32, 32), np.dtype("uint8"), decode, ChunkCache(), "raw")
        >>> patch = region.read((0, 0, 0), (16, 16, 16))  # doctest: +SKIP
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
        check: Check | None = None,
    ) -> None:
        self.name, self.check = name, check
        self.shape, self.chunks, self.dtype = shape, chunks, dtype
        self.decode, self.cache, self.key, self.depth = decode, cache, key, depth
        self.stamp, self.identity = stamp, identity
        self.store: Store | None = None
        self.direct = False
        self.mapped: Mapped | None = None
        self._lo: Shape = (0, 0, 0)
        self._hi = shape
        self._digest: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mapped": None}

    def limit(self, lo: Sequence[int], hi: Sequence[int]) -> None:
        """Cache only the box between two corners, clipped to the array."""
        z, y, x = (min(max(0, int(a)), n - 1) for a, n in zip(lo, self.shape, strict=True))
        self._lo = (z, y, x)
        z, y, x = (min(n, max(int(b), a + 1)) for b, a, n in zip(hi, self._lo, self.shape, strict=True))
        self._hi = (z, y, x)
        self.mapped = self._digest = None

    def detach(self) -> None:
        """Forget the store and the mapping, as after construction."""
        self.store, self.mapped, self._digest, self.direct = None, None, None, False

    @property
    def extent(self) -> tuple[Shape, Shape]:
        """Start and shape of the box that is cached."""
        z, y, x = (b - a for a, b in zip(self._lo, self._hi, strict=True))
        return self._lo, (z, y, x)

    @property
    def item_bytes(self) -> int:
        """Bytes of a voxel."""
        return max(1, self.depth) * self.dtype.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes of the voxels of the box that is cached."""
        return math.prod(self.extent[1]) * self.item_bytes

    @property
    def layout(self) -> Layout:
        """Layout of the cached box in a mapping."""
        _, shape = self.extent
        gz, gy, gx = (-(-b // c) - a // c for a, b, c in zip(self._lo, self._hi, self.chunks, strict=True))
        return Layout(shape, (gz, gy, gx), self.item_bytes)

    @property
    def _first_chunk(self) -> Shape:
        """Index of the chunk that holds the first voxel of the cached box."""
        z, y, x = (lo // c for lo, c in zip(self._lo, self.chunks, strict=True))
        return z, y, x

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * self.item_bytes

    def chunk_box(self, index: Shape) -> tuple[tuple[int, int, int], Shape]:
        """Return start and shape of the part of a chunk inside the cached box, by its index in `layout`."""
        starts, shape = [], []
        for i, c, lo, hi in zip(index, self.chunks, self._lo, self._hi, strict=True):
            first = (lo // c + i) * c
            starts.append(max(first, lo))
            shape.append(min(first + c, hi) - starts[-1])
        return (starts[0], starts[1], starts[2]), (shape[0], shape[1], shape[2])

    def digest(self) -> str:
        """Return a key of the cached voxels, the same in every process and run that would cache the same."""
        digest = self._digest
        if digest is None:
            source: object = self.identity() if self.identity is not None else (os.getpid(), id(self))
            parts = (FORMAT, source, self.shape, self.chunks, str(self.dtype), self.depth, self._lo, self._hi)
            digest = self._digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
        return digest  # another thread may be closing the store, which clears it

    def read_into(self, start: tuple[int, int, int], out: AnyArray) -> None:
        """Copy the box at ``start`` into ``out``, which has its shape and any strides; the box lies in the array."""
        box = self._view(start, (out.shape[0], out.shape[1], out.shape[2]))
        if box is not None:
            copy_voxels(out, box)
        elif self.direct:
            copy_voxels(out, self.decode(start, (out.shape[0], out.shape[1], out.shape[2])))
        else:
            self._read_chunks(start, out)

    def read(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """Return the voxels of a box inside the array, possibly a view of the cache: never write to them."""
        box = self._view(start, shape)
        if box is not None:
            return box
        out = np.empty((*shape, self.depth) if self.depth else shape, self.dtype)
        self.read_into(start, out)
        return out

    def _view(self, start: tuple[int, int, int], shape: Shape) -> AnyArray | None:
        """Return the mapped voxels of a box, after filling missing chunks; None if they are not mapped."""
        mapped = self.attached()
        if mapped is None:
            return None
        # Scalars instead of arrays: this runs once per array and sample.
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
        view: AnyArray = voxels.view(self.dtype)[..., 0]
        return view

    @property
    def is_cached(self) -> bool:
        """True if the voxels have a mapping, so that every read after the first is a copy."""
        mapped = self.attached()
        return mapped is not None and not mapped.full

    @property
    def is_complete(self) -> bool:
        """True if all voxels are in the mapping, so that no read decodes."""
        mapped = self.attached()
        return mapped is not None and mapped.complete and not mapped.full

    def missing(self, start: tuple[int, int, int], shape: Shape) -> list[Shape] | None:
        """Return the chunks of a box that must be filled before reading it is a copy; None if they are not cached.

        Indices count from the array's first voxel in all cache modes, since the mode may change before they are filled.
        """
        mapped = self.attached()
        if mapped is not None:
            if mapped.full:
                return None
            a, b, c = self._first_chunk
            return [] if mapped.complete else [(z + a, y + b, x + c) for z, y, x in self._missing(mapped, start, shape)]
        if self.direct or self.cache.budget < _MIN_CACHED_CHUNKS * self.chunk_bytes:
            return None
        return [index for index in self._indices(start, shape) if (self.key, index) not in self.cache]

    def _missing(self, mapped: Mapped, start: tuple[int, int, int], shape: Shape) -> list[Shape]:
        """Return the chunks of a box that are not ready, by their index in the mapping."""
        return self.chunks_not_in(mapped.ready, start, shape)

    def chunks_not_in(
        self, ready: npt.NDArray[np.bool_], start: tuple[int, int, int], shape: Shape
    ) -> list[tuple[int, int, int]]:
        """Return the chunks of a box that are False in ``ready`` (bool, `Layout.grid`)."""
        # The grid begins at the chunk of the first cached voxel.
        spans = [
            slice(max(0, a // c - lo // c), max(0, -(-(a + n) // c) - lo // c))
            for a, n, c, lo in zip(start, shape, self.chunks, self._lo, strict=True)
        ]
        of_box = ready[tuple(spans)]
        if of_box.all():
            return []
        z, y, x = (span.start for span in spans)
        return [(i + z, j + y, k + x) for i, j, k in np.argwhere(~of_box).tolist()]

    def fill(self, index: Shape) -> None:
        """Decode and cache a chunk returned by `missing`."""
        mapped = self.attached()
        if mapped is not None:
            z, y, x = (i - first for i, first in zip(index, self._first_chunk, strict=True))
            self._fill(mapped, (z, y, x))
        elif not self.direct:
            self._cached(index)

    def _fill(self, mapped: Mapped, index: Shape) -> bool:
        """Decode a chunk into the mapping, unless another thread or process does; return False if the disk is full."""
        if mapped.full:
            return bool(mapped.ready[index])
        once, key = mapped.once, (mapped.key, index)
        if once.begin(key, lambda: True if mapped.ready[index] or mapped.full else None):
            return bool(mapped.ready[index])
        try:
            start, shape = self.chunk_box(index)
            offset = [a - lo for a, lo in zip(start, self._lo, strict=True)]
            # The stamp is taken before the voxels: a write in between makes the chunk stale, and never wrong.
            stamp = self.stamp(start, shape) if self.stamp is not None else 1
            decoded: list[AnyArray] = []

            def decode() -> AnyArray:
                decoded.append(np.asarray(self.decode(start, shape), self.dtype))
                return decoded[0]

            is_filled = mapped.fill(index, offset, shape, stamp, decode)
            if is_filled and not decoded and self.check is not None and not self.depth:
                place = tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))
                self.check(start, mapped.voxels[place].view(self.dtype)[..., 0])
            return is_filled
        finally:
            once.end(key)

    def attached(self) -> Mapped | None:
        """Return the mapping; None without one."""
        mapped, store = self.mapped, self.store  # copies, since another thread may be closing the store
        if mapped is None and store is not None:
            mapped = store.attach(self)
        return mapped

    def _read_chunks(self, start: tuple[int, int, int], out: AnyArray) -> None:
        """Assemble a box from single chunks of the chunk cache."""
        # For each axis and chunk: its index, the part of the chunk to copy, and where that part lies in the box.
        along = []
        cells = touched_cells(start, out.shape[:3], self.chunks)
        for first, count, size, indices in zip(start, out.shape[:3], self.chunks, cells, strict=True):
            parts = []
            for i in indices:
                lo, hi = max(first, i * size), min(first + count, (i + 1) * size)
                parts.append((i, slice(lo - i * size, hi - i * size), slice(lo - first, hi - first)))
            along.append(parts)
        for z, y, x in itertools.product(*along):
            copy_voxels(out[z[2], y[2], x[2]], self._cached((z[0], y[0], x[0]))[z[1], y[1], x[1]])

    def _indices(self, start: tuple[int, int, int], shape: Sequence[int]) -> Iterator[Shape]:
        """Return the indices of the chunks that a box touches."""
        return itertools.product(*touched_cells(start, shape[:3], self.chunks))  # type: ignore[return-value]

    def _cached(self, index: Shape) -> AnyArray:
        """Return a chunk from the chunk cache."""
        return self.cache.get((self.key, index), partial(self._decode, index))

    def _decode(self, index: Shape) -> AnyArray:
        i, j, k = (i * c for i, c in zip(index, self.chunks, strict=True))
        z, y, x = (min(c, n - o) for c, n, o in zip(self.chunks, self.shape, (i, j, k), strict=True))
        return self.decode((i, j, k), (z, y, x))
