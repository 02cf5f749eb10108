"""The arrays of a prediction, written in whole chunks, and their coarser levels."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.codecs

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.io.downsampling import downsample_mean, downsample_mode
from cellmap_lightning.io.integrity import Encoded
from cellmap_lightning.io.object_folder import ObjectFolder, OutputPath, zarr_location
from cellmap_lightning.io.plain_chunks import PlainChunks
from cellmap_lightning.io.writer import ZarrFormat, codec_of, create_level
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.durable import flush
from cellmap_lightning.prediction.pyramid import Pyramid, Units, coarser, units_within
from cellmap_lightning.prediction.quantize import StoredValues

#: Level of zstd. At 5, probabilities of membranes take 5 % less space and six times as long: 32 MB/s per core.
ZSTD_LEVEL = 2


class OutputLevels:
    """The arrays ``<path>/<class>/s0..`` of a prediction; see docs/prediction.md.

    Args:
        path: folder of the output.
        grid: the voxels, in blocks.
        values: the conversion to stored values.
        chunks: voxels of a chunk.
        shards: voxels of a shard, for Zarr v3; None without shards.
        zarr_format: 2 or 3.
        pyramid: the levels.
        compression: level of zstd.
    """

    def __init__(
        self,
        path: OutputPath,
        grid: BlockGrid,
        values: StoredValues,
        chunks: Shape,
        shards: Shape | None,
        zarr_format: ZarrFormat,
        pyramid: Pyramid,
        compression: int = ZSTD_LEVEL,
    ) -> None:
        self.path, self.grid, self.values, self.pyramid = path, grid, values, pyramid
        self.chunks, self.shards, self.compression = chunks, shards, compression
        self.zarr_format: ZarrFormat = zarr_format
        #: Chunk files are read and written directly, without zarr-python.
        self._plain = zarr_format == 2 and not isinstance(path, ObjectFolder)
        self._arrays: dict[tuple[str, int], zarr.Array[Any]] = {}
        self._coarser = downsample_mode if values.kind == "labels" else downsample_mean

    def create(self, name: str, level: int, attributes: dict[str, Any] | None) -> None:
        """Create the array of a level, with attributes."""
        codec = codec_of("zstd", self.zarr_format, self.compression)
        if self.zarr_format == 3:
            codec = [codec, zarr.codecs.Crc32cCodec()]
        create_level(
            self.path / name / f"s{level}", self.pyramid.level_shape(level), self.values.dtype, self.chunks,
            self.zarr_format, codec, self.shards, attributes=attributes,
        )  # fmt: skip

    def array(self, name: str, level: int = 0) -> zarr.Array[Any]:
        """Return the array of a level of a class."""
        if (name, level) not in self._arrays:
            path = self.path / name / f"s{level}"
            self._arrays[name, level] = zarr.open_array(zarr_location(path), mode="r+", zarr_format=self.zarr_format)
        return self._arrays[name, level]

    def _files(self, name: str, level: int) -> PlainChunks:
        """Return the chunk files of a level in Zarr v2."""
        return PlainChunks(self.array(name, level), str(self.path / name / f"s{level}"))

    def _coarse(self, name: str, level: int, box: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Return the downsampled voxels of a box of a level.

        The box begins at the first voxel of a chunk, and consists of whole voxels of the next level.
        """
        array, step = self.array(name, level), self.pyramid.steps[level]
        if not self._plain or any(c % f for c, f in zip(self.chunks, step, strict=True)):
            return np.asarray(coarser(np.asarray(array[box]), self._coarser, step))
        # Chunk by chunk, so that each is downsampled while it is in the processor's cache.
        files = self._files(name, level)
        encoded = Encoded(files.codec.codec_id, math.prod(self.chunks) * self.values.dtype.itemsize)
        coarse = np.empty([(p.stop - p.start) // f for p, f in zip(box, step, strict=True)], self.values.dtype)
        along = [range(p.start, p.stop, c) for p, c in zip(box, self.chunks, strict=True)]
        for start in product(*along):
            chunk = tuple(slice(a, min(a + c, n)) for a, c, n in zip(start, self.chunks, array.shape, strict=True))
            voxels = files.read(chunk, encoded)
            if voxels is None:  # only the fill value, or an error that zarr-python reports
                voxels = np.asarray(array[chunk])
            inside = voxels[tuple(slice(0, p.stop - a) for a, p in zip(start, box, strict=True))]
            first = tuple(slice((a - p.start) // f, None) for a, p, f in zip(start, box, step, strict=True))
            target = coarse[first][tuple(slice(0, n // f) for n, f in zip(inside.shape, step, strict=True))]
            target[...] = coarser(inside, self._coarser, step)
        return coarse

    def _put(self, name: str, level: int, units: Units, origin: Sequence[int], data: npt.NDArray[Any]) -> list[str]:
        """Write whole chunks (or shards) of a level, and return the files to flush.

        Args:
            name: the class.
            level: the level.
            units: indices of the chunks (or shards).
            origin: first voxel of ``data``.
            data: voxels that contain those of the chunks.
        """
        unit = self.shards or self.chunks
        boxes = [
            [slice(i * u, min((i + 1) * u, n)) for i in range(part.start, part.stop)]
            for part, u, n in zip(units, unit, self.pyramid.level_shape(level), strict=True)
        ]
        array, root = self.array(name, level), str(self.path / name / f"s{level}")
        if self._plain:
            chunks, files = self._files(name, level), []
            for box in product(*boxes):
                here = tuple(slice(p.start - o, p.stop - o) for p, o in zip(box, origin, strict=True))
                index = [p.start // u for p, u in zip(box, unit, strict=True)]
                chunks.write(index, data[here])
                files.append(chunks.file(index))
            return files
        whole = [slice(parts[0].start, parts[-1].stop) for parts in boxes]
        here = tuple(slice(p.start - o, p.stop - o) for p, o in zip(whole, origin, strict=True))
        array[tuple(whole)] = data[here]
        if isinstance(self.path, ObjectFolder):  # objects are durable already
            return []
        return [f"{root}/c/{z}/{y}/{x}" for z, y, x in product(*(range(p.start, p.stop) for p in units))]

    def put_block(self, name: str, number: int, data: npt.NDArray[Any]) -> list[str]:
        """Write a block of a class, and the coarser chunks that it determines; return the files."""
        start, _ = self.grid[number]
        files: list[str] = []
        for level in range(self.pyramid.levels):
            units = units_within(self.grid, number, self.pyramid.factors(level), self.shards or self.chunks)
            if units is None:  # nor are there any in coarser levels
                break
            if level:
                data = coarser(data, self._coarser, self.pyramid.steps[level - 1])
            origin = [a // f for a, f in zip(start, self.pyramid.factors(level), strict=True)]
            files += self._put(name, level, units, origin, data)
        return files

    def make(self, level: int, name: str, index: Shape) -> None:
        """Compute a chunk (or shard) of a level from the finer level, and flush it to the disk."""
        unit = self.shards or self.chunks
        start = [i * u for i, u in zip(index, unit, strict=True)]
        stop = [min(a + u, n) for a, u, n in zip(start, unit, self.pyramid.level_shape(level), strict=True)]
        step = self.pyramid.steps[level - 1]
        fine = tuple(slice(f * a, f * b) for a, b, f in zip(start, stop, step, strict=True))
        z, y, x = (slice(i, i + 1) for i in index)
        flush(self._put(name, level, (z, y, x), start, self._coarse(name, level - 1, fine)))
