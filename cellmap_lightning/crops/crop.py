"""One raw volume and one annotated crop of it: the positions of patches, and the reading of each array of a sample."""

import dataclasses
import logging
from collections.abc import Mapping
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.batches.arrays import ArraySet, InputArray, TargetArray
from cellmap_lightning.cache.region import Region
from cellmap_lightning.cache.region_store import RegionStore
from cellmap_lightning.crops.class_boxes import differing_boxes
from cellmap_lightning.crops.class_index import Foreground
from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.crops.crop_labels import CropLabels, with_margin
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.crops.missing_raw import resolve
from cellmap_lightning.crops.opening import CropImages, open_images
from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.crops.planes import Plane
from cellmap_lightning.crops.raw import RawInputs
from cellmap_lightning.crops.raw_range import report_range
from cellmap_lightning.crops.read_limits import check_inside, check_reads
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.geometry.lattice import (
    LATTICE_TOLERANCE,
    Box,
    FloatArray,
    Lattice,
    Shape,
)
from cellmap_lightning.geometry.placement import Placement, Window
from cellmap_lightning.geometry.sample_map import Warp, outside, sample_map
from cellmap_lightning.io.chunks import Reader
from cellmap_lightning.io.ngff import Level, Multiscale, first_time, shared_metadata
from cellmap_lightning.io.store import Remote, parse_location, parts_of
from cellmap_lightning.runtime.thread_pool import ReadPool, default_workers
from cellmap_lightning.transforms.implied import Implications
from cellmap_lightning.transforms.normalization import AUTO
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

#: Smallest share of a crop outside of raw that is reported.
LEAST_OUTSIDE = 1e-6


class Crop:
    """One raw volume and one annotated crop of it, the part of a `CellMapDataset` that reads; see docs/data.md.

    Args:
        input_path: the raw multiscale group.
        target_path: the label groups, ``".../crop1/[mito,er]"``; None for raw only.
        arrays: the requested inputs, targets and classes.
        spatial: the spatial augmentation.
        is_train: True for training, in which patches need not cover the edges of the crop.
        plane: plane of flat patches: ``xy``, ``xz`` or ``yz``.
        read: options of reading and caching.
        label_options: options of the meaning of labels.
        intensity: options of normalization.
        raw_transforms: value transform of each input; see `BatchLayout`.

    Attributes:
        label: name in messages.
        raw_at: location of raw.
        raw: the inputs.
        labels: the label arrays.
        box: the annotated box, or the whole volume, or the box that restricts it; nm.
        class_boxes: the classes whose box differs from that of the others.
        within: the box that restricts the crop, nm; None without one.
        placement: positions of patches.
        pool: the reading threads.
        store: cache of decoded voxels.
        volume: voxels of the crop at the targets' resolution, by which strategies weigh crops.
        without_folder: names in the bracket without a folder, if ``unannotated_classes="unknown"``.
        weight: relative weight of the crop in the strategy ``weighted``; None if not set.
        half: half the edge lengths of the box that all targets share, along the patch's axes, nm.

    Raises:
        CellMapFileNotFoundError: a path or a class of the bracket does not exist.
        TooCoarseError: the labels are coarser than a target.
        NotAnnotatedError: none of the classes is in the bracket.
        CellMapError: other problems with the metadata, or a mismatch with the arguments.
    """

    def __init__(
        self,
        input_path: str,
        target_path: str | None,
        arrays: ArraySet,
        spatial: SpatialTransforms,
        is_train: bool,
        plane: str,
        read: ReadOptions,
        label_options: LabelOptions,
        intensity: IntensityOptions,
        raw_transforms: Mapping[str, Any],
    ) -> None:
        self.input_path, self.arrays, self.read_options = input_path, arrays, read
        self.spatial, self.is_train = spatial, is_train
        self.raw_at = parse_location(input_path, read.storage_options)
        self.target_path = TargetPath.parse(str(target_path), read.storage_options) if target_path else None
        self.label = self.target_path.label if self.target_path else parts_of(input_path).name
        self.weight: float | None = None
        self.pool = ReadPool(default_workers(read.max_workers, isinstance(self.raw_at, Remote)))
        self.store = RegionStore(read.cache, read.cache_bytes)
        self.without_folder: tuple[str, ...] = ()
        with shared_metadata():
            images, implications = self._open(label_options)
        self.class_boxes = differing_boxes(images.labels)
        self.within: Box | None = None
        if read.crop_box is not None:
            images = self._restrict(images, read.crop_box)
            self.label += f" [{read.crop_box}]"
        self.plane = Plane.parse(plane, arrays.specs)
        #: A patch of each array, along the patch's axes.
        self.windows = {
            name: self.plane.thicken(spec.window, images.raw.finest.scale) if spec.flat else spec.window
            for name, spec in arrays.specs.items()
        }
        world = self._world
        raw_label = f"{self.label}: raw" if self.target_path else "raw"
        windows = {name: world[name] for name in arrays.inputs}
        self.raw = RawInputs(images.raw, input_path, windows, raw_label, read, intensity, self.store)
        if AUTO in raw_transforms.values():
            report_range(input_path, images.raw, intensity.rule, read.retry_policy)
        self.labels = CropLabels(
            self.label, images.labels, arrays.classes, arrays.targets, world, implications, read, label_options,
            self.store,
        )  # fmt: skip
        self.box = self._crop_box()
        check_reads(self.label, self._reads())
        if read.pad:
            self.raw.check_fill(self.label, raw_transforms.values())
        self.placement = self._plan()
        self.plan_reads()
        self._partly_outside = self._levels_partly_outside()
        shown = arrays.targets or arrays.inputs
        scale = np.max([world[n].scale for n in shown], axis=0)
        self.volume = float(np.prod(self.box.extent / scale))
        self.half: FloatArray = np.min([self.windows[n].extent for n in shown], axis=0) / 2
        self._report()
        self.raw.set_missing(
            resolve(self.label, self.images.values(), read.missing_raw, self.box if arrays.targets else None)
        )

    def _open(self, options: LabelOptions) -> tuple[CropImages, Implications]:
        """Read the metadata of all images, and find the classes that imply something about those asked for."""
        tolerant = options.unannotated_classes == "unknown"
        while True:
            implications = Implications(
                self.arrays.classes,
                self.target_path.names if self.target_path else (),
                options.infer,
                options.class_table,
                options.class_relation_dict,
            )
            images = open_images(
                self.label, self.raw_at, self.target_path, self.arrays.classes, implications.read,
                self.read_options.overrides, tolerant,
            )  # fmt: skip
            if self.target_path is None or not images.absent:
                return images, implications
            # Without these classes others may be implied, or none.
            self.target_path = self.target_path.without(images.absent)
            self.without_folder += images.absent

    def _restrict(self, images: CropImages, box: CropBox) -> CropImages:
        """Return the label images as if the annotation ended at a box; without labels, raw stays as it is."""
        if self.target_path is None:
            self.within = restricted(self.label, {"raw": images.raw}, box)[2]
            return images
        inside, outside, self.within = restricted(self.label, images.labels, box)
        if outside:
            log.warning("%s: classes that the box does not reach are unannotated in it: %s", self.label, [*outside])
        return dataclasses.replace(images, labels=inside)

    # -- geometry

    @property
    def _world(self) -> dict[str, Window]:
        """A patch of each array, along the axes of the volume."""
        return {name: self.plane.in_volume(window) for name, window in self.windows.items()}

    def _crop_box(self) -> Box:
        if not self.arrays.targets:
            return self.within or self.raw.box
        box = self.labels.box
        voxel = np.min([image.finest.scale for image in self.labels.images.values()], axis=0)
        check_inside(self.label, self.input_path, box, voxel, self.raw.box, self.raw.scales[0])
        return box

    def _reads(self) -> list[tuple[str, Window, Lattice]]:
        """Return each target and input with its patch, along the axes of the volume, and a lattice it is read from."""
        world = self._world
        reads = [(name, world[name], lattice) for name, lattice in self.labels.lattices]
        return [*reads, *((name, world[name], level.lattice) for name, level in self.raw.levels.items())]

    def _plan(self) -> Placement:
        world, inputs, pad = self._world, self.arrays.inputs, self.read_options.pad
        lattices = [(window, lattice) for _, window, lattice in self._reads()]
        return Placement.plan(
            self.box,
            [world[name] for name in self.arrays.targets or inputs],
            lattices,
            pad,
            self.label,
            [] if pad else [(world[name], self.raw.box) for name in inputs],
            # An evaluation shows every voxel of every target; the part of a larger target outside the crop is unknown.
            cover=pad and not self.is_train,
        )

    def plan_reads(self) -> None:
        """Plan how each array is read at each position."""
        world, axis = self._world, self.plane.turn(None)
        self.raw.place(self.windows, world, self.placement, axis, self.spatial)
        self.labels.place(self.windows, world, self.placement, axis, self.spatial.roaming)

    def _levels_partly_outside(self) -> list[Lattice]:
        """Return the lattices of raw that the crop is partly outside of, where targets are unknown; log the share."""
        lattices: list[Lattice] = []
        worst: tuple[float, Level] | None = None
        if not self.arrays.targets:
            return lattices
        for level in self.raw.distinct_levels:
            lattice, box = level.lattice, self.box
            slack = LATTICE_TOLERANCE * np.asarray(lattice.step)
            lower, upper = lattice.box.lower - slack, lattice.box.upper + slack
            # The corners of the box of a turned array lie outside of it.
            if lattice.turn is None and (lower <= box.lower).all() and (upper >= box.upper).all():
                continue
            lattices.append(lattice)
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
        return lattices

    def _report(self) -> None:
        absent = [c for c in self.arrays.classes if c not in self.annotated]
        log.debug(  # of one crop; a collection logs one line of all
            "%s: inputs %s; targets %s; annotated %s; not annotated %s; positions: %d; workers: %d",
            self.label,
            ", ".join(f"{n} {list(self.windows[n].shape)} at {level.name}" for n, level in self.raw.levels.items()),
            ", ".join(f"{n} {list(self.windows[n].shape)}" for n in self.arrays.targets) or "none",
            list(self.annotated),
            absent,
            len(self.placement),
            self.pool.workers,
        )
        if first_time(f"{self.target_path}", "encodings"):  # only once for several planes
            self.labels.encodings.report()

    def in_volume(self, window: Window, flat: bool = False) -> Window:
        """Return a window along the axes of the volume; a flat one as thick as the volume's voxels."""
        if flat:
            window = self.plane.thicken(window, self.raw.scales[0])
        return self.plane.in_volume(window)

    def placed(self, placement: Placement, chunk_bytes: int | None = None) -> "Crop":
        """Return the raw volume with its inputs at other positions, with a separate cache and without targets.

        Args:
            placement: the positions, which may reach over the border of the volume.
            chunk_bytes: limit in bytes of a cache of single chunks; by default the same cache mode as here.
        """
        other = copy(self)
        for name in ("class_counts", "class_tiles"):
            other.__dict__.pop(name, None)
        other.placement = placement
        other.store = (
            RegionStore(self.store.mode, self.store.budget)
            if chunk_bytes is None
            else RegionStore("chunks", chunk_bytes)
        )
        other.arrays = dataclasses.replace(self.arrays, targets={})
        other.windows = {name: self.windows[name] for name in self.arrays.inputs}
        other.raw = self.raw.in_store(other.store)
        other.labels = copy(self.labels)
        other.labels.stacks = {}
        other.plan_reads()
        return other

    def share(self, pool: ReadPool, store: RegionStore) -> None:
        """Read with the threads and the store of a collection."""
        self.store.close()
        self.pool, self.store = pool, store
        self.raw.share(store)

    # -- properties

    @property
    def is_remote(self) -> bool:
        """True if raw or labels lie in a remote store."""
        return isinstance(self.raw_at, Remote) or bool(self.target_path and "://" in self.target_path.before)

    @property
    def reader(self) -> Reader:
        """Library that decodes chunks."""
        return self.read_options.reader

    @property
    def annotated(self) -> tuple[str, ...]:
        """The classes that are annotated here."""
        return self.labels.annotated

    @property
    def label_images(self) -> Mapping[str, Multiscale]:
        """The label image of each class that is read."""
        return self.labels.images

    @property
    def images(self) -> Mapping[str, StoredImage]:
        """The stored raw of each input."""
        return self.raw.images

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """The stored type of raw."""
        return self.raw.dtype

    @property
    def read_levels(self) -> list[Level]:
        """The level of each array that samples are read from."""
        return [*self.raw.levels.values(), *self.labels.levels]

    @property
    def regions(self) -> list[Region]:
        """The arrays that are read, each decoded once."""
        return [*self.raw.regions, *self.labels.regions]

    @property
    def target_window(self) -> Window:
        """A patch of the first target, along the patch's axes."""
        return self.windows[next(iter(self.arrays.targets))]

    # -- measurements

    @cached_property
    def class_counts(self) -> dict[str, float]:
        """Foreground voxels of each annotated class at the first target's scale; see `CropLabels.class_counts`."""
        return self.labels.class_counts(self.pool, self.target_window) if self.annotated else {}

    @property
    def background_counts(self) -> dict[str, float]:
        """Voxels where each annotated class is absent; see `CropLabels.background_counts`."""
        return self.labels.background_counts(self.class_counts, self.target_window) if self.annotated else {}

    def foreground_index(self, name: str) -> Foreground:
        """Return an index of the foreground of a class; see `CropLabels.foreground_index`."""
        return self.labels.foreground_index(name, self.pool, self.plane.in_volume(self.target_window).scale)

    @cached_property
    def class_tiles(self) -> dict[str, npt.NDArray[np.int64] | None]:
        """Tiles of the first target that contain each annotated class; see `tiles_with`."""
        return self.labels.class_tiles(self.pool, self.placement, self.plane.in_volume(self.target_window))

    # -- reading

    def missing(
        self, name: str, place: Shape, turn: FloatArray | None, warp: Warp | None = None
    ) -> list[tuple[Region, Shape]] | None:
        """Return the chunks to decode before an array of a sample is copied; None if the array is computed."""
        turn = self.plane.turn(turn)
        target = self.arrays.targets.get(name)
        if target is not None and target.kind.computed:
            return None
        chunks: list[tuple[Region, Shape]] = []
        for patches in self.labels.patches(name) if target is not None else [self.raw.patches[name]]:
            part = patches.missing(place, turn, warp)
            if part is None:
                return None
            chunks += [(patches.region, index) for index in part]
        return chunks

    def relative_cost(self, name: str, turn: FloatArray | None, warp: Warp | None = None) -> int:
        """Estimate the work of computing an array of a sample, in copies of it, to divide the work among threads."""
        cached, target = self.raw.cached, self.arrays.targets.get(name)
        if not cached and self.read_options.reader == "zarr":
            return 0  # zarr-python decodes the chunks of a box in its own threads
        if not cached or (target is not None and target.kind.computed):
            return 16
        if warp is not None and warp.displacement is not None:
            return 4
        used = np.zeros((3, 3), np.bool_) if turn is None else turn != 0
        about_one_axis = (used & (used.sum(axis=0) == 1) & (used.sum(axis=1, keepdims=True) == 1)).any()
        return 2 if about_one_axis else 16

    def read_array(
        self,
        name: str,
        place: Shape,
        turn: FloatArray | None,
        out: np.ndarray[Any, Any],
        spec: InputArray | TargetArray,
        transform: Any = None,
        advance: FloatArray | None = None,
        warp: Warp | None = None,
    ) -> None:
        """Write one array of one sample to its place in a compact batch.

        Args:
            name: an input or a target.
            place: the sample's place in the placement's grid (z, y, x).
            turn: see `geometry.patch_map`; along the patch's axes.
            out: ``[1, z, y, x]`` of the batch's type for an input, one sample of its compact form for a target.
            spec: the array as the batch has it.
            transform: value transform of an input; see `BatchLayout`.
            advance: distance to the previous tile; see `Placement.advance`.
            warp: the displacement along the patch's axes; None for none.

        Raises:
            ChunkError: a chunk cannot be read.
        """
        turn = self.plane.turn(turn)
        if isinstance(spec, InputArray):
            self.raw.read_into(name, place, turn, out[0], transform, warp)
            return
        window = self.windows[name]
        wide = with_margin(window, spec.kind.margin)
        hidden = self.hidden(place, wide, turn, warp)
        self.labels.read_into(name, place, turn, out, spec.kind, wide, hidden, warp)
        if advance is not None:
            spec.kind.forget(out, self.voxels_before(window, advance, place))

    def voxels_before(self, window: Window, advance: FloatArray, place: Shape) -> list[int]:
        """Return the voxels along each axis of a tile that the previous one covers, or that lie before the crop.

        These are unknown in the targets, so that no voxel is evaluated twice: those whose centres lie in the previous
        tile, see `Placement.advance`, and those whose centres lie on the crop's lower edge. These show the voxel above
        it, as those on an edge inside the crop show the one below.
        """
        axes = list(self.plane.axes)
        covered = np.ceil(window.shape - advance[axes] / window.scale - 0.5 - LATTICE_TOLERANCE)
        center = self.placement.first + self.placement.step * place
        edge = (self.box.lower - center)[axes] / window.scale + np.divide(window.shape, 2)
        before = np.floor(edge + 0.5 + LATTICE_TOLERANCE)
        counts: list[int] = np.maximum(covered, before).clip(0, window.shape).astype(int).tolist()
        return counts

    def hidden(
        self, place: Shape, window: Window, turn: FloatArray | None, warp: Warp | None
    ) -> list[npt.NDArray[np.bool_] | None]:
        """Return masks of voxels in which targets are unknown, since raw is not stored or the volume ends."""
        masked = self.raw.missing == "mask"
        if not masked and not self._partly_outside:
            return []
        center = self.placement.first + self.placement.step * place
        hidden = self.raw.not_stored(center, window, turn, warp) if masked else []
        return hidden + [
            outside(sample_map(center, window.shape, window.scale, lattice, turn, warp), lattice.shape)
            for lattice in self._partly_outside
        ]

    def __repr__(self) -> str:
        return (
            f"Crop({self.label}: {plural(len(self.placement), 'position')}, {len(self.annotated)} of "
            f"{plural(len(self.arrays.classes), 'class', 'classes')})"
        )
