"""Reading of arrays of other formats than Zarr, through their `ArraySource`."""

import os
from typing import Any

from cellmap_lightning.errors import CellMapError, ChunkError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.array_reader import ArrayReader
from cellmap_lightning.io.chunk_files import is_empty_file
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.retrying import DEFAULT_RETRY, ObjectError, RetryPolicy, tried
from cellmap_lightning.io.stored_array import ArraySource


class SourceReader(ArrayReader):
    """A reader of boxes of one array of another format than Zarr, in the order z, y, x; thread-safe.

    Args:
        level: the array.
        source: how it is read.
        label: name of the array in error messages, such as ``crop12/mito``.
        retry_policy: retries of reads that fail with a transient error, as network file systems raise them.

    Example:
        >>> level = read_image("stack.tif", Overrides(voxel_size=(8, 8, 8))).finest
        >>> SourceReader(level, level.source).read((0, 0, 0), (64, 64, 64)).shape
        (64, 64, 64)
    """

    def __init__(
        self, level: Level, source: ArraySource, label: str = "", retry_policy: RetryPolicy = DEFAULT_RETRY
    ) -> None:
        super().__init__(level, label)
        self.source = source
        self.retry_policy = retry_policy

    def read(self, start: tuple[int, int, int], shape: Shape, begun: Any = None) -> AnyArray:
        """Return the voxels of a box inside the array, in native byte order; see `ArrayReader.read`.

        Raises:
            ChunkError: the file cannot be read; the message names the array and the box.
        """
        box = [part if isinstance(part, slice) else slice(part, part + 1) for part in self._box(start, shape)]
        first, counts = [part.start for part in box], [part.stop - part.start for part in box]

        def attempt(_: Any) -> dict[str, Any]:
            try:
                return {"": self.source.read(first, counts)}
            except CellMapError:
                raise
            except Exception as e:  # libraries raise any type
                return {"": e}

        try:
            stored: Any = tried(attempt, [""], self.retry_policy)[""]
            if stored is None:
                raise FileNotFoundError("its file does not exist")
        except CellMapError:
            raise
        except Exception as e:
            cause = e.cause if isinstance(e, ObjectError) else e
            notes = "".join(f" ({note})" for note in getattr(cause, "__notes__", ()))  # such as the file of a slice
            detail = self._hide(f"{type(cause).__name__}: {cause}{notes}")
            raise ChunkError(f"{self.where(start, shape)} could not be read: {detail}; {self.box(start, shape)}") from e
        return self._in_order(stored.reshape([counts[axis] for axis in sorted(self.level.axes)]))

    def missing_chunks(
        self, start: tuple[int, int, int], shape: Shape, voxels: AnyArray | None = None
    ) -> list[tuple[int, ...]]:
        """Return the chunks that hold part of a box and are not stored; none for a remote array."""
        if not self.local:
            return []
        indices = [(index, self.source.file(index)) for index in self.files(start, shape)]
        absent = {file for file in dict.fromkeys(file for _, file in indices) if not _is_stored(file)}
        return [index for index, file in indices if file in absent or not self._has_part(index)]

    def has_chunk(self, index: tuple[int, ...]) -> bool:
        """Return whether a chunk is stored, and its file has any bytes; True for a remote array."""
        return not self.local or (_is_stored(self.source.file(index)) and self._has_part(index))

    def _has_part(self, index: tuple[int, ...]) -> bool:
        """Return whether a chunk exists in its file; formats without a lookup store all of them."""
        lookup = getattr(self.source, "has_chunk", None)
        return lookup is None or bool(lookup(index))

    def is_empty(self, index: tuple[int, ...]) -> bool:
        """Return whether the file of a chunk has 0 bytes."""
        return self.local and is_empty_file(self.source.file(index))


def _is_stored(file: str) -> bool:
    return os.path.lexists(file) and not is_empty_file(file)
