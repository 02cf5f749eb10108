"""The segmentation of one block, by a method with its parameters in voxels of the volume."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.geometry.lattice import Shape, Vector
from cellmap_lightning.instances.agglomeration import agglomerate_affinities, agglomerate_boundaries
from cellmap_lightning.instances.components import Labels, label_components
from cellmap_lightning.instances.mutex_watershed import mutex_watershed
from cellmap_lightning.instances.options import InputKind, Method, SegmentationOptions
from cellmap_lightning.instances.source import SegmentationSource
from cellmap_lightning.instances.watershed import Floats, Mask, distance_watershed

#: Voxels of the halo, where it is not given; of affinities at least, and in units of the longest offset.
_HALO, _HALO_AFFINITIES, _OFFSETS = 32, 16, 2
#: Bytes of memory per segmented voxel of each method, and per channel; measured by benchmarks/segmentation.py.
_BYTES: dict[Method, tuple[int, int]] = {
    "components": (24, 0),
    "watershed": (40, 0),
    "mutex_watershed": (70, 20),
    "agglomeration": (40, 8),
}


@dataclass(frozen=True)
class BlockSegmenter:
    """A method with its parameters; see `SegmentationOptions`.

    Attributes:
        method: the method.
        kind: the kind of its input.
        threshold: see `SegmentationOptions`.
        voxel_size: nm.
        offsets: offsets of affinities, voxels.
        smoothing: nm.
        seed_distance: nm.
        halo: voxels on either side of a block that are segmented and not written.
        options: the other parameters.
    """

    method: Method
    kind: InputKind
    threshold: float
    voxel_size: Vector
    offsets: tuple[Shape, ...]
    smoothing: float
    seed_distance: float
    halo: Shape
    options: SegmentationOptions

    @classmethod
    def of(cls, source: SegmentationSource, options: SegmentationOptions) -> "BlockSegmenter":
        """Return the segmenter of an input, with defaults in place of None.

        Raises:
            CellMapValueError: the method does not read this kind of input.
        """
        method = options.method_for(source.kind, f"{source.path}")
        size, longest = source.lattice.step, max(source.lattice.step)
        threshold = options.threshold
        if threshold is None:
            threshold = 0.0 if source.kind == "distance" else 0.5
        z, y, x = _halo(options, source)
        halo = (1, 1, 1) if method == "components" else (z, y, x)
        smoothing = longest if options.smoothing is None else options.smoothing
        seed_distance = 4 * longest if options.seed_distance is None else options.seed_distance
        return cls(method, source.kind, threshold, size, source.offsets, smoothing, seed_distance, halo, options)

    @property
    def strides(self) -> Shape:
        """Voxels to whose multiples the start of an array is aligned, so that any block gives the same edges."""
        z, y, x = self.options.strides if self.method == "mutex_watershed" else (1, 1, 1)
        return z, y, x

    @property
    def exact_joins(self) -> bool:
        """True if objects of two blocks are the same whenever they share a voxel."""
        return self.method == "components"

    @property
    def voxel_bytes(self) -> int:
        """The memory of a segmented voxel, bytes."""
        fixed, channel = _BYTES[self.method]
        return fixed + channel * len(self.offsets)

    @property
    def record(self) -> dict[str, Any]:
        """The parameters that the result depends on, for the record of the segmentation."""
        options = self.options
        return {
            "method": self.method, "kind": self.kind, "threshold": self.threshold,
            "offsets": [list(offset) for offset in self.offsets], "connectivity": options.connectivity,
            "smoothing": self.smoothing, "seed_distance": self.seed_distance, "seed_depth": options.seed_depth,
            "merge_threshold": options.merge_threshold, "strides": list(options.strides), "halo": list(self.halo),
            "overlap": options.overlap, "min_volume": options.min_volume, "max_volume": options.max_volume,
            "fill_holes": options.fill_holes,
        }  # fmt: skip

    def mask(self, values: Floats) -> Mask:
        """Return the foreground of probabilities, distances or boundaries."""
        if self.kind == "boundary":
            return values < self.threshold
        return values > self.threshold if self.kind == "distance" else values >= self.threshold

    def __call__(self, values: Floats) -> Labels:
        """Return the objects of a block with its halo.

        Args:
            values: as from `SegmentationSource.read`.

        Returns:
            Numbers from 1, and 0 in the background, ``[z, y, x]``.
        """
        options = self.options
        seeds: dict[str, Any] = {"smoothing": self.smoothing, "seed_distance": self.seed_distance}
        seeds["connectivity"] = options.connectivity
        if self.method == "components":
            return label_components(self.mask(values), options.connectivity)
        if self.method == "mutex_watershed":
            return mutex_watershed(values, self.offsets, self.threshold, options.strides)
        if self.method == "watershed":
            distance = values - np.float32(self.threshold) if self.kind == "distance" else None
            return distance_watershed(
                self.mask(values), self.voxel_size, distance, seed_depth=options.seed_depth, **seeds
            )
        if self.kind == "affinities":
            return agglomerate_affinities(
                values, self.offsets, self.voxel_size, self.threshold, options.merge_threshold, **seeds
            )
        return agglomerate_boundaries(values, self.voxel_size, self.threshold, options.merge_threshold, **seeds)


def _halo(options: SegmentationOptions, source: SegmentationSource) -> Shape:
    """Return the voxels of the halo of a method with a reach."""
    halo = []
    for axis, size in enumerate(source.lattice.step):
        longest = max((abs(offset[axis]) for offset in source.offsets), default=0)
        least = max(_HALO_AFFINITIES, _OFFSETS * longest) if source.offsets else _HALO
        halo.append(least if options.halo is None else max(1, math.ceil(options.halo / size - 1e-6)))
    return halo[0], halo[1], halo[2]
