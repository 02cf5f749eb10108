"""Reading and writing of local chunk files of Zarr v2, without zarr-python's pipeline, which costs more than the codec.

Format: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html.
"""

import math
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.metadata import ArrayV2Metadata
from zarr.storage import LocalStore

from cellmap_lightning.io.files import open_regular, read_part
from cellmap_lightning.io.integrity import Encoded, check_file
from cellmap_lightning.io.retrying import COUNTS
from cellmap_lightning.io.stores import RegularFileStore
from cellmap_lightning.runtime.location import on_network

_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_numbers = count()


class PlainChunks:
    """The chunks of one local array without filters; `of` returns None for other arrays.

    Args:
        array: the array.
        root: its folder.

    Example:
        >>> array = zarr.open_array("a.zarr/s0", zarr_format=2)
        >>> chunks = PlainChunks.of(array, array.store)
    """

    def __init__(self, array: "zarr.Array[Any]", root: str) -> None:
        metadata: Any = array.metadata
        self.root, self.shape, self.chunks = root, array.shape, array.chunks
        self.separator: str = metadata.dimension_separator
        self.order: Any = metadata.order
        self.codec: Any = metadata.compressor
        self.dtype = np.dtype(metadata.dtype.to_native_dtype())
        self.fill: Any = metadata.fill_value if metadata.fill_value is not None else 0

    @classmethod
    def of(cls, array: "zarr.Array[Any]", store: Any) -> "PlainChunks | None":
        """Return the chunks of an array; None where zarr-python must be used.

        It is needed for arrays with filters or of Zarr v3, and for other stores than local folders: a read from a
        network file system may hang, and zarr-python's asynchronous reads have a timeout.
        """
        metadata: Any = array.metadata
        if (
            type(store) not in (LocalStore, RegularFileStore)
            or array.path
            or not isinstance(metadata, ArrayV2Metadata)
            or metadata.filters
        ):
            return None
        plain = bool(array.shape) and array.dtype.kind in "buif" and store.root.is_dir()
        if not plain or on_network(store.root):
            return None
        return cls(array, str(store.root))

    def _blank(self, plain: np.ndarray[Any, Any]) -> bool:
        """Return whether all voxels of a whole chunk have the fill value."""
        if plain.dtype.kind in "bui" and self.fill == 0 and plain.nbytes % 8 == 0:  # eight bytes at a time
            return not plain.view(np.uint64).any()
        return not (plain != self.fill).any()

    def file(self, index: Sequence[int]) -> str:
        """Return the path of a chunk."""
        return f"{self.root}/{self.separator.join(map(str, index))}"

    def whole(self, box: Sequence[slice | int]) -> tuple[int, ...] | None:
        """Return the index of the chunk whose part inside the array is a box; None for any other box."""
        index = []
        for part, size, n in zip(box, self.chunks, self.shape, strict=True):
            first, stop = (part, part + 1) if isinstance(part, int) else (part.start, part.stop)
            if isinstance(part, int) or first % size or stop != min(first + size, n) or stop <= first:
                return None
            index.append(first // size)
        return tuple(index)

    def read(self, box: Sequence[slice | int], encoded: Encoded) -> np.ndarray[Any, Any] | None:
        """Return the voxels of a whole chunk; None for any other box, a missing chunk, and any error.

        The caller then reads with zarr-python, whose `RetryingStore` retries or raises the error.
        """
        index = self.whole(box)
        if index is None:
            return None
        try:
            handle, size = open_regular(self.file(index), encoded.most_stored)
            try:
                stored = read_part(handle, size)
            finally:
                os.close(handle)
            check_file(memoryview(stored), encoded)
            decoded = memoryview(self.codec.decode(stored) if self.codec is not None else stored)
            if decoded.nbytes != math.prod(self.chunks) * self.dtype.itemsize:
                return None
            voxels = np.frombuffer(decoded, self.dtype)
        except Exception:  # codecs raise any type
            return None
        COUNTS.add("reads")
        inside = tuple(slice(0, part.stop - part.start) for part in box if isinstance(part, slice))
        part = voxels.reshape(self.chunks, order=self.order)[inside]
        # A copy of a part, so that it does not keep the whole chunk in memory.
        return part if part.size == voxels.size else part.copy()

    def write(self, index: Sequence[int], voxels: np.ndarray[Any, Any]) -> None:
        """Write a chunk atomically; a chunk that holds only the fill value has no file.

        Args:
            index: index of the chunk.
            voxels: its part inside the array.
        """
        path = self.file(index)
        if voxels.shape != self.chunks:
            part = voxels
            voxels = np.full(self.chunks, self.fill, self.dtype)
            voxels[tuple(slice(0, n) for n in part.shape)] = part
        plain = np.asarray(voxels, self.dtype, order=self.order)
        plain = plain.reshape(-1, order=self.order)
        if self._blank(plain):
            Path(path).unlink(missing_ok=True)
            return
        encoded = self.codec.encode(plain) if self.codec is not None else plain.tobytes()
        draft = f"{path}.{os.getpid()}-{next(_numbers)}.partial"
        try:
            handle = os.open(draft, _WRITE, 0o666)
        except FileNotFoundError:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(draft, _WRITE, 0o666)
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
                left = memoryview(encoded).cast("B")
                while left:
                    left = left[file.write(left) :]
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
