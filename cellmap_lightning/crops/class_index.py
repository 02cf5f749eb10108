"""Where the foreground of a class is: an index of a label image, built once from the chunks that exist, and kept."""

import base64
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cellmap_lightning.crops.labels import stored_labels
from cellmap_lightning.geometry.lattice import FloatArray, Lattice, Shape
from cellmap_lightning.io.chunks import ChunkReader, chunk_shape
from cellmap_lightning.io.declared_counts import compare_counts
from cellmap_lightning.io.measurements import key_of, stamp_of
from cellmap_lightning.io.ngff import Encoding, Level
from cellmap_lightning.io.records import recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.runtime.rng import INDEX, uniforms
from cellmap_lightning.runtime.thread_pool import FORK_GATE, ReadPool

#: Voxels that are kept of a block of chunks at most, and of a whole index, as long as it has fewer blocks: a few KB.
MOST_OF_A_BLOCK, MOST_OF_ALL = 256, 4096
#: Blocks that are read at most, if any of them has foreground: spread over all that are stored.
MOST_BLOCKS = 4096

Voxels = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Foreground:
    """Foreground voxels of one class in one crop: how many there are in each block, and some of them.

    A block is chosen by its number of foreground voxels, and then one of those that were kept of it. So every voxel is
    as likely as every other, except that of a block with many of them only those that were kept can be met, and of an
    image of more than `MOST_BLOCKS` blocks only those that were read.

    Attributes:
        lattice: of the level that was looked at.
        counts: ``[blocks]``, foreground voxels of each block that has any.
        kept: ``[blocks]``, how many of them were kept.
        voxels: ``[kept.sum(), 3]``, these (z, y, x).
    """

    lattice: Lattice
    counts: npt.NDArray[np.int64]
    kept: npt.NDArray[np.int64]
    voxels: Voxels

    def __len__(self) -> int:
        """Foreground voxels of the level."""
        return int(self.counts.sum())

    @property
    def weights(self) -> FloatArray:
        """``[kept]``, how many voxels of the level each kept one stands for."""
        return np.repeat(self.counts / self.kept, self.kept)

    @cached_property
    def _until(self) -> FloatArray:
        """Where the part of [0, 1) ends that each kept voxel stands for, so that one number picks block and voxel."""
        ends: FloatArray = np.cumsum(self.weights) / len(self)
        return ends

    def pick(self, u: float) -> tuple[int, int, int]:
        """The voxel (z, y, x) for a number in [0, 1)."""
        found = min(int(self._until.searchsorted(u, "right")), len(self.voxels) - 1)
        z, y, x = self.voxels[found].tolist()
        return z, y, x


def foreground_index(
    levels: Sequence[Level], encoding: Encoding, pool: ReadPool, label: str, retry_policy: RetryPolicy = DEFAULT_RETRY
) -> Foreground:
    """The index of the first level that has foreground, from the cache folder or built and kept there.

    Chunks that were never written are not read. What the attributes call absent or unknown is no foreground.

    Args:
        levels: the level that patches read, then the finer ones: a thin structure may be gone from a coarse one.
        encoding: what their values mean.
        pool: threads to read with.
        label: what messages call it, such as ``crop12/mito``.
        retry_policy: how long an object is tried for.

    Raises:
        ChunkError: a chunk that cannot be read.
        MetadataError: stored values that the encoding does not explain.
    """
    found = Foreground(levels[0].lattice, *_nothing())
    for level in levels:
        found = _index(level, encoding, pool, label, retry_policy)
        if len(found):
            break
    return found


def _nothing() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int32)


def _index(level: Level, encoding: Encoding, pool: ReadPool, label: str, retry_policy: RetryPolicy) -> Foreground:
    reader = ChunkReader(level, label, retry_policy=retry_policy, empty=encoding.empty)
    files = reader.stored()
    key, stamp = key_of(level, "index", encoding, MOST_OF_A_BLOCK, MOST_OF_ALL, MOST_BLOCKS), stamp_of(files)
    cached = recall(key, lambda: stamp, lambda content: _unpacked(content, reader.shape))
    if cached is not None:
        return Foreground(level.lattice, *cached)
    with FORK_GATE:
        found = Foreground(level.lattice, *_build(reader, files, encoding, pool))
    blocks = np.ceil(np.divide(reader.shape, chunk_shape([reader])))
    if blocks.prod() <= MOST_BLOCKS:  # otherwise not every block was read
        compare_counts(level, encoding, len(found), label)
    remember(key, stamp, _packed(found))
    return found


def _build(
    reader: ChunkReader, files: Iterable[tuple[int, int, int]], encoding: Encoding, pool: ReadPool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]:
    block = chunk_shape([reader])
    z, y, x = (-(-n // b) for n, b in zip(reader.shape, block, strict=True))
    grid = z, y, x
    numbers = _written(reader, files, block, grid)
    if len(numbers) < math.prod(grid):
        # What no file holds is all fill value: one voxel of it tells whether that is foreground.
        hole = next(n for n in range(math.prod(grid)) if n not in numbers)
        start = np.multiply(np.unravel_index(hole, grid), block).tolist()
        if encoding.present(stored_labels(reader, encoding, (start[0], start[1], start[2]), (1, 1, 1))).any():
            numbers = range(math.prod(grid))
    order = np.array(sorted(numbers), np.int64)
    first = _spread(len(order), MOST_BLOCKS, len(order))
    most = min(MOST_OF_A_BLOCK, max(1, MOST_OF_ALL // max(1, len(first))))
    blocks: dict[int, tuple[int, Voxels]] = {}

    def look(number: int) -> None:
        start = np.multiply(np.unravel_index(number, grid), block).tolist()
        shape = np.minimum(block, np.subtract(reader.shape, start)).tolist()
        present = np.flatnonzero(encoding.present(stored_labels(reader, encoding, tuple(start), tuple(shape))))
        if len(present):
            chosen = present[_spread(len(present), most, number)]
            voxels = np.add(np.stack(np.unravel_index(chosen, shape), axis=1), start)
            blocks[number] = len(present), voxels.astype(np.int32)

    batch = 4 * pool.workers  # so that the queue stays short and the bar moves
    title = f"looking for foreground: {reader.label}"
    with tqdm(total=len(first), desc=title, unit="block", disable=None, leave=False, delay=1) as bar:
        # The rest only if these have none.
        for part in (order[first], np.delete(order, first)):
            for at in range(0, 0 if blocks else len(part), batch):
                some = part[at : at + batch].tolist()
                pool.run([partial(look, number) for number in some])
                bar.update(len(some))
    if not blocks:
        return _nothing()
    found = [blocks[number] for number in sorted(blocks)]  # threads end in any order
    return (
        np.array([count for count, _ in found], np.int64),
        np.array([len(voxels) for _, voxels in found], np.int64),
        np.concatenate([voxels for _, voxels in found]),
    )


def _written(reader: ChunkReader, files: Iterable[tuple[int, int, int]], block: Shape, grid: Shape) -> Collection[int]:
    """Numbers of the blocks that a file holds part of."""
    size = reader.level.zyx(reader.level.array.files)
    found: set[int] = set()
    for file in files:
        spans = [
            range(i * f // b, min(-(-(i + 1) * f // b), n)) for i, f, b, n in zip(file, size, block, grid, strict=True)
        ]
        found.update((z * grid[1] + y) * grid[2] + x for z, y, x in product(*spans))
    return found


def _spread(count: int, most: int, number: int) -> npt.NDArray[np.int64]:
    """Which ``most`` of ``count`` things are taken: one of each of as many equal runs, chosen by a hash of a number."""
    if count <= most:
        return np.arange(count)
    u = uniforms(0, INDEX, [number], most)[0]
    ranks = ((np.arange(most) + u) * (count / most)).astype(np.int64)
    chosen: npt.NDArray[np.int64] = np.minimum(ranks, count - 1)
    return chosen


def _packed(found: Foreground) -> dict[str, object]:
    parts: dict[str, npt.NDArray[Any]] = {"counts": found.counts, "kept": found.kept, "voxels": found.voxels}
    return {key: base64.b64encode(part.tobytes()).decode() for key, part in parts.items()}


def _unpacked(content: Mapping[str, Any], shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]:
    """Return what `_packed` was given.

    Raises:
        ValueError: it cannot be the index of an array of that shape.
    """
    parts = [base64.b64decode(content[key], validate=True) for key in ("counts", "kept", "voxels")]
    counts, kept = np.frombuffer(parts[0], np.int64), np.frombuffer(parts[1], np.int64)
    voxels: Voxels = np.frombuffer(parts[2], np.int32).reshape(-1, 3)
    fits = len(counts) == len(kept) and (kept >= 1).all() and (counts >= kept).all() and kept.sum() == len(voxels)
    if not fits or (voxels < 0).any() or (voxels >= shape).any():
        raise ValueError(f"{len(counts)} blocks and {len(voxels)} voxels do not fit each other or the array")
    return counts, kept, voxels
