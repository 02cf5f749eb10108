"""Facts of volumes and crops: from their metadata, and with ``deep`` from their voxels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from cellmap_lightning.crops.class_boxes import ClassBox, differing_boxes
from cellmap_lightning.crops.counts import known_foreground, unknown_share
from cellmap_lightning.crops.crop_box import CropBox, restricted
from cellmap_lightning.crops.encodings import LabelEncodings, Unknown
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import (
    LATTICE_TOLERANCE,
    Box,
    Lattice,
    Shape,
    Vector,
)
from cellmap_lightning.inspection.report_names import report_names
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.declared_counts import implausible_counts
from cellmap_lightning.io.images import image_exists, read_image
from cellmap_lightning.io.ngff import NO_OVERRIDES, Level, Multiscale, Overrides
from cellmap_lightning.io.statistics import Statistics, known_statistics, statistics
from cellmap_lightning.splits.crop_names import dataset_and_crop
from cellmap_lightning.splits.entries import CropRecord, overrides_of
from cellmap_lightning.splits.opening import for_all

#: Bars of a histogram.
BARS = 32


@dataclass(frozen=True)
class LevelFacts:
    """One resolution of an image.

    Attributes:
        name: such as ``s0``.
        scale: voxel size, nm.
        shape: voxels (z, y, x); None where the level is listed and not on disk.
        dtype: the stored type.
        chunks: voxels of a chunk.
        files: voxels of a file: a chunk, or a shard.
        codec: compressor.

    Example:
        See `VolumeFacts`.
    """

    name: str
    scale: Vector
    shape: Shape | None = None
    dtype: str = ""
    chunks: Shape | None = None
    files: Shape | None = None
    codec: str = ""


@dataclass(frozen=True)
class Values:
    """Stored values of a volume.

    Attributes:
        mean: mean.
        std: standard deviation.
        low: 0.5th percentile.
        median: median.
        high: 99.5th percentile.
        skew: position of the median between them: -1 at ``high``, with a tail of dark voxels, 1 at ``low``.
        histogram: shares of the voxels in equal parts of low..high, at most ``BARS``.

    Example:
        See `VolumeFacts`.
    """

    mean: float
    std: float
    low: float
    median: float
    high: float
    skew: float
    histogram: tuple[float, ...]


@dataclass(frozen=True)
class VolumeFacts:
    """A raw volume.

    Attributes:
        name: its dataset.
        path: the multiscale group.
        levels: its resolutions, finest first.
        box: its extent, nm, ``{axis: [lower, upper]}``.
        values: stored values; None if they have not been read.
        notes: assumptions about its metadata, ``{kind: text}``.
        wrong: the error if it cannot be read.

    Example:
        >>> (facts,) = read_volume_facts(["jrc_hela-2.zarr/recon-1/em/fibsem-uint8"], deep=False)
        >>> [(level.name, level.shape) for level in facts.levels]
    """

    name: str
    path: str
    levels: tuple[LevelFacts, ...] = ()
    box: Mapping[str, list[float]] | None = None
    values: Values | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def present(self) -> tuple[LevelFacts, ...]:
        """The levels that are on disk."""
        return tuple(level for level in self.levels if level.shape is not None)


@dataclass(frozen=True)
class ClassFacts:
    """One class of a crop.

    Attributes:
        voxels: foreground voxels of the finest level; None if they are not counted.
        unknown: unannotated part of the voxels; None likewise.
        scale: voxel size of the finest level, nm.
        lost: part of the foreground that the level read at the scale in use has lost; None likewise.
        level: name of that level.
        read_as: meaning of the values if the metadata has no encoding.
        size: voxels of the finest level.
        averaged: values of coarser levels that the finest does not hold, a text for each level: of all levels with
            ``deep``, else of that level.
        contradiction: counts of its metadata that cannot be, or with ``deep`` that are not those of the stored voxels;
            None without any. ``voxels`` and ``unknown`` are then those of the stored voxels.
        gaps: runs of empty sections that cut objects, see `SectionFacts`; None if they are not read.
        wrong: the error if it cannot be read.

    Example:
        See `CropFacts`.
    """

    voxels: int | None = None
    unknown: float | None = None
    scale: Vector | None = None
    lost: float | None = None
    level: str | None = None
    read_as: str | None = None
    size: int | None = None
    averaged: tuple[str, ...] = ()
    contradiction: str | None = None
    gaps: tuple[tuple[int, int], ...] | None = None
    wrong: str | None = None

    @property
    def fills(self) -> bool:
        """Whether it fills its whole crop, though its meaning was decided by the values."""
        by_values = self.read_as is not None and self.read_as.startswith("values")
        return by_values and self.voxels is not None and self.voxels == self.size

    @property
    def share(self) -> float | None:
        """Part of the known voxels that it fills, where its meaning was decided by the values; None otherwise."""
        by_values = self.read_as is not None and self.read_as.startswith("values")
        if not by_values or self.voxels is None or not self.size:
            return None
        known = self.size * (1 - (self.unknown or 0))
        return self.voxels / known if known >= 1 else None


@dataclass(frozen=True)
class CropFacts:
    """An annotated crop.

    Attributes:
        name: dataset and crop.
        where: its entry: file and line.
        usage: its split.
        raw: path of its raw volume.
        target: path of its labels, the classes in a bracket.
        levels: resolutions of its first class.
        classes: facts of each annotated class.
        box: of all classes, nm.
        apart: the classes whose box differs from that of the others.
        off: voxels by which its edges miss those of raw's finest level (z, y, x), 0 where they agree; None without raw.
        ratio: raw's finest voxels in one of the labels, along each axis; None likewise.
        outside: part of the crop that lies outside raw; None likewise.
        chunks: number of files of raw under the crop that were never written, and of all, at the level that is read.
        metadata: settings of its entry that replace its metadata.
        notes: assumptions about the metadata of its labels, ``{kind: text}``.
        wrong: the error if it cannot be read.
        left_out: the reason if the configuration does not use it.

    Example:
        >>> for crop in inspect({"csv_path": "crops.csv"}, {}, None).crops:
        ...     print(crop.name, {name: facts.voxels for name, facts in crop.classes.items()})
    """

    name: str
    where: str
    usage: str
    raw: str
    target: str
    levels: tuple[LevelFacts, ...] = ()
    classes: Mapping[str, ClassFacts] = field(default_factory=dict)
    box: Mapping[str, list[float]] | None = None
    apart: tuple[ClassBox, ...] = ()
    off: Vector | None = None
    ratio: Vector | None = None
    outside: float | None = None
    chunks: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    wrong: str | None = None
    left_out: str | None = None

    @property
    def extent(self) -> Vector | None:
        """Edge lengths, nm."""
        if self.box is None:
            return None
        z, y, x = (b - a for a, b in self.box.values())
        return z, y, x

    @property
    def scale(self) -> Vector | None:
        """The coarsest of its classes' finest voxel sizes, nm."""
        scales = [c.scale for c in self.classes.values() if c.scale is not None]
        return _vector(np.max(scales, axis=0)) if scales else None

    @property
    def held(self) -> list[str]:
        """The classes that have voxels, or whose voxels are not counted."""
        return [name for name, facts in self.classes.items() if facts.voxels != 0 and facts.wrong is None]

    @property
    def absent(self) -> list[str]:
        """The classes that are annotated and have no voxel."""
        return [name for name, facts in self.classes.items() if facts.voxels == 0]

    @property
    def unknown(self) -> float | None:
        """Mean unknown part over its classes, of those where it is counted."""
        parts = [c.unknown for c in self.classes.values() if c.unknown is not None]
        return float(np.mean(parts)) if parts else None


def read_volume_facts(
    paths: Sequence[str], deep: bool, overrides: Mapping[str, Overrides] | None = None
) -> list[VolumeFacts]:
    """Return the facts of raw volumes.

    Args:
        paths: their multiscale groups.
        deep: read a coarse level for the values, unless they are cached; without it, only cached values are returned.
        overrides: of the metadata of some of them.
    """

    def read(path: str) -> VolumeFacts:
        name = dataset_and_crop(path, None)[0]
        try:
            image = read_image(path, (overrides or {}).get(path, NO_OVERRIDES), allow_turned=True)
            box = image.finest.lattice.box
            for level in image.present:
                check_chunk_names(level.array)
            measured = statistics(image) if deep else known_statistics(image)
            values = _values(measured) if measured else None
            return VolumeFacts(name, path, _levels(image), box.as_dict(), values, _notes(image))
        except CellMapError as e:
            return VolumeFacts(name, path, wrong=str(e))

    return for_all(read, paths, "reading volumes" if deep else "reading metadata of volumes", "volume")


def read_crop_facts(
    entries: Sequence[tuple[str, CropRecord]], unknown: Unknown = "metadata", tolerant: bool = False
) -> list[CropFacts]:
    """Return the facts of crops, from their metadata; of labels without an encoding also from their values.

    Args:
        entries: usage and entry of each.
        unknown: the code of unknown voxels for entries that do not set it; see `LabelOptions`.
        tolerant: a class without a folder is unannotated, instead of unreadable.
    """
    labels = report_names([entry for _, entry in entries])

    def read(item: tuple[str, tuple[str, CropRecord]]) -> CropFacts:
        label, (usage, entry) = item
        facts = CropFacts(entry.where, entry.where, usage, entry.input_path, entry.target_path or "")
        try:
            target = entry.target
            assert target is not None
            facts = replace(facts, name=label, metadata={"unknown": unknown, **entry.metadata})
            return _crop_facts(facts, target, tolerant)
        except CellMapError as e:
            return replace(facts, wrong=str(e))

    return for_all(read, list(zip(labels, entries, strict=True)), "reading metadata of crops")


def _crop_facts(facts: CropFacts, target: TargetPath, tolerant: bool) -> CropFacts:
    """Return the facts of a crop with those of its classes and its position."""
    classes: dict[str, ClassFacts] = {}
    notes: dict[str, str] = {}
    images: dict[str, Multiscale] = {}
    encodings = LabelEncodings(facts.name, facts.metadata.get("unknown", "metadata"))
    raw_overrides, overrides = crop_overrides(facts)
    for name in target.names:
        try:
            if tolerant and not image_exists(target.of(name)):
                continue
            image = target.read(name, overrides)
            _ = image.finest.lattice
            images[name] = image
        except CellMapError as e:
            classes[name] = ClassFacts(wrong=str(e))
            continue
        for kind, text in _notes(image).items():
            notes.setdefault(kind, f"class {name}: {text}")
    facts = replace(facts, apart=differing_boxes(images))
    if images and facts.metadata.get("box") is not None:
        images = restricted(facts.name, images, CropBox.parse(facts.metadata["box"]))[0]
    for name, image in list(images.items()):
        try:
            encoding = encodings.of(name, image, image.finest)
            classes[name] = ClassFacts(
                voxels=known_foreground(image, image.finest, encoding),
                unknown=unknown_share(image),
                scale=image.finest.lattice.step,
                read_as=encodings.decided.get(name),
                size=int(np.prod(image.finest.array.shape)),
                contradiction=implausible_counts(image.finest, image),
            )
        except CellMapError as e:
            classes[name] = ClassFacts(wrong=str(e))
            del images[name]
    classes = {name: classes[name] for name in target.names if name in classes}
    facts = replace(facts, classes=classes, notes=notes)
    if not images:
        return replace(facts, wrong=next((c.wrong for c in classes.values()), "none of its classes has a folder"))
    box = reduce(Box.union, (image.finest.lattice.box for image in images.values()))
    first = next(iter(images.values()))
    facts = replace(facts, levels=_levels(first), box=box.as_dict())
    try:
        raw = read_image(facts.raw, raw_overrides, allow_turned=True).finest.lattice
    except CellMapError:
        return facts  # reported as a problem of the volume
    return _beside_raw(facts, first.finest.lattice, box, raw)


def _beside_raw(facts: CropFacts, labels: Lattice, box: Box, raw: Lattice) -> CropFacts:
    """Return the facts of a crop with its position on raw: offset of the edges, ratio of voxels, part outside."""
    # Edges are compared in voxels of raw; a distance below the tolerance is float noise of the metadata.
    edges = np.subtract(labels.box.lower, raw.box.lower) / raw.step
    off = np.where(np.abs(edges - np.rint(edges)) <= LATTICE_TOLERANCE, 0.0, edges - np.rint(edges))
    inside = np.minimum(box.upper, raw.box.upper) - np.maximum(box.lower, raw.box.lower)
    part = float(np.prod(np.clip(inside / box.extent, 0, 1)))
    outside = round(1 - part, 9) + 0.0  # no negative zero
    return replace(facts, off=_vector(off), ratio=_vector(np.divide(labels.step, raw.step)), outside=outside)


def crop_overrides(facts: CropFacts) -> tuple[Overrides, Overrides]:
    """Return the overrides of a crop's raw image and of its labels."""
    return overrides_of(facts.metadata)


def _notes(image: Multiscale) -> dict[str, str]:
    # Reversed, so that the first note of a kind stays.
    return {note.kind: note.text for note in reversed(image.notes)}


def _levels(image: Multiscale) -> tuple[LevelFacts, ...]:
    return tuple(map(_level, image.levels))


def _level(level: Level) -> LevelFacts:
    info = level.info
    if info is None:
        return LevelFacts(level.name, level.scale)
    shape, chunks, files = (level.zyx(stored) for stored in (info.shape, info.chunks, info.files))
    return LevelFacts(level.name, level.scale, shape, str(info.dtype), chunks, files, info.codec)


def _values(measured: Statistics) -> Values:
    low, median, high = (measured.percentile(p) for p in (0.5, 50, 99.5))
    skew = (high + low - 2 * median) / (high - low) if high > low else 0.0
    # Of whole numbers no more bars than there are numbers, or some bars would be empty.
    is_whole = all(q == int(q) for q in measured.quantiles)
    bars = min(BARS, max(1, int(high - low))) if is_whole else BARS
    edges = np.linspace(low, high, bars + 1)
    # The share of the voxels below each edge; where many voxels have one value, the quantiles repeat it.
    below = np.searchsorted(measured.quantiles, edges, side="right") / len(measured.quantiles)
    shares = np.diff(below)
    histogram = tuple((shares / max(shares.sum(), 1e-9)).tolist())
    return Values(measured.mean, measured.std, low, median, high, skew, histogram)


def _vector(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Vector:
    z, y, x = (float(v) for v in values)
    return z, y, x
