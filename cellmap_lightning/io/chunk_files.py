"""Files of the chunks of an array: their names, which of them exist, and stamps that show when they change.

Nothing is decoded here. Thousands of files are examined, so `os` functions are used: a `Path` costs more than the call.
"""

import hashlib
import itertools
import math
import os
import stat
from collections.abc import Iterator, Sequence

import numpy as np

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.ngff import ArrayInfo, Level
from cellmap_lightning.io.stamps import file_stamp, stamped_size
from cellmap_lightning.io.store import Remote, identity_of
from cellmap_lightning.io.stored_array import StoredArray


class ChunkFiles:
    """The chunk files of one array. In a sharded array, a file is a shard.

    Args:
        level: the array.

    Example:
        >>> list(ChunkFiles(image.finest).files((0, 0, 0), (64, 64, 64)))
        [(0, 0, 0)]
    """

    def __init__(self, level: Level) -> None:
        self.level = level

    @property
    def local(self) -> bool:
        """True if chunks are files of this machine, or of a file system mounted on it."""
        return not isinstance(self.level.path, Remote)

    @property
    def archive_stamp(self) -> bytes:
        """Stamp of the archive that holds the array; empty for any other array."""
        path = self.level.path
        return path.archive_stamp() if isinstance(path, Remote) else b""

    def identity(self) -> tuple[object, ...]:
        """Return the identity of the array; see `array_identity`."""
        return array_identity(self.level)

    def files(self, start: tuple[int, int, int], shape: Shape) -> Iterator[tuple[int, ...]]:
        """Return the indices, along the stored axes, of the files that hold part of a box."""
        return itertools.product(*self._spans(start, shape))

    def _spans(self, start: tuple[int, int, int], shape: Shape) -> list[range]:
        channel = self.level.channel or 0
        spans = [range(channel // n, channel // n + 1) for n in self.level.array.files]
        for axis, first, count in zip(self.level.axes, start, shape, strict=True):
            size = self.level.array.files[axis]
            spans[axis] = range(first // size, -(-(first + count) // size))
        return spans

    def common(
        self, index: tuple[int, ...], start: tuple[int, int, int], shape: Shape
    ) -> tuple[tuple[int, int, int], Shape]:
        """Return start and shape of the intersection of a file and a box."""
        size, file = self.level.zyx(self.level.array.files), self.level.zyx(index)
        lo = [max(a, i * c) for a, i, c in zip(start, file, size, strict=True)]
        hi = [min(a + n, (i + 1) * c) for a, n, i, c in zip(start, shape, file, size, strict=True)]
        return (lo[0], lo[1], lo[2]), (hi[0] - lo[0], hi[1] - lo[1], hi[2] - lo[2])

    def file_start(self, file: Sequence[int]) -> tuple[int, int, int]:
        """Return the first voxel (z, y, x) of a file, by its index (z, y, x)."""
        z, y, x = (i * f for i, f in zip(file, self.level.zyx(self.level.array.files), strict=True))
        return z, y, x

    def chunks_of(self, file: Sequence[int]) -> Iterator[tuple[tuple[int, int, int], Shape]]:
        """Yield start and shape of each chunk of a file, cut at the edge of the array.

        A shard may be as large as the array, so its chunks are read one after another.

        Args:
            file: its index (z, y, x).
        """
        info, zyx = self.level.array, self.level.zyx
        chunks = zyx(info.chunks)
        spans = [
            range(i * f, min((i + 1) * f, n), c)
            for i, f, n, c in zip(file, zyx(info.files), zyx(info.shape), chunks, strict=True)
        ]
        for z, y, x in itertools.product(*spans):
            dz, dy, dx = (min(c, span.stop - a) for a, span, c in zip((z, y, x), spans, chunks, strict=True))
            yield (z, y, x), (dz, dy, dx)

    def stored(self) -> dict[tuple[int, int, int], bytes]:
        """Return the stamps of all files that exist and are not empty, by their index (z, y, x).

        All other voxels have the array's fill value. A remote store is not asked, so all of its files count as
        existing; in an archive, each has the stamp of the archive.
        """
        info = self.level.array
        if not self.local:
            grid = [range(-(-n // f)) for n, f in zip(info.shape, info.files, strict=True)]
            return dict.fromkeys(map(self.level.zyx, itertools.product(*grid)), self.archive_stamp)
        stamps, by_file = {}, dict[str, bytes]()
        for index, file in list_files(info):
            stamp = by_file.get(file)
            if stamp is None:  # many chunks may lie in one file
                stamp = by_file[file] = file_stamp(file)
            if stamped_size(stamp) != 0:
                stamps[self.level.zyx(index)] = stamp
        return stamps

    def absent(self, start: tuple[int, int, int], shape: Shape, most: int = 2000) -> tuple[int, int]:
        """Return how many of the files that hold part of a box are missing or empty, and how many were examined.

        Voxels of such files have the array's fill value. Of more than ``most`` files, as many are examined, evenly
        spread. A remote store is not asked: no files are examined.
        """
        info = self.level.array
        if not self.local:
            return 0, 0
        spans = self._spans(start, shape)
        lengths = [len(span) for span in spans]
        total = math.prod(lengths)
        numbers = range(total) if total <= most else np.linspace(0, total - 1, most).round().astype(int).tolist()
        indices = np.stack(np.unravel_index(numbers, lengths), axis=1) + [span.start for span in spans]
        files = [info.file(index) for index in indices.tolist()]
        return sum(not os.path.exists(file) or is_empty_file(file) for file in files), len(files)  # noqa: PTH110

    def stamp(self, start: tuple[int, int, int], shape: Shape) -> int:
        """Return a number (64 bits, not 0) that changes when a file that holds part of a box is written or removed.

        In an archive on this machine it changes with the archive. For any other remote array it is constant, since a
        request per chunk would be needed: chunks are taken to be unchanged while the metadata of the array and its
        version are; see `identity`.
        """
        info = self.level.array
        if self.local:
            files = dict.fromkeys(info.file(index) for index in self.files(start, shape))
            stamps = [file_stamp(file) for file in files]
        else:
            stamps = [self.archive_stamp]
            if not stamps[0]:
                return 1
        digest = hashlib.blake2b(b"".join(stamps), digest_size=8)
        return int.from_bytes(digest.digest(), "little") or 1


def array_identity(level: Level) -> tuple[object, ...]:
    """Return a value that differs for every other array.

    It consists of the location with all links resolved, a checksum of the metadata, for a remote array the version
    that the server reports for the metadata, and for a box of an array the voxels of the box.
    """
    info = level.array
    # Only read for remote arrays: the cached property would cost one more object for each of thousands of arrays.
    version = info.version if isinstance(info.path, Remote) else ""
    window = () if level.window is None else (level.window,)
    return identity_of(info.path), info.checksum, version, level.axes, *window


def location_of(level: Level) -> object:
    """Return the location of an array with all links resolved, and for a box of an array also the voxels of the box."""
    path = identity_of(level.path)
    return path if level.window is None else (path, level.window)


def list_files(info: StoredArray) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield index along the stored axes, and path, of all that is named as a chunk file is, except for folders."""
    if not isinstance(info, ArrayInfo):
        grid = [range(-(-n // f)) for n, f in zip(info.shape, info.files, strict=True)]
        yield from ((index, file) for index in itertools.product(*grid) if os.path.lexists(file := info.file(index)))
        return
    root, ndim = str(info.path), len(info.shape)
    if info.separator == ".":
        for entry in _scan(root):
            parts = entry.name.removeprefix(info.prefix).split(".")
            is_named = entry.name.startswith(info.prefix) and len(parts) == ndim and all(map(str.isdigit, parts))
            if is_named and not entry.is_dir():
                yield tuple(map(int, parts)), entry.path
        return

    def below(folder: str, index: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        for entry in _scan(folder):
            if entry.name.isdigit():
                # The depth is bounded, since links may form a cycle.
                if len(index) == ndim - 1:
                    if not entry.is_dir():
                        yield (*index, int(entry.name)), entry.path
                else:
                    yield from below(entry.path, (*index, int(entry.name)))

    yield from below(f"{root}/{info.prefix}".rstrip("/"), ())


def _scan(folder: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def is_empty_file(path: str) -> bool:
    """Return whether a path leads to a regular file of 0 bytes; False where it cannot be examined."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return False
    return status.st_size == 0 and stat.S_ISREG(status.st_mode)
