"""What is wrong with volumes and crops, or will surprise a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.geometry.lattice import AXES, SCALE_TOLERANCE, Box, Vector, to_vector
from cellmap_lightning.inspection.facts import CropFacts, VolumeFacts
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.splits.leakage import PlacedCrop, held_out_crops, identity, overlaps, volume_identity

#: Part of the foreground that a coarser level may lose before it is worth a word.
MOST_LOST = 0.3
#: Unknown part of a crop from which it is worth a word.
MOST_UNKNOWN = 0.5
#: Skew of the values from which dark and bright tails are told apart.
CLEAR_SKEW = 0.15
#: How many times as wide as another the middle 99 % of a volume's values may be.
CONTRAST_RATIO = 2.0


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: what it is about; problems of one kind stand together.
        where: the volume, crop or class.
        text: what was found, and what to do.
    """

    kind: str
    where: str
    text: str


#: Every kind, in the order in which people read them, with its heading.
KINDS = {
    "unreadable": "cannot be read",
    "config": "the configuration is refused, for what the error at the end says",
    "unit": "images without a unit of length",
    "scale": "implausible voxel sizes",
    "levels": "pyramids whose levels are not placed by their metadata",
    "boxes": "pyramids whose levels cover different boxes",
    "multiscales": "groups that list several images",
    "outside": "crops outside their raw volume",
    "leakage": "crops that are trained on, and validate or test as well",
    "missing level": "levels that are listed and not on disk",
    "raw absent": "raw under a crop that was never written, and reads as the fill value",
    "raw coarse": "raw coarser than the scale",
    "labels coarse": "labels coarser than the scale",
    "small": "crops smaller than the patch",
    "off lattice": "crops off raw's lattice, so that raw is interpolated at the scale of the labels",
    "lost": f"classes that lose more than {MOST_LOST:.0%} of their foreground at the level that is read",
    "unknown": f"crops of which more than {MOST_UNKNOWN:.0%} is unknown",
    "empty": "classes without foreground",
    "rare": "classes that a single crop holds, so that they cannot be trained and validated",
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
) -> list[Problem]:
    """Everything that the facts show to be wrong.

    Args:
        volumes: raw volumes.
        crops: crops.
        classes: the classes that are looked for.
        scale: voxel size that is asked for, nm.
        shape: voxels of a patch.
        pad: whether crops may be smaller than it.
        too_coarse: what becomes of crops whose labels are too coarse.
        held_out: a manifest of crops that nothing is to be trained on.
    """
    found = [Problem("unreadable", v.name, v.wrong) for v in volumes if v.wrong]
    for volume in volumes:
        found += [Problem(kind, volume.name, f"raw: {text}") for kind, text in volume.notes.items()]
        gone = [level.name for level in volume.levels if level.shape is None]
        if gone:
            found.append(
                Problem("missing level", volume.name, f"raw lists {_listed(gone)}; a finer one is read instead")
            )
    for crop in crops:
        found += _of_crop(crop, volumes, classes, scale, shape, pad, too_coarse)
    found += _of_classes(crops, classes)
    found += _of_values(volumes)
    found += _of_leakage(crops, held_out)
    order = list(KINDS)
    return sorted(found, key=lambda problem: order.index(problem.kind))


def _of_crop(
    crop: CropFacts,
    volumes: Sequence[VolumeFacts],
    classes: Sequence[str],
    scale: Vector | None,
    shape: Sequence[int] | None,
    pad: bool,
    too_coarse: str,
) -> list[Problem]:
    found = []

    def say(kind: str, text: str) -> None:
        found.append(Problem(kind, crop.name, text))

    if crop.wrong:
        say("unreadable", crop.wrong)
        return found
    for facts in crop.classes.values():
        if facts.wrong:
            say("unreadable", facts.wrong)
    for kind, text in crop.notes.items():
        say(kind, text)
    gone = [level.name for level in crop.levels if level.shape is None]
    if gone:
        say("missing level", f"labels list {_listed(gone)}")
    if crop.outside:
        say("outside", f"{crop.outside:.1%} of it has no raw; targets are unknown there")
    if crop.off is not None and crop.ratio is not None and any(crop.off) and max(crop.ratio) >= 1 - SCALE_TOLERANCE:
        say("off lattice", f"by {_numbers(crop.off)} voxels of raw (z y x)")
    unknown = crop.unknown
    if unknown is not None and unknown > MOST_UNKNOWN:
        say("unknown", f"{unknown:.0%} of its voxels, as a mean over its classes")
    if crop.chunks is not None and crop.chunks[0]:
        say(
            "raw absent",
            f"{crop.chunks[0]} of the {crop.chunks[1]} files of raw under it do not exist, or have 0 bytes",
        )
    lost = {n: c.lost for n, c in crop.classes.items() if n in classes and c.lost is not None and c.lost > MOST_LOST}
    if lost:
        listed = _listed([f"{n} {part:.0%} at {crop.classes[n].level}" for n, part in lost.items()])
        say("lost", f"{listed}; label_downsample=any keeps thin structures, or use a finer scale")
    if scale is None:
        return found
    volume = next((v for v in volumes if v.path == crop.raw), None)
    if volume is not None and volume.present:
        ratio = np.divide(volume.present[0].scale, scale)
        if ratio.max() > 1 + SCALE_TOLERANCE:
            say("raw coarse", f"{_numbers(volume.present[0].scale)} nm at its finest, for {_numbers(scale)} nm")
    own = [facts.scale for name, facts in crop.classes.items() if name in classes and facts.scale is not None]
    if own and (np.max(own, axis=0) > np.multiply(scale, 1 + SCALE_TOLERANCE)).any():
        what = {"drop": "the crop is left out", "upsample": "they are repeated", "error": "which is refused"}[
            too_coarse
        ]
        say("labels coarse", f"{_numbers(np.max(own, axis=0))} nm at their finest, for {_numbers(scale)} nm: {what}")
    if shape is not None and len(shape) == 3 and crop.extent is not None:
        voxels = np.floor(np.divide(crop.extent, scale) + 1e-6).astype(int)
        short = [a for a, n, wanted in zip(AXES, voxels, shape, strict=True) if n < wanted]
        if short:
            what = "targets are unknown outside it" if pad else "it is refused with pad=false"
            say("small", f"{_numbers(voxels)} voxels, less than the patch along {', '.join(short)}: {what}")
    return found


def _of_leakage(crops: Sequence[CropFacts], held_out: str | None) -> list[Problem]:
    placed: dict[str, list[PlacedCrop]] = {}
    for crop in crops:
        if crop.box is not None:
            lower, upper = zip(*crop.box.values(), strict=True)
            box = Box(to_vector(lower), to_vector(upper))
            labels = identity(TargetPath.parse(crop.target).crop)
            placed.setdefault(crop.usage, []).append(
                PlacedCrop(crop.name, volume_identity(parse_location(crop.raw)), box, labels)
            )
    trained = placed.get("train", [])
    others = [*placed.get("val", []), *placed.get("test", [])]
    if held_out is not None:
        others += held_out_crops(held_out, [(crop.name.partition("/")[0], crop.volume) for crop in trained])
    return [Problem("leakage", pair.trained.name, str(pair)) for pair in overlaps(trained, others)]


def _of_classes(crops: Sequence[CropFacts], classes: Sequence[str]) -> list[Problem]:
    found = []
    for name in classes:
        annotated = [crop for crop in crops if name in crop.classes and crop.classes[name].wrong is None]
        if not annotated and any(name in crop.classes for crop in crops):
            continue  # that it cannot be read is a problem of its own
        held = [crop for crop in annotated if name in crop.held]
        if not annotated:
            found.append(Problem("empty", name, "no crop annotates it"))
        elif not held:
            found.append(
                Problem("empty", name, f"annotated in {len(annotated)} crops, and none of them has a voxel of it")
            )
        elif len(held) == 1:
            found.append(Problem("rare", name, f"only in {held[0].name}"))
    return found


def _of_values(volumes: Sequence[VolumeFacts]) -> list[Problem]:
    found = []
    types = {v.name: v.present[0].dtype for v in volumes if v.present}
    if len(set(types.values())) > 1:
        for name, dtype in types.items():
            found.append(Problem("type", name, f"{dtype}; batches travel as float32 where types differ"))
    known: list[Any] = [(v, v.values) for v in volumes if v.values is not None]
    widths = {v.name: values.high - values.low for v, values in known}
    middle = float(np.median(list(widths.values()))) if widths else 0.0
    for volume, values in known:
        ratio = widths[volume.name] / middle if middle else 1.0
        if ratio > CONTRAST_RATIO or ratio < 1 / CONTRAST_RATIO:
            text = (
                f"the middle 99 % of its values span {values.low:g} to {values.high:g}, {ratio:.2g}x the usual "
                "width; normalize={percentile: [0.5, 99.5]} makes them alike"
            )
            found.append(Problem("contrast", volume.name, text))
    dark = [v.name for v, values in known if values.skew < -CLEAR_SKEW]
    bright = [v.name for v, values in known if values.skew > CLEAR_SKEW]
    if dark and bright:
        fewer, tail = (bright, "bright") if len(bright) <= len(dark) else (dark, "dark")
        others = len(dark) + len(bright) - len(fewer)
        text = (
            f"the longer tail of its values is the {tail} one, unlike that of {others} more: perhaps dark and bright "
            "are exchanged; look at it, and if so give its entry invert: true"
        )
        found += [Problem("polarity", name, text) for name in fewer]
    return found


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")


def _numbers(values: Any) -> str:
    return " x ".join(f"{float(v):.4g}" for v in values)
