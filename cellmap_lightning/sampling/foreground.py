"""Where the foreground of a class is: an index of a label image, built once from the chunks that exist, and kept."""

import base64
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cellmap_lightning.draws import INDEX, uniforms
from cellmap_lightning.sampling.labels import stored_labels
from cellmap_lightning.sampling.pool import FORK_GATE, ReadPool
from cellmap_lightning.volumes.chunks import ChunkReader, chunk_shape
from cellmap_lightning.volumes.geometry import FloatArray, Lattice
from cellmap_lightning.volumes.ngff import Encoding, Level
from cellmap_lightning.volumes.statistics import fingerprint, recall, remember

log = logging.getLogger(__name__)

#: Voxels that are kept of a block of chunks at most, and of a whole index, as long as it has fewer blocks: a few KB.
MOST_OF_A_BLOCK, MOST_OF_ALL = 256, 4096

Voxels = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Foreground:
    """Foreground voxels of one class in one crop: how many there are in each block, and some of them.

    A block is chosen by its number of foreground voxels, and then one of those that were kept of it: an even choice of
    every voxel, but for that of a block with more than were kept only these can be met.

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


def foreground_index(levels: Sequence[Level], encoding: Encoding, pool: ReadPool, label: str) -> Foreground:
    """The index of the first level that has foreground, from the cache folder or built and kept there.

    Chunks that were never written are not read. What the attributes call absent or unknown is no foreground.

    Args:
        levels: the level that patches read, then the finer ones: a thin structure may be gone from a coarse one.
        encoding: what their values mean.
        pool: threads to read with.
        label: what messages call it, such as ``crop12/mito``.

    Raises:
        ChunkError: a chunk that cannot be read.
        MetadataError: stored values that the encoding does not explain.
    """
    found = Foreground(levels[0].lattice, *_nothing())
    for level in levels:
        found = _index(level, encoding, pool, label)
        if len(found):
            break
    return found


def _nothing() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int32)


def _index(level: Level, encoding: Encoding, pool: ReadPool, label: str) -> Foreground:
    reader = ChunkReader(level, label)
    name = fingerprint(level, "index", encoding, MOST_OF_A_BLOCK, MOST_OF_ALL)
    # Chunks can be rewritten without a change of the metadata, from which the name follows.
    stamp = reader.stamp((0, 0, 0), reader.shape)
    kept = recall(name)
    if kept is not None and kept.get("stamp") == stamp:
        return Foreground(level.lattice, *_unpacked(kept))
    with FORK_GATE:
        found = Foreground(level.lattice, *_build(reader, encoding, pool))
    remember(name, {"stamp": stamp, **_packed(found)})
    return found


def _build(
    reader: ChunkReader, encoding: Encoding, pool: ReadPool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]:
    block = chunk_shape([reader])
    grid = [-(-n // b) for n, b in zip(reader.shape, block, strict=True)]
    most = min(MOST_OF_A_BLOCK, max(1, MOST_OF_ALL // math.prod(grid)))
    blocks: dict[int, tuple[int, Voxels]] = {}
    fills: list[bool] = []

    def look(number: int, place: tuple[int, int, int]) -> None:
        z, y, x = (i * b for i, b in zip(place, block, strict=True))
        dz, dy, dx = (min(b, n - o) for b, n, o in zip(block, reader.shape, (z, y, x), strict=True))
        if not reader.written((z, y, x), (dz, dy, dx)):
            # A box without a file is all fill value: one voxel tells what that is, and no codec runs.
            if not fills:
                fills.append(bool(_present(reader, encoding, (z, y, x), (1, 1, 1)).any()))
            if not fills[0]:
                return
        present = np.flatnonzero(_present(reader, encoding, (z, y, x), (dz, dy, dx)))
        if len(present):
            chosen = present[_spread(len(present), most, number)]
            voxels = np.add(np.stack(np.unravel_index(chosen, (dz, dy, dx)), axis=1), (z, y, x))
            blocks[number] = len(present), voxels.astype(np.int32)

    places = list(enumerate(product(*map(range, grid))))
    batch = 4 * pool.workers  # so that the queue stays short and the bar moves
    title = f"looking for foreground: {reader.label}"
    with tqdm(total=len(places), desc=title, unit="block", disable=None, leave=False, delay=1) as bar:
        for first in range(0, len(places), batch):
            part = places[first : first + batch]
            pool.run([lambda n=n, p=p: look(n, p) for n, p in part])  # type: ignore[misc]
            bar.update(len(part))
    if not blocks:
        return _nothing()
    found = [blocks[number] for number in sorted(blocks)]  # threads end in any order
    return (
        np.array([count for count, _ in found], np.int64),
        np.array([len(voxels) for _, voxels in found], np.int64),
        np.concatenate([voxels for _, voxels in found]),
    )


def _present(
    reader: ChunkReader, encoding: Encoding, start: tuple[int, int, int], shape: tuple[int, int, int]
) -> npt.NDArray[np.bool_]:
    stored = stored_labels(reader, encoding, start, shape)
    present: npt.NDArray[np.bool_] = stored != encoding.absent
    if encoding.unknown is not None:
        present &= stored != encoding.unknown
    return present


def _spread(count: int, most: int, number: int) -> npt.NDArray[np.int64]:
    """Which of ``count`` voxels are kept of a block: one of each of ``most`` equal runs, chosen by a hash."""
    if count <= most:
        return np.arange(count)
    u = uniforms(0, INDEX, [number], most)[0]
    ranks = ((np.arange(most) + u) * (count / most)).astype(np.int64)
    chosen: npt.NDArray[np.int64] = np.minimum(ranks, count - 1)
    return chosen


def _packed(found: Foreground) -> dict[str, object]:
    parts: dict[str, npt.NDArray[Any]] = {"counts": found.counts, "kept": found.kept, "voxels": found.voxels}
    return {key: base64.b64encode(part.tobytes()).decode() for key, part in parts.items()}


def _unpacked(kept: dict[str, object]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Voxels]:
    counts, some, voxels = (base64.b64decode(str(kept[key])) for key in ("counts", "kept", "voxels"))
    return (
        np.frombuffer(counts, np.int64),
        np.frombuffer(some, np.int64),
        np.frombuffer(voxels, np.int32).reshape(-1, 3),
    )
