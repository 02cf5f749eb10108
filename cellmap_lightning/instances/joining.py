"""Joining of the objects of all blocks, and their final ids.

1. Each number of each block is a node, and each pair of ``join`` an edge: connected nodes are one object.
2. A component of the background that does not reach the border of the volume, and that touches a single object, is a
   hole of it, and becomes part of it. Other components are background.
3. Objects below ``min_volume`` or above ``max_volume`` are removed.
4. The others are numbered from 1, in the order of their first voxels (z, then y, then x). So the ids, and not only the
   objects, are the same for any blocks that find the same objects.

Memory is about 200 bytes per number of a block: half of it for the measures of the objects, half for the graph.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.instances.block_files import BlockFiles
from cellmap_lightning.instances.libraries import library
from cellmap_lightning.instances.measures import MEASURES, Measures
from cellmap_lightning.instances.options import IdType
from cellmap_lightning.wording import plural

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
    group = _components(int(first[-1]), _edges(blocks, first, pairs, "same"))
    background = np.zeros(int(group.max()) + 1, bool)
    if numbers.background.any():
        touching = np.concatenate([_edges(blocks, first, pairs, "touching"), _inside(blocks, first, faces)])
        group, background = _filled(group, _background(numbers), touching, _at_border(blocks, first, group, faces))
    is_object = np.zeros(len(background), bool)
    for number in blocks:
        is_object[group[first[number] + 1 : first[number + 1]]] = True
    is_object &= ~background
    row = np.where(is_object, np.cumsum(is_object) - 1, -1)  # of each group
    count = int(is_object.sum())
    voxels, begins = np.zeros(count, np.int64), np.full(count, np.iinfo(np.int64).max)
    for number, rows, found in _rows(blocks, first, group, row):
        sizes = faces.read(number, "voxels", "first")
        np.add.at(voxels, rows, sizes["voxels"][found])
        np.minimum.at(begins, rows, sizes["first"][found])
    valid = (voxels >= limits[0]) & (voxels <= limits[1])
    order = np.flatnonzero(valid)[np.argsort(begins[valid], kind="stable")]
    final = np.zeros(len(valid), np.int64)
    final[order] = np.arange(1, len(order) + 1)
    row[is_object] = final - 1  # in the order of ids, and -1 of removed objects
    # Measures are read a second time, instead of all rows of all blocks in memory.
    measures, ids = Measures.empty(len(order)), np.zeros(int(first[-1]), np.uint64)
    for number, rows, found in _rows(blocks, first, group, row):
        measures.add(rows, Measures(**faces.read(number, *MEASURES))[found])
        ids[first[number] + 1 : first[number + 1]][found] = rows + 1
    return Objects(ids, measures)


def _rows(
    blocks: Iterable[int], first: Ints, group: Ints, row: Ints
) -> Iterator[tuple[int, Ints, npt.NDArray[np.bool_]]]:
    """Yield each block with the rows of its numbers, and which of its numbers have one."""
    for number in blocks:
        rows = row[group[first[number] + 1 : first[number + 1]]]
        found = rows >= 0
        yield number, rows[found], found


def _background(numbers: BlockNumbers) -> npt.NDArray[np.bool_]:
    """Return which nodes are components of the background."""
    first = numbers.first
    empty = np.zeros(int(first[-1]), bool)
    for number, objects in enumerate(numbers.objects):
        empty[first[number] + 1 + objects : first[number + 1]] = True
    return empty


def _at_border(blocks: Iterable[int], first: Ints, group: Ints, faces: BlockFiles) -> npt.NDArray[np.bool_]:
    """Return which groups reach the border of the volume."""
    outside = np.zeros(int(group.max()) + 1, bool)
    for number in blocks:
        border = faces.read(number, "border")["border"].any(axis=1)
        outside[group[first[number] + 1 : first[number + 1]][border]] = True
    return outside


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
    group: Ints, empty: npt.NDArray[np.bool_], touching: Ints, outside: npt.NDArray[np.bool_]
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return groups in which holes belong to the object around them, and the groups that are background.

    Args:
        group: the group of each node.
        empty: true for nodes of background.
        touching: pairs of nodes of background and objects that share a face.
        outside: true for groups that reach the border of the volume.
    """
    count = len(outside)
    background = np.zeros(count, bool)
    background[group[empty]] = True
    sides = np.where(empty[touching[:, :1]], touching, touching[:, ::-1])  # background first
    around = np.unique(group[sides], axis=0)
    neighbours = np.bincount(around[:, 0], minlength=count)
    single = background & ~outside & (neighbours == 1)
    target = np.arange(count)
    fills = single[around[:, 0]]
    target[around[fills, 0]] = around[fills, 1]
    return target[group], background & ~single


def unknown_id_of(dtype: np.dtype[Any]) -> int:
    """Return the id of unannotated voxels: the largest of the type, as far as it fits into int64, as ids are read."""
    return min(int(np.iinfo(dtype).max), int(np.iinfo(np.int64).max))


def id_type(count: int, setting: IdType, where: str, with_unknown: bool = False) -> np.dtype[Any]:
    """Return the type of ids.

    Args:
        count: number of objects.
        setting: see `IdType`.
        where: the output, for messages.
        with_unknown: unannotated voxels need an id too, see `unknown_id_of`.

    Raises:
        CellMapValueError: there are more objects than the type has ids.
    """
    if with_unknown:
        count += 1
    if setting == "auto":
        return np.dtype(np.uint32 if count <= np.iinfo(np.uint32).max else np.uint64)
    dtype = np.dtype(setting)
    if count > np.iinfo(dtype).max:
        raise CellMapValueError(
            f"{where}: {plural(count - with_unknown, 'object')}{' and unknown voxels' if with_unknown else ''}, and "
            f"ids={setting} ends at {np.iinfo(dtype).max}; use ids=auto, or a larger min_volume"
        )
    return dtype
