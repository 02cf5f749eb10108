"""One raw volume and one annotated crop of it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.sampling.arrays import ArraySpecs, BatchLayout, parse_arrays, parse_classes
from cellmap_lightning.sampling.labels import LabelStack
from cellmap_lightning.sampling.names import renamed
from cellmap_lightning.sampling.pool import ReadPool, default_workers
from cellmap_lightning.sampling.source import SampleSource
from cellmap_lightning.sampling.targets_path import TargetPath
from cellmap_lightning.transforms.intensity import AUTO, input_transforms, unit_range
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.transforms.targets import class_transforms, parse_relations
from cellmap_lightning.volumes.geometry import AXES, SCALE_TOLERANCE, FloatArray
from cellmap_lightning.volumes.image import MAX_UPSAMPLING, CellMapImage
from cellmap_lightning.volumes.ngff import Multiscale, read_multiscale
from cellmap_lightning.volumes.placement import Placement
from cellmap_lightning.volumes.region import DEFAULT_CACHE_BYTES, ChunkCache

log = logging.getLogger(__name__)


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
        too_coarse: ``error`` when labels are coarser than a target asks for, or ``upsample``.
        max_upsampling: how many times finer than raw's finest level an input may be.
        cache_bytes: decoded chunks to keep in memory, bytes.
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
        too_coarse: Literal["error", "upsample"] = "error",
        max_upsampling: float = MAX_UPSAMPLING,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
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
        inputs = parse_arrays(input_arrays, "input_arrays", "input")
        names = parse_classes(classes) if classes is not None else ()
        annotated = target_path is not None and classes is not None
        targets = parse_arrays(target_arrays, "target_arrays", "output") if annotated and target_arrays else {}
        if annotated and not targets:
            raise CellMapTypeError("target_arrays is needed when there are classes: {name: {shape: voxels, scale: nm}}")
        both = sorted(set(inputs) & set(targets))
        if both:
            raise CellMapValueError(f"inputs and targets share the names {both}; give the targets others")
        self.spatial = SpatialTransforms(spatial_transforms)
        self.spatial.check({**inputs, **targets})
        self.target_path = TargetPath.parse(str(target_path)) if targets else None
        raw_name = Path(self.input_path).name
        self.label = self.target_path.label if self.target_path else raw_name
        self._pool = ReadPool(default_workers(max_workers))
        self._cache = ChunkCache(int(cache_bytes))

        self._images = {
            name: CellMapImage(
                self.input_path,
                f"{self.label}: raw" if targets else "raw",
                window.scale.tolist(),
                window.shape,
                pad=True,
                pad_value=0.0,
                interpolation="linear",
                max_upsampling=max_upsampling,
                cache=self._cache,
            )
            for name, window in inputs.items()
        }
        raw = next(iter(self._images.values()))
        volume = raw.image.finest.lattice.box
        labels = self._open_labels(names) if self.target_path else {}
        if labels:
            if too_coarse not in ("error", "upsample"):
                raise CellMapValueError(f"too_coarse must be 'error' or 'upsample', got {too_coarse!r}")
            if too_coarse == "error":
                self._check_resolution(labels, [w.scale for w in targets.values()])
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
        relations = parse_relations(class_relation_dict, names)
        self._stacks = {
            name: LabelStack(labels, names, window, self._cache, self.label, relations)
            for name, window in targets.items()
        }
        self.annotated = tuple(c for c in names if c in labels)
        self.layout = BatchLayout(
            inputs,
            targets,
            names,
            raw.region.dtype,
            input_transforms(raw_value_transforms, list(inputs), "raw_value_transforms"),
            class_transforms(target_value_transforms, names, "target_value_transforms") if targets else {},
            self.seed,
        )
        arrays = [(w, lattice) for n, w in targets.items() for lattice in self._stacks[n].lattices]
        arrays += [(image.window, image.level.lattice) for image in self._images.values()]
        self.placement = Placement.plan(
            crop,
            list(targets.values()) or list(inputs.values()),
            arrays,
            self.pad,
            self.label,
            [] if self.pad else [(w, volume) for w in inputs.values()],
        )
        scale = np.max([w.scale for w in (targets or inputs).values()], axis=0)
        #: Voxels of the crop at the resolution asked for, by which crops are weighed against each other.
        self.volume = float(np.prod(crop.extent / scale))
        self._announce()

    def _open_labels(self, names: Sequence[str]) -> dict[str, Multiscale]:
        """The label image of each class that is asked for and annotated here."""
        assert self.target_path is not None
        wanted = [name for name in names if name in self.target_path.names]
        if not wanted:
            raise NotAnnotatedError(
                f"{self.label}: none of the classes {list(names)} is annotated in it; "
                f"it has {list(self.target_path.names)}"
            )
        return {name: read_multiscale(self.target_path.of(name)) for name in wanted}

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
            ", ".join(f"{n} {list(i.window.shape)} at {i.level.name}" for n, i in self._images.items()),
            ", ".join(f"{n} {list(s.window.shape)}" for n, s in self._stacks.items()) or "none",
            list(self.annotated),
            absent,
            len(self),
            self.max_workers,
        )

    @property
    def datasets(self) -> Sequence["CellMapDataset"]:
        """This crop alone."""
        return (self,)

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """The stored type of raw."""
        return next(iter(self._images.values())).region.dtype

    @property
    def input_images(self) -> Mapping[str, CellMapImage]:
        """The image behind each input."""
        return self._images

    def share(self, pool: ReadPool, cache: ChunkCache) -> None:
        """Read with the threads and the cache of a collection."""
        self._pool, self._cache = pool, cache
        for image in self._images.values():
            image.region.cache = cache
        for stack in self._stacks.values():
            for group in stack.groups:
                group.region.cache = cache

    def read_array(
        self, name: str, center: FloatArray, turn: FloatArray | None, out: np.ndarray[Any, Any], layout: BatchLayout
    ) -> None:
        """Write one array of one sample to its place in a compact batch.

        Args:
            name: an input or a target.
            center: the sample's centre, nm (z, y, x).
            turn: see `geometry.patch_map`.
            out: ``[1, z, y, x]`` of ``layout.raw_dtype`` for an input, ``[z, y, x, bytes]`` for a target.
            layout: the layout of the batch, which crops of several stored types may share.
        """
        stack = self._stacks.get(name)
        if stack is not None:
            stack.read_into(center, out, turn)
            return
        image = self._images[name]
        if out.dtype == self.raw_dtype:
            image.read_into(center, out[0], turn)
            return
        # Crops of different types travel as float32, which no longer tells the range of the stored type.
        stored = np.empty(out.shape[1:], self.raw_dtype)
        image.read_into(center, stored, turn)
        out[0] = stored
        if layout.raw_transforms.get(name) == AUTO:
            offset, factor = unit_range(self.raw_dtype)
            if (offset, factor) != (0.0, 1.0):
                out[0] -= np.float32(offset)
                out[0] *= np.float32(factor)

    def __repr__(self) -> str:
        return (
            f"CellMapDataset({self.label}: {len(self)} positions, {len(self.annotated)} of {len(self.classes)} classes)"
        )
