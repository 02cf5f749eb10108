"""The steps of a segmentation that process one block: label, join, write.

1. ``label``: read the block with its halo, segment it, and store the numbers of its objects (from 1 in each block), the
   planes of numbers on both sides of its faces, and the measures of the objects.
2. ``join``: compare the planes of a block with those of its neighbours towards larger z, y, x, and store the pairs of
   objects that are one. With `BlockSegmenter.exact_joins` two objects are one if they share a voxel of the halo;
   otherwise, if on the two planes next to the face their intersection over union is above ``overlap``: both blocks
   have segmented these planes, each with its halo.
3. ``write``: replace the numbers of the block by final ids, and write its chunks and the coarser ones.

Where holes are filled, the background is numbered too, after the objects: its 6-connected components are joined across
faces, and the objects that they touch are stored.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import Shape
from cellmap_lightning.instances.block_files import Arrays, BlockFiles
from cellmap_lightning.instances.components import label_components
from cellmap_lightning.instances.measures import measure
from cellmap_lightning.instances.segmenter import BlockSegmenter
from cellmap_lightning.instances.source import SegmentationSource
from cellmap_lightning.io.writer import ZarrFormat
from cellmap_lightning.prediction.blocks import BlockGrid
from cellmap_lightning.prediction.durable import flush
from cellmap_lightning.prediction.output_levels import OutputLevels
from cellmap_lightning.prediction.pyramid import Pyramid
from cellmap_lightning.prediction.quantize import StoredValues

Array = npt.NDArray[Any]
Slices = tuple[slice, slice, slice]
#: The file with the final id of each number of each block.
IDS = "ids.npy"


class ObjectIds(StoredValues):
    """The storage type of ids, whose pyramid is made of the most frequent values.

    Args:
        dtype: an unsigned integer.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        super().__init__("labels")
        self.dtype = np.dtype(dtype)


@dataclass(frozen=True, eq=False)
class BlockTasks:
    """The steps of each block, in any process; see the module.

    Attributes:
        source: the input.
        segmenter: the method.
        grid: the blocks.
        folder: folder of the journal, for intermediate files.
        output: the output.
        chunks: voxels of a chunk.
        shards: voxels of a shard, or None.
        zarr_format: 2 or 3.
        pyramid: the levels.
    """

    source: SegmentationSource
    segmenter: BlockSegmenter
    grid: BlockGrid
    folder: Path
    output: Path
    chunks: Shape
    shards: Shape | None
    zarr_format: ZarrFormat
    pyramid: Pyramid

    def files(self, kind: str) -> BlockFiles:
        """Return the intermediate files of a kind: ``labels``, ``faces`` or ``pairs``."""
        return BlockFiles(self.folder, kind)

    # -- label

    def label(self, number: int) -> list[int]:
        """Segment a block.

        Returns:
            The numbers of its objects and of its components of the background, a stamp, and the number of its
            unannotated voxels.
        """
        start, shape = self.grid[number]
        lower, extent, core = self._with_halo(start, shape)
        stamp = self.source.stamp(lower, extent)  # before it is read, so that a later change is noticed
        labels = self._segment(lower, extent)
        margin = _widened(core, labels.shape)
        inside = tuple(slice(c.start - m.start, c.stop - m.start) for c, m in zip(core, margin, strict=True))
        numbers = np.ascontiguousarray(labels[margin])
        del labels
        holes = label_components(numbers == 0, 6) if self.segmenter.options.fill_holes else None
        objects, background = _renumber(numbers, inside), 0
        if holes is not None:
            background = _renumber(holes, inside)
            holes[holes > 0] += np.uint32(objects)
            numbers += holes
            del holes
        faces = _planes(numbers, inside)
        block = _compacted(numbers, inside)
        faces |= measure(block, objects + background, start, self.grid.shape).as_arrays()
        unknown = self.source.unknown(start, shape)
        if unknown is not None and background:  # what they hide is not known: their background is no hole
            faces["border"][np.unique(block[unknown]) - 1] += 1
        faces["objects"] = np.array([objects])
        faces["touching"] = _touching(block, objects) if background else np.empty((0, 2), np.uint32)
        flush([self.files("labels").write(number, {"labels": block}), self.files("faces").write(number, faces)])
        return [objects, background, stamp, 0 if unknown is None else int(np.count_nonzero(unknown))]

    def _segment(self, start: Shape, shape: Shape) -> npt.NDArray[np.uint32]:
        """Return the objects of a box; `components` need a mask alone, which is made of some planes at a time."""
        if self.segmenter.method != "components":
            return self.segmenter(self.source.read(start, shape))
        mask, depth = np.empty(shape, bool), self.source.depth
        begin = start[0]
        while begin < start[0] + shape[0]:  # to the end of a chunk, so that each is decoded once
            end = min((begin // depth + 1) * depth, start[0] + shape[0])
            values = self.source.read((begin, start[1], start[2]), (end - begin, shape[1], shape[2]))
            mask[begin - start[0] : end - start[0]] = self.segmenter.mask(values)
            begin = end
        return label_components(mask, self.segmenter.options.connectivity)

    def stamp(self, number: int) -> int:
        """Return the stamp of the stored files that a block is segmented from."""
        lower, extent, _ = self._with_halo(*self.grid[number])
        return self.source.stamp(lower, extent)

    def _with_halo(self, start: Shape, shape: Shape) -> tuple[Shape, Shape, Slices]:
        """Return the first voxel and the shape of what is read for a block, and the block inside of it."""
        halo, strides = self.segmenter.halo, self.segmenter.strides
        lower = [max(0, s - h) // n * n for s, h, n in zip(start, halo, strides, strict=True)]
        upper = [min(n, s + c + h) for n, s, c, h in zip(self.grid.shape, start, shape, halo, strict=True)]
        z, y, x = (slice(s - low, s - low + c) for s, low, c in zip(start, lower, shape, strict=True))
        extent = [b - a for a, b in zip(lower, upper, strict=True)]
        return (lower[0], lower[1], lower[2]), (extent[0], extent[1], extent[2]), (z, y, x)

    # -- join

    def join(self, number: int) -> list[int]:
        """Store the pairs of numbers of a block and of its neighbours that are one object; return their number.

        A row of ``same`` is the number in this block, the neighbour, and the number there; one of ``touching`` has
        numbers of objects and background that share a face.
        """
        here = self.files("faces").read(number)
        same: list[Array] = []
        touching: list[Array] = []
        for axis in range(3):
            if self.segmenter.exact_joins:
                same += self._shared(number, here[f"outer{axis}"], axis)
            other = self._neighbour(number, axis, (0, 0))
            if other is None:
                continue
            there = self.files("faces").read(other)
            upper, lower = here[f"upper{axis}"], there[f"lower{axis}"]
            a = upper, _cropped(here[f"outer{axis}"], here[f"inset{axis}"], upper.shape)
            b = _cropped(there[f"before{axis}"], there[f"inset{axis}"], lower.shape), lower
            objects = self._objects(number), self._objects(other)
            if not self.segmenter.exact_joins:
                pairs = _overlapping(np.stack(a), np.stack(b), objects, self.segmenter.options.overlap)
                same.append(_with_block(pairs, other))
            if self.segmenter.options.fill_holes:
                pairs = np.unique(np.stack([a[0].ravel(), b[1].ravel()], axis=1), axis=0)
                empty = pairs[:, 0] > objects[0], pairs[:, 1] > objects[1]
                same.append(_with_block(pairs[empty[0] & empty[1]], other))
                mixed = (empty[0] != empty[1]) & (pairs > 0).all(axis=1)
                touching.append(_with_block(pairs[mixed], other))
        none = np.empty((0, 3), np.int64)
        rows = {"same": np.concatenate([none, *same]), "touching": np.concatenate([none, *touching])}
        flush([self.files("pairs").write(number, rows)])
        return [len(rows["same"])]

    def _objects(self, number: int) -> int:
        """Return the largest number of an object in a block; larger ones are background."""
        return int(self.files("faces").read(number, "objects")["objects"][0])

    def _neighbour(self, number: int, axis: int, aside: tuple[int, int]) -> int | None:
        """Return the next block along an axis, shifted along the others; None outside of the volume."""
        column, z = divmod(number, self.grid.along[0])
        y, x = divmod(column, self.grid.along[2])
        step = list(aside)
        step.insert(axis, 1)
        index = [n + s for n, s in zip((z, y, x), step, strict=True)]
        if any(not 0 <= n < count for n, count in zip(index, self.grid.along, strict=True)):
            return None
        return (index[1] * self.grid.along[2] + index[2]) * self.grid.along[0] + index[0]

    def _shared(self, number: int, outer: Array, axis: int) -> list[Array]:
        """Return the numbers on the plane beyond a face, which has one more voxel on either side, and those there."""
        pairs = []
        start, _ = self.grid[number]
        sides = [other for other in range(3) if other != axis]
        low = [max(0, start[side] - 1) for side in sides]  # of the plane
        for aside in product((-1, 0, 1), repeat=2):
            other = self._neighbour(number, axis, (aside[0], aside[1]))
            if other is None:
                continue
            there = self.files("faces").read(other, f"lower{axis}")[f"lower{axis}"]
            begin, size = self.grid[other]
            first = [max(a, begin[side]) for a, side in zip(low, sides, strict=True)]
            end = [min(a + n, begin[side] + size[side]) for a, n, side in zip(low, outer.shape, sides, strict=True)]
            a = outer[tuple(slice(f - o, e - o) for f, e, o in zip(first, end, low, strict=True))]
            b = there[
                tuple(slice(f - begin[side], e - begin[side]) for f, e, side in zip(first, end, sides, strict=True))
            ]
            both = (a > 0) & (b > 0)
            rows = np.unique(np.stack([a[both], b[both]], axis=1), axis=0)
            if self.segmenter.options.fill_holes and len(rows):  # components of the background share faces only
                rows = rows[(rows[:, 0] <= self._objects(number)) & (rows[:, 1] <= self._objects(other))]
            pairs.append(_with_block(rows, other))
        return pairs

    # -- write

    def write(self, number: int, dtype: str, first: int, unknown_id: int | None = None) -> list[int]:
        """Write the ids of a block to the output, and the coarser chunks that it determines; return nothing.

        Args:
            number: number of the block.
            dtype: type of the ids.
            first: row of the block's number 0 in the file of ids.
            unknown_id: the stored value of unannotated voxels; None without such voxels.
        """
        labels = self.files("labels").read(number)["labels"]
        ids = np.load(self.folder / IDS, mmap_mode="r")
        table = np.asarray(ids[first : first + int(labels.max(initial=0)) + 1]).astype(dtype)
        written = labels if labels.dtype == dtype else np.empty(labels.shape, dtype)
        for plane, out in zip(labels, written, strict=True):  # see `_renumber`
            out[...] = table[plane]
        unknown = None if unknown_id is None else self.source.unknown(*self.grid[number])
        if unknown is not None:
            written[unknown] = unknown_id
        levels = OutputLevels(
            self.output, self.grid, ObjectIds(dtype), self.chunks, self.shards, self.zarr_format, self.pyramid
        )
        flush(levels.put_block(self.source.name, number, written))
        return []


def _widened(core: Slices, shape: tuple[int, ...]) -> Slices:
    """Return a box with one more voxel on either side, inside of an array."""
    z, y, x = (slice(max(0, c.start - 1), min(n, c.stop + 1)) for c, n in zip(core, shape, strict=True))
    return z, y, x


def _renumber(labels: npt.NDArray[np.uint32], inside: tuple[slice, ...]) -> int:
    """Replace the numbers that occur in a box by those from 1 on without gaps, and others by 0; return the largest."""
    numbers = np.zeros(int(labels.max(initial=0)) + 1, np.uint32)
    # Plane by plane: numpy converts numbers that are an index to int64, three times the memory of the whole block.
    for plane in labels[inside]:
        numbers[plane.reshape(-1)] = 1
    numbers[0] = 0
    table = np.cumsum(numbers, dtype=np.uint32) * numbers
    for plane in labels:
        plane[...] = table[plane]
    return int(table.max(initial=0))


def _compacted(numbers: Array, inside: tuple[slice, ...]) -> Array:
    """Return a box of an array as a contiguous array in the same memory, which is overwritten."""
    z, y, x = (part.stop - part.start for part in inside)
    flat, plane = numbers.reshape(-1), y * x
    for index, values in enumerate(numbers[inside]):  # its place begins before the plane itself, and after earlier ones
        flat[index * plane : (index + 1) * plane] = values.reshape(-1)
    return flat[: z * plane].reshape(z, y, x)


def _planes(numbers: Array, inside: tuple[slice, ...]) -> Arrays:
    """Return the planes of numbers at the faces of a block.

    ``lower`` and ``upper`` are the first and the last plane of the block; ``before`` and ``outer`` those beyond them,
    with one more voxel on each side, where the volume has one. ``inset`` is the first voxel of the block in those.
    """
    planes: Arrays = {}
    for axis in range(3):
        part, here = inside[axis], numbers.shape[axis]
        sides = [inside[other] for other in range(3) if other != axis]
        planes[f"lower{axis}"] = np.take(numbers, part.start, axis)[tuple(sides)]
        planes[f"upper{axis}"] = np.take(numbers, part.stop - 1, axis)[tuple(sides)]
        none = np.empty((0, 0), numbers.dtype)
        planes[f"before{axis}"] = np.take(numbers, part.start - 1, axis) if part.start > 0 else none
        planes[f"outer{axis}"] = np.take(numbers, part.stop, axis) if part.stop < here else none
        planes[f"inset{axis}"] = np.array([side.start for side in sides])
    return planes


def _cropped(plane: Array, inset: Array, shape: tuple[int, ...]) -> Array:
    """Return the part of a plane beyond a face that is next to the block."""
    return plane[tuple(slice(a, a + n) for a, n in zip(inset.tolist(), shape, strict=True))]


def _with_block(pairs: Array, other: int) -> Array:
    """Return pairs of numbers with the block of the second between them."""
    rows = np.empty((len(pairs), 3), np.int64)
    rows[:, 0], rows[:, 1], rows[:, 2] = pairs[:, 0], other, pairs[:, 1]
    return rows


def _overlapping(a: Array, b: Array, objects: tuple[int, int], overlap: float) -> Array:
    """Return the pairs of objects whose intersection over union is above a limit.

    Args:
        a: numbers of one block.
        b: numbers of the other, of the same voxels.
        objects: the largest numbers of objects.
        overlap: the limit.
    """
    one = np.where(a <= objects[0], a, 0).reshape(-1).astype(np.int64)
    two = np.where(b <= objects[1], b, 0).reshape(-1).astype(np.int64)
    sizes = np.bincount(one), np.bincount(two)
    both = (one > 0) & (two > 0)
    keys, counts = np.unique(one[both] * (objects[1] + 1) + two[both], return_counts=True)
    first, second = np.divmod(keys, objects[1] + 1)
    union = sizes[0][first] + sizes[1][second] - counts
    same = counts > overlap * union
    return np.stack([first[same], second[same]], axis=1)


def _touching(block: Array, objects: int) -> Array:
    """Return the pairs of numbers of background and objects that share a face inside of a block."""
    pairs = [np.empty((0, 2), np.uint32)]
    for axis in range(3):
        a = np.moveaxis(block, axis, 0)
        mixed = (a[1:] > objects) != (a[:-1] > objects)
        rows = np.stack([a[:-1][mixed], a[1:][mixed]], axis=1)
        pairs.append(np.unique(rows, axis=0))
    return np.unique(np.concatenate(pairs), axis=0)
