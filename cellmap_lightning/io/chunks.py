"""Reads, checks and decodes the chunks of an array; no other module does."""

import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import zarr
from zarr.core.sync import sync

from cellmap_lightning.errors import (
    CellMapError,
    CellMapKeyError,
    CellMapValueError,
    ChunkError,
    EmptyChunkError,
    MissingExtraError,
)
from cellmap_lightning.geometry.lattice import AXES, Box, Shape, to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.bounded import bounded, decode_bounded
from cellmap_lightning.io.integrity import EmptyError, SizeError, check_file, problem_of
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.openable import READERS as READERS
from cellmap_lightning.io.openable import Reader as Reader
from cellmap_lightning.io.openable import check_openable
from cellmap_lightning.io.plain_chunks import PlainChunks
from cellmap_lightning.io.retrying import (
    DEFAULT_RETRY,
    ObjectError,
    RetryingStore,
    RetryPolicy,
    described,
    is_forbidden,
)
from cellmap_lightning.io.stamps import file_stamp, stamped_size
from cellmap_lightning.io.store import Remote, identity_of
from cellmap_lightning.io.stores import open_store

#: Whether a chunk whose file has 0 bytes is an error, or counts as missing and holds the fill value.
Empty = Literal["error", "missing"]

#: The process in which TensorStore was first used: its threads do not survive a fork.
_tensorstore_pid: int | None = None


def check_reader(name: Any) -> Reader:
    """The reader of that name, if it is there.

    Raises:
        CellMapKeyError: there is none of that name.
        MissingExtraError: TensorStore is not installed.
    """
    if name not in READERS:
        raise CellMapKeyError(f"a reader is one of {', '.join(READERS)}, got {name!r}")
    if name == "tensorstore":
        try:
            import tensorstore  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                'reader=tensorstore needs TensorStore: pip install "cellmap-lightning[fast]"'
            ) from None
    found: Reader = name
    return found


class ChunkReader:
    """Reads boxes of one stored array, in the order z, y, x.

    The array is opened at the first read, once per process: a reader that was pickled or forked opens it anew. Any
    number of threads may read at a time.

    Args:
        level: the array.
        label: what error messages call it, such as ``crop12/mito``.
        reader: see `Reader`.
        retry_policy: how long an object is tried for.
        empty: see `Empty`.

    Raises:
        MetadataError: the reader cannot open the array, or not decode its chunks.
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
        check_openable(info, reader)
        self.level = level
        self.label = label
        self.reader: Reader = reader
        self.retry_policy = retry_policy
        self.empty: Empty = empty
        self.shape: Shape = level.zyx(info.shape)
        self.chunks: Shape = level.zyx(info.chunks)
        # Booleans are read as the 0 and 1 that they stand for.
        self.dtype: np.dtype[Any] = np.dtype(np.uint8) if info.dtype == np.bool_ else info.dtype
        # With the process, and the stamp of the archive that it is in.
        self._opened: tuple[tuple[int, bytes], Any] | None = None
        self._plain_chunks: tuple[Any, PlainChunks | None] | None = None
        # The store and the array as zarr-python reads them beside TensorStore, each with the process.
        self._beside: tuple[int, RetryingStore] | None = None
        self._beside_array: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "level": self.level, "label": self.label, "reader": self.reader, "retry_policy": self.retry_policy,
            "empty": self.empty,
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _open(self) -> Any:
        # Two threads may both open it at the same time: the one that is kept is as good as the other, and a lock held
        # while a fork happens would stay locked in the child. Process and array are one value, so that no thread sees
        # the array of one process with the number of another.
        opened, now = self._opened, (os.getpid(), self._archive_stamp())
        if opened is None or opened[0] != now:
            opened = now, self._tensorstore() if self.reader == "tensorstore" else self._zarr()
            self._opened = opened
        return opened[1]

    def _archive_stamp(self) -> bytes:
        path = self.level.path
        return path.archive_stamp() if isinstance(path, Remote) else b""

    def _plain(self, array: "zarr.Array[Any]") -> PlainChunks | None:
        """The array's chunks as files, where they are that."""
        found = self._plain_chunks
        if found is None or found[0] is not array:
            store = array.store
            inner = store._store if isinstance(store, RetryingStore) else store
            found = self._plain_chunks = array, PlainChunks.of(array, inner)
        return found[1]

    def _store(self) -> RetryingStore:
        info = self.level.array
        return RetryingStore(
            open_store(info.path, info.encoded.most_stored), info.encoded, self.retry_policy, str(info.path),
            info.metadata.name, self.empty,
        )  # fmt: skip

    def _zarr(self, store: RetryingStore | None = None) -> "zarr.Array[Any]":
        info = self.level.array
        zarr_format: Any = 3 if info.zarr_format == 3 else 2
        return bounded(zarr.open_array(store or self._store(), mode="r", zarr_format=zarr_format), info.encoded)

    def _tensorstore(self) -> Any:
        global _tensorstore_pid
        import tensorstore

        if _tensorstore_pid not in (None, os.getpid()):
            raise ChunkError(
                f"{self.label or self.level.path}: TensorStore was used in the process that this one was forked from, "
                "and does not work in both; start worker processes with multiprocessing_context='forkserver' or "
                "'spawn', or use reader='zarr'"
            )
        _tensorstore_pid = os.getpid()
        info = self.level.array
        driver = "zarr3" if info.zarr_format == 3 else "zarr"
        spec = {"driver": driver, "kvstore": self._kvstore()}
        return tensorstore.open(spec, open=True, read=True).result()

    def _kvstore(self) -> dict[str, Any]:
        """Where TensorStore reads, in its own words.

        Raises:
            CellMapValueError: a store, or an option of it, that it is not told of here.
        """
        path = self.level.array.path
        if not isinstance(path, Remote):
            return {"driver": "file", "path": str(path)}
        options = json.loads(path.options)
        head = path.url.partition("://")[2]
        bucket, _, inside = head.partition("/")
        if path.protocol in ("http", "https") and not options:
            return {"driver": "http", "base_url": path.url}
        if path.protocol in ("gs", "gcs") and not options:
            return {"driver": "gcs", "bucket": bucket, "path": inside}
        if path.protocol in ("s3", "s3a") and set(options) <= {"anon", "profile", "endpoint_url"}:
            found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": inside}
            if options.get("endpoint_url"):
                found |= {"endpoint": options["endpoint_url"], "aws_region": "us-east-1"}
            if options.get("profile"):
                found["aws_credentials"] = {"type": "profile", "profile": options["profile"]}
            elif options.get("anon") or path.is_open:
                found["aws_credentials"] = {"type": "anonymous"}
            return found
        raise CellMapValueError(
            f"{path}: reader='tensorstore' reads s3:// (with anon, profile and endpoint_url), gs:// and http:// "
            f"without options; storage_options has {sorted(options)}: use reader='zarr'"
        )

    def begin(self, start: tuple[int, int, int], shape: Shape) -> Any:
        """Begin to read a box, where the library reads ahead: what `read` can be given later, or None."""
        if self.reader != "tensorstore":
            return None
        try:
            if self.local:
                self._check_files(start, shape)
            return self._open()[self._box(start, shape)].read()
        except CellMapError:
            raise
        except Exception:  # `read` meets it again, and says where
            return None

    def _box(self, start: tuple[int, int, int], shape: Shape) -> tuple[slice | int, ...]:
        box: list[slice | int] = [0] * self.level.ndim
        for axis, first, count in zip(self.level.axes, start, shape, strict=True):
            box[axis] = slice(first, first + count)
        return tuple(box)

    def read(self, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
        """The decoded voxels of a box inside the array, in native byte order.

        Args:
            start: first voxel.
            shape: voxels.
            begun: what `begin` gave for the same box.

        Raises:
            EmptyChunkError: the file of a chunk has 0 bytes, where that is an error.
            ChunkError: the store or the codec failed; the message names the array and the box.
        """
        try:
            return self._read(start, shape, begun)
        except CellMapError:
            raise
        except Exception as e:  # codecs and stores raise whatever they like
            if not isinstance(e, ObjectError):
                start, shape, e = self._culprit(start, shape, e)
            if isinstance(e, ObjectError):  # which also says which object, so that nothing is read again to find it
                start, shape = self._part(e.key, start, shape)
            said = str(e) if isinstance(e, ObjectError) else described(e)
            note = self._cut_at_the_edge(start, shape, e)
            if isinstance(self.level.path, Remote):
                said = self.level.path.hide(said)
            kind = EmptyChunkError if isinstance(e, ObjectError) and isinstance(e.cause, EmptyError) else ChunkError
            raise kind(f"{self.where(start, shape)} could not be read: {said}{note}; {self.box(start, shape)}") from e

    def where(self, start: tuple[int, int, int], shape: Shape) -> str:
        """A box, for messages: who asks for it, the array, and its voxels."""
        voxels = ", ".join(f"{a}[{o}:{o + n}]" for a, o, n in zip(AXES, start, shape, strict=True))
        name = f"{self.label}: " if self.label else ""
        return f"{name}{self.level.path}: voxels {voxels}"

    def box(self, start: tuple[int, int, int], shape: Shape) -> str:
        """Level and physical box of some voxels, for messages."""
        low = np.add(self.level.lattice.box.lower, np.multiply(start, self.level.scale))
        high = low + np.multiply(shape, self.level.scale)
        box = Box(to_vector(low), to_vector(high))
        return f"level {self.level.name}, {box}"

    def _read(self, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
        level = self.level
        if self.reader == "tensorstore":
            stored = self._by_tensorstore(start, shape, begun)
        else:
            array, box = self._open(), self._box(start, shape)
            plain = self._plain(array)
            chunk = plain.read(box, level.array.encoded) if plain is not None else None
            stored = chunk if chunk is not None else np.asarray(array[box])
        kept = sorted(level.axes)
        out = stored.transpose([kept.index(a) for a in level.axes])
        return np.ascontiguousarray(out, dtype=self.dtype)

    def _by_tensorstore(self, start: tuple[int, int, int], shape: Shape, begun: Any) -> AnyArray:
        """The stored voxels of a box, as TensorStore reads them.

        Chunks that are empty, or refused by a store that does so for missing ones, are errors for TensorStore. Where
        they count as missing, zarr-python reads the box.
        """
        box = self._box(start, shape)
        if self.local and begun is None:  # otherwise `begin` has checked them
            self._check_files(start, shape)
        try:
            ahead = begun if begun is not None else self._open()[box].read()
            return np.asarray(ahead.result(timeout=self.retry_policy.timeout))
        except CellMapError:
            raise
        except Exception as e:  # codecs and stores raise whatever they like
            refused = not self.local and (is_forbidden(e) or "PERMISSION_DENIED" in str(e))
            empty = None if refused or isinstance(e, TimeoutError) else self._first_empty(start, shape)
            if empty is not None and self.empty == "error":
                raise ObjectError(self._key(empty), 1, 0.0, EmptyError()) from e
            if not refused and empty is None:
                raise
        array, pid = self._beside_array, os.getpid()
        if array is None or array[0] != pid:
            array = self._beside_array = pid, self._zarr(self._guard())
        return np.asarray(array[1][box])

    def _check_files(self, start: tuple[int, int, int], shape: Shape) -> None:
        """Refuse chunk files that TensorStore would wait for, read without end, or take for missing.

        Raises:
            ObjectError: there is one.
        """
        info = self.level.array
        most = info.encoded.most_stored
        for index in self.files(start, shape):
            wrong = problem_of(info.file(index), most)
            if wrong is not None:
                raise ObjectError(self._key(index), 1, 0.0, wrong)

    def _first_empty(self, start: tuple[int, int, int], shape: Shape) -> tuple[int, ...] | None:
        """The first chunk or shard of a box whose file has 0 bytes."""
        try:
            return next((index for index in self.files(start, shape) if self.is_empty(index)), None)
        except ObjectError:
            return None

    def is_empty(self, index: tuple[int, ...]) -> bool:
        """Return whether the file of a chunk or shard has 0 bytes.

        Raises:
            ObjectError: a store elsewhere does not answer.
        """
        if self.local:
            return _is_empty(self.level.array.file(index))
        content = sync(self._guard().content(self._key(index)))
        return content is not None and not len(content)

    def _cut_at_the_edge(self, start: tuple[int, int, int], shape: Shape, error: Exception) -> str:
        """A note for the error of a chunk at the array's edge that has the size of its part inside the array."""
        info = self.level.array
        index = next(iter(self.files(start, shape)))
        inside = [min(f, n - i * f) for f, n, i in zip(info.files, info.shape, index, strict=True)]
        if info.encoded.shard is not None or tuple(inside) == info.files:
            return ""
        nbytes = self._held_bytes(index, error)
        if nbytes is None or nbytes + self._whole() - info.encoded.nbytes != math.prod(inside) * info.dtype.itemsize:
            return ""
        return (
            f": this is the size of the part inside the array ({' x '.join(map(str, inside))} of "
            f"{' x '.join(map(str, info.files))} voxels), so it was written cut at the edge; chunks of Zarr are whole "
            "there too, and the array has to be written again"
        )

    def _held_bytes(self, index: tuple[int, ...], error: Exception) -> int | None:
        """Bytes that a chunk decodes to which could not be read; None where that is not known."""
        if isinstance(error, ObjectError):
            return error.cause.nbytes if isinstance(error.cause, SizeError) else None
        if isinstance(error, TimeoutError):
            return None
        try:
            content = sync(self._guard().content(self._key(index)))
        except ObjectError:
            return None
        if content is None:
            return None
        stored, encoded = memoryview(content.to_bytes()), self.level.array.encoded
        try:
            check_file(stored, encoded)
            if encoded.codec and encoded.exact and not encoded.opaque:
                decode_bounded(stored[encoded.head : len(stored) - encoded.tail], encoded)
        except SizeError as e:
            return e.nbytes
        except Exception:  # codecs raise whatever they like
            return None
        return None

    def _whole(self) -> int:
        """Bytes of the voxels of a whole chunk."""
        return math.prod(self.level.array.files) * self.level.array.dtype.itemsize

    def _culprit(
        self, start: tuple[int, int, int], shape: Shape, error: Exception
    ) -> tuple[tuple[int, int, int], Shape, Exception]:
        """The first chunk of a box that cannot be read, and why."""
        grid = [range(a // c, -(-(a + n) // c)) for a, n, c in zip(start, shape, self.chunks, strict=True)]
        for index in itertools.product(*grid):
            lo = [max(a, i * c) for a, i, c in zip(start, index, self.chunks, strict=True)]
            hi = [min(a + n, (i + 1) * c) for a, n, i, c in zip(start, shape, index, self.chunks, strict=True)]
            part = (lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2])
            try:
                self._read(*part)
            except Exception as e:  # as above
                return *part, e
        return start, shape, error

    def _part(self, key: str, start: tuple[int, int, int], shape: Shape) -> tuple[tuple[int, int, int], Shape]:
        """What a box has in common with an object of the store; all of it where that is no chunk."""
        index = next((index for index in self.files(start, shape) if key == self._key(index)), None)
        return self.common(index, start, shape) if index is not None else (start, shape)

    def common(
        self, index: tuple[int, ...], start: tuple[int, int, int], shape: Shape
    ) -> tuple[tuple[int, int, int], Shape]:
        """What a box has in common with what is stored in one file: start and shape."""
        size, file = self.level.zyx(self.level.array.files), self.level.zyx(index)
        lo = [max(a, i * c) for a, i, c in zip(start, file, size, strict=True)]
        hi = [min(a + n, (i + 1) * c) for a, n, i, c in zip(start, shape, file, size, strict=True)]
        return (lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2])

    def _key(self, index: tuple[int, ...]) -> str:
        """What a chunk or shard is called in the array's store."""
        info = self.level.array
        return f"{info.prefix}{info.separator.join(map(str, index))}"

    def files(self, start: tuple[int, int, int], shape: Shape) -> Iterator[tuple[int, ...]]:
        """Indices, along the stored axes, of the chunks or shards that hold part of a box."""
        spans = [range(1)] * self.level.ndim
        for axis, first, count in zip(self.level.axes, start, shape, strict=True):
            size = self.level.array.files[axis]
            spans[axis] = range(first // size, -(-(first + count) // size))
        return itertools.product(*spans)

    def missed(
        self, start: tuple[int, int, int], shape: Shape, voxels: AnyArray | None = None
    ) -> list[tuple[int, ...]]:
        """Return which of the chunks or shards that hold part of a box were not stored when it was read just now.

        Args:
            start: first voxel.
            shape: voxels.
            voxels: what was read; a chunk with two different values in it is stored, and not asked for.
        """
        if self.local:
            return [index for index in self.files(start, shape) if not self.stores(index)]
        if self.reader == "tensorstore":  # which does not say what it missed
            return [index for index in self._uniform(start, shape, voxels) if not self.stores(index)]
        names = self._guard().missed
        return [index for index in self.files(start, shape) if self._key(index) in names]

    def _uniform(self, start: tuple[int, int, int], shape: Shape, voxels: AnyArray | None) -> Iterator[tuple[int, ...]]:
        """Indices of the chunks or shards whose part of a box has one value, so that it may be the fill value."""
        for index in self.files(start, shape):
            if voxels is not None:
                low, size = self.common(index, start, shape)
                part = voxels[tuple(slice(a - o, a - o + n) for a, o, n in zip(low, start, size, strict=True))]
                first = part.flat[0]
                if (part != first).any() and first == first:  # NaN, as a fill value may be, differs from itself
                    continue
            yield index

    def stores(self, index: tuple[int, ...]) -> bool:
        """Return whether a chunk or shard is stored; where the store is not local, it is asked.

        A file of 0 bytes stores nothing.

        Raises:
            ChunkError: it could not be asked.
        """
        if self.local:
            # Thousands of them, and a Path costs more than the call.
            file = self.level.array.file(index)
            return os.path.lexists(file) and not _is_empty(file)
        try:
            answer: bool = sync(self._guard().stores(self._key(index)))
        except ObjectError as e:
            name = f"{self.label}: " if self.label else ""
            text = f"{name}{self.level.path}: the store does not answer whether a chunk is stored: {e}"
            raise ChunkError(self.level.path.hide(text) if isinstance(self.level.path, Remote) else text) from e
        return answer

    def _guard(self) -> RetryingStore:
        """The store as zarr-python reads it, whatever decodes."""
        if self.reader == "zarr":
            store = self._open().store
            if isinstance(store, RetryingStore):
                return store
        beside, pid = self._beside, os.getpid()
        if beside is None or beside[0] != pid:
            beside = self._beside = pid, self._store()
        return beside[1]

    @property
    def local(self) -> bool:
        """Whether chunks are files of this machine, or of a file system that it sees."""
        return not isinstance(self.level.path, Remote)

    def identity(self) -> tuple[object, ...]:
        """See `array_identity`."""
        return array_identity(self.level)

    def stored(self) -> dict[tuple[int, int, int], bytes]:
        """The files of chunks or shards that exist and are not empty, ``{place among them (z, y, x): stamp}``.

        Whatever no file holds has the array's fill value. Of a store elsewhere, which is not asked, all may exist; in
        an archive, each has the stamp of the archive.
        """
        info, root = self.level.array, str(self.level.array.path)
        if not self.local:
            grid = [range(-(-n // f)) for n, f in zip(info.shape, info.files, strict=True)]
            return dict.fromkeys(map(self.level.zyx, itertools.product(*grid)), self._archive_stamp())
        found = {}
        deepest = (info.prefix + "/" * (len(info.shape) - 1)).count("/") if info.separator == "/" else 0
        for folder, folders, names in os.walk(root, followlinks=True):
            inside = folder[len(root) + 1 :]
            depth = inside.count("/") + 1 if inside else 0  # bounded, since links may lead round in a circle
            folders[:] = [name for name in folders if name.isdigit() or name == "c"] if depth < deepest else []
            for name in names:
                key = f"{inside}/{name}" if inside else name
                index = key.removeprefix(info.prefix).split(info.separator)
                if key.startswith(info.prefix) and len(index) == len(info.shape) and all(map(str.isdigit, index)):
                    stamp = file_stamp(f"{folder}/{name}")
                    if stamped_size(stamp) == 0:
                        continue
                    z, y, x = self.level.zyx([int(part) for part in index])
                    found[z, y, x] = stamp
        return found

    def absent(self, start: tuple[int, int, int], shape: Shape, most: int = 2000) -> tuple[int, int]:
        """How many files that would hold part of a box were never written or are empty, and of how many.

        What they would hold is read as the array's fill value. Nothing is decoded. Of more than ``most`` files, as many
        are looked at, evenly spread. A store elsewhere is not asked: of none.
        """
        info = self.level.array
        if not self.local:
            return 0, 0
        spans = [range(1)] * self.level.ndim
        for axis, first, count in zip(self.level.axes, start, shape, strict=True):
            size = info.files[axis]
            spans[axis] = range(first // size, -(-(first + count) // size))
        lengths = [len(span) for span in spans]
        total = math.prod(lengths)
        numbers = range(total) if total <= most else np.linspace(0, total - 1, most).round().astype(int).tolist()
        places = np.stack(np.unravel_index(numbers, lengths), axis=1) + [span.start for span in spans]
        files = [info.file(place) for place in places.tolist()]
        return sum(not os.path.exists(file) or _is_empty(file) for file in files), len(files)  # noqa: PTH110  as below

    def stamp(self, start: tuple[int, int, int], shape: Shape) -> int:
        """Return a number (64 bits, not 0) that changes when a file that holds part of the box is written or removed.

        In an archive on this machine it changes with the archive. Of a store elsewhere it is always the same: what was
        read there once is taken to stay, as long as the metadata of the array and its version do; see `identity`.
        """
        info = self.level.array
        if self.local:
            parts = [file_stamp(info.file(index)) for index in self.files(start, shape)]
        else:  # to ask for each chunk would cost a request
            archive = self._archive_stamp()
            if not archive:
                return 1
            parts = [archive]
        found = hashlib.blake2b(b"".join(parts), digest_size=8)
        return int.from_bytes(found.digest(), "little") or 1


def array_identity(level: Level) -> tuple[object, ...]:
    """Return what tells an array from every other one.

    This is where it is, with all links resolved, what its metadata says, and for an array elsewhere the version that
    the server gives of its metadata.
    """
    info = level.array
    # Asked for where there is one alone: the cached answer would be one more object for each of thousands of arrays.
    version = info.version if isinstance(info.path, Remote) else ""
    return identity_of(info.path), info.checksum, version, level.axes


def _is_empty(file: str) -> bool:
    """Whether a path leads to a file of 0 bytes."""
    try:
        status = os.stat(file)  # noqa: PTH116  as above
    except OSError:
        return False
    return status.st_size == 0 and stat.S_ISREG(status.st_mode)


def chunk_shape(readers: list[ChunkReader]) -> Shape:
    """Voxels that are decoded at a time from arrays of one shape: whole chunks of all of them, and not too few."""
    chunks = np.max([reader.chunks for reader in readers], axis=0)
    # Each call of a reader has a price of its own, which tiny chunks would pay thousands of times.
    chunks = chunks * -(-LEAST_CHUNK // np.minimum(chunks, LEAST_CHUNK))
    z, y, x = np.minimum(chunks, readers[0].shape).tolist()
    return z, y, x


#: Voxels along an axis that are decoded together at least.
LEAST_CHUNK = 64
