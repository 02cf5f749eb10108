"""Facts of crops at a voxel size: absent chunks of raw, lost foreground, and with ``deep`` the stored labels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cellmap_lightning.cache.patches import stored_box
from cellmap_lightning.crops.counts import count_foreground, counted_foreground, known_foreground
from cellmap_lightning.crops.crop_box import image_part
from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.crops.section_gaps import SectionFacts, section_facts
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Box, Vector, to_vector
from cellmap_lightning.inspection.facts import ClassFacts, CropFacts, crop_overrides
from cellmap_lightning.io.declared_counts import declared_foreground, declared_unknown
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Level, Multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.splits.opening import for_all


def at_scale(crops: Sequence[CropFacts], scale: Vector, deep: bool) -> list[CropFacts]:
    """Return the facts of crops with those that depend on the voxel size: absent chunks of raw, lost foreground.

    Args:
        crops: the crops.
        scale: voxel size, nm.
        deep: read the labels: their voxels, sections and levels, and compare them with the metadata.
    """
    pool = ReadPool(4)

    def read(facts: CropFacts) -> CropFacts:
        if facts.wrong is not None or facts.box is None:
            return facts
        voxels = _Voxels(facts, deep, pool)
        classes = {
            name: of_class if of_class.wrong is not None else _with_loss(of_class, name, facts, scale, voxels)
            for name, of_class in facts.classes.items()
        }
        # A crop that is too coarse is not read, so its raw is not either.
        chunks = _absent_chunks(facts, scale) if fits(facts, scale) else None
        return replace(facts, classes=classes, chunks=chunks)

    try:
        return for_all(read, crops, "counting voxels" if deep else "checking chunks")
    finally:
        pool.close()


class _Voxels:
    """Counts and values of the labels of one crop.

    Args:
        facts: the crop.
        deep: read the labels, instead of the counts in their metadata.
        pool: reads them.
    """

    def __init__(self, facts: CropFacts, deep: bool, pool: ReadPool) -> None:
        self._crop, self._deep, self._pool = facts.name, deep, pool
        self._encodings = LabelEncodings(facts.name, facts.metadata.get("unknown", "metadata"), thorough=deep)

    def sections(self, name: str, image: Multiscale) -> SectionFacts | None:
        """Return the facts of the sections of a class, or None if they are not read."""
        if not self._deep:
            return None
        return section_facts(image.finest, self._encodings.of(name, image, image.finest), f"{self._crop}, {name}")

    def averaged(self, name: str, image: Multiscale, refused: Level | None = None) -> tuple[str, ...]:
        """Return for each coarser level that was averaged which values the finest does not hold.

        Only levels whose encoding was read are compared; with ``deep`` that of every level is.

        Args:
            name: the class.
            image: its image.
            refused: a level whose error makes the class unreadable, and is not repeated.
        """
        texts = []
        for level in image.present:
            if level in (image.finest, refused):
                continue
            try:
                if self._deep:
                    self._encodings.of(name, image, level)
            except CellMapError as e:  # no error of the class: this level is not read
                texts.append(str(e))
            if (name, level.name) in self._encodings.averaged:
                texts.append(self._encodings.averaged[name, level.name])
        return tuple(texts)

    def foreground(self, name: str, image: Multiscale, level: Level) -> int | None:
        """Return the foreground voxels of a class at a level, or None if they are not counted.

        With ``deep`` they are those of the stored voxels, unless the metadata has a count of the finest level, which is
        compared with its sections.
        """
        encoding = self._encodings.of(name, image, level)
        voxels = known_foreground(image, level, encoding)
        if self._deep and (voxels is None or level != image.finest):
            where = f"{self._crop}, {level.path.parent.name}/{level.name}"
            counted = counted_foreground(level, encoding)
            return counted if counted is not None else count_foreground(level, encoding, self._pool, where)
        return voxels


def _with_loss(of_class: ClassFacts, name: str, crop: CropFacts, scale: Vector, voxels: _Voxels) -> ClassFacts:
    """Return the facts of a class with the part of its foreground that the level read at a scale has lost."""
    image = class_image(crop, name)
    level = choose_level(image, scale)
    try:
        fine = voxels.foreground(name, image, image.finest)
    except CellMapError as e:
        return replace(of_class, wrong=str(e))
    try:
        coarse, sections = voxels.foreground(name, image, level), voxels.sections(name, image)
    except CellMapError as e:
        return replace(of_class, wrong=str(e), averaged=voxels.averaged(name, image, level))
    if sections is not None:
        if of_class.contradiction is None:
            of_class = replace(of_class, contradiction=_contradiction(image, sections))
        of_class = replace(of_class, gaps=sections.gaps, unknown=sections.unknown)
        fine, coarse = sections.present, sections.present if level == image.finest else coarse
    lost = None
    if fine and coarse is not None:
        # Voxels of levels differ in size, so that volumes are compared, not counts.
        volumes = coarse * float(np.prod(level.scale)), fine * float(np.prod(image.finest.scale))
        lost = 1 - volumes[0] / volumes[1]
    return replace(of_class, voxels=fine, lost=lost, level=level.name, averaged=voxels.averaged(name, image))


def _contradiction(image: Multiscale, stored: SectionFacts) -> str | None:
    """Return the counts of the metadata of a class that are not those of its stored voxels; None without any."""
    declared = {
        "voxels of the class": (declared_foreground(image.finest, image), stored.present),
        "unknown voxels": (declared_unknown(image.finest, image), stored.missing),
    }
    texts = [
        f"{of_metadata:,} {what}, and {counted:,} are stored"
        for what, (of_metadata, counted) in declared.items()
        if of_metadata is not None and of_metadata != counted
    ]
    return "; ".join(texts) or None


def class_image(crop: CropFacts, name: str) -> Multiscale:
    """Return the label image of a class, inside of the box that restricts the crop."""
    image = TargetPath.parse(crop.target).read(name, crop_overrides(crop)[1])
    if crop.metadata.get("box") is None or crop.box is None:
        return image
    return image_part(image, _physical(crop.box)) or image


def _physical(box: Mapping[str, list[float]]) -> Box:
    lower, upper = (to_vector(sides) for sides in zip(*box.values(), strict=True))
    return Box(lower, upper)


def _absent_chunks(facts: CropFacts, scale: Vector) -> tuple[int, int] | None:
    """Return the number of absent and of all files of raw under a crop, at the level that is read at a scale."""
    assert facts.box is not None
    try:
        level = choose_level(read_image(facts.raw, crop_overrides(facts)[0], allow_turned=True), scale)
        stored = stored_box(level.lattice, _physical(facts.box), 0)
        return open_reader(level).absent(*stored) if stored is not None else None
    except CellMapError:
        return None  # reported as a problem of the volume


def fits(crop: CropFacts, scale: Vector) -> bool:
    """Check that the labels of a crop are as fine as a scale."""
    return crop.scale is not None and bool((np.divide(crop.scale, scale) <= 1 + SCALE_TOLERANCE).all())
