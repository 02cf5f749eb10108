"""Multiscale images and their levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.geometry.lattice import AXES, Lattice, Shape, Turn, Vector, to_vector
from cellmap_lightning.io.array_window import ArrayWindow
from cellmap_lightning.io.label_ids import LabelIds
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.io.ngff.arrays import ArrayInfo, read_array
from cellmap_lightning.io.ngff.notes import Note
from cellmap_lightning.io.store import StorePath
from cellmap_lightning.io.stored_array import ArraySource, StoredArray

#: Voxels of the first level by which lower edges of levels may differ; of the level itself, by which upper ones may
#: beyond a ragged last voxel.
BOX_TOLERANCE = 0.1


@dataclass(frozen=True)
class Level:
    """One resolution level of a multiscale image.

    Attributes:
        path: the array's folder.
        name: its path inside the image, such as ``s0``.
        scale: voxel size in nm (z, y, x).
        translation: centre of voxel 0 in nm (z, y, x).
        axes: the stored axes that are z, y, x.
        ndim: number of stored axes.
        source: the array, if it is not a Zarr array.
        ids: meaning of the ids of a label map for one of its classes; None for any other array.
        channel: index along the stored axes that are not spatial; None where these have length 1.
        turn: see `Lattice`; None where the array's axes are those of space.
        names: names of the stored axes by the image's metadata; empty where the array's own names do not matter.
        window: first voxel and voxels (z, y, x) of the box of the array that the level is; None for the whole array.
        whole: the level of the whole array, if the level is a box of it; see `part`.

    Example:
        >>> read_multiscale("jrc_a.zarr/recon-1/em/fibsem-uint8").finest.scale
        (8.0, 8.0, 8.0)
    """

    path: StorePath
    name: str
    scale: Vector
    translation: Vector
    axes: tuple[int, int, int]
    ndim: int
    source: ArraySource | None = field(default=None, repr=False, compare=False)
    ids: LabelIds | None = field(default=None, repr=False)
    channel: int | None = None
    turn: Turn | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()
    window: tuple[Shape, Shape] | None = None
    whole: "Level | None" = field(default=None, repr=False, compare=False)

    @cached_property
    def info(self) -> StoredArray | None:
        """Metadata of the array; None where the image lists a level that does not exist."""
        if self.whole is not None and self.window is not None:
            shape = list(self.whole.array.shape)
            for axis, count in zip(self.axes, self.window[1], strict=True):
                shape[axis] = count
            return ArrayWindow(self.whole.array, tuple(shape))
        info = self.source if self.source is not None else read_array(self.path)
        if info is not None and len(info.shape) != self.ndim:
            raise MetadataError(
                f"{self.path}: the array has {len(info.shape)} axes {list(info.shape)}, the image's "
                f"metadata has {self.ndim}"
            )
        if isinstance(info, ArrayInfo) and self.names and _is_permuted(info.axis_names, self.names):
            raise MetadataError(
                f"{self.path}: its axes are {list(info.axis_names)} by the array's own metadata, and "
                f"{list(self.names)} by those of the image; correct the one that is wrong"
            )
        if info is not None and self.channel is None:
            other = [n for i, n in enumerate(info.shape) if i not in self.axes]
            if any(n != 1 for n in other):
                raise MetadataError(
                    f"{self.path}: shape {list(info.shape)} has a non-spatial axis longer than 1; "
                    "only channel and time axes of length 1 can be read"
                )
        return info

    @cached_property
    def lattice(self) -> Lattice:
        """Voxels in nm.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        return Lattice(self.translation, self.scale, self.zyx(self.array.shape), self.turn)

    @property
    def array(self) -> StoredArray:
        """Metadata of the array.

        Raises:
            CellMapFileNotFoundError: the level is not on disk.
        """
        if self.info is None:
            raise missing(self.path, f"level {self.name!r} is listed in {self.path.parent} but")
        return self.info

    def zyx(self, stored: Sequence[int]) -> Shape:
        """Return values along the stored axes in the order z, y, x."""
        z, y, x = (int(stored[a]) for a in self.axes)
        return z, y, x

    def part(self, start: Shape, shape: Shape) -> "Level":
        """Return a box of the level of a whole array as a level, whose voxel 0 is the first voxel of the box.

        Args:
            start: first voxel of the box (z, y, x).
            shape: voxels of the box (z, y, x), inside the array.
        """
        translation = to_vector(np.add(self.translation, np.multiply(start, self.scale)))
        return replace(self, translation=translation, window=(start, shape), whole=self)


def _is_permuted(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists name z, y and x, and place them differently; other names say nothing."""
    if not (set(AXES) <= set(names) and set(AXES) <= set(others)):
        return False
    return any(names.index(axis) != others.index(axis) for axis in AXES)


@dataclass(frozen=True)
class Multiscale:
    """One multiscale image.

    Attributes:
        path: the group's folder.
        levels: finest first, as listed.
        attributes: the group's attributes.
        assumed: assumptions made when the metadata was read; `notes` adds those about the arrays.
        as_stored: whether ``level_translations=stored`` was set, so that boxes of levels may differ.
        whole: the whole image, if the levels are boxes of its levels.

    Example:
        >>> [level.name for level in read_multiscale("jrc_a.zarr/recon-1/em/fibsem-uint8").present]
        ['s0', 's1', 's2']
    """

    path: StorePath
    levels: tuple[Level, ...]
    attributes: Mapping[str, Any] = field(repr=False)
    assumed: tuple[Note, ...] = field(default=(), repr=False)
    as_stored: bool = field(default=False, repr=False)
    whole: "Multiscale | None" = field(default=None, repr=False, compare=False)

    @cached_property
    def present(self) -> tuple[Level, ...]:
        """Levels whose arrays exist.

        Raises:
            CellMapFileNotFoundError: no array exists.
        """
        present = tuple(level for level in self.levels if level.info is not None)
        if not present:
            raise missing(self.levels[0].path, f"{self.path}: none of its levels is on disk;")
        return present

    @property
    def finest(self) -> Level:
        """Finest level that exists."""
        return self.present[0]

    def with_ids(self, ids: LabelIds) -> "Multiscale":
        """Return the image as that of one class of a label map.

        Args:
            ids: meaning of its ids for the class.
        """
        levels = []
        for level in self.levels:
            levels.append(replace(level, ids=ids))
            vars(levels[-1])["info"] = level.info  # read already
        return replace(self, levels=tuple(levels))

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """Assumptions about the image, including a comparison of the boxes of its levels.

        Raises:
            CellMapFileNotFoundError: none of its levels is on disk.
        """
        if self.whole is not None:
            return self.whole.notes
        different = _different_boxes(self.present) if not self.as_stored else None
        return (*self.assumed, *([different] if different is not None else []))


def _different_boxes(levels: Sequence[Level]) -> Note | None:
    """Return a note on a level that does not cover the box of the finest one, apart from a ragged last voxel."""
    first = levels[0].lattice
    for level in levels[1:]:
        lattice = level.lattice
        low = np.abs(np.subtract(lattice.box.lower, first.box.lower)) / first.step
        high = np.abs(np.subtract(lattice.box.upper, first.box.upper)) / lattice.step
        if (low > BOX_TOLERANCE).any() or (high >= 1 + BOX_TOLERANCE).any():
            return Note(
                "boxes",
                f"level {level.name} covers {lattice.box}, and level {levels[0].name} covers {first.box}: one of them "
                "is misplaced or of another voxel size; they are read as stored",
            )
    return None
