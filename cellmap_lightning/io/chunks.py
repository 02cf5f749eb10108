"""Reads of one Zarr array, with checks of its chunks; `plain_chunks`, zarr-python (`bounded`) or TensorStore decode."""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from cellmap_lightning.errors import (
    CellMapError,
    CellMapKeyError,
    ChunkError,
    EmptyChunkError,
    missing_extra,
)
from cellmap_lightning.geometry.grids import cell_parts
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.array_reader import ArrayReader, Empty
from cellmap_lightning.io.bounded import bounded, decode_bounded
from cellmap_lightning.io.chunk_files import is_empty_file
from cellmap_lightning.io.integrity import EmptyError, SizeError, check_file, problem_of
from cellmap_lightning.io.ngff import ArrayInfo, Level
from cellmap_lightning.io.openable import READERS, Reader, check_openable
from cellmap_lightning.io.plain_chunks import PlainChunks
from cellmap_lightning.io.retrying import (
    DEFAULT_RETRY,
    ObjectError,
    RetryingStore,
    RetryPolicy,
    described,
    is_forbidden,
)
from cellmap_lightning.io.stores import open_store
from cellmap_lightning.io.tensorstore_driver import open_tensorstore
from cellmap_lightning.validation import one_of

__all__ = ["ChunkReader", "Reader", "check_reader"]


def check_reader(name: Any) -> Reader:
    """Return the reader of that name if it is installed.

    Raises:
        CellMapKeyError: an unknown name.
        MissingExtraError: TensorStore is not installed.
    """
    reader: Reader = one_of("reader", name, READERS, CellMapKeyError)
    if reader == "tensorstore":
        try:
            import tensorstore  # noqa: F401
        except ImportError:
            raise missing_extra("fast", "reader=tensorstore needs TensorStore") from None
    return reader


class ChunkReader(ArrayReader):
    """A reader of boxes of one Zarr array, in the order z, y, x; thread-safe.

    The array is opened at the first read, once per process: a pickled or forked reader opens it again.

    Args:
        level: the array.
        label: name of the array in error messages, such as ``crop12/mito``.
        reader: see `Reader`.
        retry_policy: retries and timeouts of each object.
        empty: see `Empty`.

    Raises:
        MetadataError: the reader cannot open the array, or cannot decode its chunks.

    Example:
        >>> reader = ChunkReader(read_multiscale("jrc_a.zarr/recon-1/em/fibsem-uint8").finest)
        >>> reader.read((0, 0, 0), (64, 64, 64)).shape
        (64, 64, 64)
    """

    def __init__(
        self,
        level: Level,
        label: str = "",
        reader: Reader = "zarr",
        retry_policy: RetryPolicy = DEFAULT_RETRY,
        empty: Empty = "error",
    ) -> None:
        info = level.array
        assert isinstance(info, ArrayInfo)
        check_openable(info, reader)
        super().__init__(level, label)
        self.info = info
        self.reader: Reader = reader
        self.retry_policy = retry_policy
        self.empty: Empty = empty
        # The open array, with the process and the stamp of its archive, for which alone it is valid.
        self._opened: tuple[tuple[int, bytes], Any] | None = None
        self._plain_chunks: tuple[Any, PlainChunks | None] | None = None
        # Store and array of zarr-python that are used in addition to TensorStore, each with the process.
        self._fallback_store: tuple[int, RetryingStore] | None = None
        self._fallback_array: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "level": self.level, "label": self.label, "reader": self.reader, "retry_policy": self.retry_policy,
            "empty": self.empty,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _open(self) -> Any:
        # No lock, since one that is held during a fork would stay locked in the child. Two threads may both open the
        # array, with equal results. Key and array are assigned as one value, so that they always belong together.
        opened, key = self._opened, (os.getpid(), self.archive_stamp)
        if opened is None or opened[0] != key:
            use_tensorstore = self.reader == "tensorstore"
            array = open_tensorstore(self.info, self.label or str(self.level.path)) if use_tensorstore else self._zarr()
            opened = self._opened = key, array
        return opened[1]

    def _plain(self, array: "zarr.Array[Any]") -> PlainChunks | None:
        """Return the fast reader of the array's chunk files; None where only zarr-python can read them."""
        plain = self._plain_chunks
        if plain is None or plain[0] is not array:
            store = array.store
            inner = store.wrapped if isinstance(store, RetryingStore) else store
            plain = self._plain_chunks = array, PlainChunks.of(array, inner)
        return plain[1]

    def _store(self) -> RetryingStore:
        info = self.info
        return RetryingStore(
            open_store(info.path, info.encoded.most_stored), info.encoded, self.retry_policy, str(info.path),
            info.metadata.name, self.empty,
        )  # fmt: skip

    def _zarr(self, store: RetryingStore | None = None) -> "zarr.Array[Any]":
        info = self.info
        zarr_format: Any = 3 if info.zarr_format == 3 else 2
        return bounded(zarr.open_array(store or self._store(), mode="r", zarr_format=zarr_format), info.encoded)

    def begin(self, start: tuple[int, int, int], shape: Shape) -> Any:
        """Start to read a box in the background; return a handle for `read`, or None where the reader cannot do so."""
        if self.reader != "tensorstore":
            return None
        try:
            if self.local:
                self._check_files(start, shape)
            return self._open()[self._box(start, shape)].read()
        except CellMapError:
            raise
        except Exception:  # raised again by `read`, with the place
            return None

    def read(self, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
        """Return the decoded voxels of a box inside the array, in native byte order.

        Args:
            start: first voxel.
            shape: voxels.
            begun: the handle that `begin` returned for the same box.

        Raises:
            EmptyChunkError: a chunk file has 0 bytes, and ``empty`` is ``error``.
            ChunkError: the store or the codec failed; the message names the array and the box.
        """
        try:
            return self._read(start, shape, begun)
        except CellMapError:
            raise
        except Exception as e:  # codecs and stores raise any type
            if not isinstance(e, ObjectError):
                start, shape, e = self._culprit(start, shape, e)
            if isinstance(e, ObjectError):  # it names the object, so nothing is read again to find the chunk
                start, shape = self._part(e.key, start, shape)
            detail = self._hide(str(e) if isinstance(e, ObjectError) else described(e))
            note = self._cut_at_the_edge(start, shape, e)
            error = EmptyChunkError if isinstance(e, ObjectError) and isinstance(e.cause, EmptyError) else ChunkError
            raise error(
                f"{self.where(start, shape)} could not be read: {detail}{note}; {self.box(start, shape)}"
            ) from e

    def _read(self, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
        if self.reader == "tensorstore":
            stored = self._by_tensorstore(start, shape, begun)
        else:
            array, box = self._open(), self._box(start, shape)
            plain = self._plain(array)
            chunk = plain.read(box, self.info.encoded) if plain is not None else None
            stored = chunk if chunk is not None else np.asarray(array[box])
        return self._in_order(stored)

    def _by_tensorstore(self, start: tuple[int, int, int], shape: Shape, begun: Any) -> AnyArray:
        """Return the stored voxels of a box, read with TensorStore.

        TensorStore raises for empty chunks, and for chunks that a store refuses because they are missing. Where these
        count as missing, zarr-python reads the box.
        """
        box = self._box(start, shape)
        if self.local and begun is None:  # otherwise `begin` has checked them
            self._check_files(start, shape)
        try:
            handle = begun if begun is not None else self._open()[box].read()
            return np.asarray(handle.result(timeout=self.retry_policy.timeout))
        except CellMapError:
            raise
        except Exception as e:  # codecs and stores raise any type
            if not self._counts_as_missing(start, shape, e):
                raise
        array, pid = self._fallback_array, os.getpid()
        if array is None or array[0] != pid:
            array = self._fallback_array = pid, self._zarr(self._zarr_store())
        return np.asarray(array[1][box])

    def _counts_as_missing(self, start: tuple[int, int, int], shape: Shape, error: Exception) -> bool:
        """Return whether TensorStore's error for a box may stand for a missing chunk.

        Raises:
            ObjectError: a chunk file has 0 bytes, and ``empty`` is ``error``.
        """
        if not self.local and (is_forbidden(error) or "PERMISSION_DENIED" in str(error)):
            return True
        empty = self._first_empty(start, shape) if not isinstance(error, TimeoutError) else None
        if empty is not None and self.empty == "error":
            raise ObjectError(self.info.key(empty), 1, 0.0, EmptyError()) from error
        return empty is not None

    def _check_files(self, start: tuple[int, int, int], shape: Shape) -> None:
        """Check that TensorStore would not block on a chunk file, read it without end, or take it for missing.

        Raises:
            ObjectError: a file that is not regular, or too large.
        """
        info = self.info
        folder, most = str(info.path), info.encoded.most_stored
        for index in self.files(start, shape):
            problem = problem_of(f"{folder}/{info.key(index)}", most)
            if problem is not None:
                raise ObjectError(info.key(index), 1, 0.0, problem)

    def _first_empty(self, start: tuple[int, int, int], shape: Shape) -> tuple[int, ...] | None:
        """Return the first chunk or shard of a box whose file has 0 bytes."""
        try:
            return next((index for index in self.files(start, shape) if self.is_empty(index)), None)
        except ObjectError:
            return None

    def is_empty(self, index: tuple[int, ...]) -> bool:
        """Return whether the file of a chunk or shard has 0 bytes.

        Raises:
            ObjectError: a remote store does not answer.
        """
        if self.local:
            return is_empty_file(self.info.file(index))
        content = sync(self._zarr_store().content(self.info.key(index)))
        return content is not None and not len(content)

    def _cut_at_the_edge(self, start: tuple[int, int, int], shape: Shape, error: Exception) -> str:
        """Return a note for an error, where a chunk at the array's edge has the size of its part inside the array."""
        info = self.info
        index = next(iter(self.files(start, shape)))
        inside = [min(f, n - i * f) for f, n, i in zip(info.files, info.shape, index, strict=True)]
        if info.encoded.shard is not None or tuple(inside) == info.files:
            return ""
        nbytes = self._decoded_bytes(index, error)
        # `encoded.nbytes` also counts checksums that were added before the compressor.
        checksums = info.encoded.nbytes - math.prod(info.files) * info.dtype.itemsize
        if nbytes is None or nbytes - checksums != math.prod(inside) * info.dtype.itemsize:
            return ""
        return (
            f": this is the size of the part inside the array ({' x '.join(map(str, inside))} of "
            f"{' x '.join(map(str, info.files))} voxels), so it was written cut at the edge; chunks of Zarr are whole "
            "there too, and the array must be written again"
        )

    def _decoded_bytes(self, index: tuple[int, ...], error: Exception) -> int | None:
        """Return the decoded size of a chunk that could not be read; None where it is not known."""
        if isinstance(error, ObjectError):
            return error.cause.nbytes if isinstance(error.cause, SizeError) else None
        if isinstance(error, TimeoutError):
            return None
        try:
            content = sync(self._zarr_store().content(self.info.key(index)))
        except ObjectError:
            return None
        if content is None:
            return None
        stored, encoded = memoryview(content.to_bytes()), self.info.encoded
        try:
            check_file(stored, encoded)
            if encoded.codec and encoded.exact and not encoded.opaque:
                decode_bounded(stored[encoded.head : len(stored) - encoded.tail], encoded)
        except SizeError as e:
            return e.nbytes
        except Exception:  # codecs raise any type
            return None
        return None

    def _culprit(
        self, start: tuple[int, int, int], shape: Shape, error: Exception
    ) -> tuple[tuple[int, int, int], Shape, Exception]:
        """Return start, shape and error of the first chunk of a box that cannot be read, found by reading each."""
        for part in cell_parts(start, shape, self.chunks):
            try:
                self._read(*part)
            except Exception as e:
                return *part, e
        return start, shape, error

    def _part(self, key: str, start: tuple[int, int, int], shape: Shape) -> tuple[tuple[int, int, int], Shape]:
        """Return the part of a box that an object of the store holds; the whole box where that is not a chunk."""
        index = next((index for index in self.files(start, shape) if key == self.info.key(index)), None)
        return self.common(index, start, shape) if index is not None else (start, shape)

    def missing_chunks(
        self, start: tuple[int, int, int], shape: Shape, voxels: AnyArray | None = None
    ) -> list[tuple[int, ...]]:
        """Return the chunks or shards that hold part of a box and were missing when it was read last.

        Args:
            start: first voxel.
            shape: voxels.
            voxels: the voxels that were read; a chunk with two different values exists, and is not requested.
        """
        if self.local:
            return [index for index in self.files(start, shape) if not self.has_chunk(index)]
        if self.reader == "tensorstore":  # does not report missing chunks
            return [index for index in self._uniform(start, shape, voxels) if not self.has_chunk(index)]
        names = self._zarr_store().missed
        return [index for index in self.files(start, shape) if self.info.key(index) in names]

    def _uniform(self, start: tuple[int, int, int], shape: Shape, voxels: AnyArray | None) -> Iterator[tuple[int, ...]]:
        """Yield the chunks or shards whose part of a box has a single value, which may be the fill value."""
        for index in self.files(start, shape):
            if voxels is not None:
                low, size = self.common(index, start, shape)
                part = voxels[tuple(slice(a - o, a - o + n) for a, o, n in zip(low, start, size, strict=True))]
                first = part.flat[0]
                if (part != first).any() and first == first:  # NaN, which may be the fill value, differs from itself
                    continue
            yield index

    def has_chunk(self, index: tuple[int, ...]) -> bool:
        """Return whether a chunk or shard exists and has any bytes; a remote store is asked.

        Raises:
            ChunkError: the store does not answer.
        """
        if self.local:
            file = self.info.file(index)
            return os.path.lexists(file) and not is_empty_file(file)
        try:
            answer: bool = sync(self._zarr_store().stores(self.info.key(index)))
        except ObjectError as e:
            raise ChunkError(
                self._hide(f"{self.name}: the store does not answer whether a chunk is stored: {e}")
            ) from e
        return answer

    def _zarr_store(self) -> RetryingStore:
        """Return the array's store for zarr-python, also where TensorStore decodes."""
        if self.reader == "zarr":
            store = self._open().store
            if isinstance(store, RetryingStore):
                return store
        beside, pid = self._fallback_store, os.getpid()
        if beside is None or beside[0] != pid:
            beside = self._fallback_store = pid, self._store()
        return beside[1]
