"""Choice of the reader of an array by its volume format."""

from cellmap_lightning.io.array_reader import ArrayReader, Empty
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.io.openable import Reader
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.source_reader import SourceReader
from cellmap_lightning.io.window_reader import WindowReader


def open_reader(
    level: Level,
    label: str = "",
    reader: Reader = "zarr",
    retry_policy: RetryPolicy = DEFAULT_RETRY,
    empty: Empty = "error",
) -> ArrayReader:
    """Return a reader of the array of a level.

    Args:
        level: the array, of any volume format.
        label: name of the array in error messages, such as ``crop12/mito``.
        reader: library that decodes Zarr arrays; see `chunks.Reader`.
        retry_policy: retries and timeouts of each object.
        empty: treatment of chunk files of 0 bytes in Zarr arrays.

    Raises:
        MetadataError: the reader cannot open the array, or cannot decode its chunks.
    """
    if level.whole is not None:
        return WindowReader(level, open_reader(level.whole, label, reader, retry_policy, empty))
    if level.source is not None:
        return SourceReader(level, level.source, label, retry_policy)
    return ChunkReader(level, label, reader, retry_policy, empty)
