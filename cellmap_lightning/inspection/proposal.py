"""A proposal of settings that fit the data, each with its reason."""

import json
import math
import re
import textwrap
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.geometry.lattice import AXES, SCALE_TOLERANCE, FloatArray, Vector, to_vector
from cellmap_lightning.inspection.facts import CropFacts, VolumeFacts
from cellmap_lightning.inspection.formats import voxel_count
from cellmap_lightning.validation import first_few

#: Part of the crops that must have labels and raw at a scale.
MOST_CROPS = 0.8
#: Divisor of the edge lengths of patches: the U-Nets of ``configs/model`` halve them three times.
MULTIPLE = 8
#: The smallest patches of a U-Net that halves them three times: it cannot normalize a single voxel.
_ONE_AXIS_LONGER = ((8, 8, 16), (8, 16, 8), (16, 8, 8))
_ONE_LONGER = "one axis is longer, since a U-Net cannot normalize the single voxel that it shrinks a patch of 8^3 to"
#: Voxels along an axis of a patch, at most, and at least if crops are large enough.
LARGEST, SMALLEST = 128, 16
#: Ratio of the voxel sizes along two axes from which the patch has fewer voxels along the coarse one.
ANISOTROPIC = 3.0
#: Bytes that training a 3D U-Net takes per voxel of a batch: nnU-Net plans 2 patches of 128^3 for 8 GB (Isensee et al.
#: 2021, doi 10.1038/s41592-020-01008-z). A rule of thumb; the networks of ``configs/model`` take less.
BYTES_PER_VOXEL = 2048
#: Samples of a batch, at most, and at least if memory allows it.
MOST_SAMPLES, LEAST_SAMPLES = 16, 2
#: Characters of a line of a comment in the YAML, which fits a terminal of 80.
_COMMENT = 76
#: Names that a reason lists.
_LISTED = 10


@dataclass(frozen=True)
class Proposal:
    """Settings for ``cellmap-train``.

    Attributes:
        scale: voxel size, nm.
        shape: voxels of a patch.
        batch_size: samples of a batch.
        normalize: mapping from stored values to an input.
        classes: the classes.
        only_datasets: the datasets with raw fine enough for the scale, if others would be refused.
        reasons: the reason of each setting.
        yaml: the settings with their reasons, ready to paste.
        overrides: the settings as overrides of a command line, ``{key: value}``; None where the crops are given by
            ``datasets``, which is too long for one.

    Example:
        >>> print(inspect({"csv_path": "crops.csv"}, {}, None).proposal.yaml)
    """

    scale: Vector
    shape: tuple[int, int, int]
    batch_size: int
    normalize: Any
    classes: tuple[str, ...]
    only_datasets: tuple[str, ...] | None
    reasons: Mapping[str, str]
    yaml: str
    overrides: Mapping[str, str] | None = None

    @property
    def cuts(self) -> bool:
        """True if it proposes to cut crops that are all for training."""
        return "split" in self.reasons


def propose(
    volumes: Sequence[VolumeFacts],
    crops: Sequence[CropFacts],
    source: Mapping[str, Any],
    device_bytes: int,
    chosen: Mapping[str, Any],
    max_upsampling: float,
    pad: bool = True,
    holds: Callable[[tuple[int, int, int], Vector], bool] | None = None,
    why_split: str | None = None,
    deep: bool = False,
) -> Proposal | None:
    """Return settings that fit; None without a volume that can be read.

    Args:
        volumes: raw volumes.
        crops: annotated crops, perhaps none.
        source: keys of ``data`` that name the crops, for the YAML.
        device_bytes: memory of the device that trains.
        chosen: the user's ``scale``, ``shape`` and ``classes``, or None for each.
        max_upsampling: largest ratio of raw's finest voxel size to that of an input.
        pad: whether crops may be smaller than a patch.
        holds: whether the crops can be cut for a patch of a shape and voxel size; None if they are not cut.
        why_split: reason of the split in ``source``, if it is proposed.
        deep: voxels of labels are counted, after the proposal.
    """
    usable = [crop for crop in crops if crop.wrong is None and crop.scale is not None and crop.off is not None]
    readable = [volume for volume in volumes if volume.present]
    if not readable:
        return None
    scale, why_scale = _scale(readable, usable)
    if chosen.get("scale"):
        scale, why_scale = to_vector(chosen["scale"]), "as given"
    largest = np.multiply(scale, 1 + SCALE_TOLERANCE)
    fitting = [crop for crop in usable if (np.asarray(crop.scale) <= largest).all()]
    shape, why_shape = _patch_shape(scale, fitting, readable, device_bytes, chosen, pad, holds)
    classes, why_classes = _classes(usable, cut=holds is not None, counted=deep)
    if chosen.get("classes"):
        classes, why_classes = tuple(chosen["classes"]), "as given"
    batch_size, why_batch_size = _batch_size(shape, device_bytes)
    normalize, why_normalize = _normalize(readable)
    reasons = {"scale": why_scale, "shape": why_shape, "batch_size": why_batch_size, "normalize": why_normalize}
    if classes:
        reasons["classes"] = why_classes
    if why_split is not None:
        reasons["split"] = why_split
    only, why_only = _fine_enough_datasets(readable, usable, scale, max_upsampling, source)
    if only is not None:
        reasons["only_datasets"] = why_only
        source = {**source, "only_datasets": list(only)}
    data = source if not classes else {**source, "classes": list(classes)}
    text = _yaml(scale, shape, batch_size, normalize, data, reasons)
    settings = {**data, "batch_size": batch_size, "normalize": normalize}
    overrides = _overrides(settings, shape, scale)
    return Proposal(scale, shape, batch_size, normalize, classes, only, reasons, text, overrides)


def _overrides(settings: Mapping[str, Any], shape: Sequence[int], scale: Vector) -> dict[str, str] | None:
    """Return settings as overrides of a command line; None where the crops are given by ``datasets``.

    Args:
        settings: keys of ``data``.
        shape: voxels of a patch.
        scale: voxel size, nm.
    """
    if settings.get("datasets") is not None:
        return None
    overrides = {f"data.{name}": override_text(value) for name, value in settings.items() if value is not None}
    return overrides | {"patch.shape": override_text(list(shape)), "patch.scale": override_text(_whole(scale))}


def _scale(volumes: Sequence[VolumeFacts], crops: Sequence[CropFacts]) -> tuple[Vector, str]:
    """Return the finest voxel size of a level of raw at which most crops have both raw and labels."""
    by_path = {volume.path: volume for volume in volumes}
    candidates = sorted({_rounded(level.scale) for volume in volumes for level in volume.present}, key=np.prod)
    if not crops:
        return candidates[0], "raw's finest level; there are no labels"
    finest = [(by_path[c.raw].present[0].scale, c.scale) for c in crops if c.raw in by_path and c.scale is not None]

    def fitting(scale: Vector) -> int:
        largest = np.multiply(scale, 1 + SCALE_TOLERANCE)
        return sum(bool((np.maximum(raw, label) <= largest).all()) for raw, label in finest)

    counts = {scale: fitting(scale) for scale in candidates}
    needed = min(max(counts.values()), MOST_CROPS * len(crops))
    chosen = next(scale for scale in candidates if counts[scale] >= needed)
    return chosen, _scale_reason(chosen, counts, crops)


def _scale_reason(chosen: Vector, counts: Mapping[Vector, int], crops: Sequence[CropFacts]) -> str:
    """Return why a voxel size is proposed.

    Args:
        chosen: the voxel size, nm.
        counts: the candidates from fine to coarse, and the number of crops that fit each.
        crops: annotated crops.
    """
    finer = [s for s in counts if np.prod(s) < np.prod(chosen)]
    text = f"the finest level at which most crops have raw and labels: {counts[chosen]} of {len(crops)}"
    if finer:
        text += f"; {_scale_text(finer[-1])} fits {counts[finer[-1]]}"
    coarser = [s for s in counts if counts[s] > counts[chosen]]
    text += f"; {_scale_text(coarser[0])} would fit {counts[coarser[0]]}" if coarser else ""
    coarse = [c.name for c in crops if c.scale is not None and max(np.divide(c.scale, chosen)) > 1 + SCALE_TOLERANCE]
    return text + (f"; labels are coarser in {first_few(coarse, _LISTED)}" if coarse else "")


def _fine_enough_datasets(
    volumes: Sequence[VolumeFacts],
    crops: Sequence[CropFacts],
    scale: Vector,
    max_upsampling: float,
    source: Mapping[str, Any],
) -> tuple[tuple[str, ...] | None, str]:
    """Return the datasets whose raw is fine enough; None if all of them are, or none, or if the source chooses some.

    The others have to be excluded: raw that is too coarse is an error, not left out.
    """
    if source.get("only_datasets") is not None or source.get("only_crops") is not None:
        return None, ""
    paths = {v.path for v in volumes if max(np.divide(v.present[0].scale, scale)) <= max_upsampling}
    if {crop.raw in paths for crop in crops} != {True, False}:
        return None, ""
    names = sorted({volume.name for volume in volumes if volume.path in paths})
    others = sorted({volume.name for volume in volumes if volume.path not in paths})
    reason = f"raw of {first_few(others, _LISTED)} is more than {max_upsampling:g}x coarser, which is refused"
    return tuple(names), reason


def _patch_shape(
    scale: Vector,
    crops: Sequence[CropFacts],
    volumes: Sequence[VolumeFacts],
    device_bytes: int,
    chosen: Mapping[str, Any],
    pad: bool,
    holds: Callable[[tuple[int, int, int], Vector], bool] | None,
) -> tuple[tuple[int, int, int], str]:
    """Return the voxels of a patch, the user's or those that the crops contain, and the reason.

    Args:
        scale: voxel size, nm.
        crops: the crops whose labels fit it.
        volumes: readable raw volumes.
        device_bytes: see `propose`.
        chosen: see `propose`.
        pad: see `propose`.
        holds: see `propose`.
    """
    shape, reason = _shape(scale, crops, volumes, device_bytes, pad)
    if chosen.get("shape"):
        shape, reason = tuple(chosen["shape"]), "as given"
    elif holds is not None:
        shape, reason = _cut_shape(shape, scale, reason, holds, pad)
    if not (chosen.get("shape") and chosen.get("scale")) and holds is None:
        reason += _smaller(crops, scale, shape, pad)
    return shape, reason


def _shape(
    scale: Vector, crops: Sequence[CropFacts], volumes: Sequence[VolumeFacts], device_bytes: int, pad: bool
) -> tuple[tuple[int, int, int], str]:
    """Return the voxels of a patch that the crops contain, fewer if two samples would not fit in memory.

    Along each axis every crop contains it, unless small crops would shorten it to less than half of what half of the
    crops contain; without ``pad`` always.
    """
    boxes = [crop.extent for crop in crops if crop.extent is not None]
    all_of, half = ("every crop", "half of the crops") if boxes else ("every volume", "half of the volumes")
    boxes = boxes or [to_vector([b - a for a, b in v.box.values()]) for v in volumes if v.box]
    sizes = np.divide(boxes, scale)
    least, middle = np.floor(np.min(sizes, axis=0) + 1e-6), np.floor(np.median(sizes, axis=0) + 1e-6)
    by_all = (2 * _multiples(least) >= _multiples(middle)) & (least >= MULTIPLE) | (not pad)
    shape = _multiples(np.where(by_all, least, middle))
    voxels = " x ".join(f"{n:.0f}" for n in np.where(by_all, least, middle))
    exceptions = [axis for axis, is_all in zip(AXES, by_all, strict=True) if not is_all]
    if len(exceptions) == len(AXES):
        all_of, exceptions = half, []
    text = f"multiples of {MULTIPLE}, at most {LARGEST}, that {all_of} can hold ({voxels} voxels)"
    if exceptions:
        text += f", along {' and '.join(exceptions)} only {half}"
    ratio = np.divide(scale, min(scale))
    if ratio.max() >= ANISOTROPIC:
        flat = np.clip(np.round(LARGEST / ratio / MULTIPLE) * MULTIPLE, SMALLEST, LARGEST)
        shape = np.minimum(shape, flat)
        text += ", fewer along the axis whose voxels are long"
    most = device_bytes / BYTES_PER_VOXEL / LEAST_SAMPLES
    # Shorten the longest edge in nm until the smallest batch fits.
    while np.prod(shape) > most and shape.max() > SMALLEST:
        shape[int(np.argmax(shape * scale))] -= MULTIPLE
    if pad and (shape == MULTIPLE).all():
        shape[-1], text = SMALLEST, f"{text}; {_ONE_LONGER}"
    z, y, x = (int(n) for n in shape)
    return (z, y, x), text


def _multiples(voxels: FloatArray) -> FloatArray:
    """Return the edge lengths of the largest patch in a box of so many voxels."""
    multiples: FloatArray = np.clip(voxels // MULTIPLE * MULTIPLE, MULTIPLE, LARGEST)
    return multiples


def _cut_shape(
    shape: tuple[int, int, int],
    scale: Vector,
    reason: str,
    holds: Callable[[tuple[int, int, int], Vector], bool],
    pad: bool,
) -> tuple[tuple[int, int, int], str]:
    """Return the largest patch for which the crops can be cut, and the reason.

    Args:
        shape: voxels of the patch that the uncut crops hold; its longest edge in nm is shortened as often as needed.
        scale: voxel size, nm.
        reason: of this shape.
        holds: whether the crops can be cut for a patch.
        pad: whether crops may be smaller than a patch.
    """
    shapes, edges = [shape], np.array(shape)
    while np.sum(edges - MULTIPLE) > MULTIPLE and edges.max() > MULTIPLE:
        edges[int(np.argmax(np.where(edges > MULTIPLE, edges * scale, 0)))] -= MULTIPLE
        shapes.append(_integers(edges))
    # A smaller patch needs less of a crop, and reaches less far beyond its box.
    number = bisect_left(range(len(shapes)), True, key=lambda n: holds(shapes[n], scale))
    if number == 0:
        return shape, reason
    if number < len(shapes):
        reason = f"multiples of {MULTIPLE}, at most {LARGEST}, that the parts hold which split=blocks cuts"
        return shapes[number], reason
    longer = [(z, y, x) for z, y, x in _ONE_AXIS_LONGER if pad or np.all(np.less_equal((z, y, x), shape))]
    for smallest in longer:
        if holds(smallest, scale):
            return smallest, f"the smallest, with which split=blocks cuts all crops; {_ONE_LONGER}"
    last = (MULTIPLE,) * 3
    if holds(last, scale):
        fits = "model.strides=[2,2] model.channels=[16,32,64] fit it"
        return last, f"the smallest, with which split=blocks cuts all crops; {fits}"
    reason = "the smallest; split=blocks cannot cut all crops for it, split.blocks.crops names those that it can"
    return last, reason


def _smaller(crops: Sequence[CropFacts], scale: Vector, shape: Sequence[int], pad: bool) -> str:
    """Return the end of a reason: the crops that are smaller than a patch."""
    short = []
    for crop in crops:
        if crop.extent is not None and len(shape) == len(scale):
            voxels = np.floor(np.divide(crop.extent, scale) + 1e-6)
            if (voxels < shape).any():
                short.append(f"{crop.name} ({voxel_count(voxels.tolist())})")
    effect = "targets are unknown outside of smaller crops" if pad else "pad=false refuses smaller crops"
    return f"; {effect}: {first_few(short, _LISTED)}" if short else ""


def _integers(edges: npt.NDArray[np.int_]) -> tuple[int, int, int]:
    z, y, x = (int(n) for n in edges)
    return z, y, x


def _batch_size(shape: tuple[int, ...], device_bytes: int) -> tuple[int, str]:
    samples = int(device_bytes / BYTES_PER_VOXEL / np.prod(shape))
    reason = (
        f"about {BYTES_PER_VOXEL // 1024} kB of a device with {device_bytes / 2**30:.0f} GiB per voxel, a rule of "
        f"thumb for 3D U-Nets; at most {MOST_SAMPLES}"
    )
    return max(1, min(MOST_SAMPLES, samples)), reason


def _normalize(volumes: Sequence[VolumeFacts]) -> tuple[Any, str]:
    """Return ``dtype`` if the values fill the range of their type, else percentiles."""
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
    measured = "deep=true reads the values"
    if known:  # the least span of any volume
        span = min(v.high - v.low for v in known) / 255
        where = "" if len(known) == len(volumes) == 1 else f" in {len(known)} of {len(volumes)} volumes"
        measured = f"the middle 99 % of the values span at least {math.floor(100 * span)} % of it{where}"
    return "dtype", f"{kind} to [0, 1] by the range of its type; {measured}"


def _classes(crops: Sequence[CropFacts], cut: bool, counted: bool) -> tuple[tuple[str, ...], str]:
    """Return the classes that both train and val can have.

    Args:
        crops: the crops.
        cut: whether parts of each crop are for train and for val.
        counted: whether voxels are counted for the report.
    """
    names = list(dict.fromkeys(name for crop in crops for name in crop.classes))
    present = {name: sum(name in crop.held for crop in crops) for name in names}
    least = 2 if len(crops) > 1 and not cut else 1
    chosen = tuple(name for name in names if present[name] >= least)
    text = f"with foreground in at least {least} crops, so that both train and val can have it"
    if least == 1:
        text = "with foreground in the only crop" if len(crops) == 1 else "with foreground in a crop, which is cut"
    uncounted = [n for n in chosen if all(c.classes[n].voxels is None for c in crops if n in c.classes)]
    if uncounted and not counted:
        text += (
            f"; the metadata do not say how many voxels of {first_few(uncounted, _LISTED)} the crops have, so a crop "
            "without any would count too: repeat the cellmap-inspect command with deep=true at its end to count them"
        )
    left_out = [f"{name} ({present[name]})" for name in names if name not in chosen]
    return chosen, text + (f"; left out: {first_few(left_out, _LISTED)}" if left_out else "")


def _yaml(
    scale: Vector,
    shape: Sequence[int],
    batch_size: int,
    normalize: Any,
    data: Mapping[str, Any],
    reasons: Mapping[str, str],
) -> str:
    def flow(value: Any) -> str:  # JSON is YAML too
        return json.dumps(value, ensure_ascii=False)

    sizes = _whole(scale)
    lines = ["# @package _global_", "patch:"]
    lines += [*_comment(reasons["shape"]), f"  shape: {flow(list(shape))}"]
    lines += [*_comment(reasons["scale"]), f"  scale: {flow(sizes)}", "data:"]
    for name, value in data.items():
        if name in reasons:
            lines += _comment(reasons[name])
        if name == "datasets":  # the crops of each split
            lines.append(f"  {name}:")
            for split, entries in value.items():
                lines += [f"    {split}:", *(f"      - {flow(entry)}" for entry in entries)]
        else:
            lines.append(f"  {name}: {flow(value)}")
    lines += [*_comment(reasons["batch_size"]), f"  batch_size: {batch_size}"]
    lines += [*_comment(reasons["normalize"]), f"  normalize: {flow(normalize)}"]
    return "\n".join(lines) + "\n"


def override_text(value: Any) -> str:
    """Return a value as in an override of a command line, with quotes around texts that need them."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{override_text(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_text, value)) + "]"
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value)
    if isinstance(value, str) and (not is_plain or value.lower() in ("true", "false", "null", "nan", "inf")):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return value if isinstance(value, str) else json.dumps(value)


def _whole(scale: Vector) -> list[float]:
    """Return a voxel size with whole numbers where it has them."""
    return [int(s) if s == int(s) else s for s in scale]


def _comment(text: str) -> list[str]:
    return [f"  # {line}" for line in textwrap.wrap(text, _COMMENT)]


def _rounded(scale: Vector) -> Vector:
    """Return a voxel size without the float noise of pyramids, so that levels of several volumes are one candidate."""
    z, y, x = (float(f"{s:.6g}") for s in scale)
    return z, y, x


def _scale_text(scale: Vector) -> str:
    return " x ".join(f"{s:g}" for s in scale) + " nm"
