"""The label arrays of a crop, read together: presence of all classes as bits, or their ids."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cellmap_lightning.errors import CellMapError, CellMapValueError, MetadataError
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.kinds import UNKNOWN_ID, signed
from cellmap_lightning.transforms.targets import pack_into, packed_bytes
from cellmap_lightning.volumes.chunks import ChunkReader
from cellmap_lightning.volumes.geometry import AffineMap, FloatArray, Lattice, Shape, patch_map
from cellmap_lightning.volumes.image import choose_level
from cellmap_lightning.volumes.ngff import Encoding, Level, Multiscale, read_encoding
from cellmap_lightning.volumes.placement import Window
from cellmap_lightning.volumes.region import ChunkCache, Region
from cellmap_lightning.volumes.resample import AnyArray, evaluate

#: How labels are made coarser: the stored level, or from the finest one the majority of its voxels, or any of them.
Downsample = Literal["stored", "majority", "any"]
DOWNSAMPLE = ("stored", "majority", "any")
#: What the code of unknown voxels is: as the metadata says, a number, or None where every value is meant.
Unknown = int | None | Literal["metadata"]

Member = tuple[int, str, Level, Encoding]


def label_members(
    images: Mapping[str, Multiscale],
    order: Sequence[str],
    window: Window,
    label: str,
    downsample: Downsample,
    unknown: Unknown,
) -> list[Member]:
    """Position, name, level and encoding of each class that is read.

    Raises:
        CellMapError: a level or an encoding that cannot be read; the message names the class.
    """
    members = []
    for name, image in images.items():
        try:
            level = (
                choose_level(image, window.scale.tolist(), f"{label}/{name}")
                if downsample == "stored"
                else image.finest
            )
            if level.array.dtype.kind == "b":
                encoding = Encoding(0, None)
            else:
                encoding = read_encoding(image, level)
                if unknown != "metadata":
                    encoding = Encoding(encoding.absent, unknown)
            members.append((order.index(name), name, level, encoding))
        except CellMapError as e:
            e.args = (f"{label}, class {name!r}: {e}",)
            raise
    return members


def stored_labels(reader: ChunkReader, encoding: Encoding, start: tuple[int, int, int], shape: Shape) -> AnyArray:
    """Stored integers of a box.

    Raises:
        MetadataError: they are not whole numbers, or it cannot be told whether a value is an id or means unknown.
    """
    stored = reader.read(start, shape)
    if stored.dtype.kind == "f":
        if not (np.isfinite(stored).all() and (np.rint(stored) == stored).all()):
            raise MetadataError(f"{reader.label}: {reader.level.path} holds labels that are not whole numbers (or NaN)")
        stored = stored.astype(np.int64)
    if stored.dtype.kind == "i":
        odd = (stored < 0) & (stored != encoding.absent)
        if encoding.unknown is not None:
            odd &= stored != encoding.unknown
        if odd.any():
            raise MetadataError(
                f"{reader.label}: {reader.level.path} holds the negative label {int(stored[odd][0])}, which its "
                f"encoding does not explain (absent {encoding.absent}, unknown {encoding.unknown})"
            )
    if encoding.ambiguous and encoding.unknown is not None and (stored > encoding.unknown).any():
        raise MetadataError(
            f"{reader.label}: {reader.level.path} holds ids above {encoding.unknown}, and nothing says whether "
            f"{encoding.unknown} means unknown or is an instance: its attributes have no complement_counts.unknown. "
            f"Say it with unknown={encoding.unknown} or unknown=null"
        )
    return stored


class BitGroup:
    """The classes of a crop that share one lattice, as one array of packed voxels.

    Args:
        members: position, name, level and encoding of each class.
        depth: bytes of a packed voxel.
        cache: where decoded chunks are kept.
        label: what messages call the crop.
    """

    def __init__(self, members: Sequence[Member], depth: int, cache: ChunkCache, label: str) -> None:
        self.lattice: Lattice = members[0][2].lattice
        self.depth = depth
        self.members = [(index, ChunkReader(level, f"{label}/{name}"), code) for index, name, level, code in members]
        chunks = np.max([reader.chunks for _, reader, _ in self.members], axis=0)
        z, y, x = (int(n) for n in np.minimum(chunks, self.lattice.shape))
        key = ("bits", depth, *((index, str(level.path), encoding) for index, _, level, encoding in members))
        self.region = Region(self.lattice.shape, (z, y, x), np.dtype(np.uint8), self._decode, cache, key, depth)

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        packed = np.zeros((*shape, self.depth), np.uint8)
        for index, reader, encoding in self.members:
            pack_into(packed, index, stored_labels(reader, encoding, start, shape), encoding.absent, encoding.unknown)
        return packed


class BitStack:
    """Presence of the annotated classes of a crop at the resolution of one target.

    Args:
        images: the multiscale label image of each class that is read.
        implications: the classes, and what follows from them.
        count: classes that are asked for, the first of those that are read.
        window: the target's patch in the volume's directions, from which the level follows.
        cache: where decoded chunks are kept.
        label: what messages call the crop.
        downsample: see `Downsample`.
        unknown: see `Unknown`.
    """

    def __init__(
        self,
        images: Mapping[str, Multiscale],
        implications: Implications,
        count: int,
        window: Window,
        cache: ChunkCache,
        label: str,
        downsample: Downsample = "stored",
        unknown: Unknown = "metadata",
    ) -> None:
        self.implications = implications
        self.downsample = downsample
        self.depth, self.depth_out = packed_bytes(len(implications.read)), packed_bytes(count)
        groups: list[list[Member]] = []
        for member in label_members(images, implications.read, window, label, downsample, unknown):
            for group in groups:
                if group[0][2].lattice.matches(member[2].lattice):
                    group.append(member)
                    break
            else:
                groups.append([member])
        self.groups = [BitGroup(members, self.depth, cache, label) for members in groups]

    @property
    def regions(self) -> list[Region]:
        """The arrays that are read."""
        return [group.region for group in self.groups]

    @property
    def lattices(self) -> list[Lattice]:
        """Their lattices; one, unless classes of the crop differ."""
        return [group.lattice for group in self.groups]

    def read_into(
        self, center: FloatArray, scale: FloatArray, out: np.ndarray[Any, Any], turn: FloatArray | None
    ) -> None:
        """Write the packed patch around ``center`` to ``out`` ``[z, y, x, bytes]``; zero where nothing is known.

        Args:
            center: nm (z, y, x).
            scale: voxel size of the patch, nm.
            out: where to.
            turn: see `geometry.patch_map`.
        """
        whole = out if self.depth == self.depth_out else np.empty((*out.shape[:3], self.depth), np.uint8)
        for number, group in enumerate(self.groups):
            amap = patch_map(center, (out.shape[0], out.shape[1], out.shape[2]), scale, group.lattice, turn)
            part = whole if number == 0 else np.empty(whole.shape, np.uint8)
            if self.downsample == "stored":
                evaluate(group.region, amap, part, method="nearest", fill=0)
            else:
                _vote(group.region, amap, part, self.downsample)
            if number:
                whole |= part
        if self.implications:
            self.implications.apply(whole)
        if whole is not out:
            out[...] = whole[..., : self.depth_out]


def _vote(region: Region, amap: AffineMap, out: np.ndarray[Any, Any], rule: Downsample) -> None:
    """Each output voxel from all the stored voxels that it covers; present bits in even bytes, known ones in odd."""
    parts = np.maximum(np.ceil(np.linalg.norm(amap.matrix, axis=0) - 1e-3), 1).astype(int)
    votes = np.zeros((*out.shape[:3], 8 * out.shape[3]), np.uint32)
    sample = np.empty(out.shape, np.uint8)
    for part in np.ndindex(*parts):
        shift = (np.asarray(part) + 0.5) / parts - 0.5
        moved = AffineMap(amap.matrix, amap.offset + amap.matrix @ shift, amap.shape)
        evaluate(region, moved, sample, method="nearest", fill=0)
        votes += np.unpackbits(sample, axis=-1, bitorder="little")
    votes = votes.reshape(*out.shape[:3], -1, 2, 8)
    present, known = votes[..., 0, :], votes[..., 1, :]
    total = int(np.prod(parts))
    if rule == "any":
        is_present = present > 0
        is_known = is_present | (known == total)
    else:
        is_known = 2 * known > total
        is_present = is_known & (2 * present > known)
    packed = np.packbits(np.stack([is_present, is_known], axis=-2), axis=-1, bitorder="little")
    out[...] = packed.reshape(out.shape)


class IdStack:
    """Instance ids of the annotated classes of a crop, unknown ones as -1.

    Args:
        images: the multiscale label image of each annotated class.
        classes: the classes that are asked for.
        window: see `BitStack`.
        cache: see `BitStack`.
        label: see `BitStack`.
        unknown: see `Unknown`.
    """

    def __init__(
        self,
        images: Mapping[str, Multiscale],
        classes: Sequence[str],
        window: Window,
        cache: ChunkCache,
        label: str,
        unknown: Unknown = "metadata",
    ) -> None:
        self.members = label_members(images, classes, window, label, "stored", unknown)
        self.dtype = id_dtype(images)
        self.readers = [ChunkReader(level, f"{label}/{name}") for _, name, level, _ in self.members]
        self.regions = []
        for reader, (_, _, level, encoding) in zip(self.readers, self.members, strict=True):
            decode = _IdDecoder(reader, encoding, self.dtype)
            key = ("ids", str(level.path), encoding, str(self.dtype))
            self.regions.append(Region(reader.shape, reader.chunks, self.dtype, decode, cache, key))

    @property
    def lattices(self) -> list[Lattice]:
        """The lattices of the levels that are read."""
        return [level.lattice for _, _, level, _ in self.members]

    def read_into(
        self, center: FloatArray, scale: FloatArray, out: np.ndarray[Any, Any], turn: FloatArray | None
    ) -> None:
        """Write the ids around ``center`` to ``out`` ``[C, z, y, x]``; -1 where nothing is known. See `BitStack`."""
        out[...] = UNKNOWN_ID
        for region, (index, _, level, _) in zip(self.regions, self.members, strict=True):
            amap = patch_map(center, (out.shape[1], out.shape[2], out.shape[3]), scale, level.lattice, turn)
            evaluate(region, amap, out[index], method="nearest", fill=UNKNOWN_ID)


class _IdDecoder:
    """Stored ids with unknown as -1 and absent as 0."""

    def __init__(self, reader: ChunkReader, encoding: Encoding, dtype: np.dtype[Any]) -> None:
        self.reader, self.encoding, self.dtype = reader, encoding, dtype

    def __call__(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        stored = stored_labels(self.reader, self.encoding, start, shape)
        if stored.dtype == np.uint64 and (stored > np.iinfo(np.int64).max).any():
            raise CellMapValueError(f"{self.reader.label}: {self.reader.level.path} holds ids above 2^63 - 1")
        ids = stored.astype(self.dtype)
        if self.encoding.absent != 0:
            ids[stored == self.encoding.absent] = 0
        if self.encoding.unknown is not None:
            ids[stored == self.encoding.unknown] = UNKNOWN_ID
        return ids


def id_dtype(images: Mapping[str, Multiscale]) -> np.dtype[Any]:
    """The signed type that holds the ids of all these images."""
    kinds = [signed(image.finest.array.dtype) for image in images.values()]
    return max(kinds, key=lambda k: k.itemsize, default=np.dtype(np.int16))
