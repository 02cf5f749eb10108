"""Settings that fit the data, each with its reason."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellmap_lightning.geometry.lattice import SCALE_TOLERANCE, Vector, to_vector
from cellmap_lightning.inspection.facts import CropFacts, VolumeFacts

#: Part of the crops that must have labels and raw at a scale.
MOST_CROPS = 0.8
#: Edge lengths of patches are multiples of it: the U-Nets of ``configs/model`` halve them three times.
MULTIPLE = 8
#: Voxels along an axis of a patch at most, and at least where crops allow it.
LARGEST, SMALLEST = 128, 16
#: Voxel sizes may differ by so much along the axes before the patch is made flat like the voxels.
ANISOTROPIC = 3.0
#: Bytes that training a 3D U-Net takes per voxel of a batch: nnU-Net plans 2 patches of 128^3 for 8 GB (Isensee et al.
#: 2021, doi 10.1038/s41592-020-01008-z). A rule of thumb; the networks of ``configs/model`` take less.
BYTES_PER_VOXEL = 2048
#: Samples of a batch at most, and at least where memory allows it.
MOST_SAMPLES, LEAST_SAMPLES = 16, 2


@dataclass(frozen=True)
class Proposal:
    """Settings for ``cellmap-train``.

    Attributes:
        scale: voxel size, nm.
        shape: voxels of a patch.
        batch_size: samples of a batch.
        normalize: how stored values become an input.
        classes: the classes.
        only_datasets: the datasets that can deliver the scale, where others would be refused.
        reasons: why, of each of these.
        yaml: the same, ready to paste.
    """

    scale: Vector
    shape: tuple[int, int, int]
    batch_size: int
    normalize: Any
    classes: tuple[str, ...]
    only_datasets: tuple[str, ...] | None
    reasons: Mapping[str, str]
    yaml: str


def propose(
    volumes: Sequence[VolumeFacts],
    crops: Sequence[CropFacts],
    source: Mapping[str, Any],
    device_bytes: int,
    given: Mapping[str, Any],
    max_upsampling: float,
) -> Proposal | None:
    """Settings that fit; None without a crop and without a volume that can be read.

    Args:
        volumes: raw volumes.
        crops: annotated crops, perhaps none.
        source: keys of ``data`` that name the crops, for the YAML.
        device_bytes: memory of the device that trains.
        given: ``scale``, ``shape`` and ``classes`` that the user has chosen, or None for each.
        max_upsampling: how many times finer than raw's finest level an input may be.
    """
    usable = [crop for crop in crops if crop.wrong is None and crop.scale is not None and crop.off is not None]
    readable = {volume.path: volume for volume in volumes if volume.present}
    if not readable:
        return None
    scale, why_scale = _scale(list(readable.values()), usable)
    scale, why_scale = (to_vector(given["scale"]), "as given") if given.get("scale") else (scale, why_scale)
    shape, why_shape = _shape(scale, usable, list(readable.values()), device_bytes)
    if given.get("shape"):
        shape, why_shape = tuple(given["shape"]), "as given"
    samples = int(device_bytes / BYTES_PER_VOXEL / np.prod(shape))
    batch_size = max(1, min(MOST_SAMPLES, samples))
    why_batch = (
        f"about {BYTES_PER_VOXEL // 1024} kB of a device with {device_bytes / 2**30:.0f} GiB per voxel, a rule of "
        f"thumb for 3D U-Nets; at most {MOST_SAMPLES}"
    )
    normalize, why_normalize = _normalize(list(readable.values()))
    classes, why_classes = _classes(usable)
    if given.get("classes"):
        classes, why_classes = tuple(given["classes"]), "as given"
    reasons = {"scale": why_scale, "shape": why_shape, "batch_size": why_batch, "normalize": why_normalize}
    if classes:
        reasons["classes"] = why_classes
    only, why_only = _able(list(readable.values()), usable, scale, max_upsampling)
    if source.get("only_datasets") is not None or source.get("only_crops") is not None:
        only = None  # the user's own choice
    if only is not None:
        reasons["only_datasets"] = why_only
        source = {**source, "only_datasets": list(only)}
    data = {**source, **({"classes": list(classes)} if classes else {})}
    text = _yaml(scale, shape, batch_size, normalize, data, reasons)
    return Proposal(scale, shape, batch_size, normalize, classes, only, reasons, text)


def _scale(volumes: Sequence[VolumeFacts], crops: Sequence[CropFacts]) -> tuple[Vector, str]:
    by_path = {volume.path: volume for volume in volumes}
    candidates = sorted({_rounded(level.scale) for volume in volumes for level in volume.present}, key=np.prod)
    if not crops:
        return candidates[0], "raw's finest level; there are no labels"
    finest = [(by_path[c.raw].present[0].scale, c.scale) for c in crops if c.raw in by_path and c.scale is not None]

    def fitting(scale: Vector) -> int:
        asked = np.multiply(scale, 1 + SCALE_TOLERANCE)
        return sum(bool((np.maximum(raw, label) <= asked).all()) for raw, label in finest)

    counts = {scale: fitting(scale) for scale in candidates}
    most = max(counts.values())
    wanted = min(most, MOST_CROPS * len(crops))
    chosen = next(scale for scale in candidates if counts[scale] >= wanted)
    finer = [s for s in candidates if np.prod(s) < np.prod(chosen)]
    text = f"the finest level at which most crops have raw and labels: {counts[chosen]} of {len(crops)}"
    if finer:
        text += f"; {_nm(finer[-1])} fits {counts[finer[-1]]}"
    coarser = [s for s in candidates if counts[s] > counts[chosen]]
    return chosen, text + (f"; {_nm(coarser[0])} would fit {counts[coarser[0]]}" if coarser else "")


def _able(
    volumes: Sequence[VolumeFacts], crops: Sequence[CropFacts], scale: Vector, max_upsampling: float
) -> tuple[tuple[str, ...] | None, str]:
    """The datasets whose raw is fine enough, where that of others is not: these would be refused, not left out."""
    able = {v.path for v in volumes if max(np.divide(v.present[0].scale, scale)) <= max_upsampling}
    if not crops or all(crop.raw in able for crop in crops) or not any(crop.raw in able for crop in crops):
        return None, ""
    names = sorted({volume.name for volume in volumes if volume.path in able})
    others = sorted({volume.name for volume in volumes if volume.path not in able})
    return tuple(names), f"raw of {_some(others)} is more than {max_upsampling:g}x coarser, which is refused"


def _shape(
    scale: Vector, crops: Sequence[CropFacts], volumes: Sequence[VolumeFacts], device_bytes: int
) -> tuple[tuple[int, int, int], str]:
    boxes = [crop.extent for crop in crops if crop.extent is not None]
    if boxes:
        extents, what = np.median(boxes, axis=0), "half of the crops"
    else:
        extents = np.median([[b - a for a, b in v.box.values()] for v in volumes if v.box], axis=0)
        what = "the volume"
    fits = np.floor(extents / scale + 1e-6)
    shape = np.clip(fits // MULTIPLE * MULTIPLE, MULTIPLE, LARGEST)
    voxels = " x ".join(f"{n:.0f}" for n in fits)
    text = f"multiples of {MULTIPLE}, at most {LARGEST}, that {what} can hold ({voxels} voxels)"
    ratio = np.divide(scale, min(scale))
    if ratio.max() >= ANISOTROPIC:
        flat = np.clip(np.round(LARGEST / ratio / MULTIPLE) * MULTIPLE, SMALLEST, LARGEST)
        shape = np.minimum(shape, flat)
        text += ", fewer along the axis whose voxels are long"
    most = device_bytes / BYTES_PER_VOXEL / LEAST_SAMPLES
    while np.prod(shape) > most and shape.max() > SMALLEST:
        shape[int(np.argmax(shape * scale))] -= MULTIPLE
    z, y, x = (int(n) for n in shape)
    return (z, y, x), text


def _normalize(volumes: Sequence[VolumeFacts]) -> tuple[Any, str]:
    types = {volume.present[0].dtype for volume in volumes}
    percentile = {"percentile": [0.5, 99.5]}
    if len(types) > 1:
        return (
            percentile,
            f"stored types differ ({', '.join(sorted(types))}), so that the range of the type means nothing",
        )
    kind = next(iter(types))
    if kind not in ("uint8", "int8", "bool"):
        return percentile, f"{kind}: values seldom fill its range"
    known = [volume.values for volume in volumes if volume.values is not None]
    narrow = [v for v in known if v.high - v.low < 0.4 * 255]
    if narrow:
        return percentile, (
            f"in {len(narrow)} of the {len(known)} volumes whose values are known the middle 99 % span less than 40 % "
            f"of {kind}"
        )
    seen = f"the values of {len(known)} of {len(volumes)} volumes fill it" if known else "deep=true looks at the values"
    return "dtype", f"{kind} to [0, 1] by the range of its type; {seen}"


def _classes(crops: Sequence[CropFacts]) -> tuple[tuple[str, ...], str]:
    names = list(dict.fromkeys(name for crop in crops for name in crop.classes))
    held = {name: sum(name in crop.held for crop in crops) for name in names}
    least = 2 if len(crops) > 1 else 1
    chosen = tuple(name for name in names if held[name] >= least)
    # With 48 classes of which each is written twenty times, those that few crops hold are still classes.
    left = [f"{name} ({held[name]})" for name in names if name not in chosen]
    text = f"with foreground in at least {least} crops, so that both train and val can have it"
    if least == 1:
        text = "with foreground in the only crop"
    unsure = [n for n in chosen if all(c.classes[n].voxels is None for c in crops if n in c.classes)]
    if unsure:
        text += f"; nothing says how many voxels {_some(unsure)} have, deep=true counts them"
    return chosen, text + (f"; left out: {_some(left)}" if left else "")


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:10]) + (f" and {len(words) - 10} more" if len(words) > 10 else "")


def _yaml(
    scale: Vector,
    shape: Sequence[int],
    batch_size: int,
    normalize: Any,
    data: Mapping[str, Any],
    reasons: Mapping[str, str],
) -> str:
    def flow(value: Any) -> str:  # what is JSON is YAML too
        return json.dumps(value, ensure_ascii=False)

    plain = [int(s) if s == int(s) else s for s in scale]
    lines = ["# @package _global_", "patch:"]
    lines += [*_comment(reasons["shape"]), f"  shape: {flow(list(shape))}"]
    lines += [*_comment(reasons["scale"]), f"  scale: {flow(plain)}", "data:"]
    for name, value in data.items():
        if name in reasons:
            lines += _comment(reasons[name])
        if isinstance(value, Mapping):  # the crops of each split
            lines.append(f"  {name}:")
            for split, entries in value.items():
                lines += [f"    {split}:", *(f"      - {flow(entry)}" for entry in entries)]
        else:
            lines.append(f"  {name}: {flow(value)}")
    lines += [*_comment(reasons["batch_size"]), f"  batch_size: {batch_size}"]
    lines += [*_comment(reasons["normalize"]), f"  normalize: {flow(normalize)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return [f"  # {line}" for line in textwrap.wrap(text, 110)]


def _rounded(scale: Vector) -> Vector:
    """Without the float noise of pyramids, so that levels of several volumes are the same candidate."""
    z, y, x = (float(f"{s:.6g}") for s in scale)
    return z, y, x


def _nm(scale: Vector) -> str:
    return " x ".join(f"{s:g}" for s in scale) + " nm"
