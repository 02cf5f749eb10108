"""Foreground indices: samples of the foreground voxels of one class, built once from the stored chunks and cached."""

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
from cellmap_lightning.io.array_reader import ArrayReader, chunk_shape
from cellmap_lightning.io.declared_counts import compare_counts
from cellmap_lightning.io.measurements import key_of, stamp_of
from cellmap_lightning.io.ngff import Encoding, Level
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.records import recall, remember
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.runtime.rng import INDEX, uniforms
from cellmap_lightning.runtime.thread_pool import FORK_GATE, ReadPool

#: Limits of the sampled voxels of one block of chunks, and of a whole index of fewer blocks: a few KB.
MOST_OF_A_BLOCK, MOST_OF_ALL = 256, 4096
#: Limit of the blocks that are read if any of them has foreground, spread over all stored blocks.
MOST_BLOCKS = 4096

Voxels = npt.NDArray[np.int32]
#: Counts, numbers of sampled voxels, and sampled voxels of a `Foreground`.
Parts = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]
_EMPTY: Parts = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int32))


@dataclass(frozen=True, eq=False)
class Foreground:
    """Foreground voxels of one class in one crop: their number in each block, and a sample of them; see `pick`.

    A block is chosen by its number of foreground voxels, then one of its sampled voxels. All voxels are equally likely,
    except that only sampled voxels of a block, and only the `MOST_BLOCKS` blocks that were read, can be chosen.

    Attributes:
        lattice: lattice of the level.
        counts: ``[blocks]``, foreground voxels of each block with any.
        sampled: ``[blocks]``, number of sampled voxels of each block.
        voxels: ``[sampled.sum(), 3]``, the sampled voxels (z, y, x).
    """

    lattice: Lattice
    counts: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.int64]
    voxels: Voxels

    def __len__(self) -> int:
        """Return the number of foreground voxels of the level."""
        return int(self.counts.sum())

    @property
    def weights(self) -> FloatArray:
        """``[voxels]``, number of voxels of the level that each sampled voxel represents."""
        return np.repeat(self.counts / self.sampled, self.sampled)

    @cached_property
    def _cumulative(self) -> FloatArray:
        """Cumulative probabilities of the sampled voxels, so that one number picks block and voxel."""
        ends: FloatArray = np.cumsum(self.weights) / len(self)
        return ends

    def pick(self, u: float) -> tuple[int, int, int]:
        """Return the voxel (z, y, x) that a number in [0, 1) chooses."""
        index = min(int(self._cumulative.searchsorted(u, "right")), len(self.voxels) - 1)
        z, y, x = self.voxels[index].tolist()
        return z, y, x


def foreground_index(
    levels: Sequence[Level], encoding: Encoding, pool: ReadPool, label: str, retry_policy: RetryPolicy = DEFAULT_RETRY
) -> Foreground:
    """Return the index of the first level with foreground, from the cache folder or built and cached there.

    Chunks that were never written are not read. Absent and unknown voxels are not foreground.

    Args:
        levels: the level that patches read, then finer ones: a thin structure may be missing in a coarse level.
        encoding: meaning of stored values.
        pool: reading threads.
        label: name in messages, such as ``crop12/mito``.
        retry_policy: retries and timeouts of reads.

    Raises:
        ChunkError: a chunk cannot be read.
        MetadataError: stored values that the encoding does not explain.
    """
    index = Foreground(levels[0].lattice, *_EMPTY)
    for level in levels:
        index = _index(level, encoding, pool, label, retry_policy)
        if len(index):
            break
    return index


def _index(level: Level, encoding: Encoding, pool: ReadPool, label: str, retry_policy: RetryPolicy) -> Foreground:
    reader = open_reader(level, label, retry_policy=retry_policy, empty=encoding.empty)
    files = reader.stored()
    key, stamp = key_of(level, "index", encoding, MOST_OF_A_BLOCK, MOST_OF_ALL, MOST_BLOCKS), stamp_of(files)
    cached = recall(key, lambda: stamp, lambda content: _unpacked(content, reader.shape))
    if cached is not None:
        return Foreground(level.lattice, *cached)
    with FORK_GATE:
        index = Foreground(level.lattice, *_build(reader, files, encoding, pool))
    blocks = np.ceil(np.divide(reader.shape, chunk_shape([reader])))
    if blocks.prod() <= MOST_BLOCKS:  # otherwise not every block was read
        compare_counts(level, encoding, len(index), label)
    remember(key, stamp, _packed(index))
    return index


def _build(reader: ArrayReader, files: Iterable[tuple[int, int, int]], encoding: Encoding, pool: ReadPool) -> Parts:
    """Return counts, numbers of sampled voxels, and sampled voxels of all blocks with foreground."""
    block = chunk_shape([reader])
    z, y, x = (-(-n // b) for n, b in zip(reader.shape, block, strict=True))
    grid = z, y, x
    numbers = _stored_blocks(reader, files, block, grid)
    if len(numbers) < math.prod(grid):
        # Blocks without a file are all fill value: one voxel shows whether that is foreground.
        empty = next(n for n in range(math.prod(grid)) if n not in numbers)
        start = np.multiply(np.unravel_index(empty, grid), block).tolist()
        if encoding.present(stored_labels(reader, encoding, (start[0], start[1], start[2]), (1, 1, 1))).any():
            numbers = range(math.prod(grid))
    order = np.array(sorted(numbers), np.int64)
    first = _spread(len(order), MOST_BLOCKS, len(order))
    most = min(MOST_OF_A_BLOCK, max(1, MOST_OF_ALL // max(1, len(first))))
    blocks: dict[int, tuple[int, Voxels]] = {}

    def read_block(number: int) -> None:
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
        # The remaining blocks are read only if the first ones have no foreground.
        for part in (order[first], np.delete(order, first)):
            for offset in range(0, 0 if blocks else len(part), batch):
                some = part[offset : offset + batch].tolist()
                pool.run([partial(read_block, number) for number in some])
                bar.update(len(some))
    if not blocks:
        return _EMPTY
    ordered = [blocks[number] for number in sorted(blocks)]  # deterministic, although threads finish in any order
    return (
        np.array([count for count, _ in ordered], np.int64),
        np.array([len(voxels) for _, voxels in ordered], np.int64),
        np.concatenate([voxels for _, voxels in ordered]),
    )


def _stored_blocks(
    reader: ArrayReader, files: Iterable[tuple[int, int, int]], block: Shape, grid: Shape
) -> Collection[int]:
    """Return the numbers of the blocks that overlap a stored file."""
    size = reader.level.zyx(reader.level.array.files)
    numbers: set[int] = set()
    for file in files:
        first = reader.file_start(file)
        spans = [
            range(max(0, i // b), min(-(-(i + f) // b), n)) for i, f, b, n in zip(first, size, block, grid, strict=True)
        ]
        numbers.update((z * grid[1] + y) * grid[2] + x for z, y, x in product(*spans))
    return numbers


def _spread(count: int, most: int, number: int) -> npt.NDArray[np.int64]:
    """Return a stratified sample of ``most`` of ``count`` indices: one per equal run, chosen by a hash of a number."""
    if count <= most:
        return np.arange(count)
    u = uniforms(0, INDEX, [number], most)[0]
    ranks = ((np.arange(most) + u) * (count / most)).astype(np.int64)
    chosen: npt.NDArray[np.int64] = np.minimum(ranks, count - 1)
    return chosen


def _packed(index: Foreground) -> dict[str, object]:
    """Return an index as JSON-compatible content of the cache folder."""
    # The key of `sampled` is the one in files of earlier versions.
    parts: dict[str, npt.NDArray[Any]] = {"counts": index.counts, "kept": index.sampled, "voxels": index.voxels}
    return {key: base64.b64encode(part.tobytes()).decode() for key, part in parts.items()}


def _unpacked(content: Mapping[str, Any], shape: Shape) -> Parts:
    """Return the arrays of an index from the content of the cache folder.

    Raises:
        ValueError: the content cannot be the index of an array of that shape.
    """
    parts = [base64.b64decode(content[key], validate=True) for key in ("counts", "kept", "voxels")]
    counts, sampled = np.frombuffer(parts[0], np.int64), np.frombuffer(parts[1], np.int64)
    voxels: Voxels = np.frombuffer(parts[2], np.int32).reshape(-1, 3)
    fits = (
        len(counts) == len(sampled)
        and (sampled >= 1).all()
        and (counts >= sampled).all()
        and sampled.sum() == len(voxels)
    )
    if not fits or (voxels < 0).any() or (voxels >= shape).any():
        raise ValueError(f"{len(counts)} blocks and {len(voxels)} voxels do not fit each other or the array")
    return counts, sampled, voxels
