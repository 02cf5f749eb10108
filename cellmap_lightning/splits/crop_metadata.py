"""What a crop holds, by its metadata: known before it is opened, and without reading a voxel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from cellmap_lightning.crops.counts import counted_in_metadata
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import Box, Vector, to_vector
from cellmap_lightning.io.ngff import NO_OVERRIDES, Overrides, read_multiscale
from cellmap_lightning.io.store import parts_of, prefetch_metadata


@dataclass(frozen=True)
class CropMetadata:
    """What the metadata of a crop says.

    Attributes:
        voxels: foreground voxels of each annotated class at its finest level; None where nothing says how many.
        box: the box of all of them in nm; None where it cannot be told.
        scale: the coarsest of their finest voxel sizes along each axis, nm; None likewise.
    """

    voxels: Mapping[str, int | None]
    box: Box | None = None
    scale: Vector | None = None

    @property
    def classes(self) -> frozenset[str]:
        """The classes that have voxels here, or may have: those whose count is not 0."""
        return frozenset(name for name, count in self.voxels.items() if count != 0)


def look(target: TargetPath, classes: Sequence[str], overrides: Overrides = NO_OVERRIDES) -> CropMetadata:
    """What a crop holds of these classes. What cannot be read counts as listed: opening it will say what is wrong."""
    voxels: dict[str, int | None] = {}
    box: Box | None = None
    scale: Vector | None = None
    wanted = [name for name in classes if name in target.names]
    prefetch_metadata([target.of(name) for name in wanted])
    for name in wanted:
        voxels[name] = None
        try:
            image = read_multiscale(target.existing(name), overrides)
            lattice = image.finest.lattice
            voxels[name] = counted_in_metadata(image)
        except CellMapError:
            continue
        box = lattice.box if box is None else box.union(lattice.box)
        scale = lattice.step if scale is None else to_vector(np.maximum(scale, lattice.step))
    return CropMetadata(voxels, box, scale)


def dataset_and_crop(input_path: str, target: TargetPath | None) -> tuple[str, str]:
    """Dataset of a crop, and its path inside it; both without what depends on where the data was put.

    The dataset is the name of the Zarr container, or else of the deepest folder that holds raw and target.
    """
    own = parts_of(target.before) if target else parts_of(input_path)
    for parent in own.parents if target else (own, *own.parents):
        if parent.suffix in (".zarr", ".n5"):
            return parent.stem, own.relative_to(parent).as_posix()
    raw = parts_of(input_path)
    if target is None:
        return raw.name, raw.name
    shared = [a for a, b in zip(raw.parts, own.parts, strict=False) if a == b]
    return PurePosixPath(*shared).name if shared else raw.name, own.name
