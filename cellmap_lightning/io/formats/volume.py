"""The protocol of a volume format, and the description of a volume that it returns."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import Vector
from cellmap_lightning.io.ngff import Note
from cellmap_lightning.io.store import Remote, StorePath
from cellmap_lightning.io.stored_array import ArraySource
from cellmap_lightning.io.versions import versions

#: Voxels along an axis of the parts in which an array without chunks is read.
PART = 64
#: Names of the axes of arrays of 1 to 5 axes without names: the last three are z, y and x.
AXIS_NAMES = "tczyx"


class FormatArray:
    """Base class of the arrays of a format; a subclass has at least `read`.

    Args:
        path: location of the array, which differs for every other array.
        shape: voxels along the stored axes.
        dtype: the stored type.
        chunks: voxels of the smallest part that can be read by itself; by default `PART` along each axis.
        files: voxels in one file of the chunk grid; by default a chunk.
        container: file that holds the array; by default ``path``.
        attributes: its attributes.
        codec: compressor of a chunk, such as ``gzip``.
        details: other values on which the decoded voxels depend; they are part of `checksum`.

    Raises:
        MetadataError: a voxel is not a number.
    """

    #: Whether it can be read in a process that was forked after an earlier read.
    forks = True

    def __init__(
        self,
        path: StorePath,
        shape: Sequence[int],
        dtype: Any,
        chunks: Sequence[int] | None = None,
        files: Sequence[int] | None = None,
        *,
        container: StorePath | None = None,
        attributes: Mapping[str, Any] | None = None,
        codec: str = "none",
        details: object = "",
    ) -> None:
        self.path = path
        self.shape = tuple(map(int, shape))
        stored = np.dtype(dtype)
        if stored.kind not in "uif" and stored != np.bool_:
            raise MetadataError(f"{path}: the type {stored} is not a number; images of one value a voxel can be read")
        if not self.shape or min(self.shape) < 1:
            raise MetadataError(f"{path}: shape {list(self.shape)} holds no voxel")
        self.dtype: np.dtype[Any] = stored.newbyteorder("=")
        self.chunks = tuple(map(int, chunks)) if chunks is not None else tuple(min(PART, n) for n in self.shape)
        self.files = tuple(map(int, files)) if files is not None else self.chunks
        self.container = container if container is not None else path
        self.attributes: Mapping[str, Any] = attributes or {}
        self.codec = codec
        text = repr((self.shape, self.chunks, self.files, stored.str, codec, details))
        self.checksum = hashlib.sha256(text.encode()).hexdigest()

    @property
    def metadata(self) -> StorePath:
        """File that describes the array."""
        return self.container

    @cached_property
    def version(self) -> str:
        """Version of the metadata on a server; empty for local arrays."""
        return versions([self.metadata])[0] if isinstance(self.metadata, Remote) else ""

    def key(self, index: Sequence[int]) -> str:
        """Return the name of a file of the chunk grid, by its index along the stored axes."""
        return ".".join(map(str, index))

    def file(self, index: Sequence[int]) -> str:
        """Return the path of a file of the chunk grid; by default the container holds all chunks."""
        return str(self.container)


@dataclass(frozen=True)
class FormatLevel:
    """One resolution of a volume.

    Attributes:
        name: its name inside the volume, such as ``s0``.
        array: its voxels.
        axes: names of the stored axes, one letter each, such as ``czyx``; empty if the format has no names.
        voxel_size: voxel size in nm (z, y, x). Without a stored voxel size it is relative to the first level.
        translation: centre of voxel 0 in nm (z, y, x).
    """

    name: str
    array: ArraySource
    axes: str = ""
    voxel_size: Vector = (1.0, 1.0, 1.0)
    translation: Vector = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class FormatVolume:
    """A volume of a format: its levels, finest first.

    Attributes:
        levels: the resolutions.
        has_voxel_size: whether the voxel size is stored; otherwise it must be set.
        voxel_size_problem: the error if the stored voxel size is malformed or contradicts itself; it must be set then.
        known_voxel_size: without a voxel size, nm along z, y and x where the format stores it, else None.
        unit_nm: nm in the unit that was assumed for voxel sizes and translations; the setting ``unit`` replaces it.
        attributes: attributes of the volume.
        notes: assumptions made when it was opened.
    """

    levels: tuple[FormatLevel, ...]
    has_voxel_size: bool = True
    unit_nm: float = 1.0
    attributes: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[Note, ...] = ()
    voxel_size_problem: str = ""
    known_voxel_size: tuple[float | None, float | None, float | None] = (None, None, None)


class VolumeFormat(Protocol):
    """A volume format. Packages add one with the entry point ``cellmap_lightning.formats``, a class without arguments.

    `cellmap_lightning.testing.FormatConformance` has the tests that each format should pass.

    Example:
        >>> [format.name for format in formats()]
        ['npy', 'hdf5', 'tiff', 'mrc', 'n5', 'precomputed', 'slices']
    """

    @property
    def name(self) -> str:
        """Name of the format in messages."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of its files, such as ``.tif``; a class array may be a file with one of them."""

    def matches(self, path: StorePath) -> bool:
        """Return whether a location holds a volume of the format, by its name and by a look at few files."""

    def open(self, path: StorePath) -> FormatVolume:
        """Read the metadata of a volume.

        Raises:
            MissingExtraError: an optional library is needed and not installed.
            CellMapError: the volume cannot be read.
        """

    def children(self, path: StorePath) -> list[str]:
        """Return the names of the arrays and groups in a container, such as the classes of a crop."""


def strip_suffix(path: StorePath) -> str:
    """Return the name of a file without its suffix."""
    return path.name[: len(path.name) - len(path.suffix)] if path.suffix else path.name
