"""The options of a segmentation: those of the method, and those of its files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cellmap_lightning.crops.encodings import Unknown, check_unknown
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.instances.components import Connectivity
from cellmap_lightning.io.meanings import ValuesSetting, check_values
from cellmap_lightning.io.writer import ZarrFormat
from cellmap_lightning.prediction.options import parse_lengths
from cellmap_lightning.validation import one_of, positive_number

Method = Literal["components", "watershed", "mutex_watershed", "agglomeration"]
#: The kind of stored predictions. ``distance``: a signed distance in nm, positive inside.
InputKind = Literal["probability", "mask", "distance", "affinities", "boundary"]
#: The type of stored ids; ``auto`` is uint32, or uint64 for more objects.
IdType = Literal["auto", "uint8", "uint16", "uint32", "uint64"]

#: The kinds that each method reads.
KINDS: dict[Method, tuple[InputKind, ...]] = {
    "components": ("probability", "mask", "distance", "boundary"),
    "watershed": ("probability", "mask", "distance", "boundary"),
    "mutex_watershed": ("affinities",),
    "agglomeration": ("affinities", "boundary"),
}
#: The method of each kind, where none is given.
_METHODS: dict[InputKind, Method] = {
    "probability": "components",
    "mask": "components",
    "distance": "watershed",
    "boundary": "watershed",
    "affinities": "mutex_watershed",
}


@dataclass(frozen=True)
class SegmentationOptions:
    """The options of a method; lengths are in nm; see docs/instances.md.

    Attributes:
        method: the method; None for that of the input's kind.
        threshold: probability, affinity, or signed distance in nm, from which a voxel is foreground; of boundaries,
            the probability below which it is. None for 0.5, and 0 nm.
        connectivity: neighbours of a voxel, for ``components``, ``watershed`` and ``agglomeration``.
        smoothing: standard deviation of the Gaussian on distances, nm; None for the longest side of a voxel.
        seed_distance: the shortest distance of two seeds, nm; None for four times the longest side of a voxel.
        seed_depth: the smallest distance of a seed to the background, nm; a component without a seed is one object.
        merge_threshold: mean affinity above which ``agglomeration`` merges fragments.
        strides: distances, in voxels, of those whose repulsive edges ``mutex_watershed`` uses.
        halo: margin of a block that is segmented and not written, nm; None for 32 voxels, or for affinities 16 and
            twice the longest offset. ``components`` needs none.
        overlap: intersection over union, on both sides of a face, above which the objects of two blocks are joined.
        min_volume: minimum volume of an object, nm³.
        max_volume: maximum volume of an object, nm³; None without limit.
        fill_holes: add background that a single object encloses to it.

    Raises:
        CellMapValueError: an option is invalid.
    """

    method: Method | None = None
    threshold: float | None = None
    connectivity: Connectivity = 26
    smoothing: float | None = None
    seed_distance: float | None = None
    seed_depth: float = 0.0
    merge_threshold: float = 0.5
    strides: Sequence[int] = (2, 2, 2)
    halo: float | None = None
    overlap: float = 0.5
    min_volume: float = 0.0
    max_volume: float | None = None
    fill_holes: bool = False

    def __post_init__(self) -> None:
        if self.method is not None:
            one_of("method", self.method, get_args(Method))
        one_of("connectivity", self.connectivity, get_args(Connectivity))
        if self.threshold is not None:
            _finite("threshold", self.threshold, -math.inf)
        for name in ("smoothing", "seed_distance", "seed_depth", "halo", "min_volume"):
            if getattr(self, name) is not None:
                _finite(name, getattr(self, name), 0.0)
        if self.max_volume is not None:
            positive_number("max_volume", self.max_volume)
            if self.max_volume < self.min_volume:
                raise CellMapValueError(
                    f"max_volume: {self.max_volume:g} nm³ is less than min_volume={self.min_volume:g}; use a larger one"
                )
        if not 0.5 <= _finite("overlap", self.overlap, 0.0) < 1:
            raise CellMapValueError(f"overlap must be at least 0.5 and below 1, got {self.overlap!r}")
        object.__setattr__(self, "strides", parse_lengths("strides", self.strides))

    def method_for(self, kind: InputKind, where: str) -> Method:
        """Return the method for a kind of input.

        Args:
            kind: the kind.
            where: the input, for messages.

        Raises:
            CellMapValueError: the method does not read this kind.
        """
        method = self.method or _METHODS[kind]
        if kind not in KINDS[method]:
            others = [name for name, kinds in KINDS.items() if kind in kinds]
            raise CellMapValueError(
                f"{where}: method={method} needs {' or '.join(KINDS[method])}, and the prediction is {kind}; "
                f"use method={' or '.join(others)}, or set kind if that is wrong"
            )
        return method


def _finite(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf or value != value:
        raise CellMapValueError(
            f"{name} must be a number{f' of at least {least:g}' if least == 0 else ''}, got {value!r}"
        )
    return float(value)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The options of the prediction that is segmented; see `open_source`.

    Example:
        >>> SourceOptions(kind="affinities", offsets=[[-1, 0, 0], [0, -1, 0], [0, 0, -1]]).values
        'auto'

    Attributes:
        kind: the kind of its values; None for that in the metadata.
        offsets: the offset of each channel of affinities, voxels (z, y, x); None for those in the metadata.
        channels: names of the groups that are the channels of affinities; None for the channels of one array.
        values: the meaning of stored values, see `meaning_of`.
        unknown: the stored value of unannotated voxels of an annotation, if the metadata do not define it; see
            `LabelOptions`.

    Raises:
        CellMapError: the kind or the meaning is unknown, or the code of unannotated voxels is invalid.
    """

    kind: InputKind | None = None
    offsets: Sequence[Sequence[int]] | None = None
    channels: Sequence[str] | None = None
    values: ValuesSetting = "auto"
    unknown: Unknown = "metadata"

    def __post_init__(self) -> None:
        if self.kind is not None:
            one_of("kind", self.kind, get_args(InputKind))
        check_values(self.values)
        check_unknown(self.unknown)


@dataclass(frozen=True)
class StorageOptions:
    """The options of the files of a segmentation; see docs/instances.md.

    Attributes:
        zarr_format: 2 (OME-NGFF 0.4) or 3 (OME-NGFF 0.5).
        chunks: voxels of a chunk (z, y, x).
        shards: voxels of a shard, for Zarr v3; None without shards.
        levels: number of levels of the pyramid; None for as many as leave the longest axis 32 voxels.
        ids: type of stored ids, see `IdType`.
        block: voxels of a block, multiples of a chunk (or shard); None for as many as ``block_size_mb`` allows.
        block_size_mb: memory of a process for a block, MiB.
        overwrite: replace another segmentation in the output.
        check_space: raise an error if the disk has less free space than the result takes without compression.

    Raises:
        CellMapValueError: an option is invalid.
    """

    zarr_format: ZarrFormat = 2
    chunks: Sequence[int] = (64, 64, 64)
    shards: Sequence[int] | None = None
    levels: int | None = None
    ids: IdType = "auto"
    block: Sequence[int] | None = None
    block_size_mb: float = 3072
    overwrite: bool = False
    check_space: bool = True

    def __post_init__(self) -> None:
        one_of("zarr_format", self.zarr_format, (2, 3))
        one_of("ids", self.ids, get_args(IdType))
        positive_number("block_size_mb", self.block_size_mb)
        for name in ("chunks", "shards", "block"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_lengths(name, getattr(self, name)))
        if self.shards and (self.zarr_format == 2 or any(s % c for s, c in zip(self.shards, self.chunks, strict=True))):
            raise CellMapValueError(
                f"shards: {list(self.shards)} need zarr_format=3, and to be multiples of chunks={list(self.chunks)}"
            )
        if self.block and any(b % u for b, u in zip(self.block, self.unit, strict=True)):
            raise CellMapValueError(
                f"block: {list(self.block)} voxels are no multiple of {list(self.unit)}, the voxels of a file"
            )

    @property
    def unit(self) -> Shape:
        """The voxels of the smallest file that is written as a whole: a shard, or a chunk."""
        z, y, x = self.shards or self.chunks
        return z, y, x

    def block_shape(self, shape: Shape, halo: Shape, voxel_bytes: int) -> Shape:
        """Return the voxels of a block, so that it takes at most `block_size_mb` with its halo.

        Args:
            shape: voxels of the volume.
            halo: voxels of the halo.
            voxel_bytes: memory of a voxel that is segmented.
        """
        if self.block:
            z, y, x = self.block
            return z, y, x
        block, budget = list(self.unit), self.block_size_mb * 2**20
        while True:
            # The shortest axis that does not reach the end is doubled, so that coarser chunks lie in one block.
            axes = [axis for axis in range(3) if block[axis] < shape[axis]]
            if not axes:
                break
            axis = min(axes, key=lambda axis: block[axis])
            larger = [n * 2 if a == axis else n for a, n in enumerate(block)]
            if math.prod(b + 2 * h for b, h in zip(larger, halo, strict=True)) * voxel_bytes > budget:
                break
            block = larger
        return block[0], block[1], block[2]
