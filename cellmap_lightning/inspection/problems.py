"""Problems of volumes and crops: errors, and properties that surprise in a training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.crops.section_gaps import gaps_text
from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.geometry.lattice import AXES, SCALE_TOLERANCE, Box, Vector, to_vector
from cellmap_lightning.inspection.facts import CropFacts, VolumeFacts
from cellmap_lightning.inspection.formats import by_axis
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.splits.leakage import PlacedCrop, held_out_crops, identity, overlaps, volume_identity
from cellmap_lightning.splits.spellings import OtherSpelling
from cellmap_lightning.validation import first_few
from cellmap_lightning.wording import plural

#: Part of the foreground that a coarser level may lose before it is reported.
MOST_LOST = 0.3
#: Unknown part of a crop from which it is reported.
MOST_UNKNOWN = 0.5
#: Part of the known voxels of a crop from which a class is reported that is annotated beside others.
MOSTLY = 0.9
#: Skew of the values from which a volume counts as having a dark or a bright tail.
CLEAR_SKEW = 0.15
#: Ratio between the width of the middle 99 % of a volume's values and the median width, from which it is reported.
CONTRAST_RATIO = 2.0
#: Text of the problem that no crop validates, where the proposal cuts the crops.
PROPOSED_CUT = (
    "no crop validates; the proposal sets data.split to blocks, which cuts a part of each crop for validation, see "
    "docs/data.md"
)
#: End of the text about empty sections, with the place of the class.
_GAPS_ADVICE = (
    "counted from 0, though objects continue on both sides; annotate them there, or mark the sections as unknown: in a "
    "mask from Fiji fill them with 128, and convert it with 'classes={{255:{0},128:unknown}}'; objects are cut there "
    "in either case, so for ids, affinities and distances they have to be annotated"
)
#: Names that one problem lists.
_LISTED = 8


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        kind: a key of `KINDS`; problems of one kind are reported together.
        where: the volume, crop or class.
        text: the values, and what to do.

    Example:
        >>> [problem.text for problem in inspect(data, patch, None).problems if problem.kind == "leakage"]
    """

    kind: str
    where: str
    text: str


#: Every kind, in the order of the report, with its heading.
KINDS = {
    "unreadable": "cannot be read",
    "config": "the configuration is refused, for the reason in the error at the end",
    "spelling": "classes under another spelling, which are unannotated",
    "access": "files that are slow to read patch by patch",
    "sources": "virtual datasets with parts that are not stored",
    "white": "TIFF files that mark 0 as white, and are read as stored",
    "orientation": "TIFF files with a tag Orientation, which is not applied",
    "thumbnail": "TIFF files whose last page is left out as a thumbnail",
    "position": "TIFF files with a stored position, which is not applied",
    "unit": "images without a unit of length",
    "scale": "implausible voxel sizes",
    "order": "voxel sizes or positions that are set, perhaps in the order x, y, z",
    "offset": "positions in attributes that are not read, so that the array begins at 0",
    "levels": "pyramids whose levels are not placed by their metadata",
    "boxes": "pyramids whose levels cover different boxes",
    "class boxes": "classes that lie elsewhere than the other classes of their crop, perhaps by wrong metadata",
    "multiscales": "groups that list several images",
    "systems": "images with several coordinate systems",
    "versions": "groups with metadata of two versions of OME-NGFF that differ",
    "outside": "crops outside their raw volume",
    "leakage": "crops that are trained on, and validate or test as well",
    "contradiction": "crops for training that overlap, with labels that contradict each other",
    "validation": "nothing to validate on",
    "missing level": "levels that are listed and not on disk",
    "raw absent": "raw under a crop that was never written, and reads as the fill value",
    "raw coarse": "raw coarser than the scale",
    "labels coarse": "labels coarser than the scale",
    "small": "crops smaller than the patch",
    "off lattice": "crops off raw's lattice, so that raw is interpolated at the scale of the labels",
    "averaged": "labels whose coarser levels hold values that the finest does not",
    "stale": "pyramids whose coarser levels do not show what the finer ones do: write them again from the finest",
    "counts": "wrong complement_counts in the metadata, by which classes are sampled: correct or remove them",
    "lost": f"classes that lose more than {MOST_LOST:.0%} of their foreground at the level that is read",
    "unknown": f"crops that are unknown to more than {MOST_UNKNOWN:.0%}",
    "gaps": "empty sections inside objects, which cut them",
    "filled": "classes without an encoding that fill their whole crop: does one of their values mean absent?",
    "mostly": "classes without an encoding that fill over 90 % of a crop beside others: is the mask inverted?",
    "empty": "classes without foreground",
    "rare": "classes in a single crop, which only data.split=blocks divides into training and validation",
    "one split": "classes without foreground in training or in validation",
    "range": "raw that its normalization does not bring to about 0 to 1",
    "type": "volumes of different types",
    "contrast": "volumes that differ in contrast",
    "polarity": "volumes that differ in polarity",
}


def find_problems(
    volumes: Sequence[VolumeFacts],
    crops: Sequence[CropFacts],
    classes: Sequence[str],
    scale: Vector | None,
    shape: Sequence[int] | None,
    pad: bool,
    too_coarse: str = "drop",
    held_out: str | None = None,
    spellings: Sequence[OtherSpelling] = (),
    noted: Sequence[Problem] = (),
) -> list[Problem]:
    """Return all problems that the facts show, in the order of `KINDS`.

    Args:
        volumes: raw volumes.
        crops: crops.
        classes: the requested classes.
        scale: the requested voxel size, nm.
        shape: voxels of a patch.
        pad: whether crops may be smaller than it.
        too_coarse: treatment of crops whose labels are too coarse: ``drop``, ``upsample`` or ``error``.
        held_out: a manifest of crops that must not be trained on.
        spellings: classes that crops annotate under another spelling.
        noted: other problems, to be sorted among them.
    """
    problems = [*noted, *(problem for volume in volumes for problem in _of_volume(volume))]
    problems += [
        Problem("spelling", found.crop, f"has {found.stored!r}, and classes has {found.name!r}: rename one of them")
        for found in spellings
    ]
    finest = {volume.path: volume.present[0].scale for volume in volumes if volume.present}
    for crop in crops:
        pairs = [("unreadable", crop.wrong)] if crop.wrong else [*_of_metadata(crop), *_of_content(crop, classes)]
        if scale is not None and not crop.wrong:
            pairs += [*_of_scale(crop, finest, classes, scale, too_coarse), *_of_size(crop, scale, shape, pad)]
        problems += [Problem(kind, crop.name, text) for kind, text in pairs]
    # Parts of a cut crop have the same.
    problems += dict.fromkeys(Problem("class boxes", crop.name, str(found)) for crop in crops for found in crop.apart)
    problems += [
        *_of_classes(crops, classes),
        *_of_splits(crops, classes),
        *_of_types(volumes),
        *_of_contrast(volumes),
        *_of_polarity(volumes),
    ]
    problems += _of_leakage(crops, held_out)
    if not any(problem.kind == "validation" for problem in noted):
        problems += _of_usages(crops)
    order = list(KINDS)
    return sorted(problems, key=lambda problem: order.index(problem.kind))


def _of_volume(volume: VolumeFacts) -> Iterator[Problem]:
    if volume.wrong:
        yield Problem("unreadable", volume.name, volume.wrong)
    for kind, text in volume.notes.items():
        yield Problem(kind, volume.name, f"raw: {text}")
    yield from (Problem("missing level", volume.name, text) for text in _missing_levels(volume))


def _missing_levels(volume: VolumeFacts) -> Iterator[str]:
    """Yield a text about missing levels for each level that is read in their place, as `choose_level` does."""
    present = volume.present
    instead: dict[str, list[str]] = {}
    for number, level in enumerate(volume.levels):
        if level.shape is not None:
            continue
        finer = [other for other in volume.levels[:number] if other.shape is not None]
        text = "no level is"
        if finer:
            text = f"the finer level {finer[-1].name} ({list(finer[-1].scale)} nm) is read instead"
        elif present:
            text = f"the coarser level {present[0].name} ({list(present[0].scale)} nm) is read instead, upsampled"
        instead.setdefault(text, []).append(level.name)
    for text, names in instead.items():
        yield f"raw lists {first_few(names, _LISTED)}, not on disk; {text}"


# -- of a crop: pairs of kind and text


def _of_metadata(crop: CropFacts) -> Iterator[tuple[str, str]]:
    """Yield problems of metadata and position."""
    for facts in crop.classes.values():
        if facts.wrong:
            yield "unreadable", facts.wrong
    yield from crop.notes.items()
    missing = [level.name for level in crop.levels if level.shape is None]
    if missing:
        yield "missing level", f"labels list {first_few(missing, _LISTED)}"
    if crop.outside:
        yield "outside", f"{crop.outside:.1%} of it has no raw; targets are unknown there"
    # Labels finer than raw are resampled anyway, wherever their edges are.
    if crop.off is not None and crop.ratio is not None and any(crop.off) and max(crop.ratio) >= 1 - SCALE_TOLERANCE:
        yield "off lattice", f"by {by_axis(crop.off)} voxels of raw (z y x)"


def _of_content(crop: CropFacts, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield problems of stored voxels."""
    if crop.unknown is not None and crop.unknown > MOST_UNKNOWN:
        yield "unknown", f"{crop.unknown:.0%} of its voxels, as a mean over its classes"
    if crop.chunks is not None and crop.chunks[0]:
        absent, total = crop.chunks
        yield "raw absent", f"{absent} of the {total} files of raw under it do not exist, or have 0 bytes"
    lost = [
        f"{name} {facts.lost:.0%} at {facts.level}"
        for name, facts in crop.classes.items()
        if name in classes and facts.lost is not None and facts.lost > MOST_LOST
    ]
    if lost:
        advice = "label_downsample=any keeps thin structures, or use a finer scale"
        yield "lost", f"{first_few(lost, _LISTED)}; {advice}"
    for name in crop.classes:
        yield from _of_labels(crop, name, classes)


def _of_labels(crop: CropFacts, name: str, classes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield problems of the stored labels of one class."""
    facts = crop.classes[name]
    yield from (("averaged", f"{name}: {text}") for text in facts.averaged)
    if facts.fills:
        yield "filled", f"{name}: {facts.read_as}; no voxel is absent or unknown"
    elif len(crop.classes) > 1 and (share := facts.share) is not None and share > MOSTLY:
        yield "mostly", f"{name}: {share:.1%} of the known voxels, read as {facts.read_as}"
    if facts.contradiction:
        yield "counts", f"{name}: {facts.contradiction}"
    if facts.gaps and name in classes and facts.scale is not None and crop.box is not None:
        sections = gaps_text(facts.gaps, crop.box["z"][0], facts.scale[0])
        yield "gaps", f"{name}: no voxel in section {sections}, {_GAPS_ADVICE.format(name)}"


def _of_scale(
    crop: CropFacts, finest: Mapping[str, Vector], classes: Sequence[str], scale: Vector, too_coarse: str
) -> Iterator[tuple[str, str]]:
    """Yield raw and labels that are coarser than the requested voxel size."""
    if crop.raw in finest and np.divide(finest[crop.raw], scale).max() > 1 + SCALE_TOLERANCE:
        yield "raw coarse", f"{by_axis(finest[crop.raw])} nm at its finest, for {by_axis(scale)} nm"
    scales = [facts.scale for name, facts in crop.classes.items() if name in classes and facts.scale is not None]
    coarsest = np.max(scales, axis=0) if scales else np.zeros(3)
    if (coarsest > np.multiply(scale, 1 + SCALE_TOLERANCE)).any():
        effects = {"drop": "the crop is left out", "upsample": "they are repeated", "error": "which is refused"}
        text = f"{by_axis(coarsest)} nm at their finest, for {by_axis(scale)} nm: {effects[too_coarse]}"
        yield "labels coarse", text


def _of_size(crop: CropFacts, scale: Vector, shape: Sequence[int] | None, pad: bool) -> Iterator[tuple[str, str]]:
    """Yield crops that are smaller than the patch."""
    if shape is None or len(shape) != 3 or crop.extent is None:
        return
    voxels = np.floor(np.divide(crop.extent, scale) + 1e-6).astype(int)
    short = [axis for axis, n, needed in zip(AXES, voxels, shape, strict=True) if n < needed]
    if short:
        effect = "targets are unknown outside it" if pad else "it is refused with pad=false"
        yield "small", f"{by_axis(voxels)} voxels, less than the patch along {', '.join(short)}: {effect}"


# -- of all crops, or all volumes


def _of_leakage(crops: Sequence[CropFacts], held_out: str | None) -> Iterator[Problem]:
    placed: dict[str, list[PlacedCrop]] = {}
    for crop in crops:
        if crop.box is not None:
            lower, upper = zip(*crop.box.values(), strict=True)
            box = Box(to_vector(lower), to_vector(upper))
            labels = identity(TargetPath.parse(crop.target).crop)
            volume = volume_identity(parse_location(crop.raw))
            is_part = crop.metadata.get("box") is not None
            placed.setdefault(crop.usage, []).append(PlacedCrop(crop.name, volume, box, labels, is_part))
    trained = placed.get("train", [])
    others = [*placed.get("val", []), *placed.get("test", [])]
    if held_out is not None:
        others += held_out_crops(held_out, trained)
    for pair in overlaps(trained, others):
        yield Problem("leakage", pair.trained.name, str(pair))


def _of_usages(crops: Sequence[CropFacts]) -> Iterator[Problem]:
    trained = [crop for crop in crops if crop.usage == "train"]
    if trained and len(trained) == sum(crop.usage != "predict" for crop in crops):
        text = (
            "no crop validates; list some for validation, or set data.split=blocks, with a patch that fits into a part "
            "of each crop; see docs/data.md"
        )
        yield Problem("validation", first_few([crop.name for crop in trained]), text)


def _of_classes(crops: Sequence[CropFacts], classes: Sequence[str]) -> Iterator[Problem]:
    for name in classes:
        annotated = [crop for crop in crops if name in crop.classes and crop.classes[name].wrong is None]
        if not annotated and any(name in crop.classes for crop in crops):
            continue  # reported as unreadable
        present = [crop for crop in annotated if name in crop.held]
        if not annotated:
            yield Problem("empty", name, "no crop annotates it")
        elif not present:
            yield Problem("empty", name, f"annotated in {plural(len(annotated), 'crop')}, without a voxel of it")
        elif len(present) == 1:
            yield Problem("rare", name, f"only in {present[0].name}")


def _of_splits(crops: Sequence[CropFacts], classes: Sequence[str]) -> Iterator[Problem]:
    """Yield the classes of two or more crops that have foreground in training or in validation only."""
    used = [crop for crop in crops if crop.left_out is None and crop.wrong is None]
    if not {"train", "val"} <= {crop.usage for crop in used}:
        return
    for name in classes:
        holding = [crop for crop in used if name in crop.held]
        usages = {crop.usage for crop in holding}
        if len({crop.name for crop in holding}) > 1 and len(usages & {"train", "val"}) == 1:
            lacking, verb = ("validation", "measured") if "train" in usages else ("training", "learnt")
            yield Problem(
                "one split", name,
                f"no crop for {lacking} holds it, so that nothing is {verb} for it; it is in "
                f"{first_few([crop.name for crop in holding])}: change data.split, seed or data.val_fraction",
            )  # fmt: skip


def _of_types(volumes: Sequence[VolumeFacts]) -> Iterator[Problem]:
    types = {volume.name: volume.present[0].dtype for volume in volumes if volume.present}
    if len(set(types.values())) > 1:
        for name, dtype in types.items():
            yield Problem("type", name, f"{dtype}; batches are transferred as float32 where types differ")


def _of_contrast(volumes: Sequence[VolumeFacts]) -> Iterator[Problem]:
    values = {volume.name: volume.values for volume in volumes if volume.values is not None}
    widths = {name: v.high - v.low for name, v in values.items()}
    middle = float(np.median(list(widths.values()))) if widths else 0.0
    for name, v in values.items():
        ratio = widths[name] / middle if middle else 1.0
        if ratio > CONTRAST_RATIO or ratio < 1 / CONTRAST_RATIO:
            text = (
                f"the middle 99 % of its values span {v.low:g} to {v.high:g}, {ratio:.2g}x the usual width; "
                "normalize={percentile: [0.5, 99.5]} makes them alike"
            )
            yield Problem("contrast", name, text)


def _of_polarity(volumes: Sequence[VolumeFacts]) -> Iterator[Problem]:
    """Yield the volumes of the smaller group, if some have a dark and others a bright tail of values."""
    skews = {volume.name: volume.values.skew for volume in volumes if volume.values is not None}
    dark = [name for name, skew in skews.items() if skew < -CLEAR_SKEW]
    bright = [name for name, skew in skews.items() if skew > CLEAR_SKEW]
    if not dark or not bright:
        return
    fewer, tail = (bright, "bright") if len(bright) <= len(dark) else (dark, "dark")
    others = len(dark) + len(bright) - len(fewer)
    for name in fewer:
        text = (
            f"the longer tail of its values is the {tail} one, unlike that of {others} other volumes: perhaps dark and "
            "bright are exchanged; look at it, and if so give its entry invert: true"
        )
        yield Problem("polarity", name, text)
