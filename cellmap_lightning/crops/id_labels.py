"""Instance ids of the classes of a crop."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import Patches, Resampled
from cellmap_lightning.cache.region import Region
from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.crops.labels import Nearest, label_members, stored_labels
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray, Lattice, Shape
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.geometry.sample_map import Warp
from cellmap_lightning.io.array_reader import ArrayReader, chunk_shape
from cellmap_lightning.io.chunk_files import location_of
from cellmap_lightning.io.chunks import Reader
from cellmap_lightning.io.ngff import Encoding, Level, Multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.transforms.kinds.kind import UNKNOWN_ID, signed


class IdStack:
    """Instance ids of the annotated classes of a crop, -1 where unannotated; see docs/targets.md.

    Args:
        images: the multiscale label image of each annotated class.
        classes: the requested classes.
        window: see `BitStack`.
        cache: see `BitStack`.
        label: see `BitStack`.
        encodings: encodings of its arrays; by default from their metadata and values.
        reader: see `chunks.Reader`.
        retry_policy: retries and timeouts of reads.
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
        self._stored = [
            id_region(level, encoding, self.dtype, f"{label}/{name}", cache, reader, retry_policy)
            for _, name, level, encoding in self.members
        ]
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
        """Plan how patches are read; see `BitStack.place`."""
        self.patches, self.regions = [], []
        for region, lattice in zip(self._stored, self.lattices, strict=True):
            source = Nearest(region, lattice)
            patches = Patches(region, lattice, window, placement, source, plane)
            self.regions.append(region)
            if not patches.sliced and lattice.turn is None:
                resampled = Resampled(source, lattice.box, straight, placement, self.dtype, 0, self.cache, self.label)
                patches = resampled.patches(window, placement, plane)
                if patches.sliced:
                    self.regions[-1:] = [resampled.region, region] if roaming else [resampled.region]
            self.patches.append(patches)

    def read_into(
        self, place: tuple[int, int, int], out: AnyArray, turn: FloatArray | None, warp: Warp | None = None
    ) -> None:
        """Write the ids at a place to ``out`` ``[C, z, y, x]``; -1 where unannotated. See `Patches`."""
        if len(self.members) < len(out):
            out[...] = UNKNOWN_ID
        for patches, (index, _, _, _) in zip(self.patches, self.members, strict=True):
            patches.read_into(place, out[index], turn, UNKNOWN_ID, warp)


class _IdDecoder:
    """Decoder of stored ids, with -1 for unknown and 0 for absent voxels."""

    def __init__(self, reader: ArrayReader, encoding: Encoding, dtype: np.dtype[Any]) -> None:
        self.reader, self.encoding, self.dtype = reader, encoding, dtype

    def identity(self) -> tuple[object, ...]:
        """Return everything that the ids depend on."""
        return "ids", self.reader.identity(), self.encoding, str(self.dtype)

    def __call__(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        stored = stored_labels(self.reader, self.encoding, start, shape)
        if stored.dtype == np.uint64 and (stored > np.iinfo(np.int64).max).any():
            raise CellMapValueError(
                f"{self.reader.label}: {self.reader.level.path} holds ids above 2^63 - 1; ids must fit into int64"
            )
        ids = stored.astype(self.dtype)
        if self.encoding.absent != 0:
            ids[stored == self.encoding.absent] = 0
        if self.encoding.unknown is not None:
            ids[stored == self.encoding.unknown] = UNKNOWN_ID
        return ids


def id_region(
    level: Level,
    encoding: Encoding,
    dtype: np.dtype[Any],
    label: str,
    cache: ChunkCache,
    reader: Reader = "zarr",
    retry_policy: RetryPolicy = DEFAULT_RETRY,
) -> Region:
    """Return the ids of one label array: 0 where the class is absent, -1 where it is unannotated.

    Args:
        level: the stored array.
        encoding: the meaning of its values.
        dtype: a signed type that holds its ids, see `id_dtype`.
        label: name of crop and class, for messages.
        cache: cache of single chunks, used without a mapping.
        reader: see `chunks.Reader`.
        retry_policy: retries and timeouts of reads.
    """
    decoder = _IdDecoder(open_reader(level, label, reader, retry_policy, encoding.empty), encoding, dtype)
    key = ("ids", location_of(level), encoding, str(dtype))
    return Region(
        decoder.reader.shape, chunk_shape([decoder.reader]), dtype, decoder, cache, key,
        stamp=decoder.reader.stamp, identity=decoder.identity, name=label,
    )  # fmt: skip


def id_dtype(images: Mapping[str, Multiscale]) -> np.dtype[Any]:
    """Return the signed type that holds the ids of all images."""
    kinds = [signed(image.finest.array.dtype) for image in images.values()]
    return max(kinds, key=lambda k: k.itemsize, default=np.dtype(np.int16))
