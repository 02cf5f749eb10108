"""Exceptions of the package: each is a `CellMapError` and also the builtin exception that a caller would catch."""

from cellmap_lightning.redaction import hide_address

__all__ = [
    "CacheError",
    "CellMapError",
    "CellMapFileExistsError",
    "CellMapFileNotFoundError",
    "CellMapIndexError",
    "CellMapKeyError",
    "CellMapMemoryError",
    "CellMapTypeError",
    "CellMapValueError",
    "ChunkError",
    "EmptyChunkError",
    "MetadataError",
    "MissingExtraError",
    "OutputError",
    "WorkerError",
    "install_command",
    "missing_extra",
]


class CellMapError(Exception):
    """Base class of all errors about data, metadata, configuration or their combination.

    Credentials in addresses are hidden in the message. See docs/reliability.md.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide_address(arg) if isinstance(arg, str) else arg for arg in args))


class CellMapValueError(CellMapError, ValueError):
    """An invalid value of an argument, of a setting or of metadata."""


class CellMapTypeError(CellMapError, TypeError):
    """A value of the wrong type, or a call at the wrong time."""


class CellMapKeyError(CellMapError, KeyError):
    """An unknown name of an axis, an array, a class or a split."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class CellMapIndexError(CellMapError, IndexError):
    """A position outside ``range(len(dataset))``."""


class CellMapFileNotFoundError(CellMapError, FileNotFoundError):
    """A path in a CSV, a configuration or an argument that does not exist."""


class CellMapFileExistsError(CellMapError, FileExistsError):
    """An output path that exists already."""


class MetadataError(CellMapValueError):
    """Metadata on disk that is not readable as OME-NGFF, Zarr or CellMap attributes."""


class ChunkError(CellMapError, OSError):
    """Stored voxels that could not be read or decoded."""


class EmptyChunkError(ChunkError):
    """A chunk whose file has 0 bytes."""


class CacheError(CellMapError, OSError):
    """Decoded voxels that cannot be stored in the cache."""


class OutputError(CellMapError, OSError):
    """A volume that cannot be written, as on a disk that is full, read-only or too small."""


class CellMapMemoryError(CellMapError, MemoryError, RuntimeError):
    """A batch that does not fit; also a `RuntimeError`, by which Lightning's tuner detects a too large batch size."""


class WorkerError(CellMapError, RuntimeError):
    """A worker process that died or does not respond; also a `RuntimeError`, as torch raises."""


class MissingExtraError(CellMapError, ImportError):
    """An optional library that is needed and not installed."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra; the working directory is a clone of the repository."""
    return f'pip install -e ".[{extra}]"'


def missing_extra(extra: str, what: str, alternative: str = "") -> MissingExtraError:
    """Return the error about a library that is not installed.

    Args:
        extra: the extra of the package that contains the library, such as ``train``.
        what: the feature and the library that it needs, such as ``"pictures need matplotlib"``.
        alternative: what works without the library, such as ``"metric=voxels"``.
    """
    ending = f", or {alternative}" if alternative else ""
    return MissingExtraError(f"{what}, which is not installed; in a clone: {install_command(extra)}{ending}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
