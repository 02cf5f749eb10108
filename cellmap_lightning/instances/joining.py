"""Joining of the objects of all blocks, and their final ids.

1. Each number of each block is a node, and each pair of ``join`` an edge: connected nodes are one object.
2. A component of the background that does not reach the border of the volume, and that touches a single object, is a
   hole of it, and becomes part of it. Other components are background.
3. Objects below ``min_volume`` or above ``max_volume`` are removed.
4. The others are numbered from 1, in the order of their first voxels (z, then y, then x). So the ids, and not only the
   objects, are the same for any blocks that find the same objects.

Memory is about 100 bytes per number of a block.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.instances.block_files import BlockFiles
from cellmap_lightning.instances.libraries import library
from cellmap_lightning.instances.measures import Measures, joined
from cellmap_lightning.instances.options import IdType

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BlockNumbers:
    """The numbers of all blocks in one sequence.

    Attributes:
        objects: number of objects of each block.
        background: number of components of the background of each block.
    """

    objects: Ints
    background: Ints

    @classmethod
    def of(cls, notes: Mapping[int, Sequence[int]]) -> "BlockNumbers":
        """Return the numbers from the notes of labelled blocks."""
        rows = [notes[number] for number in range(len(notes))]
        return cls(np.array([r[0] for r in rows], np.int64), np.array([r[1] for r in rows], np.int64))

    @property
    def first(self) -> Ints:
        """The node of the number 0 of each block, which is background; and the number of nodes."""
        return np.concatenate([[0], np.cumsum(self.objects + self.background + 1)])


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of a segmentation.

    Attributes:
        ids: final id of each number of each block, see `BlockNumbers.first`.
        measures: measures of the objects, whose ids are their rows plus 1.
    """

    ids: npt.NDArray[np.uint64]
    measures: Measures


def join_objects(numbers: BlockNumbers, faces: BlockFiles, pairs: BlockFiles, limits: tuple[int, float]) -> Objects:
    """Return the objects of all blocks.

    Args:
        numbers: the numbers of blocks.
        faces: the files with the measures of each block.
        pairs: the files with the pairs of each block.
        limits: least and largest number of voxels of an object.
    """
    first = numbers.first
    blocks = range(len(numbers.objects))
    names = ("voxels", "sums", "low", "high", "first", "border")
    measures = joined([Measures(**faces.read(number, *names)) for number in blocks])
    # The row of a node: nodes without those of number 0.
    nodes = np.concatenate([first[n] + 1 + np.arange(first[n + 1] - first[n] - 1) for n in blocks])
    same = _edges(blocks, first, pairs, "same")
    group = _components(int(first[-1]), same)
    empty = np.zeros(int(first[-1]), bool)
    for number in blocks:
        empty[first[number] + 1 + numbers.objects[number] : first[number + 1]] = True
    if numbers.background.any():
        touching = np.concatenate([_edges(blocks, first, pairs, "touching"), _inside(blocks, first, faces)])
        group, removed = _filled(group, empty, touching, measures, nodes)
    else:
        removed = np.zeros(len(group), bool)
    rows = nodes[~removed[group[nodes]]]
    remaining, compact = np.unique(group[rows], return_inverse=True)
    totals = measures[~removed[group[nodes]]].grouped(compact, len(remaining))
    valid = (totals.voxels >= limits[0]) & (totals.voxels <= limits[1])
    order = np.flatnonzero(valid)[np.argsort(totals.first[valid], kind="stable")]
    final = np.zeros(len(remaining), np.uint64)
    final[order] = np.arange(1, len(order) + 1, dtype=np.uint64)
    ids = np.zeros(int(first[-1]), np.uint64)
    ids[rows] = final[compact]
    return Objects(ids, totals[order])


def _edges(blocks: Iterable[int], first: Ints, pairs: BlockFiles, name: str) -> Ints:
    """Return pairs of nodes, from the pairs of numbers of all blocks."""
    edges = [np.empty((0, 2), np.int64)]
    for number in blocks:
        rows = pairs.read(number, name)[name]
        edges.append(np.stack([first[number] + rows[:, 0], first[rows[:, 1]] + rows[:, 2]], axis=1))
    return np.concatenate(edges)


def _inside(blocks: Iterable[int], first: Ints, faces: BlockFiles) -> Ints:
    """Return pairs of nodes of background and objects that share a face inside of a block."""
    return np.concatenate(
        [first[number] + faces.read(number, "touching")["touching"].astype(np.int64) for number in blocks]
    )


def _components(nodes: int, edges: Ints) -> Ints:
    """Return the connected component of each node."""
    sparse: Any = library("scipy.sparse")
    matrix = sparse.coo_matrix((np.ones(len(edges), np.uint8), (edges[:, 0], edges[:, 1])), (nodes, nodes))
    labels = library("scipy.sparse.csgraph").connected_components(matrix, directed=False)[1]
    return np.asarray(labels, np.int64)


def _filled(
    group: Ints, empty: npt.NDArray[np.bool_], touching: Ints, measures: Measures, nodes: Ints
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return groups in which holes belong to the object around them, and the groups that are background.

    Args:
        group: the group of each node.
        empty: true for nodes of background.
        touching: pairs of nodes of background and objects that share a face.
        measures: the measures of nodes.
        nodes: the node of each row of the measures.
    """
    count = int(group.max()) + 1
    background = np.zeros(count, bool)
    background[group[empty]] = True
    outside = np.zeros(count, bool)
    outside[group[nodes[measures.border.any(axis=1)]]] = True
    sides = np.where(empty[touching[:, :1]], touching, touching[:, ::-1])  # background first
    around = np.unique(group[sides], axis=0)
    neighbours = np.bincount(around[:, 0], minlength=count)
    single = background & ~outside & (neighbours == 1)
    target = np.arange(count)
    fills = single[around[:, 0]]
    target[around[fills, 0]] = around[fills, 1]
    return target[group], background & ~single


def id_type(count: int, setting: IdType, where: str) -> np.dtype[Any]:
    """Return the type of ids.

    Raises:
        CellMapValueError: there are more objects than the type has ids.
    """
    if setting == "auto":
        return np.dtype(np.uint32 if count <= np.iinfo(np.uint32).max else np.uint64)
    dtype = np.dtype(setting)
    if count > np.iinfo(dtype).max:
        raise CellMapValueError(
            f"{where}: there are {count} objects, and ids={setting} ends at {np.iinfo(dtype).max}; use ids=auto, or a "
            "larger min_volume"
        )
    return dtype
