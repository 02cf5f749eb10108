"""The one family of errors: each is a `CellMapError` and also the builtin that a caller would catch."""

from cellmap_lightning.redaction import hide_address


class CellMapError(Exception):
    """Base of every error that this package raises about data, metadata, configuration or their combination.

    Credentials in addresses are hidden.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide_address(arg) if isinstance(arg, str) else arg for arg in args))


class CellMapValueError(CellMapError, ValueError):
    """A value that was given, or found in metadata, cannot be right."""


class CellMapTypeError(CellMapError, TypeError):
    """A value of the wrong kind was given."""


class CellMapKeyError(CellMapError, KeyError):
    """A name that does not exist: an axis, an array, a class, a split."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class CellMapIndexError(CellMapError, IndexError):
    """A position outside ``range(len(dataset))``."""


class CellMapFileNotFoundError(CellMapError, FileNotFoundError):
    """A path that a CSV, a config or a caller names does not exist."""


class CellMapFileExistsError(CellMapError, FileExistsError):
    """Something is already where a volume was to be written."""


class MetadataError(CellMapValueError):
    """Metadata on disk that is not readable as OME-NGFF, Zarr or CellMap attributes."""


class ChunkError(CellMapError, OSError):
    """Stored voxels that could not be read or decoded."""


class EmptyChunkError(ChunkError):
    """A chunk whose file has 0 bytes."""


class CacheError(CellMapError, OSError):
    """Decoded voxels that cannot be kept where they were to be kept."""


class OutputError(CellMapError, OSError):
    """A volume that cannot be written: the disk is full, read-only or too small."""


class CellMapMemoryError(CellMapError, MemoryError, RuntimeError):
    """A batch that cannot fit; also a `RuntimeError`, by which Lightning's tuner knows a batch size as too large."""


class WorkerError(CellMapError, RuntimeError):
    """A worker process that ended or does not answer; also a `RuntimeError`, as torch raises."""


class MissingExtraError(CellMapError, ImportError):
    """An optional library is needed here and is not installed."""
