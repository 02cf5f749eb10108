"""The split inside of crops: boxes of one crop for training and for validation, with a gap between them."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from cellmap_lightning.batches.arrays import ArraySet
from cellmap_lightning.crops.crop_box import EDGE_SLACK, CropBox, restricted
from cellmap_lightning.crops.spelling import meant
from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, SCALE_TOLERANCE, Box, FloatArray, to_vector
from cellmap_lightning.io.images import image_exists, read_image
from cellmap_lightning.io.ngff import Multiscale
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.splits.block_options import BlockOptions
from cellmap_lightning.splits.crop_names import crop_names, target_of
from cellmap_lightning.splits.cuts import Line, cut, gap_steps
from cellmap_lightning.splits.division import Division
from cellmap_lightning.splits.entries import CropRecord, table_of
from cellmap_lightning.splits.manifests import Filter
from cellmap_lightning.splits.opening import for_all
from cellmap_lightning.splits.patch_reach import PatchReach, patch_reach
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import part_of

log = logging.getLogger(__name__)

#: Names of classes that a message lists.
_LISTED = 12

_Parts = tuple[list[CropRecord], list[CropRecord]]


@dataclass(frozen=True, eq=False)
class _Room:
    """The place of a crop that is cut: its box, the grid of its cuts, and the patches that it must hold.

    Attributes:
        box: the annotated box, or the whole volume; nm.
        step: distance of possible cuts along each axis, nm.
        patch: extent and reach of training patches.
    """

    box: Box
    step: FloatArray
    patch: PatchReach


class InsideSplit:
    """The rule ``split: {blocks: ...}``; see docs/data.md.

    Args:
        options: how crops are cut.
        division: reads which classes matter.
        arrays: the inputs and targets; None if the patch is unknown, which then has no length.
        spatial: the augmentation of training patches.
        planes: planes of flat patches.
        seed: seed of random positions.
        tolerant: names of classes may have no folder.

    Attributes:
        cuts: how each crop was cut, by the location of its entry; for messages.
    """

    def __init__(
        self,
        options: BlockOptions,
        division: Division,
        arrays: ArraySet | None,
        spatial: SpatialTransforms,
        planes: Sequence[str],
        seed: int,
        tolerant: bool,
    ) -> None:
        self.options, self.division, self.arrays, self.spatial = options, division, arrays, spatial
        self.planes, self.seed, self.tolerant = planes, seed, tolerant
        self.cuts: dict[str, str] = {}
        self._filter = Filter(None, options.crops, "split.blocks.crops")

    def divide(self, splits: Mapping[str, list[CropRecord]]) -> dict[str, list[CropRecord]]:
        """Return the crops of each split, those for training cut into boxes for training and validation.

        Raises:
            CellMapValueError: crops are given for validation, none for training, or a crop is too small; the message
                lists all of them.
        """
        train = splits.get("train", [])
        if splits.get("val"):
            raise CellMapValueError(
                f"split=blocks cuts validation out of the crops for training, and {self.division.source} gives "
                f"{len(splits['val'])} for validation; list these for training too, or set split=csv"
            )
        if not train:
            raise CellMapValueError(f"split=blocks cuts crops for training, and {self.division.source} has none")
        names = crop_names(train)
        matches = self._filter.matches(names)
        chosen = {id(entry): str(name) for entry, name, match in zip(train, names, matches, strict=True) if match}

        def parts(entry: CropRecord) -> _Parts | CellMapError:
            try:
                return self._parts(entry, chosen[id(entry)]) if id(entry) in chosen else ([entry], [])
            except CellMapError as e:
                return e

        results = for_all(parts, train, "cutting crops")
        problems = [(entry, e) for entry, e in zip(train, results, strict=True) if isinstance(e, CellMapError)]
        if problems:
            raise CellMapValueError(
                f"split=blocks cannot cut {part_of(len(problems), len(train), 'crop')}:\n{table_of(problems)}"
            )
        divided = {"train": [entry for result in results for entry in result[0]]}  # type: ignore[index]
        divided["val"] = [entry for result in results for entry in result[1]]  # type: ignore[index]
        if not divided["val"]:
            raise CellMapKeyError(self._unannotated([entry for entry in train if id(entry) in chosen]))
        return {**divided, **{split: entries for split, entries in splits.items() if split not in divided}}

    def _unannotated(self, entries: Sequence[CropRecord]) -> str:
        """Return the message for crops of which none annotates any of the classes."""
        classes = list(self.division.classes or ())
        targets = [target_of(entry) for entry in entries]
        stored = sorted({name for target in targets if target is not None for name in target.names})
        names, held = ", ".join(classes), f"{first_few(stored, _LISTED)}{meant(classes, stored)}"
        start = "split=blocks leaves nothing for validation: "
        if len(entries) == 1:
            return f"{start}the only crop that it cuts annotates none of the classes {names}; it annotates {held}"
        return (
            f"{start}none of the {len(entries)} crops that it cuts annotates any of the classes {names}; they annotate "
            f"{held}"
        )

    def _parts(self, entry: CropRecord, name: str) -> _Parts:
        """Return the boxes of a crop for training and for validation; the crop itself where it annotates no class."""
        if entry.dataset is not None:
            raise CellMapTypeError(f"{entry.where}: a dataset cannot be cut by split=blocks; give its paths instead")
        room = self._room(entry, name)
        if room is None:
            return [entry], []
        axis = AXES.index(self.options.axis) if self.options.axis else int(room.box.extent.argmax())
        step = float(room.step[axis])
        length = math.floor(float(room.box.extent[axis]) / step + EDGE_SLACK)
        line = Line(length, step, float(room.patch.extent[axis]), float(room.patch.beyond[axis]))
        try:
            trained, validated = cut(line, self.options, self.seed, name)
        except CellMapError as e:
            e.args = (f"{name}, along {AXES[axis]}: {e}",)
            raise
        gap = gap_steps(line, self.options) * step
        if gap < line.reach - step * SCALE_TOLERANCE:
            log.warning(
                "%s: the gap of %g nm is smaller than the reach of training patches, which show up to %g nm of the raw "
                "of validation; split.blocks.gap_nm=null chooses %g nm",
                name, gap, line.reach - gap, line.steps(line.reach) * step,
            )  # fmt: skip

        def part(interval: tuple[int, int]) -> CropRecord:
            lower, upper = list(room.box.lower), list(room.box.upper)
            lower[axis] = room.box.lower[axis] + step * interval[0]
            if interval[1] < length:  # a last step may be cut at the end of the crop
                upper[axis] = room.box.lower[axis] + step * interval[1]
            box = CropBox.of(Box(to_vector(lower), to_vector(upper)))
            return replace(entry, metadata={**entry.metadata, "box": str(box)})

        self.cuts[entry.where] = (
            f"{name}: cut along {AXES[axis]} into {_nm(trained, step)} nm for training and {_nm(validated, step)} nm "
            f"for validation, with a gap of {gap:g} nm"
        )
        return [part(interval) for interval in trained], [part(interval) for interval in validated]

    def _room(self, entry: CropRecord, name: str) -> _Room | None:
        """Return the place of a crop; None where it annotates none of the classes."""
        overrides, box = entry.overrides, entry.crop_box
        raw = read_image(parse_location(entry.input_path, entry.storage_options), overrides[0])
        images = {"raw": raw}
        if self.division.classes is not None:
            target = entry.target
            assert target is not None  # checked when the crops were listed
            if not self.tolerant:  # a typing error, before "no crop annotates the class" blames the setting
                target.check_names([*self.division.classes, *self.division.read_classes(target.names)])
            annotated = [n for n in self.division.read_classes(target.names) if n in target.names]
            annotated = [n for n in annotated if image_exists(target.of(n)) or not self.tolerant]
            images = {n: target.read(n, overrides[1]) for n in annotated}
        if not images:
            return None
        whole = reduce(Box.union, (image.finest.lattice.box for image in images.values()))
        place = whole if box is None else restricted(name, images, box)[2]
        stored = raw.finest.scale
        if self.arrays is None:
            return _Room(place, _grid(images, np.asarray(stored)), PatchReach(np.zeros(3), np.zeros(3)))
        patch = patch_reach(self.arrays, self.spatial, self.planes, stored)
        scales = [spec.window.scale for spec in (self.arrays.targets or self.arrays.inputs).values() if not spec.flat]
        return _Room(place, _grid(images, np.max(scales, axis=0) if scales else np.asarray(stored)), patch)


def _grid(images: Mapping[str, Multiscale], scale: FloatArray) -> FloatArray:
    """Return the distance of possible cuts: the largest voxels that targets are read from, so that none is cut.

    Args:
        images: the label images, or raw.
        scale: voxel size of the targets, nm.
    """
    steps = []
    for image in images.values():
        fits = [level for level in image.present if (np.divide(level.scale, scale) <= 1 + SCALE_TOLERANCE).all()]
        steps.append((fits or [image.finest])[-1].scale)
    finest = np.max([image.finest.scale for image in images.values()], axis=0)
    coarsest: FloatArray = np.max(steps, axis=0)
    # Cuts lie on the edges of the finest voxels too, or else on these alone.
    ratio = coarsest / finest
    grid: FloatArray = np.where(np.abs(ratio - np.rint(ratio)) < SCALE_TOLERANCE, np.rint(ratio) * finest, finest)
    return grid


def _nm(intervals: Sequence[tuple[int, int]], step: float) -> str:
    return " + ".join(f"{(end - start) * step:g}" for start, end in intervals)
