"""Crop metadata (classes, voxel counts, box), read before a crop is opened and without reading voxels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.crops.counts import counted_in_metadata
from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import Box, Vector, to_vector
from cellmap_lightning.io.images import image_exists
from cellmap_lightning.io.ngff import NO_OVERRIDES, Multiscale, Overrides
from cellmap_lightning.io.store import prefetch_metadata


@dataclass(frozen=True)
class CropMetadata:
    """Content of a crop according to its metadata; see docs/data.md.

    Attributes:
        voxels: foreground voxels of each annotated class at its finest level; None if the metadata have no count.
        box: the box of all classes, nm; None if unknown.
        scale: the coarsest of the classes' finest voxel sizes along each axis, nm; None if unknown.
    """

    voxels: Mapping[str, int | None]
    box: Box | None = None
    scale: Vector | None = None

    @property
    def classes(self) -> frozenset[str]:
        """The classes that have, or may have, voxels in the crop: those with a count other than 0."""
        return frozenset(name for name, count in self.voxels.items() if count != 0)


def read_crop_metadata(
    target: TargetPath,
    classes: Sequence[str],
    overrides: Overrides = NO_OVERRIDES,
    tolerant: bool = False,
    crop_box: CropBox | None = None,
) -> CropMetadata:
    """Read the metadata of some classes of a crop.

    A class that cannot be read is listed without a count; the error is raised when the crop is opened.

    Args:
        target: the labels of the crop.
        classes: the classes.
        overrides: settings that replace metadata.
        tolerant: a class without a folder is unannotated.
        crop_box: the part of the crop that is used; None for all of it.
    """
    voxels: dict[str, int | None] = {}
    images: dict[str, Multiscale] = {}
    annotated = [name for name in classes if name in target.names]
    prefetch_metadata([target.of(name) for name in annotated])
    for name in annotated:
        voxels[name] = None
        try:
            if not image_exists(target.of(name)):
                if tolerant:
                    del voxels[name]
                continue
            image = target.read(name, overrides)
            _ = image.finest.lattice
            images[name] = image
        except CellMapError:
            continue
    if crop_box is not None and images:
        try:
            images, outside, _ = restricted(target.label, images, crop_box)
        except CellMapError:
            return CropMetadata(voxels)
        for name in outside:
            del voxels[name]
    box: Box | None = None
    scale: Vector | None = None
    for name, image in images.items():
        lattice = image.finest.lattice
        voxels[name] = counted_in_metadata(image)
        box = lattice.box if box is None else box.union(lattice.box)
        scale = lattice.step if scale is None else to_vector(np.maximum(scale, lattice.step))
    return CropMetadata(voxels, box, scale)
