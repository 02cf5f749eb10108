"""Options of a crop: how its voxels are read, what its labels mean, and the values of raw."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

from cellmap_lightning.crops.encodings import MissingLabels, Unknown, check_missing_labels, check_unknown
from cellmap_lightning.crops.image import MAX_UPSAMPLING, MissingRaw, check_missing_raw
from cellmap_lightning.crops.labels import DOWNSAMPLE, Downsample
from cellmap_lightning.crops.unannotated import UnannotatedClasses, check_unannotated_classes
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.io.chunks import Reader, check_reader
from cellmap_lightning.io.ngff import LevelTranslations, Overrides
from cellmap_lightning.io.retrying import DEFAULT_RETRY, RetryPolicy
from cellmap_lightning.runtime.location import CacheMode, check_mode
from cellmap_lightning.transforms.augment import IntensityTransforms
from cellmap_lightning.transforms.intensity import AUTO, Normalize


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How the voxels of raw and labels are read and cached.

    Attributes:
        pad: read crops smaller than a patch: the raw around them where the volume has it (0 outside), targets NaN
            outside the crop.
        max_workers: reading threads; by default the environment's ``CELLMAP_MAX_WORKERS``, else ``min(4, cpu_count)``.
        cache: where decoded voxels are cached: ``disk`` (shared by all processes of the machine, and found again by the
            next run), ``memory``, ``chunks`` (in the memory of each process, those that were decoded last), ``none``,
            or ``auto``: on disk unless that is a network file system.
        cache_bytes: limit of the cache in bytes, for all datasets of the process; by default half of what is free
            there, on disk at most 200 GB, and 2 GiB of ``chunks``.
        reader: what decodes: ``zarr``, or ``tensorstore`` (from the extra ``fast``).
        missing_raw: samples that show raw of which a chunk is not stored: ``error``, ``warn`` (they show the fill
            value), ``fill`` (the same, reported once), ``mask`` (so they do, and targets there are unknown), or
            ``auto``: ``mask`` where raw is visibly a partial copy, in which chunks exist only around crops, as
            `csc fetch-data` leaves it, and otherwise ``error``.
        max_upsampling: how many times finer than raw's finest level an input may be.
        read_attempts: attempts to read an object, the first included.
        read_timeout: seconds for one object, all attempts together.
        storage_options: of addresses such as ``s3://bucket/vol.zarr``: what fsspec's file system is made with, as
            ``{anon: true}``, ``{profile: lab}`` or ``{endpoint_url: ...}``.
        unit: unit of the axes in place of the stored one, such as ``micrometer``: of raw and labels alike, or
            ``{raw: ..., gt: ...}``, as for the next three.
        voxel_size: voxel size of the finest level in place of the stored one, nm (z, y, x).
        translation: centre of voxel 0 of the finest level in place of the stored one, nm (z, y, x).
        multiscale: name of the image to read where a group lists several.
        level_translations: where levels lie whose translations are missing or all the same: ``auto`` (all levels cover
            the same box) or ``stored``.

    Raises:
        CellMapError: a value that is not one of these.
    """

    pad: bool = False
    max_workers: int | None = None
    cache: CacheMode = "auto"
    cache_bytes: int | None = None
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

    def __post_init__(self) -> None:
        check_mode(self.cache, self.cache_bytes)
        check_reader(self.reader)
        check_missing_raw(self.missing_raw)
        _ = self.retry_policy, self.overrides

    @cached_property
    def retry_policy(self) -> RetryPolicy:
        """Retries and deadlines of reads."""
        return RetryPolicy(self.read_attempts, self.read_timeout)

    @cached_property
    def overrides(self) -> tuple[Overrides, Overrides]:
        """What replaces the metadata of raw and of labels."""
        return Overrides.pair(
            self.level_translations,
            unit=self.unit,
            voxel_size=self.voxel_size,
            translation=self.translation,
            multiscale=self.multiscale,
        )


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What stored labels mean, and what becomes of them in targets.

    Attributes:
        target_value_transforms: None, or a callable ``[z, y, x] -> [z, y, x]`` on 0, 1 and NaN: one for all, a list, or
            ``{class: callable}``.
        class_relation_dict: ``{class: [classes that exclude it]}``: where one of these is present and the class itself
            is not known, it is 0.
        infer: what is known by implication, any of ``subset`` and ``superset``; see `Implications`.
        class_table: the classes and their parts; by default those of the CellMap Segmentation Challenge.
        label_downsample: how labels are made coarser: ``stored`` (the level on disk), or from the finest level the
            ``majority`` of the voxels, or ``any`` of them, for thin structures that a pyramid loses.
        unknown: code of unknown voxels in label arrays whose metadata leave it open: ``metadata`` (decided by the
            values, where they decide it), a stored value, or None where every value is meant; or ``{class: code}``.
        missing_labels: chunks of labels that are missing although ``complement_counts`` promise voxels in them:
            ``error``, or ``unknown`` (they are NaN). Any other chunk of labels that is missing is absent.
        unannotated_classes: classes that no crop of the train split annotates, and those in brackets of target paths
            that have no folder: ``error``, or ``unknown`` (targets are NaN, and one warning names them).
        nan_targets: NaN where a target is unknown; otherwise 0, with a boolean ``<name>_mask`` beside the target.
        too_coarse: ``error`` when labels are coarser than a target asks for, or ``upsample``; in a split also ``drop``.

    Raises:
        CellMapError: a value that is not one of these.
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
        if self.label_downsample not in DOWNSAMPLE:
            raise CellMapValueError(
                f"label_downsample must be one of {', '.join(DOWNSAMPLE)}, got {self.label_downsample!r}"
            )


@dataclass(frozen=True, kw_only=True)
class IntensityOptions:
    """How stored values of raw become the values of inputs.

    Attributes:
        raw_value_transforms: ``"auto"`` (normalized as the next two say), None (stored values as float32), a callable
            ``[1, z, y, x] -> [1, z, y, x]``, a list of these, or one per input.
        normalize: how ``"auto"`` maps stored values: ``dtype`` (the type's range to [0, 1]), ``{range: [lo, hi]}``,
            ``{percentile: [lo, hi]}`` or ``zscore`` of the volume; linear, nothing is clipped.
        invert: exchange dark and bright after that.
        intensity_transforms: see `IntensityTransforms`; applied while training, to normalized raw.

    Raises:
        CellMapError: a value that is not one of these.
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
            CellMapError: ``normalize`` is no rule.
        """
        return Normalize.parse(self.normalize, self.invert)


class CropOptions(NamedTuple):
    """All options of a crop.

    Attributes:
        read: how voxels are read and cached.
        labels: what stored labels mean.
        intensity: how stored values of raw become the values of inputs.
    """

    read: ReadOptions
    labels: LabelOptions
    intensity: IntensityOptions

    @classmethod
    def of(cls, **options: Any) -> "CropOptions":
        """Group options by their names.

        Raises:
            CellMapTypeError: an option that does not exist.
            CellMapError: a value that is not one of its option.
        """
        groups: list[Any] = []
        for kind in (ReadOptions, LabelOptions, IntensityOptions):
            names = [field.name for field in fields(kind)]
            groups.append(kind(**{name: options.pop(name) for name in names if name in options}))
        for name in options:
            known = [field.name for group in groups for field in fields(group)]
            close = difflib.get_close_matches(name, known, 1)
            raise CellMapTypeError(f"unexpected option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return cls(*groups)
