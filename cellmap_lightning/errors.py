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

    Example:
        >>> from cellmap_lightning import ReadOptions
        >>> try:
        ...     ReadOptions(reader="zar")
        ... except CellMapError as e:
        ...     print(e)
        reader must be one of zarr, tensorstore, got 'zar'; did you mean 'zarr'?
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide_address(arg) if isinstance(arg, str) else arg for arg in args))


class CellMapValueError(CellMapError, ValueError):
    """An invalid value of an argument, of a setting or of metadata.

    Example:
        >>> from cellmap_lightning import ReadOptions
        >>> ReadOptions(read_attempts=0)
        Traceback (most recent call last):
        cellmap_lightning.errors.CellMapValueError: read_attempts must be a whole number of at least 1, got 0
    """


class CellMapTypeError(CellMapError, TypeError):
    """A value of the wrong type, or a call at the wrong time.

    Example:
        >>> from cellmap_lightning import CellMapDataSplit
        >>> CellMapDataSplit("crops.csv", cache="disk")
        Traceback (most recent call last):
        cellmap_lightning.errors.CellMapTypeError: CellMapDataSplit: ...; use read=ReadOptions(cache=...)
    """


class CellMapKeyError(CellMapError, KeyError):
    """An unknown name of an axis, an array, a class or a split.

    Example:
        >>> from cellmap_lightning import SplitOptions
        >>> SplitOptions(split="stratifed")
        Traceback (most recent call last):
        cellmap_lightning.errors.CellMapKeyError: split must be one of csv, ...; did you mean 'stratified'?
    """

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class CellMapIndexError(CellMapError, IndexError):
    """A position outside ``range(len(dataset))``, or a fold outside of those of a rule.

    Example:
        >>> from cellmap_lightning import SplitOptions
        >>> SplitOptions(split="kfold", fold=5, n_folds=5)
        Traceback (most recent call last):
        cellmap_lightning.errors.CellMapIndexError: fold must be in [0, 5) with n_folds=5, got 5
    """


class CellMapFileNotFoundError(CellMapError, FileNotFoundError):
    """A path in a CSV, a configuration or an argument that does not exist.

    Example:
        >>> from cellmap_lightning import CellMapDataSplit
        >>> CellMapDataSplit("no/crops.csv")
        Traceback (most recent call last):
        cellmap_lightning.errors.CellMapFileNotFoundError: the CSV of crops no/crops.csv does not exist: ...
    """


class CellMapFileExistsError(CellMapError, FileExistsError):
    """An output path that exists already.

    Example:
        >>> from pathlib import Path
        >>> from cellmap_lightning.io.writer import make_room
        >>> make_room(Path("/"), overwrite=False)
        Traceback (most recent call last):
        cellmap_lightning.errors.CellMapFileExistsError: ... exists already; choose another path or pass overwrite=True
    """


class MetadataError(CellMapValueError):
    """Metadata on disk that is not readable as OME-NGFF, Zarr or CellMap attributes; see docs/reliability.md."""


class ChunkError(CellMapError, OSError):
    """Stored voxels that could not be read or decoded; see docs/reliability.md."""


class EmptyChunkError(ChunkError):
    """A chunk whose file has 0 bytes; see docs/reliability.md."""


class CacheError(CellMapError, OSError):
    """Decoded voxels that cannot be stored in the cache; see docs/reliability.md."""


class OutputError(CellMapError, OSError):
    """A volume that cannot be written, as on a disk that is full, read-only or too small; see docs/prediction.md."""


class CellMapMemoryError(CellMapError, MemoryError, RuntimeError):
    """A batch that does not fit; see docs/batches.md.

    It is also a `RuntimeError`, by which Lightning's tuner detects a too large batch size.
    """


class WorkerError(CellMapError, RuntimeError):
    """A worker process that died or does not respond; see docs/reliability.md.

    It is also a `RuntimeError`, as torch raises.
    """


class MissingExtraError(CellMapError, ImportError):
    """An optional library that is needed and not installed.

    Example:
        >>> raise missing_extra("train", "pictures need matplotlib")
        Traceback (most recent call last):
        cellmap_lightning.errors.MissingExtraError: pictures need matplotlib, which is not installed; ...
    """


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
