"""The label arrays of a crop, read together: one packed array of bits for all classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.transforms.targets import Relations, infer_exclusive, pack_into, packed_bytes
from cellmap_lightning.volumes.chunks import ChunkReader
from cellmap_lightning.volumes.geometry import FloatArray, Lattice, Shape, patch_map
from cellmap_lightning.volumes.image import choose_level
from cellmap_lightning.volumes.ngff import Encoding, Level, Multiscale, read_encoding
from cellmap_lightning.volumes.placement import Window
from cellmap_lightning.volumes.region import ChunkCache, Region
from cellmap_lightning.volumes.resample import AnyArray, evaluate


class LabelGroup:
    """The classes of a crop that share one lattice, as one array of packed voxels.

    Args:
        members: position, level and encoding of each class.
        depth: bytes of a packed voxel.
        cache: where decoded chunks are kept.
        label: what messages call the crop.
    """

    def __init__(
        self,
        members: Sequence[tuple[int, Level, Encoding]],
        depth: int,
        cache: ChunkCache,
        label: str,
        classes: Sequence[str],
    ) -> None:
        self.lattice: Lattice = members[0][1].lattice
        self.depth = depth
        self.members = [
            (index, ChunkReader(level, f"{label}/{classes[index]}"), encoding) for index, level, encoding in members
        ]
        chunks = np.max([reader.chunks for _, reader, _ in self.members], axis=0)
        z, y, x = (int(n) for n in np.minimum(chunks, self.lattice.shape))
        key = tuple((index, str(level.path), encoding) for index, level, encoding in members)
        self.region = Region(self.lattice.shape, (z, y, x), np.dtype(np.uint8), self._decode, cache, key, depth)

    def _decode(self, start: tuple[int, int, int], shape: Shape) -> AnyArray:
        packed = np.zeros((*shape, self.depth), np.uint8)
        for index, reader, encoding in self.members:
            stored = reader.read(start, shape)
            if stored.dtype.kind == "f":
                stored = _as_integers(stored, reader)
            if encoding.ambiguous and encoding.unknown is not None and (stored > encoding.unknown).any():
                raise MetadataError(
                    f"{reader.label}: {reader.level.path} holds ids above {encoding.unknown}, and nothing says whether "
                    f"{encoding.unknown} means unknown or is an instance: "
                    "its attributes have no complement_counts.unknown"
                )
            pack_into(packed, index, stored, encoding.absent, encoding.unknown)
        return packed


def _as_integers(stored: AnyArray, reader: ChunkReader) -> AnyArray:
    """Labels that were stored as floats, if they are whole numbers."""
    whole = np.isfinite(stored).all() and (np.rint(stored) == stored).all()
    if not whole:
        raise MetadataError(f"{reader.label}: {reader.level.path} holds labels that are not whole numbers (or NaN)")
    return stored.astype(np.int64)


class LabelStack:
    """The annotated classes of a crop at the resolution of one target.

    Args:
        images: the multiscale label image of each annotated class.
        classes: all classes that are asked for.
        window: the target's patch.
        cache: where decoded chunks are kept.
        label: what messages call the crop.
        relations: see `infer_exclusive`.
    """

    def __init__(
        self,
        images: Mapping[str, Multiscale],
        classes: Sequence[str],
        window: Window,
        cache: ChunkCache,
        label: str,
        relations: Relations,
    ) -> None:
        self.window = window
        self.relations = relations
        depth = packed_bytes(len(classes))
        groups: list[list[tuple[int, Level, Encoding]]] = []
        for name, image in images.items():
            try:
                level = choose_level(image, window.scale.tolist(), f"{label}/{name}")
                truth = level.array.dtype.kind == "b"
                encoding = Encoding(0, None) if truth else read_encoding(image, level)
                member = (classes.index(name), level, encoding)
                for group in groups:
                    if group[0][1].lattice.matches(level.lattice):
                        group.append(member)
                        break
                else:
                    groups.append([member])
            except CellMapError as e:
                e.args = (f"{label}, class {name!r}: {e}",)
                raise
        self.groups = [LabelGroup(members, depth, cache, label, classes) for members in groups]

    @property
    def lattices(self) -> list[Lattice]:
        """The lattices of the levels that are read; one, unless classes of the crop differ."""
        return [group.lattice for group in self.groups]

    def read_into(self, center: FloatArray, out: np.ndarray[Any, Any], turn: FloatArray | None) -> None:
        """Write the packed patch around ``center`` to ``out`` ``[z, y, x, bytes]``; zero where nothing is known."""
        for number, group in enumerate(self.groups):
            amap = patch_map(center, self.window.shape, self.window.scale, group.lattice, turn)
            part = out if number == 0 else np.empty(out.shape, np.uint8)
            evaluate(group.region, amap, part, method="nearest", fill=0)
            if number:
                out |= part
        if self.relations:
            infer_exclusive(out, self.relations)
