"""Presence of the classes of a crop, read together as bits, and what all stored labels share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import MapTo, Patches, Resampled, stored_box
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.geometry.lattice import Box, FloatArray, Lattice, Shape
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import AnyArray, evaluate
from cellmap_lightning.geometry.sample_map import VoxelMap
from cellmap_lightning.io.array_reader import ArrayReader, chunk_shape
from cellmap_lightning.io.chunk_files import location_of
from cellmap_lightning.io.chunks import Reader
from cellmap_lightning.io.label_values import CODE, read_labels
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale, read_encoding
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.targets import pack, packed_bytes

#: Downsampling of labels: the stored level, or the majority, or any, of the finest level's voxels.
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
    """Return position, name, level and encoding of each class that is read.

    Raises:
        CellMapError: a level or an encoding cannot be read; the message names the class.
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
                # Voxels are counted at the finest level: decided now, so that an error is raised at setup.
                encodings.of(name, image, image.finest)
            members.append((order.index(name), name, level, encoding))
        except CellMapError as e:
            if f"{label}/{name}" not in str(e):
                e.args = (f"{label}, class {name!r}: {e}",)
            raise
    return members


def stored_labels(
    reader: ArrayReader, encoding: Encoding, start: tuple[int, int, int], shape: Shape, begun: Any = None
) -> AnyArray:
    """Read the stored integers of a box; for ``begun`` see `ArrayReader.read`.

    Raises:
        MetadataError: values are not whole numbers, or the encoding is ambiguous or does not explain them.
    """
    stored = read_labels(reader, start, shape, begun)
    where = f"{reader.label}: {reader.level.path}"
    if encoding.ids is not None:
        stored = encoding.ids.decode(stored, where)
    if stored.dtype.kind == "i":
        unexplained = (stored < 0) & (stored != encoding.absent)
        if encoding.unknown is not None:
            unexplained &= stored != encoding.unknown
        if unexplained.any():
            raise MetadataError(
                f"{where} holds the negative label {int(stored[unexplained][0])}, which its "
                f"encoding does not explain (absent {encoding.absent}, unknown {encoding.unknown})"
            )
    if encoding.ambiguous and encoding.unknown is not None and (stored > encoding.unknown).any():
        raise MetadataError(
            f"{where} holds ids above {encoding.unknown}, and nothing says whether "
            f"{encoding.unknown} means unknown or is an instance: its attributes have no complement_counts.unknown. "
            f"Set unknown={encoding.unknown} or unknown=null for this crop or class"
        )
    # The encoding was assumed from a part of the values: a contradicting value makes it ambiguous.
    if encoding.assumed and ((stored == CODE) if encoding.assumed == "ids" else (stored != 0) & (stored != CODE)).any():
        raise MetadataError(
            f"{where} holds {CODE} beside other ids, and no metadata say whether it means unknown or is an id: set "
            f"unknown={CODE} or unknown=null for this crop or class"
        )
    if encoding.missing != "absent":
        stored = _without_missing(reader, encoding, start, stored)
    return stored


def _without_missing(
    reader: ArrayReader, encoding: Encoding, start: tuple[int, int, int], stored: AnyArray
) -> AnyArray:
    """Return the stored labels of a box, with the code of unknown voxels in missing chunks."""
    z, y, x = stored.shape
    missed = reader.missing_chunks(start, (z, y, x), stored)
    if encoding.missing == "empty":
        missed = [index for index in missed if reader.is_empty(index)]
    code = encoding.unknown
    if not missed or code is None:
        return stored
    fits = stored.dtype.kind in "iu" and np.iinfo(stored.dtype).min <= code <= np.iinfo(stored.dtype).max
    stored = stored.copy() if fits else stored.astype(np.int64)
    size = reader.level.zyx(reader.level.array.files)
    for index in missed:
        corner = np.subtract(reader.file_start(reader.level.zyx(index)), start)
        box = tuple(slice(max(0, int(c)), max(0, int(c) + f)) for c, f in zip(corner, size, strict=True))
        stored[box] = code
    return stored


class BitGroup:
    """Classes of a crop that share a lattice, as one array of packed voxels.

    Args:
        members: position, name, level and encoding of each class.
        depth: bytes of a packed voxel.
        cache: cache of single chunks, used without a mapping.
        label: name of the crop in messages.
        reader: see `chunks.Reader`.
        retry_policy: retries and timeouts of reads.
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
            (index, open_reader(level, f"{label}/{name}", reader, retry_policy, code.empty), code)
            for index, name, level, code in members
        ]
        self.chunks = chunk_shape([reader for _, reader, _ in self.members])
        key = ("bits", depth, *((index, location_of(level), encoding) for index, _, level, encoding in members))
        self.region = Region(
            self.lattice.shape, self.chunks, np.dtype(np.uint8), self.decode, cache, key, depth, self.stamp,
            self.identity,
        )  # fmt: skip

    def decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """Return the packed voxels of a box."""
        # Reads of all classes are started first, so that they overlap.
        begun = [reader.begin(start, shape) for _, reader, _ in self.members]
        stored = (
            (index, stored_labels(reader, encoding, start, shape, ahead), encoding.absent, encoding.unknown)
            for (index, reader, encoding), ahead in zip(self.members, begun, strict=True)
        )
        return pack(stored, shape, self.depth)

    def stamp(self, start: tuple[int, int, int], shape: Shape) -> int:
        """Return one stamp of all classes; see `ArrayReader.stamp`."""
        return mixed(reader.stamp(start, shape) for _, reader, _ in self.members)

    def identity(self) -> tuple[object, ...]:
        """Return everything that the voxels depend on."""
        return "bits", *((index, reader.identity(), encoding) for index, reader, encoding in self.members)


class BitStack:
    """Presence of the annotated classes of a crop at the resolution of one target; see docs/targets.md.

    Args:
        images: the multiscale label image of each class that is read.
        implications: the classes that are read, and their implications.
        count: number of requested classes, the first of those that are read.
        window: the target's patch in the volume's directions, from which the level follows.
        cache: cache of single chunks, used without a mapping.
        label: name of the crop in messages.
        downsample: see `Downsample`.
        encodings: encodings of its arrays; by default from their metadata and values.
        reader: see `chunks.Reader`.
        retry_policy: retries and timeouts of reads.
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
        """The lattices of these levels, each once; one unless classes of the crop differ."""
        return [group.lattice for group in self.groups]

    def place(
        self, window: Window, straight: Window, placement: Placement, plane: FloatArray | None, roaming: bool
    ) -> None:
        """Plan how patches are read; see `Patches`.

        Args:
            window: a patch, along the patch's axes.
            straight: the same along the axes of the volume.
            placement: the positions.
            plane: matrix from the patch's axes to the volume's; None if they are the same.
            roaming: patches may be other than slices: rotated by any angle, zoomed, sheared or displaced.
        """
        # Without downsampling, a single group aligned with the patches is sliced; everything else is resampled.
        sources = [group.region for group in self.groups]
        if self.downsample == "stored" and len(self.groups) == 1:
            group = self.groups[0]
            key = (*sources[0].key, self.depth_out, repr(self.implications.identity))  # type: ignore[misc]
            region = Region(
                group.lattice.shape, group.chunks, np.dtype(np.uint8), self._decode, self.cache, key, self.depth_out,
                group.stamp, self.identity, f"{self.label}: {len(group.members)} classes",
            )  # fmt: skip
            patches = Patches(region, group.lattice, window, placement, Nearest(region, group.lattice), plane)
            if patches.sliced:
                self.patches, self.regions = patches, [region]
                return
        box = self.lattices[0].box
        for lattice in self.lattices[1:]:
            box = box.union(lattice.box)
        dtype = np.dtype(np.uint8)
        resampled = Resampled(self, box, straight, placement, dtype, self.depth_out, self.cache, self.label)
        turned = any(lattice.turn is not None for lattice in self.lattices)
        self.patches = Patches(resampled.region, resampled.lattice, window, placement, self, plane, computed=True)
        if not turned:
            self.patches = resampled.patches(window, placement, plane)
        self.regions = [resampled.region] if self.patches.sliced else []
        if roaming or not self.patches.sliced:
            self.regions += sources

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        """Return the packed voxels of a box, with implied ones; only for a single lattice."""
        packed = self.groups[0].decode(start, shape)
        if self.implications:
            self.implications.apply(packed)
        return packed[..., : self.depth_out]

    def evaluate(self, where: MapTo, out: AnyArray, fill: float) -> None:
        """Write a packed patch to ``out`` ``[z, y, x, bytes]``; 0 where unannotated."""
        whole = out if self.depth == self.depth_out else np.empty((*out.shape[:3], self.depth), np.uint8)
        for number, group in enumerate(self.groups):
            amap = where(group.lattice)
            part = whole if number == 0 else np.empty(whole.shape, np.uint8)
            if self.downsample == "stored":
                evaluate(group.region, amap, part, method="nearest", fill=0)
            else:
                _vote(group.region, amap, part, self.downsample)
            if number:
                # Groups hold different classes, whose bits are 0 in the other groups.
                whole |= part
        if self.implications:
            self.implications.apply(whole)
        if whole is not out:
            out[...] = whole[..., : self.depth_out]

    def stamp(self, box: Box) -> int:
        """Return one stamp of all classes in a physical box; see `ArrayReader.stamp`."""
        boxes = ((group, stored_box(group.lattice, box, 1)) for group in self.groups)
        return mixed(group.stamp(*voxels) for group, voxels in boxes if voxels is not None)

    def identity(self) -> tuple[object, ...]:
        """Return everything that the voxels depend on."""
        groups = [group.identity() for group in self.groups]
        return "labels", self.downsample, self.depth_out, self.implications.identity, groups


class Nearest:
    """A region as a `Source` with nearest-neighbour interpolation.

    Args:
        region: the region.
        lattice: its lattice.
    """

    def __init__(self, region: Region, lattice: Lattice) -> None:
        self.region, self.lattice = region, lattice

    @property
    def lattices(self) -> list[Lattice]:
        """The lattice of its voxels, in a list."""
        return [self.lattice]

    def evaluate(self, where: MapTo, out: AnyArray, fill: float) -> None:
        """Write a patch to ``out``: the nearest voxels."""
        evaluate(self.region, where(self.lattice), out, method="nearest", fill=fill)

    def stamp(self, box: Box) -> int:
        """Return the stamp of a physical box; see `ChunkReader.stamp`."""
        voxels = stored_box(self.lattice, box, 1)
        return self.region.stamp(*voxels) if voxels is not None and self.region.stamp is not None else 1

    def identity(self) -> tuple[object, ...]:
        """Return everything that the voxels depend on."""
        return self.region.identity() if self.region.identity is not None else ()


def mixed(stamps: Iterable[int]) -> int:
    """Return one stamp that changes when any of several does; never 0."""
    combined = 0
    for stamp in stamps:
        combined = (combined * 0x100000001B3 ^ stamp) & 0xFFFFFFFFFFFFFFFF  # as in the FNV-1 hash
    return combined or 1


def _vote(region: Region, amap: VoxelMap, out: np.ndarray[Any, Any], rule: Downsample) -> None:
    """Downsample packed voxels: each output voxel is decided by the stored voxels that it covers.

    Args:
        region: the stored voxels.
        amap: map from the patch's voxels to those of the region.
        out: ``[z, y, x, bytes]``, present bits in even bytes, known bits in odd ones.
        rule: ``majority`` or ``any``.
    """
    # An output voxel is sampled at as many evenly spaced points as it covers stored voxels along each axis.
    parts = np.maximum(np.ceil(np.linalg.norm(amap.matrix, axis=0) - 1e-3), 1).astype(int)
    votes = np.zeros((*out.shape[:3], 8 * out.shape[3]), np.uint32)
    sample = np.empty(out.shape, np.uint8)
    for part in np.ndindex(*parts):
        shift = (np.asarray(part) + 0.5) / parts - 0.5
        evaluate(region, amap.shifted(shift), sample, method="nearest", fill=0)
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
