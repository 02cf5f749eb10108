"""A dataset over one annotated crop."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Never

import numpy as np

from cellmap_lightning.batches.arrays import ArraySet, ArraySpecs
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.flat_options import refuse_flat
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.geometry.placement import Placement
from cellmap_lightning.io.ngff import Level
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.transforms.intensity import IntensityTransforms
from cellmap_lightning.transforms.normalization import Scaling, input_transforms
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.transforms.targets import class_transforms
from cellmap_lightning.validation import whole_number
from cellmap_lightning.wording import plural


class CellMapDataset(SampleSource):
    """A dataset of patches of one raw volume and of the labels of one annotated crop in it.

    Args:
        input_path: the raw multiscale group.
        target_path: the label groups, ``".../crop1/[mito,er]"``; a class outside the bracket is unannotated in this
            crop. None for raw only.
        classes: the targets' channels, in order. None for raw only.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` (z, y, x) of the inputs, or one bare specification.
        target_arrays: the same for the targets; concentric with the inputs.
        spatial_transforms: see `SpatialTransforms`; applied while training.
        is_train: draw samples at random and augment them.
        seed: random seed; each sample is a function of the seed and its number.
        plane: plane of flat patches: ``xy``, ``xz`` or ``yz``.
        read: options of reading and caching.
        labels: options of the meaning of stored labels.
        intensity: options of normalization and intensity augmentation.
        flat: none; options that are given flat are an error that names their dataclass.

    Raises:
        CellMapFileNotFoundError: a path or a class of the bracket does not exist.
        TooCoarseError: the labels are coarser than a target.
        NotAnnotatedError: none of ``classes`` is in the bracket.
        CellMapError: other problems with the arguments, the metadata, or their combination.

    Example:
        >>> dataset = CellMapDataset(
        ...     "jrc_a.zarr/recon-1/em/fibsem-uint8", "jrc_a.zarr/recon-1/labels/groundtruth/crop1/[mito,er]",
        ...     ["mito", "er"], {"raw": patch}, {"labels": patch}, read=ReadOptions(pad=True),
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        input_path: str,
        target_path: str | None = None,
        classes: Sequence[str] | None = None,
        input_arrays: ArraySpecs | None = None,
        target_arrays: ArraySpecs | None = None,
        spatial_transforms: Mapping[str, Any] | None = None,
        is_train: bool = False,
        seed: int = 0,
        plane: str = "xy",
        read: ReadOptions | None = None,
        labels: LabelOptions | None = None,
        intensity: IntensityOptions | None = None,
        **flat: Never,
    ) -> None:
        refuse_flat(CellMapDataset, flat, {"read": ReadOptions, "labels": LabelOptions, "intensity": IntensityOptions})
        read, labels, intensity = read or ReadOptions(), labels or LabelOptions(), intensity or IntensityOptions()
        if labels.too_coarse == "drop":
            raise CellMapValueError("too_coarse must be 'error' or 'upsample', got 'drop', which only splits support")
        seed = whole_number("seed", seed)
        arrays = ArraySet.parse(input_arrays, target_arrays, classes, target_path is not None)
        spatial = SpatialTransforms(spatial_transforms)
        spatial.check({name: spec.window for name, spec in arrays.specs.items()})
        raw_transforms = input_transforms(intensity.raw_value_transforms, list(arrays.inputs), "raw_value_transforms")
        crop = Crop(
            str(input_path), target_path if arrays.targets else None, arrays, spatial, bool(is_train), plane, read,
            labels, intensity, raw_transforms,
        )  # fmt: skip
        layout = BatchLayout(
            arrays.inputs,
            arrays.targets,
            arrays.classes,
            crop.raw_dtype,
            crop.labels.id_dtype,
            raw_transforms,
            class_transforms(labels.target_value_transforms, arrays.classes, "target_value_transforms")
            if arrays.targets
            else {},
            Scaling.of([0], [crop.raw.affine]),
            bool(labels.nan_targets),
            seed,
            IntensityTransforms(intensity.intensity_transforms) if is_train else None,
        )
        super().__init__([crop], layout, seed, bool(is_train), spatial, crop.pool, crop.store)

    @property
    def crop(self) -> Crop:
        """The crop."""
        return self.crops[0]

    @property
    def input_path(self) -> str:
        """Path of the raw multiscale group."""
        return self.crop.input_path

    @property
    def target_path(self) -> TargetPath | None:
        """Path of the label groups, with the classes of the bracket; None for raw only."""
        return self.crop.target_path

    @property
    def label(self) -> str:
        """Name of the crop, for messages."""
        return self.crop.label

    @property
    def annotated(self) -> tuple[str, ...]:
        """The classes that are annotated in the crop."""
        return self.crop.annotated

    @property
    def box(self) -> Box:
        """The annotated box, or the whole volume; nm."""
        return self.crop.box

    @property
    def raw_box(self) -> Box:
        """The whole volume, nm."""
        return self.crop.raw.box

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """The stored type of raw."""
        return self.crop.raw_dtype

    @property
    def placement(self) -> Placement:
        """The positions of patches."""
        return self.crop.placement

    @property
    def images(self) -> Mapping[str, StoredImage]:
        """The stored raw of each input."""
        return self.crop.images

    @property
    def levels(self) -> Mapping[str, Level]:
        """The level of raw that each input is read from."""
        return self.crop.raw.levels

    @property
    def affine(self) -> tuple[float, float]:
        """Offset and factor that normalize stored values."""
        return self.crop.raw.affine

    @property
    def weight(self) -> float | None:
        """Relative weight of the crop in the strategy ``weighted``; None if not set."""
        return self.crop.weight

    @property
    def class_counts(self) -> dict[str, float]:
        """Foreground voxels of each annotated class; see `CropLabels.class_counts`."""
        return self.crop.class_counts

    @property
    def background_counts(self) -> dict[str, float]:
        """Voxels where each annotated class is absent; see `CropLabels.background_counts`."""
        return self.crop.background_counts

    def share(self, pool: ReadPool, store: RegionStore) -> None:
        """Read with the threads and the cache of a collection."""
        self.crop.share(pool, store)
        self._pool, self._store = pool, store

    def set_affine(self, affine: tuple[float, float]) -> None:
        """Normalize by another offset and factor, such as those of a checkpoint."""
        self.crop.raw.affine = affine
        self.layout = dataclasses.replace(self.layout, scaling=Scaling.of([0], [affine]))

    def describe(self) -> str:
        """Return the crop and the number of positions, for log lines."""
        return f"{self.label}, {plural(len(self), 'position')} of a patch"

    def __repr__(self) -> str:
        return (
            f"CellMapDataset({self.label}: {plural(len(self), 'position')}, {len(self.annotated)} of "
            f"{plural(len(self.classes), 'class', 'classes')})"
        )
