"""One raw volume and one annotated crop of it."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from cellmap_lightning.batches.arrays import (
    ArraySpecs,
    BatchLayout,
    InputArray,
    TargetArray,
    parse_classes,
    parse_inputs,
    parse_targets,
)
from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.cache.patches import Patches, Resampled, reached
from cellmap_lightning.cache.region import Region, RegionStore
from cellmap_lightning.crops.class_index import Foreground, foreground_index
from cellmap_lightning.crops.class_tiles import tiles_with
from cellmap_lightning.crops.counts import foreground, known_foreground, unknown_in_metadata
from cellmap_lightning.crops.encodings import (
    LabelEncodings,
    MissingLabels,
    Unknown,
    check_missing_labels,
    check_unknown,
)
from cellmap_lightning.crops.image import MAX_UPSAMPLING, MissingRaw, StoredImage, check_missing_raw, choose_level
from cellmap_lightning.crops.labels import DOWNSAMPLE, BitStack, Downsample, IdStack, id_dtype
from cellmap_lightning.crops.missing_raw import resolve
from cellmap_lightning.crops.planes import Plane
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.datasets.renamed import renamed
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import (
    AXES,
    LATTICE_TOLERANCE,
    SCALE_TOLERANCE,
    Box,
    FloatArray,
    Lattice,
    Shape,
    outside,
    patch_map,
)
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.chunks import Reader, check_reader
from cellmap_lightning.io.ngff import (
    Level,
    LevelTranslations,
    Multiscale,
    Overrides,
    first_time,
    read_multiscale,
    report,
    shared_metadata,
)
from cellmap_lightning.io.retrying import PATIENT, Patience
from cellmap_lightning.io.statistics import statistics
from cellmap_lightning.io.store import Remote, StorePath, exists, located, parts_of, warm
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.runtime.location import CacheMode
from cellmap_lightning.runtime.thread_pool import ReadPool, default_workers
from cellmap_lightning.sampling.tiles import IntArray
from cellmap_lightning.transforms.augment import IntensityTransforms
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.intensity import AUTO, Normalize, Scaling, input_transforms
from cellmap_lightning.transforms.kinds import UNKNOWN_ID, TargetKind
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.transforms.targets import class_transforms

log = logging.getLogger(__name__)

#: Part of a crop outside of raw from which it is reported.
LEAST_OUTSIDE = 1e-6
#: A place in a placement's grid (z, y, x).
Place = tuple[int, int, int]


class TooCoarseError(CellMapValueError):
    """The labels of a crop are coarser than what is asked for."""


class NotAnnotatedError(CellMapValueError):
    """A crop annotates none of the classes."""


class CellMapDataset(SampleSource):
    """Patches of one raw volume and of the labels of one annotated crop in it.

    Args:
        input_path: the raw multiscale group.
        target_path: the label groups, ``".../crop1/[mito,er]"``; a class outside the bracket is not annotated in this
            crop. None for raw only.
        classes: the targets' channels, in order. None for raw only.
        input_arrays: ``{name: {"shape": voxels, "scale": nm}}`` (z, y, x) of the inputs, or one bare description.
        target_arrays: the same for the targets; concentric with the inputs.
        spatial_transforms: see `SpatialTransforms`; applied while training.
        intensity_transforms: see `IntensityTransforms`; applied while training, to normalized raw.
        raw_value_transforms: ``"auto"`` (stored integers to [0, 1] by their type's range), None (stored values as
            float32), a callable ``[1, z, y, x] -> [1, z, y, x]``, a list of these, or one per input.
        target_value_transforms: None, or a callable ``[z, y, x] -> [z, y, x]`` on 0, 1 and NaN: one for all, a list, or
            ``{class: callable}``.
        class_relation_dict: ``{class: [classes that exclude it]}``: where one of these is present and the class itself
            is not known, it is 0.
        is_train: draw samples at random and augment them.
        pad: read crops smaller than a patch: the raw around them where the volume has it (0 outside), targets NaN
            outside the crop.
        max_workers: reading threads; by default the environment's ``CELLMAP_MAX_WORKERS``, else ``min(4, cpu_count)``.
        seed: everything random follows from it and from the number of the sample.
        normalize: how ``"auto"`` maps stored values: ``dtype`` (the type's range to [0, 1]), ``{range: [lo, hi]}``,
            ``{percentile: [lo, hi]}`` or ``zscore`` of the volume; linear, nothing is cut off.
        invert: exchange dark and bright after that.
        infer: what is known by implication, any of ``subset`` and ``superset``; see `Implications`.
        class_table: the classes and their parts; by default those of the CellMap Segmentation Challenge.
        label_downsample: how labels are made coarser: ``stored`` (the level on disk), or from the finest level the
            ``majority`` of the voxels, or ``any`` of them, for thin structures that a pyramid loses.
        unknown: code of unknown voxels in label arrays whose metadata leave it open: ``metadata`` (decided by the
            values, where they decide it), a stored value, or None where every value is meant; or ``{class: code}``.
        nan_targets: say NaN where nothing is known; otherwise 0, with a boolean ``<name>_mask`` beside the target.
        plane: where flat patches lie: ``xy``, ``xz`` or ``yz``.
        too_coarse: ``error`` when labels are coarser than a target asks for, or ``upsample``.
        max_upsampling: how many times finer than raw's finest level an input may be.
        cache: where decoded voxels are kept: ``disk`` (shared by all processes of the machine, and found again by the
            next run), ``memory``, ``chunks`` (in the memory of each process, those that were decoded last), ``none``,
            or ``auto``: on disk unless that is a network file system.
        cache_bytes: bytes that are kept at most, by all datasets of the process; by default half of what is free
            there, on disk at most 200 GB, and 2 GiB of ``chunks``.
        reader: what decodes: ``zarr``, or ``tensorstore`` (from the extra ``fast``).
        missing_raw: what becomes of samples that show raw of which a chunk is not stored: ``error``, ``warn`` (they
            show the fill value), ``fill`` (the same, reported once), ``mask`` (so they do, and targets there are
            unknown), or ``auto``: ``mask`` where raw is visibly a partial copy, in which chunks exist only around
            crops, as `csc fetch-data` leaves it, and otherwise ``error``. A chunk of labels that is not stored holds
            the fill value.
        missing_labels: what becomes of chunks of labels that are missing although ``complement_counts`` promise voxels
            in them: ``error``, or ``unknown`` (they are NaN). Any other chunk of labels that is missing is absent.
        unit: unit of the axes in place of the stored one, such as ``micrometer``: of raw and labels alike, or
            ``{raw: ..., gt: ...}``, as for the next three.
        voxel_size: voxel size of the finest level in place of the stored one, nm (z, y, x).
        translation: centre of voxel 0 of the finest level in place of the stored one, nm (z, y, x).
        multiscale: name of the image to read where a group lists several.
        level_translations: where levels lie whose translations are missing or all the same: ``auto`` (all levels cover
            the same box) or ``stored``.
        read_attempts: how many times an object is asked for at most, before that is an error.
        read_timeout: seconds after which it is given up, with all attempts.
        storage_options: of addresses such as ``s3://bucket/vol.zarr``: what fsspec's file system is made with, as
            ``{anon: true}``, ``{profile: lab}`` or ``{endpoint_url: ...}``.
        raw_path: older name of ``input_path``.
        gt_path: older name of ``target_path``.

    Raises:
        CellMapFileNotFoundError: a path or a class of the bracket does not exist.
        TooCoarseError: the labels are coarser than asked for.
        NotAnnotatedError: none of ``classes`` is in the bracket.
        CellMapError: anything else that is wrong with the arguments, the metadata, or their combination.
    """

    def __init__(
        self,
        input_path: str | None = None,
        target_path: str | None = None,
        classes: Sequence[str] | None = None,
        input_arrays: ArraySpecs | None = None,
        target_arrays: ArraySpecs | None = None,
        spatial_transforms: Mapping[str, Any] | None = None,
        raw_value_transforms: Any = AUTO,
        target_value_transforms: Any = None,
        class_relation_dict: Mapping[str, Any] | None = None,
        is_train: bool = False,
        pad: bool = False,
        max_workers: int | None = None,
        seed: int = 0,
        *,
        intensity_transforms: Mapping[str, Any] | None = None,
        normalize: Any = "dtype",
        invert: bool = False,
        infer: Sequence[str] = (),
        class_table: str | None = None,
        label_downsample: Downsample = "stored",
        unknown: Unknown = "metadata",
        nan_targets: bool = True,
        plane: str = "xy",
        too_coarse: Literal["error", "upsample"] = "error",
        max_upsampling: float = MAX_UPSAMPLING,
        cache: CacheMode = "auto",
        cache_bytes: int | None = None,
        reader: Reader = "zarr",
        missing_raw: MissingRaw = "auto",
        missing_labels: MissingLabels = "error",
        unit: Any = None,
        voxel_size: Any = None,
        translation: Any = None,
        multiscale: Any = None,
        level_translations: LevelTranslations = "auto",
        read_attempts: int = PATIENT.attempts,
        read_timeout: float = PATIENT.timeout,
        storage_options: Mapping[str, Any] | None = None,
        raw_path: str | None = None,
        gt_path: str | None = None,
        ground_truth_path: str | None = None,
    ) -> None:
        input_path = renamed("input_path", input_path, raw_path=raw_path)
        target_path = renamed("target_path", target_path, gt_path=gt_path, ground_truth_path=ground_truth_path)
        if input_path is None:
            raise CellMapTypeError("input_path is needed: the raw multiscale group")
        if input_arrays is None:
            raise CellMapTypeError("input_arrays is needed: {name: {shape: voxels, scale: nm}}")
        self.input_path = str(input_path)
        self.seed = int(seed)
        self.is_train = bool(is_train)
        self.pad = bool(pad)
        names = parse_classes(classes) if classes is not None else ()
        inputs = parse_inputs(input_arrays)
        annotated = target_path is not None and classes is not None
        targets = parse_targets(target_arrays, len(names)) if annotated and target_arrays else {}
        if annotated and not targets:
            raise CellMapTypeError("target_arrays is needed when there are classes: {name: {shape: voxels, scale: nm}}")
        arrays: dict[str, InputArray | TargetArray] = {**inputs, **targets}
        both = sorted(set(inputs) & set(targets))
        if both:
            raise CellMapValueError(f"inputs and targets share the names {both}; give the targets others")
        if label_downsample not in DOWNSAMPLE:
            raise CellMapValueError(
                f"label_downsample must be one of {', '.join(DOWNSAMPLE)}, got {label_downsample!r}"
            )
        if too_coarse not in ("error", "upsample"):
            raise CellMapValueError(f"too_coarse must be 'error' or 'upsample', got {too_coarse!r}")
        self._overrides = Overrides.pair(
            level_translations, unit=unit, voxel_size=voxel_size, translation=translation, multiscale=multiscale
        )
        augment = IntensityTransforms(intensity_transforms)
        self.spatial = SpatialTransforms(spatial_transforms)
        self.spatial.check({name: spec.window for name, spec in arrays.items()})
        #: Where raw lies.
        self.raw_at = located(self.input_path, storage_options)
        self.target_path = TargetPath.parse(str(target_path), storage_options) if targets else None
        self.label = self.target_path.label if self.target_path else parts_of(self.input_path).name
        self._pool = ReadPool(default_workers(max_workers, isinstance(self.raw_at, Remote)))
        self._store = RegionStore(cache, cache_bytes)
        chunks = self._store.chunks
        self.reader = check_reader(reader)
        self.missing_raw = check_missing_raw(missing_raw)
        self.patience = Patience(read_attempts, read_timeout)
        #: How the label arrays of each class are read.
        self.encodings = LabelEncodings(
            self.label, check_unknown(unknown), check_missing_labels(missing_labels), patience=self.patience
        )

        implications = Implications(
            names, self.target_path.names if self.target_path else (), infer, class_table, class_relation_dict
        )
        with shared_metadata():
            raw, labels = self._look(names, implications.read)
        volume = raw.finest.lattice.box
        #: The whole volume, nm.
        self.raw_box: Box = volume
        #: Voxel sizes of raw's levels, nm, finest first.
        self.raw_scales = tuple(level.scale for level in raw.levels)
        self.plane = Plane.parse(plane, arrays)
        #: Patches of the arrays, along their own axes.
        self._windows = {
            name: self.plane.thicken(spec.window, raw.finest.scale) if spec.flat else spec.window
            for name, spec in arrays.items()
        }
        #: The same along the axes of the volume.
        world = {name: self.plane.in_volume(window) for name, window in self._windows.items()}
        what = f"{self.label}: raw" if targets else "raw"
        self._raw = {name: choose_level(raw, world[name].scale.tolist(), what, max_upsampling) for name in inputs}
        for level in {level.path: level for level in self._raw.values()}.values():
            check_chunk_names(level.array, what)
        self._images = {name: self._stored_image(level, chunks, what) for name, level in self._raw.items()}

        if self.target_path:
            if too_coarse == "error":
                self._check_resolution(labels, [world[name].scale for name in targets])
            boxes = [image.finest.lattice.box for image in labels.values()]
            crop = boxes[0]
            for box in boxes[1:]:
                crop = crop.union(box)
            if not crop.intersects(volume):
                raise CellMapValueError(
                    f"{self.label}: the labels ({crop}) lie outside the raw volume {self.input_path} ({volume})"
                )
        else:
            crop = volume
        self.box = crop
        self._labels, self._stored_levels = labels, label_downsample == "stored"
        self.annotated = tuple(c for c in names if c in labels)
        self._stacks: dict[str, BitStack | IdStack] = {}
        self._fills: dict[float, float] = {}
        for name, target in targets.items():
            if target.kind.reads == "bits":
                self._stacks[name] = BitStack(
                    labels, implications, len(names), world[name], chunks, self.label, label_downsample,
                    self.encodings, self.reader, self.patience,
                )  # fmt: skip
            else:
                own = {c: image for c, image in labels.items() if c in names}
                self._stacks[name] = IdStack(
                    own, names, world[name], chunks, self.label, self.encodings, self.reader, self.patience
                )

        rule = Normalize.parse(normalize, invert)
        found = statistics(raw, self.patience) if rule.needs_statistics else None
        #: Offset and factor that normalize stored values.
        self.affine = rule.affine(self.raw_dtype, found, self.input_path)
        if raw.finest.array.dtype.kind == "b" and rule.rule == "dtype":
            self.affine = (1.0, -1.0) if rule.invert else (0.0, 1.0)
        #: Tells this volume and rule from others in a checkpoint.
        self.normalization_key = hide_address(f"{self.input_path} {rule}")  # checkpoints hold it
        self.layout = BatchLayout(
            inputs,
            targets,
            names,
            self.raw_dtype,
            id_dtype(labels),
            input_transforms(raw_value_transforms, list(inputs), "raw_value_transforms"),
            class_transforms(target_value_transforms, names, "target_value_transforms") if targets else {},
            Scaling.of([0], [self.affine]),
            bool(nan_targets),
            self.seed,
            augment if self.is_train else None,
        )
        if self.pad:
            self._check_fill()
        lattices = [(world[n], lattice) for n in targets for lattice in self._stacks[n].lattices]
        lattices += [(world[n], level.lattice) for n, level in self._raw.items()]
        self.placement = Placement.plan(
            crop,
            [world[n] for n in targets or inputs],
            lattices,
            self.pad,
            self.label,
            [] if self.pad else [(world[n], volume) for n in inputs],
            # An evaluation shows every voxel of every target; where a larger one leaves the crop, nothing is known.
            cover=self.pad and not self.is_train,
        )
        self._place(world, targets)
        self._raw_ends = self._find_where_raw_ends()
        self._tiled = world[next(iter(targets or inputs))]
        scale = np.max([world[n].scale for n in targets or inputs], axis=0)
        #: Voxels of the crop at the resolution asked for, by which crops are weighed against each other.
        self.volume = float(np.prod(crop.extent / scale))
        #: How often it is drawn beside other crops by the strategy `weighted`; None where nobody said.
        self.weight: float | None = None
        #: Half the edge lengths of what every target holds, along the patch's own axes, nm.
        self.half: FloatArray = np.min([self._windows[n].extent for n in targets or inputs], axis=0) / 2
        self._announce()
        if first_time(f"{self.target_path}", "encodings"):  # and not once more for each plane
            self.encodings.report()
        labels_box = self.box if self._stacks else None
        self.missing_raw = resolve(self.label, self._images.values(), self.missing_raw, labels_box)
        for image in self._images.values():
            image.missing = self.missing_raw

    def _place(self, world: Mapping[str, Window], targets: Mapping[str, TargetArray]) -> None:
        """Say where each array is read at each position, and what of the volume that can touch."""
        axis = self.plane.turn(None)
        roaming, turned = bool(self.spatial.rotate), bool(self.spatial.transpose)
        self._patches: dict[str, Patches] = {}
        self._raw_regions: list[Region] = []
        for name, image in self._images.items():
            window, straight = self._windows[name], world[name]
            patches = Patches(image.region, image.lattice, window, self.placement, image, axis)
            image.region.limit(*reached(self.placement, straight, image.lattice, turned, roaming or not patches.sliced))
            regions = [image.region]
            if not patches.sliced:
                again = Resampled(
                    image,
                    image.lattice.box,
                    straight,
                    self.placement,
                    image.region.dtype,
                    0,
                    self._store.chunks,
                    image.region.name,
                )
                patches = again.patches(window, self.placement, axis)
                if patches.sliced:
                    again.region.limit(*reached(self.placement, straight, again.lattice, turned, roaming))
                    regions = [again.region, image.region] if roaming else [again.region]
            self._patches[name] = patches
            self._raw_regions += regions
        for name, stack in self._stacks.items():
            margin = targets[name].kind.margin
            window, straight = (_grown(w, margin) for w in (self._windows[name], world[name]))
            stack.place(window, straight, self.placement, axis, roaming)
            if isinstance(stack, BitStack):
                assert stack.patches is not None
                self._patches[name] = stack.patches

    def _find_where_raw_ends(self) -> list[Lattice]:
        """The lattices of raw that the crop is partly outside of; the part is reported.

        Targets are unknown where raw does not exist.
        """
        ends: list[Lattice] = []
        worst: tuple[float, Level] | None = None
        if not self._stacks:
            return ends
        for level in {level.path: level for level in self._raw.values()}.values():
            lattice, box = level.lattice, self.box
            slack = LATTICE_TOLERANCE * np.asarray(lattice.step)
            lower, upper = lattice.box.lower - slack, lattice.box.upper + slack
            if (lower <= box.lower).all() and (upper >= box.upper).all():
                continue
            ends.append(lattice)
            inside = np.minimum(box.upper, lattice.box.upper) - np.maximum(box.lower, lattice.box.lower)
            part = 1 - float(np.prod(np.clip(inside / box.extent, 0, 1)))
            if worst is None or part > worst[0]:
                worst = part, level
        if worst is not None and worst[0] >= LEAST_OUTSIDE and first_time(f"{self.target_path}", "outside"):
            part, level = worst
            log.warning(
                "%s: %.3g %% of the crop (%s) lies outside of raw (%s, level %s: %s): targets are unknown there",
                self.label, 100 * part, self.box, self.raw_at, level.name, level.lattice.box,
            )  # fmt: skip
        return ends

    def _stored_image(self, level: Level, chunks: ChunkCache, what: str) -> StoredImage:
        return StoredImage(level, chunks, what, self.reader, self.patience, self.missing_raw)

    @property
    def regions(self) -> list[Region]:
        """The arrays that are read, each decoded once."""
        return [*self._raw_regions, *(region for stack in self._stacks.values() for region in stack.regions)]

    def _look(self, names: Sequence[str], read: Sequence[str]) -> tuple[Multiscale, dict[str, Multiscale]]:
        """The raw image, and that of each class that is read and annotated here, with the metadata of every level.

        Raises:
            CellMapError: what is wrong with one of them, or a list of all that is wrong.
        """
        paths: dict[str, StorePath] = {"raw": self.raw_at}
        if self.target_path is not None:
            self.target_path.check_names(list(dict.fromkeys((*names, *read))))
            wanted = [name for name in read if name in self.target_path.names]
            if not wanted:
                raise NotAnnotatedError(
                    f"{self.label}: none of the classes {list(names)} is annotated in it; "
                    f"it has {list(self.target_path.names)}"
                )
            groups = {f"class {name}": self.target_path.of(name) for name in wanted}
            warm(list(groups.values()))
            paths |= groups
        found: dict[str, Multiscale] = {}
        problems: list[CellMapError] = []
        for what, path in paths.items():
            try:
                image = read_multiscale(path, self._overrides[what != "raw"])
                _ = image.finest.lattice
                report(image.path, image.notes)
                found[what] = image
            except CellMapError as e:
                problems.append(self._class_error(what) or e)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise CellMapValueError(
                f"{self.label}: {len(problems)} things are wrong:" + "".join(f"\n    - {e}" for e in problems)
            )
        for what, image in found.items():
            unknown, voxels = unknown_in_metadata(image), math.prod(image.finest.array.shape)
            if what != "raw" and unknown == voxels:
                log.warning("%s, %s: by its metadata all %d voxels are unknown", self.label, what, voxels)
        raw = found.pop("raw")
        return raw, {what.removeprefix("class "): image for what, image in found.items()}

    def _class_error(self, what: str) -> CellMapError | None:
        """Return the error for a class that does not exist, which lists what does; None where it exists.

        Raises:
            CellMapFileNotFoundError: the crop as a whole does not exist.
        """
        if self.target_path is None or what == "raw":
            return None
        try:
            self.target_path.found(what.removeprefix("class "))
        except CellMapError as e:
            if not exists(self.target_path.crop):
                raise
            return e
        return None

    def _check_resolution(self, labels: Mapping[str, Multiscale], scales: Sequence[FloatArray]) -> None:
        finest = np.min(scales, axis=0)
        for name, image in labels.items():
            level = image.finest
            ratio = np.divide(level.scale, finest)
            if ratio.max() > 1 + SCALE_TOLERANCE:
                axis = int(ratio.argmax())
                raise TooCoarseError(
                    f"{self.label}: the labels of {name!r} ({level.scale[axis]:g} nm along {AXES[axis]} at their "
                    "finest level) "
                    f"are {ratio[axis]:.3g}x coarser than the {finest[axis]:g} nm asked for; use a coarser scale, or "
                    "too_coarse=upsample"
                )

    def _announce(self) -> None:
        absent = [c for c in self.classes if c not in self.annotated]
        log.info(
            "%s: inputs %s; targets %s; annotated %s; not annotated %s; %d positions; %d workers",
            self.label,
            ", ".join(f"{n} {list(self._windows[n].shape)} at {level.name}" for n, level in self._raw.items()),
            ", ".join(f"{n} {list(self._windows[n].shape)}" for n in self._stacks) or "none",
            list(self.annotated),
            absent,
            len(self),
            self.max_workers,
        )

    @property
    def is_remote(self) -> bool:
        """Whether raw or labels lie in a store elsewhere."""
        return isinstance(self.raw_at, Remote) or bool(self.target_path and "://" in self.target_path.before)

    @property
    def label_images(self) -> Mapping[str, Multiscale]:
        """The label image of each class that is read."""
        return self._labels

    @property
    def read_levels(self) -> list[Level]:
        """The level of each array that samples are read from."""
        return [*self._raw.values(), *(level for stack in self._stacks.values() for level in stack.levels)]

    @property
    def datasets(self) -> Sequence["CellMapDataset"]:
        """This crop alone."""
        return (self,)

    @cached_property
    def raw_dtype(self) -> np.dtype[Any]:
        """The stored type of raw."""
        return next(iter(self._images.values())).region.dtype

    @cached_property
    def class_counts(self) -> dict[str, float]:
        """Foreground voxels of each annotated class in the crop, scaled to the resolution of the first target.

        From the metadata's ``complement_counts``; where there are none the voxels are counted once, and the count is
        kept in the cache folder, never in the data.
        """
        found = {}
        for name in self.annotated:
            image = self._labels[name]
            code, label = self.encodings.of(name, image, image.finest), f"{self.label}/{name}"
            stored = foreground(image, code, self._pool, label, self.patience)
            found[name] = stored * self._per_stored_voxel(image)
        return found

    @property
    def counted(self) -> bool:
        """Whether `class_counts` needs no voxel to be read."""
        images = {name: self._labels[name] for name in self.annotated}
        codes = self.encodings
        return all(known_foreground(i, i.finest, codes.of(n, i, i.finest)) is not None for n, i in images.items())

    @property
    def target_window(self) -> Window:
        """A patch of the first target, along its own axes."""
        return self._windows[next(iter(self.layout.targets))]

    @property
    def background_counts(self) -> dict[str, float]:
        """Voxels where each annotated class is not, scaled like `class_counts`.

        Unknown voxels are left out where the metadata says how many there are.
        """
        found = {}
        for name, count in self.class_counts.items():
            image = self._labels[name]
            known = float(np.prod(image.finest.array.shape)) - unknown_in_metadata(image)
            found[name] = max(0.0, known * self._per_stored_voxel(image) - count)
        return found

    def foreground_index(self, name: str) -> Foreground:
        """Where a class is: an index of the level that patches read, or of the next finer one that has any of it.

        With ``label_downsample`` other than ``stored`` patches are made from the finest level, so that is looked at.
        """
        image = self._labels[name]
        scale = self.plane.in_volume(self.target_window).scale.tolist()
        chosen = choose_level(image, scale, f"{self.label}/{name}") if self._stored_levels else image.finest
        levels = image.present[image.present.index(chosen) :: -1]
        code, label = self.encodings.of(name, image, chosen), f"{self.label}/{name}"
        return foreground_index(levels, code, self._pool, label, self.patience)

    def _per_stored_voxel(self, image: Multiscale) -> float:
        """Voxels of the first target in one of the finest level."""
        scale = self.target_window.scale
        return float(np.prod(image.finest.scale) / np.prod(scale))

    @cached_property
    def class_tiles(self) -> dict[str, IntArray | None]:
        """Tiles of the first target in which each annotated class is seen; see `tiles_with`."""
        found: dict[str, IntArray | None] = {}

        def look(name: str) -> None:
            image, label = self._labels[name], f"{self.label}/{name}"
            code = partial(self.encodings.of, name, image)
            found[name] = tiles_with(image, code, self.placement, self._tiled, label, self.patience)

        self._pool.run([partial(look, name) for name in self.annotated])
        return found

    def set_affine(self, affine: tuple[float, float]) -> None:
        """Normalize by another offset and factor, such as those of a checkpoint."""
        self.affine = affine
        self.layout = dataclasses.replace(self.layout, scaling=Scaling.of([0], [affine]))

    @property
    def images(self) -> Mapping[str, StoredImage]:
        """The stored raw of each input."""
        return self._images

    @property
    def levels(self) -> dict[str, Level]:
        """The level of raw that each input is read from."""
        return dict(self._raw)

    def in_volume(self, window: Window, flat: bool = False) -> Window:
        """A window along the axes of the volume; a flat one as thick as the volume's voxels."""
        if flat:
            window = self.plane.thicken(window, self.raw_scales[0])
        return self.plane.in_volume(window)

    def placed(self, placement: Placement, chunk_bytes: int | None = None) -> "CellMapDataset":
        """The raw volume of this dataset, with its inputs around other centres, in a store of its own.

        Args:
            placement: where they may lie; inputs reach over the border of the volume if it says so.
            chunk_bytes: keep the chunks that were decoded last, so many bytes of them, instead of what this dataset
                keeps.
        """
        other = copy(self)
        for name in ("_offsets", "_firsts", "_tile_offsets"):
            other.__dict__.pop(name, None)  # they are those of the positions, and worked out when asked for
        other.placement = placement
        if chunk_bytes is None:
            other._store = RegionStore(self._store.mode, self._store.budget)
        else:
            other._store = RegionStore("chunks", chunk_bytes)
        other._images = {
            name: self._stored_image(level, other._store.chunks, f"{self.label}: raw")
            for name, level in self._raw.items()
        }
        for name, image in other._images.items():
            image.quiet = self._images[name].quiet  # it was reported already
        other._stacks = {}
        other.layout = dataclasses.replace(self.layout, targets={}, scaling=Scaling.of([0], [self.affine]))
        other._place({name: self.plane.in_volume(self._windows[name]) for name in self._images}, {})
        return other

    def bytes_under(self, extent: FloatArray) -> int:
        """Bytes of the chunks of raw, as they are decoded, that a box touches at most.

        Args:
            extent: the box, nm along z, y, x.
        """
        found = 0
        for image in {image.region.key: image for image in self._images.values()}.values():
            region = image.region
            reach = np.ceil(np.divide(extent, image.lattice.step) / region.chunks) + 1
            grid = np.ceil(np.divide(region.shape, region.chunks))
            found += region.chunk_bytes * int(np.minimum(reach, grid).prod())
        return found

    def share(self, pool: ReadPool, store: RegionStore) -> None:
        """Read with the threads and the store of a collection."""
        self._store.close()
        self._pool, self._store = pool, store
        for image in self._images.values():  # of which something else may be made that is kept
            image.region.cache = store.chunks

    def missing(self, name: str, place: Place, turn: FloatArray | None) -> list[tuple[Region, Shape]] | None:
        """The chunks that must be filled before an array of a sample is copied; None where it must be computed."""
        turn = self.plane.turn(turn)
        stack = self._stacks.get(name)
        if stack is not None and self.layout.targets[name].kind.computed:
            return None
        found: list[tuple[Region, Shape]] = []
        for patches in stack.patches if isinstance(stack, IdStack) else [self._patches[name]]:
            part = patches.missing(place, turn)
            if part is None:
                return None
            found += [(patches.region, index) for index in part]
        return found

    def effort(self, name: str, turn: FloatArray | None) -> int:
        """How many times the work of a copy it is to compute an array of a sample: a guess, to share it out."""
        if not self._kept and self.reader == "zarr":
            return 0  # zarr-python decodes the chunks of a box in threads of its own
        about_one_axis = turn is not None and bool((np.abs(turn) == 1).any())
        kind = self.layout.targets[name].kind if name in self.layout.targets else None
        return 2 if about_one_axis and self._kept and not (kind is not None and kind.computed) else 16

    @property
    def _kept(self) -> bool:
        """Whether what is read is kept, as it mostly is, so that nothing has to be decoded."""
        return self._raw_regions[0].kept

    def read_array(
        self,
        name: str,
        place: Place,
        turn: FloatArray | None,
        out: np.ndarray[Any, Any],
        layout: BatchLayout,
        advance: FloatArray | None = None,
    ) -> None:
        """Write one array of one sample to its place in a compact batch.

        Args:
            name: an input or a target.
            place: the sample's place in the placement's grid (z, y, x).
            turn: see `geometry.patch_map`; along the patch's own axes.
            out: ``[1, z, y, x]`` of ``layout.raw_dtype`` for an input, one sample of its compact form for a target.
            layout: the layout of the batch, which crops of several stored types may share.
            advance: of a tile, see `Placement.advance`.
        """
        turn = self.plane.turn(turn)
        if name not in self._stacks:
            self._read_raw(name, place, turn, out[0], layout)
            return
        kind = layout.targets[name].kind
        self._read_target(name, place, turn, out, kind)
        if advance is not None:
            window = self._windows[name]
            # The voxels whose centres lie before the end of the tile before.
            before = np.ceil(window.shape - advance[list(self.plane.axes)] / window.scale - 0.5 - LATTICE_TOLERANCE)
            kind.forget(out, before.clip(0).astype(int).tolist())

    def _read_target(
        self, name: str, place: Place, turn: FloatArray | None, out: np.ndarray[Any, Any], kind: TargetKind
    ) -> None:
        stack = self._stacks[name]
        shape: tuple[int, ...] = _widened(self._windows[name].shape, kind.margin)
        if isinstance(stack, IdStack):
            shape, dtype = (len(self.classes), *shape), stack.dtype
        else:
            shape, dtype = (*shape, stack.depth_out), np.dtype(np.uint8)
        same = shape == out.shape and dtype == out.dtype
        stored = out if same else np.empty(shape, dtype)
        if isinstance(stack, IdStack):
            stack.read_into(place, stored, turn)
        else:
            self._patches[name].read_into(place, stored, turn, 0)
        if self.missing_raw == "mask" or self._raw_ends:
            window = _grown(self._windows[name], kind.margin)
            center = self.placement.first + self.placement.step * place
            lattices = [] if self.missing_raw != "mask" else [image.lattice for image in self._images.values()]
            maps = [patch_map(center, window.shape, window.scale, lattice, turn) for lattice in lattices]
            hidden = [image.unseen(amap) for image, amap in zip(self._images.values(), maps, strict=False)]
            hidden += [
                outside(patch_map(center, window.shape, window.scale, lattice, turn), lattice.shape)
                for lattice in self._raw_ends
            ]
            for unseen in hidden:
                if unseen is not None and isinstance(stack, IdStack):
                    stored[:, unseen] = UNKNOWN_ID
                elif unseen is not None:
                    stored[unseen] = 0
        if same:
            return
        if kind.name == "instances":
            out[...] = stored  # ids of a narrower type than that of the batch
        else:
            kind.encode(stored, out)

    def _fill(self, transform: Any) -> float:
        """What stands in raw outside the volume: what is normalized to 0, as nearly as the stored type can say it."""
        key = self.affine[0] if isinstance(transform, str) else 0.0
        if key not in self._fills:
            fill = key
            if self.raw_dtype.kind in "iu":
                info = np.iinfo(self.raw_dtype)
                fill = min(max(round(fill), int(info.min)), int(info.max))
            self._fills[key] = fill
        return self._fills[key]

    def _check_fill(self) -> None:
        offset, factor = self.affine
        left = abs((self._fill(AUTO) - offset) * factor)
        # Rounding a z-score's mean to a whole number is harmless; a value beyond the type is not.
        if (
            AUTO in self.layout.raw_transforms.values()
            and self.raw_dtype.kind in "iu"
            and left > max(0.01, abs(factor))
        ):
            raise CellMapValueError(
                f"{self.label}: normalize makes 0 of the stored value {offset:g}, which {self.raw_dtype} cannot say, "
                "so that what lies outside the volume cannot be 0; use a range inside the type, or pad=False"
            )

    def _read_raw(
        self, name: str, place: Place, turn: FloatArray | None, out: np.ndarray[Any, Any], layout: BatchLayout
    ) -> None:
        fill = self._fill(layout.raw_transforms.get(name))
        if out.dtype == self.raw_dtype:
            self._patches[name].read_into(place, out, turn, fill)
            return
        # Crops of different types travel as float32, rounded as they were stored.
        stored = np.empty(out.shape, self.raw_dtype)
        self._patches[name].read_into(place, stored, turn, fill)
        out[...] = stored

    def __repr__(self) -> str:
        return (
            f"CellMapDataset({self.label}: {len(self)} positions, {len(self.annotated)} of {len(self.classes)} classes)"
        )


def _widened(shape: Shape, margin: Shape) -> Shape:
    z, y, x = (n + 2 * m for n, m in zip(shape, margin, strict=True))
    return z, y, x


def _grown(window: Window, margin: Shape) -> Window:
    return Window(_widened(window.shape, margin), window.scale.tolist())
