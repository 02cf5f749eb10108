"""What is known of volumes and crops: from their metadata, and with ``deep`` from their voxels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cellmap_lightning.cache.patches import stored_box
from cellmap_lightning.crops.counts import count_foreground, known_foreground, unknown_share
from cellmap_lightning.crops.encodings import LabelEncodings, Unknown
from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE, SCALE_TOLERANCE, Box, Lattice, Shape, Vector
from cellmap_lightning.io.chunk_names import check_chunk_names
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import NO_OVERRIDES, Level, Multiscale, Overrides, read_multiscale
from cellmap_lightning.io.statistics import Statistics, known_statistics, statistics
from cellmap_lightning.io.store import exists
from cellmap_lightning.runtime.thread_pool import ReadPool
from cellmap_lightning.splits.crop_metadata import dataset_and_crop
from cellmap_lightning.splits.entries import CropRecord
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
        chunks: voxels that are decoded together.
        files: voxels in a file: a chunk, or a shard.
        codec: what compresses them.
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
        skew: where the median lies between them: -1 at ``high``, with a tail of dark voxels, 1 at ``low``.
        histogram: shares of the voxels in equal parts of low..high, at most ``BARS``.
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
        box: what it fills, nm, ``{axis: [lower, upper]}``.
        values: stored values; None where nobody has read them.
        notes: assumptions about its metadata, ``{kind: text}``.
        wrong: why it cannot be read.
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
        voxels: foreground voxels of the finest level; None where nothing says how many.
        unknown: part of the voxels that nobody annotated; None likewise.
        scale: voxel size of the finest level, nm.
        lost: part of the foreground that the level read at the scale in use has lost; None likewise.
        level: name of that level.
        read_as: how the values are read where no metadata say it.
        wrong: why it cannot be read.
    """

    voxels: int | None = None
    unknown: float | None = None
    scale: Vector | None = None
    lost: float | None = None
    level: str | None = None
    read_as: str | None = None
    wrong: str | None = None


@dataclass(frozen=True)
class CropFacts:
    """An annotated crop.

    Attributes:
        name: dataset and crop.
        where: where it was named.
        usage: its split.
        raw: path of its raw volume.
        target: path of its labels, the classes in a bracket.
        levels: resolutions of its first class.
        classes: of each class that is annotated.
        box: of all classes, nm.
        off: voxels by which its edges miss those of raw's finest level (z, y, x), 0 where they agree; None without raw.
        ratio: raw's finest voxels in one of the labels, along each axis; None likewise.
        outside: part of the crop that lies outside raw; None likewise.
        chunks: files of raw under the crop that were never written, and of how many, of the level that is read.
        metadata: what its entry sets in place of its metadata.
        notes: assumptions about the metadata of its labels, ``{kind: text}``.
        wrong: why it cannot be read.
    """

    name: str
    where: str
    usage: str
    raw: str
    target: str
    levels: tuple[LevelFacts, ...] = ()
    classes: Mapping[str, ClassFacts] = field(default_factory=dict)
    box: Mapping[str, list[float]] | None = None
    off: Vector | None = None
    ratio: Vector | None = None
    outside: float | None = None
    chunks: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    wrong: str | None = None

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
        """The classes that have voxels, or may have."""
        return [name for name, facts in self.classes.items() if facts.voxels != 0 and facts.wrong is None]

    @property
    def absent(self) -> list[str]:
        """The classes that are annotated and have none."""
        return [name for name, facts in self.classes.items() if facts.voxels == 0]

    @property
    def unknown(self) -> float | None:
        """Mean unknown part over its classes, of those whose metadata says it."""
        parts = [c.unknown for c in self.classes.values() if c.unknown is not None]
        return float(np.mean(parts)) if parts else None


def look_at_volumes(
    paths: Sequence[str], deep: bool, overrides: Mapping[str, Overrides] | None = None
) -> list[VolumeFacts]:
    """Facts of raw volumes.

    Args:
        paths: their multiscale groups.
        deep: read a coarse level for the values, where nobody has; otherwise they are known only if somebody has.
        overrides: of the metadata of some of them.
    """

    def look(path: str) -> VolumeFacts:
        name = dataset_and_crop(path, None)[0]
        try:
            image = read_multiscale(path, (overrides or {}).get(path, NO_OVERRIDES))
            box = image.finest.lattice.box
            for level in image.present:
                check_chunk_names(level.array)
            found = statistics(image) if deep else known_statistics(image)
            values = _values(found) if found else None
            return VolumeFacts(name, path, _levels(image), box.as_dict(), values, _notes(image))
        except CellMapError as e:
            return VolumeFacts(name, path, wrong=str(e))

    return for_all(look, paths, "reading volumes" if deep else "looking at volumes", "volume")


def look_at_crops(
    entries: Sequence[tuple[str, CropRecord]], unknown: Unknown = "metadata", tolerant: bool = False
) -> list[CropFacts]:
    """Facts of crops, from their metadata; of labels without an encoding also from their values.

    Args:
        entries: usage and entry of each.
        unknown: the code of unknown voxels where an entry has none of its own; see `CellMapDataset`.
        tolerant: a class without a folder is not annotated, instead of unreadable.
    """

    def look(item: tuple[str, CropRecord]) -> CropFacts:
        usage, entry = item
        facts = CropFacts(entry.where, entry.where, usage, entry.input_path, entry.target_path or "")
        try:
            target = entry.target
            assert target is not None
            facts = replace(facts, name=target.label, metadata={"unknown": unknown, **entry.metadata})
            return _crop(facts, target, tolerant)
        except CellMapError as e:
            return replace(facts, wrong=str(e))

    return for_all(look, entries, "looking at crops")


def _crop(facts: CropFacts, target: TargetPath, tolerant: bool) -> CropFacts:
    classes: dict[str, ClassFacts] = {}
    levels: tuple[LevelFacts, ...] = ()
    first: Lattice | None = None
    box: Box | None = None
    encodings = LabelEncodings(facts.name, facts.metadata.get("unknown", "metadata"))
    notes: dict[str, str] = {}
    raw_overrides, overrides = _overrides(facts)
    for name in target.names:
        try:
            if tolerant and not exists(target.of(name)):
                continue
            image = read_multiscale(target.of(name), overrides)
            lattice = image.finest.lattice
            encoding = encodings.of(name, image, image.finest)
            voxels = known_foreground(image, image.finest, encoding)
            read_as = encodings.decided.get(name)
            classes[name] = ClassFacts(voxels, unknown_share(image), lattice.step, read_as=read_as)
            for kind, text in _notes(image).items():
                notes.setdefault(kind, f"class {name}: {text}")
        except CellMapError as e:
            classes[name] = ClassFacts(wrong=str(e))
            continue
        if first is None:
            first, levels = lattice, _levels(image)
        box = lattice.box if box is None else box.union(lattice.box)
    facts = replace(facts, levels=levels, classes=classes, notes=notes, box=box.as_dict() if box else None)
    if box is None or first is None:
        return replace(facts, wrong=next((c.wrong for c in classes.values()), "none of its classes has a folder"))
    try:
        raw = read_multiscale(facts.raw, raw_overrides).finest.lattice
    except CellMapError:
        return facts  # the volume's own line says it
    edges = np.subtract(first.box.lower, raw.box.lower) / raw.step
    off = np.where(np.abs(edges - np.rint(edges)) <= LATTICE_TOLERANCE, 0.0, edges - np.rint(edges))
    inside = np.minimum(box.upper, raw.box.upper) - np.maximum(box.lower, raw.box.lower)
    part = float(np.prod(np.clip(inside / box.extent, 0, 1)))
    return replace(
        facts, off=_vector(off), ratio=_vector(np.divide(first.step, raw.step)), outside=round(1 - part, 9) + 0.0
    )


def at_scale(crops: Sequence[CropFacts], scale: Vector, deep: bool) -> list[CropFacts]:
    """The same with what depends on the voxel size that is read: chunks of raw that are absent, and what labels lose.

    Args:
        crops: the crops.
        scale: voxel size, nm.
        deep: count voxels where the metadata does not say how many a level has.
    """
    pool = ReadPool(4)

    def look(facts: CropFacts) -> CropFacts:
        if facts.wrong is not None or facts.box is None:
            return facts
        target = TargetPath.parse(facts.target)
        raw_overrides, overrides = _overrides(facts)
        encodings = LabelEncodings(facts.name, facts.metadata.get("unknown", "metadata"), thorough=deep)
        classes = {}
        for name, own in facts.classes.items():
            if own.wrong is None:
                image = read_multiscale(target.of(name), overrides)
                own = _lost(own, name, image, scale, deep, pool, facts, encodings)
            classes[name] = own
        chunks = None
        if not fits(facts, scale):
            return replace(facts, classes=classes)  # it will not be read
        try:
            level = choose_level(read_multiscale(facts.raw, raw_overrides), scale)
            lower, upper = (tuple(sides) for sides in zip(*facts.box.values(), strict=True))
            found = stored_box(level.lattice, Box(lower, upper), 0)
            chunks = ChunkReader(level).absent(*found) if found is not None else None
        except CellMapError:
            pass  # said elsewhere
        return replace(facts, classes=classes, chunks=chunks)

    try:
        return for_all(look, crops, "counting voxels" if deep else "looking at chunks")
    finally:
        pool.close()


def fits(crop: CropFacts, scale: Vector) -> bool:
    """Whether the labels of a crop are as fine as a scale."""
    return crop.scale is not None and bool((np.divide(crop.scale, scale) <= 1 + SCALE_TOLERANCE).all())


def _overrides(facts: CropFacts) -> tuple[Overrides, Overrides]:
    """Overrides of a crop's raw image and of its labels."""
    return Overrides.pair(**{key: value for key, value in facts.metadata.items() if key != "unknown"})


def _notes(image: Multiscale) -> dict[str, str]:
    return {note.kind: note.text for note in reversed(image.notes)}


def _lost(
    own: ClassFacts,
    name: str,
    image: Multiscale,
    scale: Vector,
    deep: bool,
    pool: ReadPool,
    crop: CropFacts,
    encodings: LabelEncodings,
) -> ClassFacts:
    level = choose_level(image, scale)

    def count(of: Level) -> int | None:
        encoding = encodings.of(name, image, of)
        known = known_foreground(image, of, encoding)
        if known is None and deep:
            return count_foreground(of, encoding, pool, f"{crop.name}, {of.path.parent.name}/{of.name}")
        return known

    try:
        fine, coarse = count(image.finest), count(level)
    except CellMapError as e:
        return replace(own, wrong=str(e))
    lost = None
    if fine and coarse is not None:
        kept = coarse * float(np.prod(level.scale)) / (fine * float(np.prod(image.finest.scale)))
        lost = 1 - kept
    return replace(own, voxels=fine, lost=lost, level=level.name)


def _levels(image: Multiscale) -> tuple[LevelFacts, ...]:
    found = []
    for level in image.levels:
        info = level.info
        if info is None:
            found.append(LevelFacts(level.name, level.scale))
            continue
        shape, chunks, files = (level.zyx(stored) for stored in (info.shape, info.chunks, info.files))
        found.append(LevelFacts(level.name, level.scale, shape, str(info.dtype), chunks, files, info.codec))
    return tuple(found)


def _values(found: Statistics) -> Values:
    low, median, high = (found.percentile(p) for p in (0.5, 50, 99.5))
    skew = (high + low - 2 * median) / (high - low) if high > low else 0.0
    whole = all(q == int(q) for q in found.quantiles)  # of whole numbers no more bars than there are numbers
    bars = min(BARS, max(1, int(high - low))) if whole else BARS
    edges = np.linspace(low, high, bars + 1)
    # The share of the voxels below each edge; where many voxels have one value, the quantiles repeat it.
    below = np.searchsorted(found.quantiles, edges, side="right") / len(found.quantiles)
    shares = np.diff(below)
    return Values(found.mean, found.std, low, median, high, skew, tuple((shares / max(shares.sum(), 1e-9)).tolist()))


def _vector(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Vector:
    z, y, x = (float(v) for v in values)
    return z, y, x
