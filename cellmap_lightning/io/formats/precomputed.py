"""Neuroglancer precomputed volumes, read with TensorStore.

Specification: https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/volume.md. Lengths are nm,
axes are listed as x, y, z, and ``voxel_offset`` counts voxels from the origin to the corner of voxel 0. Chunk
files that end in ``.gz``, as CloudVolume writes them to local disks, are unpacked into memory first.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError, missing_extra
from cellmap_lightning.geometry.grids import touched_cells
from cellmap_lightning.geometry.lattice import Vector, to_vector
from cellmap_lightning.geometry.resample import AnyArray
from cellmap_lightning.io.formats.chunk_folders import suffix_of_chunks
from cellmap_lightning.io.formats.open_files import OPEN_FILES
from cellmap_lightning.io.formats.stored_bytes import stored_bytes
from cellmap_lightning.io.formats.volume import FormatArray, FormatLevel, FormatVolume
from cellmap_lightning.io.store import StorePath, read_json
from cellmap_lightning.io.tensorstore_driver import check_process, kvstore

INFO = "info"


class PrecomputedFormat:
    """Precomputed images and segmentations, local and remote, sharded or not."""

    name = "Neuroglancer precomputed"
    suffixes: tuple[str, ...] = ()

    def matches(self, path: StorePath) -> bool:
        """Return whether a location has an ``info`` file that lists scales."""
        try:
            return "scales" in (read_json(path / INFO) or {})
        except MetadataError:
            return False

    def open(self, path: StorePath) -> FormatVolume:
        """Read the ``info`` file.

        Raises:
            MissingExtraError: TensorStore is not installed.
            MetadataError: the file is malformed.
        """
        try:
            import tensorstore  # noqa: F401
        except ImportError:
            raise missing_extra("precomputed", f"{path}: precomputed volumes need TensorStore") from None
        info = read_json(path / INFO) or {}
        scales = info["scales"]
        if not isinstance(scales, list) or not scales or not all(isinstance(scale, dict) for scale in scales):
            raise MetadataError(f"{path / INFO}: scales should list the resolutions, got {scales!r}")
        levels = []
        for number, scale in enumerate(scales):
            try:
                size, offset = _zyx(scale["resolution"]), _zyx(scale.get("voxel_offset", (0, 0, 0)))
                array = _PrecomputedArray(path, info, scale, number)
            except (KeyError, TypeError, ValueError) as e:
                raise MetadataError(f"{path / INFO}: scale {number} is malformed ({e!r})") from e
            center = (np.asarray(offset) + 0.5) * size
            levels.append(FormatLevel(str(scale["key"]), array, "zyxc", size, to_vector(center)))
        return FormatVolume(tuple(levels), attributes=info)

    def children(self, path: StorePath) -> list[str]:
        """Return no names: a location holds one volume."""
        return []


class _PrecomputedArray(FormatArray):
    """One scale of a volume."""

    forks = False  # TensorStore's threads do not survive a fork

    def __init__(self, path: StorePath, info: Mapping[str, Any], scale: Mapping[str, Any], number: int) -> None:
        channels = int(info.get("num_channels", 1))
        shape = (*map(int, _zyx(scale["size"])), channels)
        chunks = (*map(int, _zyx(scale["chunk_sizes"][0])), channels)
        self.number, self.key_of_scale = number, str(scale["key"])
        self.offset = tuple(map(int, _zyx(scale.get("voxel_offset", (0, 0, 0)))))
        self.is_sharded = scale.get("sharding") is not None
        super().__init__(
            path / self.key_of_scale, shape, info["data_type"], chunks, container=path, attributes=scale,
            codec=str(scale["encoding"]), details=(number, scale),
        )  # fmt: skip
        self.info = dict(info)
        #: Suffix of the chunk files.
        self.suffix = suffix_of_chunks(self.path, self._name((0, 0, 0)), self.is_sharded, self._is_chunk)

    @property
    def metadata(self) -> StorePath:
        return self.container / INFO

    def key(self, index: Sequence[int]) -> str:
        if self.is_sharded:
            return ""
        return self._name(index) + self.suffix

    def _name(self, index: Sequence[int]) -> str:
        """Return the name of a chunk without the suffix of its file."""
        low = np.multiply(index[:3], self.chunks[:3])
        high = np.minimum(low + self.chunks[:3], self.shape[:3])
        return "_".join(f"{a}-{b}" for a, b in zip((low + self.offset)[::-1], (high + self.offset)[::-1], strict=True))

    def _is_chunk(self, name: str) -> bool:
        """Return whether a name is that of a chunk of the grid."""
        corner = [int(start) for start in re.findall(r"(-?\d+)--?\d+", name)][::-1]
        index = np.floor_divide(np.subtract(corner, self.offset), self.chunks[:3])
        grid = -(-np.array(self.shape[:3]) // self.chunks[:3])
        return bool((index >= 0).all() and (index < grid).all()) and self._name(index.tolist()) == name

    def file(self, index: Sequence[int]) -> str:
        """Return the file of a chunk; of a sharded scale its folder, which changes when a shard is replaced."""
        key = self.key(index)
        return str(self.path / key) if key else str(self.path)

    def read(self, start: Sequence[int], shape: Sequence[int]) -> AnyArray:
        check_process(str(self.path))
        low = np.add(start[:3], self.offset)
        box = tuple(slice(int(a), int(a) + n) for a, n in zip(low[::-1], shape[2::-1], strict=True))
        if self.suffix:
            stored = np.asarray(self._unpacked(start, shape)[box].read().result())
            return stored.transpose(2, 1, 0, 3)
        with OPEN_FILES.use(self._opened, str(self.path)) as store:
            stored = np.asarray(store[box].read().result())  # x, y, z, channel
        return stored.transpose(2, 1, 0, 3)

    def _opened(self, path: str) -> Any:
        import tensorstore

        spec = {"driver": "neuroglancer_precomputed", "kvstore": kvstore(self.container), "scale_index": self.number}
        return tensorstore.open(spec, open=True, read=True).result()

    def _unpacked(self, start: Sequence[int], shape: Sequence[int]) -> Any:
        """Return a store in memory that holds the chunks of a box, without gzip.

        Raises:
            ValueError: a chunk is not a whole gzip stream.
            OSError: it cannot be read.
        """
        import tensorstore

        context = tensorstore.Context()
        memory = tensorstore.KvStore.open("memory://", context=context).result()
        memory["info"] = json.dumps(self.info).encode()
        spans = touched_cells(start[:3], shape[:3], self.chunks[:3])
        for place in np.ndindex(*map(len, spans)):
            name = self._name([span[i] for span, i in zip(spans, place, strict=True)])
            packed = stored_bytes(self.path, name + self.suffix)
            if packed is not None:
                memory[f"{self.key_of_scale}/{name}"] = self._gunzip(name, packed)
        spec = {"driver": "neuroglancer_precomputed", "kvstore": "memory://", "scale_index": self.number}
        return tensorstore.open(spec, context=context, open=True, read=True).result()

    def _gunzip(self, name: str, packed: bytes) -> bytes:
        # No encoding stores a chunk in much more than its voxels, and a damaged file may unpack to any size.
        most = 2 * int(np.prod(self.chunks)) * self.dtype.itemsize + (1 << 16)
        stream = zlib.decompressobj(31)
        try:
            content = stream.decompress(packed, most)
        except zlib.error as e:
            raise ValueError(f"chunk {name}{self.suffix} is not a gzip file ({e})") from e
        if not stream.eof:
            raise ValueError(f"chunk {name}{self.suffix} is cut off, or unpacks to more than {most} bytes")
        return content


def _zyx(values: Sequence[float]) -> Vector:
    x, y, z = values
    return float(z), float(y), float(x)
