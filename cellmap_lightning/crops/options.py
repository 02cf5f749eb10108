"""Options of a crop: reading and caching, meaning of labels, and normalization of raw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

from cellmap_lightning.crops.crop_box import CropBox
from cellmap_lightning.crops.encodings import MissingLabels, Unknown, check_missing_labels, check_unknown
from cellmap_lightning.crops.image import MAX_UPSAMPLING, MissingRaw, check_missing_raw
from cellmap_lightning.crops.labels import DOWNSAMPLE, Downsample
from cellmap_lightning.crops.unannotated import UnannotatedClasses, check_unannotated_classes
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.io.chunks import Reader, check_reader
from cellmap_lightning.io.ngff import LevelTranslations, Overrides
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.runtime.location import CacheMode, check_mode
from cellmap_lightning.transforms.intensity import IntensityTransforms
from cellmap_lightning.transforms.normalization import AUTO, Normalize
from cellmap_lightning.validation import did_you_mean, int_at_least, mapping_or_none, one_of, positive_number, yes_or_no


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of reading and caching the voxels of raw and labels; see docs/configuration.md.

    Attributes:
        pad: allow crops smaller than a patch: patches show the raw around them (0 outside the volume), and targets are
            NaN outside the crop.
        max_workers: reading threads; by default the environment's ``CELLMAP_MAX_WORKERS``, else ``min(4, cpu_count)``.
        cache: location of the cache of decoded voxels: ``disk`` (shared by all processes of the machine, and reused by
            later runs), ``memory``, ``chunks`` (in each process, the chunks used last), ``none``, or ``auto``: on disk
            unless that is a network file system. ``device`` is ``auto`` with the crops that fit on the device of the
            Trainer as well, from which batches are gathered there; ``auto`` does this if it is a CUDA device that holds
            all crops; see docs/device.md.
        cache_bytes: limit of the cache in bytes, for all datasets of the process; by default half of the free space
            there, on disk at most 200 GB, and 2 GiB of ``chunks``.
        device_cache_bytes: limit of the voxels on the device in bytes, for all splits; by default half of its memory
            without that of the batches.
        reader: decoding library: ``zarr``, or ``tensorstore`` (from the extra ``fast``).
        missing_raw: policy for samples that show raw chunks that are not stored: ``error``, ``warn`` (they show the
            fill value), ``fill`` (the same, logged once), ``mask`` (the same, with unknown targets there), or ``auto``:
            ``mask`` if raw is a partial copy, in which chunks exist only around crops, as `csc fetch-data` makes it,
            else ``error``.
        max_upsampling: largest ratio of the voxel size of raw's finest level to that of an input.
        read_attempts: attempts to read an object, the first included.
        read_timeout: seconds for one object, all attempts together.
        storage_options: arguments of fsspec's file system for addresses such as ``s3://bucket/vol.zarr``, as
            ``{anon: true}``, ``{profile: lab}`` or ``{endpoint_url: ...}``.
        unit: unit of the axes in place of the stored one, such as ``micrometer``: of raw and labels alike, or
            ``{raw: ..., gt: ...}``, as for the next three and ``axes``.
        voxel_size: voxel size of the finest level in place of the stored one, nm (z, y, x).
        translation: centre of voxel 0 of the finest level in place of the stored one, nm (z, y, x).
        multiscale: name of the image to read where a group lists several.
        level_translations: treatment of missing or equal translations of levels: ``auto`` (all levels cover the same
            box) or ``stored``.
        axes: names of the stored axes, one letter each, such as ``xyz``; for arrays that are not OME-NGFF images.
        box: the part of the crop that is used, see `CropBox.parse`; None for all of it.

    Raises:
        CellMapError: an invalid value.
    """

    pad: bool = False
    max_workers: int | None = None
    cache: CacheMode = "auto"
    cache_bytes: int | None = None
    device_cache_bytes: int | None = None
    reader: Reader = "zarr"
    missing_raw: MissingRaw = "auto"
    max_upsampling: float = MAX_UPSAMPLING  # finer patches hold no more information
    read_attempts: int = DEFAULT_RETRY.attempts
    read_timeout: float = DEFAULT_RETRY.timeout
    storage_options: Mapping[str, Any] | None = None
    unit: Any = None
    voxel_size: Any = None
    translation: Any = None
    multiscale: Any = None
    level_translations: LevelTranslations = "auto"
    axes: Any = None
    box: Any = None

    def __post_init__(self) -> None:
        check_mode(self.cache, self.cache_bytes)
        if self.device_cache_bytes is not None:
            int_at_least("device_cache_bytes", self.device_cache_bytes, 1)
        check_reader(self.reader)
        check_missing_raw(self.missing_raw)
        yes_or_no("pad", self.pad)
        positive_number("max_upsampling", self.max_upsampling)
        mapping_or_none("storage_options", self.storage_options)
        _ = self.retry_policy, self.overrides, self.crop_box

    @cached_property
    def crop_box(self) -> CropBox | None:
        """The part of the crop that is used; None for all of it."""
        return None if self.box is None else CropBox.parse(self.box)

    @cached_property
    def retry_policy(self) -> RetryPolicy:
        """Retries and timeouts of reads."""
        return RetryPolicy(self.read_attempts, self.read_timeout)

    @cached_property
    def overrides(self) -> tuple[Overrides, Overrides]:
        """Replacements for the metadata of raw and of labels."""
        return Overrides.pair(
            self.level_translations,
            unit=self.unit,
            voxel_size=self.voxel_size,
            translation=self.translation,
            multiscale=self.multiscale,
            axes=self.axes,
        )


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Options of the meaning of stored labels and of targets; see docs/targets.md.

    Attributes:
        target_value_transforms: None, or a callable ``[z, y, x] -> [z, y, x]`` on 0, 1 and NaN: one for all, a list, or
            ``{class: callable}``.
        class_relation_dict: ``{class: [classes that exclude it]}``: where one of these is present and the class itself
            is unknown, it is 0.
        infer: rules of implication, any of ``subset`` and ``superset``; see `Implications`.
        class_table: the classes and their parts; by default those of the CellMap Segmentation Challenge.
        label_downsample: downsampling of labels: ``stored`` (the level on disk), or ``majority`` or ``any`` of the
            finest level's voxels, the last for thin structures that a pyramid loses.
        unknown: code of unknown voxels in label arrays whose metadata do not define it: ``metadata`` (decided by the
            values, if they are unambiguous), a stored value, or None if no value means unknown; or ``{class: code}``.
        missing_labels: policy for label chunks that are missing although ``complement_counts`` declare voxels in them:
            ``error``, or ``unknown`` (they are NaN). Other missing label chunks are absent voxels.
        unannotated_classes: policy for classes that no crop of the train split annotates, and for those in brackets of
            target paths without a folder: ``error``, or ``unknown`` (targets are NaN, and one warning names them).
        nan_targets: NaN where a target is unknown; otherwise 0, with a boolean ``<name>_mask`` beside the target.
        too_coarse: ``error`` if labels are coarser than a target, or ``upsample``; in a split also ``drop``.

    Raises:
        CellMapError: an invalid value.
    """

    target_value_transforms: Any = None
    class_relation_dict: Mapping[str, Any] | None = None
    infer: Sequence[str] = ()
    class_table: str | None = None
    label_downsample: Downsample = "stored"
    unknown: Unknown = "metadata"
    missing_labels: MissingLabels = "error"
    unannotated_classes: UnannotatedClasses = "error"
    nan_targets: bool = True
    too_coarse: Literal["error", "upsample", "drop"] = "error"

    def __post_init__(self) -> None:
        check_unknown(self.unknown)
        check_missing_labels(self.missing_labels)
        check_unannotated_classes(self.unannotated_classes)
        one_of("label_downsample", self.label_downsample, DOWNSAMPLE)
        yes_or_no("nan_targets", self.nan_targets)
        one_of("too_coarse", self.too_coarse, ("error", "upsample", "drop"))


@dataclass(frozen=True, kw_only=True)
class IntensityOptions:
    """Options of the values of inputs; see docs/transforms.md.

    Attributes:
        raw_value_transforms: ``"auto"`` (normalized by the next two), None (stored values as float32), a callable
            ``[1, z, y, x] -> [1, z, y, x]``, a list of these, or one per input.
        normalize: linear map of stored values by ``"auto"``, without clipping: ``dtype`` (the type's range to [0, 1]),
            ``{range: [lo, hi]}``, ``{percentile: [lo, hi]}`` or ``zscore`` of the volume.
        invert: exchange dark and bright after normalization.
        intensity_transforms: see `IntensityTransforms`; applied while training, to normalized raw.

    Raises:
        CellMapError: an invalid value.
    """

    raw_value_transforms: Any = AUTO
    normalize: Any = "dtype"
    invert: bool = False
    intensity_transforms: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        IntensityTransforms(self.intensity_transforms)

    @property
    def rule(self) -> Normalize:
        """The rule of ``normalize`` and ``invert``.

        Raises:
            CellMapError: ``normalize`` is not a rule.
        """
        return Normalize.parse(self.normalize, self.invert)


class CropOptions(NamedTuple):
    """All options of a crop; see docs/configuration.md.

    Attributes:
        read: reading and caching of voxels.
        labels: meaning of stored labels.
        intensity: values of inputs.
    """

    read: ReadOptions
    labels: LabelOptions
    intensity: IntensityOptions

    @classmethod
    def of(cls, **options: Any) -> "CropOptions":
        """Group options by their names.

        Raises:
            CellMapTypeError: an option does not exist.
            CellMapError: a value of an option is invalid.
        """
        groups: list[Any] = []
        for kind in (ReadOptions, LabelOptions, IntensityOptions):
            names = [field.name for field in fields(kind)]
            groups.append(kind(**{name: options.pop(name) for name in names if name in options}))
        for name in options:
            known = [field.name for group in groups for field in fields(group)]
            raise CellMapTypeError(f"unexpected option {name!r}{did_you_mean(name, known)}")
        return cls(*groups)
