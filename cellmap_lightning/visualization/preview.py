"""Batches as ``training_step`` gets them, ready to be drawn: each sample with its crop, place and transforms."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.geometry.lattice import AXES, Box, FloatArray, Vector, to_vector
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.geometry.sample_map import Warp
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.samples import Samples
from cellmap_lightning.validation import did_you_mean, int_at_least
from cellmap_lightning.visualization.display import Display, display, display_prediction
from cellmap_lightning.visualization.figures.legend import UNKNOWN_TEXT
from cellmap_lightning.visualization.figures.page import write_page
from cellmap_lightning.visualization.figures.samples import SheetSample
from cellmap_lightning.visualization.figures.sheet import contact_sheet
from cellmap_lightning.visualization.viewer_links import napari, neuroglancer

#: Times the wanted samples that are read at most, to find one of each crop.
_FURTHER = 4


@dataclass(frozen=True, eq=False)
class PreviewSample:
    """One sample of a batch.

    Attributes:
        sample: its arrays and header, for a contact sheet.
        crop: label of its crop.
        center: centre of the patch, nm (z, y, x).
        neuroglancer: a link to the place.
        napari: a command that shows the place.
        number: number of the sample; None without its draw.

    Example:
        >>> for preview in collect(data.train_dataloader(), samples=3):
        ...     print(preview.sample.header, preview.neuroglancer)
    """

    sample: SheetSample
    crop: str
    center: tuple[float, float, float]
    neuroglancer: str
    napari: str
    number: int | None = None


def show(
    source: SampleSource,
    layout: BatchLayout,
    batch: Mapping[str, torch.Tensor],
    draws: Sequence[Draw] = (),
    predictions: torch.Tensor | None = None,
    input_name: str | None = None,
    target_name: str | None = None,
    serve: str = "http://localhost:8000",
) -> list[PreviewSample]:
    """Return the samples of a finished batch.

    Args:
        source: the source of the batch.
        layout: its layout.
        batch: the batch, on any device.
        draws: position and transforms of each of its samples; without them, or if they are not those of the batch,
            transforms are not named.
        predictions: values of the target, ``[N, channels, ...]``: probabilities of classes, affinities, distances, ...
        input_name: the input to draw; by default the first.
        target_name: the target to draw; by default the first.
        serve: see `viewer_links.neuroglancer`.

    Raises:
        CellMapKeyError: the batch has no such input or target.
    """
    input_name = _checked_name("input", input_name, layout.inputs)
    target_name = _checked_name("target", target_name, layout.targets)
    assert input_name is not None
    positions = batch["idx"].tolist()
    notes = [] if not target_name else _lattice_notes(layout, input_name, target_name)
    kind = layout.targets[target_name].kind if target_name else None
    samples = []
    for row, (position, draw) in enumerate(zip(positions, _draws_of(positions, draws), strict=True)):
        crop, place = source.locate(position)
        center = to_vector(crop.placement.center(place))
        window = crop.windows[input_name]
        raw = batch[input_name][row, 0]
        displays: dict[str, Display] = {}
        if target_name is not None and kind is not None and not notes:
            displays["target"] = display(kind, batch[target_name][row])
        if predictions is not None:
            displays["prediction"] = display_prediction(kind, predictions[row], len(layout.classes))
        header = "   ·   ".join(_facts(crop, window, center, layout, draw) + notes)
        sample = sheet_sample(raw, displays, _drawn_scale(window, raw.ndim), header)
        labels = _label_paths(crop)
        link = neuroglancer(crop.input_path, labels, center, min(window.scale.tolist()), serve)
        command = napari(crop.input_path, labels, center)
        number = None if draw is None else draw.sample
        samples.append(PreviewSample(sample, crop.label, center, link, command, number))
    return samples


def _draws_of(positions: list[int], draws: Sequence[Draw]) -> Sequence[Draw | None]:
    """Return the draw of each sample of a batch; None of each where the draws are not those of the batch."""
    first = list(draws)[: len(positions)]
    return first if [draw.position for draw in first] == positions else [None] * len(positions)


def _facts(crop: Crop, window: Window, center: Vector, layout: BatchLayout, draw: Draw | None) -> list[str]:
    """Return the parts of a sample's header: its number, crop, box in the volume and transforms."""
    turn = crop.plane.turn(None if draw is None else draw.turn)
    extent = window.extent if turn is None else np.abs(turn) @ window.extent
    box = Box(to_vector(center - extent / 2), to_vector(center + extent / 2))
    facts = [crop.label, f"box {_box_text(box)} nm"]
    if draw is None:
        return facts
    return [f"sample {draw.sample}", *facts, describe_transforms(turn, layout, draw.warp)]


def _drawn_scale(window: Window, axes: int) -> list[float]:
    """Return the voxel size, nm, along the axes of a patch that are drawn."""
    scale: list[float] = window.scale.tolist()
    if axes == 2:  # a dropped axis has no voxel size in the figure
        return [s for s, n in zip(scale, window.shape, strict=True) if n != 1] or scale
    return scale


def sheet_sample(
    raw: torch.Tensor, displays: Mapping[str, Display], scale: Sequence[float], header: str
) -> SheetSample:
    """Return a row of a contact sheet.

    Args:
        raw: ``[z, y, x]`` or ``[y, x]``.
        displays: of ``target`` and ``prediction``, those that are there.
        scale: voxel size, nm.
        header: text above the row.
    """
    masks = {name: shown.masks.numpy() for name, shown in displays.items()}
    pictures = {name: shown.picture.numpy() for name, shown in displays.items() if shown.picture is not None}
    image = raw.detach().cpu().float().numpy()
    return SheetSample(image, masks.get("target"), masks.get("prediction"), scale, header, pictures)


def describe_transforms(turn: FloatArray | None, layout: BatchLayout, warp: Warp | None = None) -> str:
    """Return in words how a patch is oriented in the volume and which intensity transforms apply to it.

    Args:
        turn: matrix from the patch's directions to the volume's.
        layout: has the intensity transforms; only their ranges are named, not the values drawn for a sample.
        warp: the displacement; None for none.
    """
    words = ["not turned"] if turn is None else _describe_turn(turn)
    if warp is not None and warp.displacement is not None:
        magnitude = max(warp.displacement.magnitude)
        words.append(f"elastic up to {magnitude:g} nm")
    if warp is not None:
        for one in warp.sections:
            what = "stacks of sections" if one.lasting else "sections"
            words.append(f"{what} across {AXES[one.axis]} displaced up to {one.max_shift:g} nm")
    if layout.augment:
        words += [f"{name} {low:g} to {high:g}" for name, (low, high) in layout.augment.ranges.items()]
        words += [f"{name} {effect.probability:.0%}" for name, effect in layout.augment.effects.items()]
    return ", ".join(words)


def _describe_turn(turn: FloatArray) -> list[str]:
    # The matrix is an orthogonal one with a stretch along axes of the volume, or of the patch (polar decompositions).
    u, sizes, v = np.linalg.svd(turn)
    turn = u @ v
    stretches = [(u * sizes) @ u.T, (v.T * sizes) @ v]
    stretch = next((s for s in stretches if np.abs(s - np.diag(np.diag(s))).max() < 1e-6), stretches[0])
    is_zoom = np.abs(stretch - np.diag(np.diag(stretch))).max() < 1e-6
    zoom = 1 / np.diag(stretch)  # the content is magnified where the patch shows less of the volume
    # The orthogonal one is the nearest signed permutation (transposition and mirrors) and the rotation that is left.
    nearest = np.abs(turn).argmax(axis=0)
    signs = np.sign(turn[nearest, range(3)]).astype(int)
    permutation = np.zeros((3, 3))
    permutation[nearest, range(3)] = signs
    words = []
    rotation = turn
    if sorted(nearest.tolist()) == [0, 1, 2]:
        if nearest.tolist() != [0, 1, 2]:
            words.append("axes z y x show " + " ".join(AXES[i] for i in nearest.tolist()))
        mirrored = [AXES[i] for i in range(3) if signs[i] < 0]
        if mirrored:
            words.append(f"mirrored along {' '.join(mirrored)}")
        rotation = turn @ permutation.T
    # The trace of a rotation matrix is 1 + 2 cos(angle).
    angle = math.degrees(math.acos(min(1.0, max(-1.0, (float(np.trace(rotation)) - 1) / 2))))
    if angle > 0.01:
        fixed = [AXES[i] for i in range(3) if abs(rotation[i, i] - 1) < 1e-6]
        words.append(f"rotated by {angle:.1f}°" + (f" about {fixed[0]}" if fixed else ""))
    if is_zoom and np.ptp(zoom) < 1e-6:
        words += [f"zoomed {zoom[0]:.2f} times"] if abs(zoom[0] - 1) > 1e-6 else []
    elif is_zoom:
        words.append(
            "zoomed " + " ".join(f"{axis} {factor:.2f}" for axis, factor in zip(AXES, zoom, strict=True)) + " times"
        )
    else:
        words.append(f"sheared, by {1 / sizes[0]:.2f} to {1 / sizes[-1]:.2f} times")
    return words or ["not turned"]


def _checked_name(kind: str, name: str | None, names: Mapping[str, Any]) -> str | None:
    """Return a name of one of the arrays, by default the first."""
    if name is not None and name not in names:
        raise CellMapKeyError(
            f"the batch has no {kind} {name!r}; it has {', '.join(names) or 'none'}{did_you_mean(name, names)}"
        )
    return name or next(iter(names), None)


def _lattice_notes(layout: BatchLayout, input_name: str, target_name: str) -> list[str]:
    """Return a note if a target has other voxels than an input, so that it cannot be drawn on it."""
    window, other = layout.inputs[input_name].window, layout.targets[target_name].window
    if window.shape == other.shape and window.scale.tolist() == other.scale.tolist():
        return []
    return [f"the target {target_name} has other voxels than {input_name}, and is not drawn"]


def _box_text(box: Box) -> str:
    return " ".join(f"{axis} {low:.0f}..{high:.0f}" for axis, (low, high) in box.as_dict().items())


def _label_paths(crop: Crop) -> dict[str, str]:
    if crop.target_path is None:
        return {}
    return {name: str(crop.target_path.of(name)) for name in crop.annotated}


def collect(
    loader: CellMapDataLoader,
    samples: int,
    epoch: int = 0,
    serve: str = "http://localhost:8000",
    candidates: int | None = None,
) -> list[PreviewSample]:
    """Return the first samples of an epoch, or of more of them those whose places differ most.

    Args:
        loader: yields finished batches.
        samples: number of samples.
        epoch: number of the epoch, from 0.
        serve: see `viewer_links.neuroglancer`.
        candidates: number of the first samples to choose from; by default ``samples``, so that none is left out. While
            too few crops are among them, up to `_FURTHER` times as many are read.

    Raises:
        CellMapValueError: ``samples`` or ``epoch`` is not a whole number of at least 1 or 0.
    """
    int_at_least("samples", samples, 1)
    int_at_least("epoch", epoch, 0)
    loader.set_epoch(epoch)
    view = loader.dataset
    assert isinstance(view, Samples)
    wanted = max(samples, candidates or samples)
    most = wanted if wanted == samples else _FURTHER * wanted
    different = min(samples, len({crop.label for crop in loader.source.crops}))
    collected: list[PreviewSample] = []
    batches = iter(loader)
    with (
        contextlib.closing(batches),
        tqdm(total=wanted, desc="reading samples", unit="sample", disable=None, leave=False, delay=1) as bar,
    ):
        for number, batch in enumerate(batches):
            draws = view.draws(loader.numbers(number))
            collected += show(loader.source, loader.layout, batch, draws, serve=serve)
            bar.update(len(batch["idx"]))
            enough = wanted if len({one.crop for one in collected}) >= different else most
            if len(collected) >= enough:
                break
    return spread(collected[: max(wanted, _last_new(collected) + 1)] if most > wanted else collected[:wanted], samples)


def _last_new(previews: Sequence[PreviewSample]) -> int:
    """Return the number of the last sample that is the first of its crop."""
    first: dict[str, int] = {}
    for number, one in enumerate(previews):
        first.setdefault(one.crop, number)
    return max(first.values(), default=-1)


def spread(previews: Sequence[PreviewSample], count: int) -> list[PreviewSample]:
    """Return some samples whose places differ, by their numbers, else in their order.

    They are chosen one after the other, beginning with the first: of the crop with the fewest chosen ones, that
    farthest from those chosen in its crop. Sampling by class repeats the crops with rare classes, and small crops have
    few places.

    Args:
        previews: the samples to choose from.
        count: number of samples.
    """
    left = list(range(len(previews)))
    chosen: list[int] = []
    while left and len(chosen) < count:

        def rank(number: int) -> tuple[int, float]:
            one = previews[number]
            others = [previews[n].center for n in chosen if previews[n].crop == one.crop]
            return -len(others), min((math.dist(one.center, other) for other in others), default=math.inf)

        best = max(left, key=rank)  # of equal ones the first
        chosen.append(best)
        left.remove(best)
    # Tiles are read in an order that spreads them over the crops.
    return sorted((previews[place] for place in sorted(chosen)), key=lambda one: one.number or 0)


def write(
    previews: Sequence[PreviewSample],
    classes: Sequence[str],
    path: Path,
    title: str,
    overlay: Any = "outline",
    html: bool = False,
    unknown: str = UNKNOWN_TEXT,
) -> list[Path]:
    """Draw a contact sheet, and with ``html`` a page beside it. Return the files that were written.

    Args:
        previews: the samples.
        classes: names of the classes.
        path: the file of the sheet.
        title: a line above everything.
        overlay: see `contact_sheet`, as ``unknown``.
        html: write the page.
        unknown: text for voxels that are unknown for every class.
    """
    samples = [preview.sample for preview in previews]
    contact_sheet(samples, classes, path=path, title=title, max_rows=len(samples), overlay=overlay, unknown=unknown)
    if not html:
        return [path]
    page = path.with_suffix(".html")
    links = [(preview.neuroglancer, preview.napari) for preview in previews]
    write_page(samples, classes, page, title=title, links=links)
    return [path, page]
