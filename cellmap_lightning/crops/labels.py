"""The label arrays of a crop, read together: presence of all classes as bits, or their ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import MapTo, Patches, Resampled, stored_box
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.errors import CellMapError, CellMapValueError, MetadataError
from cellmap_lightning.geometry.lattice import AffineMap, Box, FloatArray, Lattice, Shape
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import AnyArray, evaluate
from cellmap_lightning.io.chunks import ChunkReader, Reader, chunk_shape
from cellmap_lightning.io.label_values import CODE, read_labels
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale, read_encoding
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.io.store import identity_of
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.kinds import UNKNOWN_ID, signed
from cellmap_lightning.transforms.targets import pack, packed_bytes

#: How labels are made coarser: the stored level, or from the finest one the majority of its voxels, or any of them.
Downsample = Literal["stored", "majority", "any"]
DOWNSAMPLE = ("stored", "majority", "any")

Member = tuple[int, str, Level, Encoding]


def label_members(
    images: Mapping[str, Multiscale],
    order: Sequence[str],
    window: Window,
    label: str,
    downsample: Downsample,
    encodings: LabelEncodings,
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
            encoding = encodings.of(name, image, level)
            if level != image.finest and read_encoding(image, level) is None:
                encodings.of(name, image, image.finest)  # voxels are counted there, which must not fail later
            members.append((order.index(name), name, level, encoding))
        except CellMapError as e:
            if f"{label}/{name}" not in str(e):
                e.args = (f"{label}, class {name!r}: {e}",)
            raise
    return members


def stored_labels(
    reader: ChunkReader, encoding: Encoding, start: tuple[int, int, int], shape: Shape, begun: Any = None
) -> AnyArray:
    """Stored integers of a box; for ``begun`` see `ChunkReader.read`.

    Raises:
        MetadataError: they are not whole numbers, or it cannot be told whether a value is an id or means unknown.
    """
    stored = read_labels(reader, start, shape, begun)
    where = f"{reader.label}: {reader.level.path}"
    if stored.dtype.kind == "i":
        odd = (stored < 0) & (stored != encoding.absent)
        if encoding.unknown is not None:
            odd &= stored != encoding.unknown
        if odd.any():
            raise MetadataError(
                f"{where} holds the negative label {int(stored[odd][0])}, which its "
                f"encoding does not explain (absent {encoding.absent}, unknown {encoding.unknown})"
            )
    if encoding.ambiguous and encoding.unknown is not None and (stored > encoding.unknown).any():
        raise MetadataError(
            f"{where} holds ids above {encoding.unknown}, and nothing says whether "
            f"{encoding.unknown} means unknown or is an instance: its attributes have no complement_counts.unknown. "
            f"Set unknown={encoding.unknown} or unknown=null for this crop or class"
        )
    if encoding.assumed and ((stored == CODE) if encoding.assumed == "ids" else (stored != 0) & (stored != CODE)).any():
        raise MetadataError(
            f"{where} holds {CODE} beside other ids, and no metadata say whether it means unknown or is an id: set "
            f"unknown={CODE} or unknown=null for this crop or class"
        )
    if encoding.missing != "absent":
        stored = _without_missing(reader, encoding, start, stored)
    return stored


def _without_missing(
    reader: ChunkReader, encoding: Encoding, start: tuple[int, int, int], stored: AnyArray
) -> AnyArray:
    """Stored labels of a box, with the code of unknown voxels where chunks are missing."""
    z, y, x = stored.shape
    missed = reader.missed(start, (z, y, x), stored)
    if encoding.missing == "empty":
        missed = [index for index in missed if reader.is_empty(index)]
    code = encoding.unknown
    if not missed or code is None:
        return stored
    fits = stored.dtype.kind in "iu" and np.iinfo(stored.dtype).min <= code <= np.iinfo(stored.dtype).max
    stored = stored.copy() if fits else stored.astype(np.int64)
    size = reader.level.zyx(reader.level.array.files)
    for index in missed:
        corner = np.multiply(reader.level.zyx(index), size) - start
        box = tuple(slice(max(0, int(c)), max(0, int(c) + f)) for c, f in zip(corner, size, strict=True))
        stored[box] = code
    return stored


class BitGroup:
    """The classes of a crop that share one lattice, as one array of packed voxels.

    Args:
        members: position, name, level and encoding of each class.
        depth: bytes of a packed voxel.
        cache: where decoded chunks are kept that have no other place.
        label: what messages call the crop.
        reader: see `chunks.Reader`.
        retry_policy: how long an object is tried for.
    """

    def __init__(
        self,
        members: Sequence[Member],
        depth: int,
        cache: ChunkCache,
        label: str,
        reader: Reader,
        retry_policy: RetryPolicy,
    ) -> None:
        self.lattice: Lattice = members[0][2].lattice
        self.depth = depth
        self.members = [
            (index, ChunkReader(level, f"{label}/{name}", reader, retry_policy, code.empty), code)
            for index, name, level, code in members
        ]
        self.chunks = chunk_shape([reader for _, reader, _ in self.members])
        key = ("bits", depth, *((index, identity_of(level.path), encoding) for index, _, level, encoding in members))
        self.region = Region(
            self.lattice.shape, self.chunks, np.dtype(np.uint8), self.decode, cache, key, depth, self.stamp,
            self.identity,
        )  # fmt: skip

    def decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """The packed voxels of a box."""
        begun = [reader.begin(start, shape) for _, reader, _ in self.members]
        stored = (
            (index, stored_labels(reader, encoding, start, shape, ahead), encoding.absent, encoding.unknown)
            for (index, reader, encoding), ahead in zip(self.members, begun, strict=True)
        )
        return pack(stored, shape, self.depth)

    def stamp(self, start: tuple[int, int, int], shape: Shape) -> int:
        """See `ChunkReader.stamp`, of all classes."""
        return mixed(reader.stamp(start, shape) for _, reader, _ in self.members)

    def identity(self) -> tuple[object, ...]:
        """What the voxels follow from."""
        return "bits", *((index, reader.identity(), encoding) for index, reader, encoding in self.members)


class BitStack:
    """Presence of the annotated classes of a crop at the resolution of one target.

    Args:
        images: the multiscale label image of each class that is read.
        implications: the classes, and what follows from them.
        count: classes that are asked for, the first of those that are read.
        window: the target's patch in the volume's directions, from which the level follows.
        cache: where decoded chunks are kept that have no other place.
        label: what messages call the crop.
        downsample: see `Downsample`.
        encodings: how its arrays are read; by default as their metadata and values say.
        reader: see `chunks.Reader`.
        retry_policy: how long an object is tried for.
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
        encodings: LabelEncodings | None = None,
        reader: Reader = "zarr",
        retry_policy: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        self.implications = implications
        self.downsample = downsample
        self.cache = cache
        self.label = label
        self.depth, self.depth_out = packed_bytes(len(implications.read)), packed_bytes(count)
        groups: list[list[Member]] = []
        for member in label_members(
            images, implications.read, window, label, downsample, encodings or LabelEncodings(label)
        ):
            for group in groups:
                if group[0][2].lattice.matches(member[2].lattice):
                    group.append(member)
                    break
            else:
                groups.append([member])
        self.groups = [BitGroup(members, self.depth, cache, label, reader, retry_policy) for members in groups]
        self.patches: Patches | None = None
        self.regions: list[Region] = []

    @property
    def levels(self) -> list[Level]:
        """The levels that are read."""
        return [reader.level for group in self.groups for _, reader, _ in group.members]

    @property
    def lattices(self) -> list[Lattice]:
        """Their lattices; one, unless classes of the crop differ."""
        return [group.lattice for group in self.groups]

    def place(
        self, window: Window, straight: Window, placement: Placement, plane: FloatArray | None, roaming: bool
    ) -> None:
        """Say where patches are read; see `Patches`.

        Args:
            window: a patch, along its own axes.
            straight: the same along the axes of the volume.
            placement: the positions.
            plane: how the patch's axes lie in the volume.
            roaming: patches are turned by other than quarter turns.
        """
        sources = [group.region for group in self.groups]
        if self.downsample == "stored" and len(self.groups) == 1:
            group = self.groups[0]
            key = (*sources[0].key, self.depth_out, repr(self.implications.identity))  # type: ignore[misc]
            region = Region(
                group.lattice.shape, group.chunks, np.dtype(np.uint8), self._decode, self.cache, key, self.depth_out,
                group.stamp, self.identity, f"{self.label}: {len(group.members)} classes",
            )  # fmt: skip
            patches = Patches(region, group.lattice, window, placement, _Nearest(region, group.lattice), plane)
            if patches.sliced:
                self.patches, self.regions = patches, [region]
                return
        box = self.lattices[0].box
        for lattice in self.lattices[1:]:
            box = box.union(lattice.box)
        again = Resampled(self, box, straight, placement, np.dtype(np.uint8), self.depth_out, self.cache, self.label)
        self.patches = again.patches(window, placement, plane)
        self.regions = [again.region] if self.patches.sliced else []
        if roaming or not self.patches.sliced:
            self.regions += sources

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """The packed voxels of a box of the only lattice, with what they imply."""
        packed = self.groups[0].decode(start, shape)
        if self.implications:
            self.implications.apply(packed)
        return packed[..., : self.depth_out]

    def evaluate(self, where: MapTo, out: AnyArray, fill: float) -> None:
        """Write a packed patch to ``out`` ``[z, y, x, bytes]``; zero where nothing is known."""
        whole = out if self.depth == self.depth_out else np.empty((*out.shape[:3], self.depth), np.uint8)
        for number, group in enumerate(self.groups):
            amap = where(group.lattice)
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

    def stamp(self, box: Box) -> int:
        """See `ChunkReader.stamp`, of all classes in a physical box."""
        found = ((group, stored_box(group.lattice, box, 1)) for group in self.groups)
        return mixed(group.stamp(*part) for group, part in found if part is not None)

    def identity(self) -> tuple[object, ...]:
        """What the voxels follow from."""
        groups = [group.identity() for group in self.groups]
        return "labels", self.downsample, self.depth_out, self.implications.identity, groups


class _Nearest:
    """The nearest voxels of a region.

    Args:
        region: the region.
        lattice: where its voxels are.
    """

    def __init__(self, region: Region, lattice: Lattice) -> None:
        self.region, self.lattice = region, lattice

    @property
    def lattices(self) -> list[Lattice]:
        return [self.lattice]

    def evaluate(self, where: MapTo, out: AnyArray, fill: float) -> None:
        evaluate(self.region, where(self.lattice), out, method="nearest", fill=fill)

    def stamp(self, box: Box) -> int:
        found = stored_box(self.lattice, box, 1)
        return self.region.stamp(*found) if found is not None and self.region.stamp is not None else 1

    def identity(self) -> tuple[object, ...]:
        return self.region.identity() if self.region.identity is not None else ()


def mixed(stamps: Iterable[int]) -> int:
    """One stamp of several."""
    found = 0
    for stamp in stamps:
        found = (found * 0x100000001B3 ^ stamp) & 0xFFFFFFFFFFFFFFFF
    return found or 1


def _vote(region: Region, amap: AffineMap, out: np.ndarray[Any, Any], rule: Downsample) -> None:
    """Each output voxel from all the stored voxels that it covers; present bits in even bytes, known ones in odd."""
    parts = np.maximum(np.ceil(np.linalg.norm(amap.matrix, axis=0) - 1e-3), 1).astype(int)
    votes = np.zeros((*out.shape[:3], 8 * out.shape[3]), np.uint32)
    sample = np.empty(out.shape, np.uint8)
    for part in np.ndindex(*parts):
        shift = (np.asarray(part) + 0.5) / parts - 0.5
        moved = AffineMap(amap.matrix, amap.offset + amap.matrix @ shift, amap.shape, amap.first)
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
        encodings: how its arrays are read; by default as their metadata and values say.
        reader: see `chunks.Reader`.
        retry_policy: how long an object is tried for.
    """

    def __init__(
        self,
        images: Mapping[str, Multiscale],
        classes: Sequence[str],
        window: Window,
        cache: ChunkCache,
        label: str,
        encodings: LabelEncodings | None = None,
        reader: Reader = "zarr",
        retry_policy: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        self.cache = cache
        self.label = label
        self.dtype = id_dtype(images)
        self.members = label_members(images, classes, window, label, "stored", encodings or LabelEncodings(label))
        self._stored = []
        for _, name, level, encoding in self.members:
            decoder = _IdDecoder(
                ChunkReader(level, f"{label}/{name}", reader, retry_policy, encoding.empty), encoding, self.dtype
            )
            key = ("ids", identity_of(level.path), encoding, str(self.dtype))
            self._stored.append(
                Region(
                    decoder.reader.shape, chunk_shape([decoder.reader]), self.dtype, decoder, cache, key,
                    stamp=decoder.reader.stamp, identity=decoder.identity, name=f"{label}/{name}",
                )
            )  # fmt: skip
        self.patches: list[Patches] = []
        self.regions: list[Region] = []

    @property
    def levels(self) -> list[Level]:
        """The levels that are read."""
        return [level for _, _, level, _ in self.members]

    @property
    def lattices(self) -> list[Lattice]:
        """The lattices of the levels that are read."""
        return [level.lattice for level in self.levels]

    def place(
        self, window: Window, straight: Window, placement: Placement, plane: FloatArray | None, roaming: bool
    ) -> None:
        """Say where patches are read; see `BitStack.place`."""
        self.patches, self.regions = [], []
        for region, lattice in zip(self._stored, self.lattices, strict=True):
            source = _Nearest(region, lattice)
            patches = Patches(region, lattice, window, placement, source, plane)
            self.regions.append(region)
            if not patches.sliced:
                again = Resampled(source, lattice.box, straight, placement, self.dtype, 0, self.cache, self.label)
                patches = again.patches(window, placement, plane)
                if patches.sliced:
                    self.regions[-1:] = [again.region, region] if roaming else [again.region]
            self.patches.append(patches)

    def read_into(self, place: tuple[int, int, int], out: AnyArray, turn: FloatArray | None) -> None:
        """Write the ids at a place to ``out`` ``[C, z, y, x]``; -1 where nothing is known. See `Patches`."""
        if len(self.members) < len(out):
            out[...] = UNKNOWN_ID
        for patches, (index, _, _, _) in zip(self.patches, self.members, strict=True):
            patches.read_into(place, out[index], turn, UNKNOWN_ID)


class _IdDecoder:
    """Stored ids with unknown as -1 and absent as 0."""

    def __init__(self, reader: ChunkReader, encoding: Encoding, dtype: np.dtype[Any]) -> None:
        self.reader, self.encoding, self.dtype = reader, encoding, dtype

    def identity(self) -> tuple[object, ...]:
        """What the ids follow from."""
        return "ids", self.reader.identity(), self.encoding, str(self.dtype)

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
