"""Batches as ``training_step`` sees them, ready to be drawn: each sample with its crop, place and transforms."""

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
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES, Box, FloatArray, to_vector
from cellmap_lightning.loading.dataloader import CellMapDataLoader
from cellmap_lightning.loading.samples import Samples
from cellmap_lightning.visualization.figures.page import write_page
from cellmap_lightning.visualization.figures.sheet import SheetSample, contact_sheet
from cellmap_lightning.visualization.links import napari, neuroglancer


@dataclass(frozen=True, eq=False)
class Shown:
    """One sample of a batch.

    Attributes:
        sample: what is drawn.
        crop: where it is from.
        center: centre of the patch, nm (z, y, x).
        neuroglancer: a link to the place.
        napari: a command that shows the place.
    """

    sample: SheetSample
    crop: str
    center: tuple[float, float, float]
    neuroglancer: str
    napari: str


def show(
    source: SampleSource,
    layout: BatchLayout,
    batch: Mapping[str, torch.Tensor],
    draws: Sequence[Draw] = (),
    predictions: torch.Tensor | None = None,
    input_name: str | None = None,
    target_name: str | None = None,
    serve: str = "http://localhost:8000",
) -> list[Shown]:
    """The samples of a finished batch.

    Args:
        source: where the batch comes from.
        layout: how it is laid out.
        batch: the batch, on any device.
        draws: how each of its samples was drawn; without it, or where it is not that of the batch, transforms are not
            named.
        predictions: probabilities ``[N, C, ...]``.
        input_name: the input that is shown; by default the first.
        target_name: the target that is shown; by default the first.
        serve: see `links.neuroglancer`.

    Raises:
        CellMapKeyError: there is no such input or target.
    """
    input_name = _known("input", input_name, layout.inputs)
    target_name = _known("target", target_name, layout.targets)
    assert input_name is not None
    window = layout.inputs[input_name].window
    positions = batch["idx"].tolist()
    draws = list(draws)[: len(positions)]
    if [draw.position for draw in draws] != positions:
        draws = ()
    other = target_name is not None and not _alike(layout.targets[target_name].window, window)
    found = []
    for row, position in enumerate(positions):
        crop, place = source.locate(position)
        center = to_vector(crop.placement.center(place))
        turn = crop.plane.turn(draws[row].turn) if draws else crop.plane.turn(None)
        shape = crop.windows[input_name]
        reach = shape.extent if turn is None else np.abs(turn) @ shape.extent
        box = Box(to_vector(center - reach / 2), to_vector(center + reach / 2))
        facts = [f"sample {draws[row].sample}"] if draws else []
        facts += [crop.label, f"box {_box(box)} nm"]
        facts += [transforms(turn, layout)] if draws else []
        if other:
            facts.append(f"the target {target_name} has other voxels than {input_name}, and is not drawn")
        raw = batch[input_name][row, 0]
        target = None
        if target_name is not None and not other:
            target = by_class(batch[target_name][row], len(layout.classes))
        scale = shape.scale.tolist()
        labels = _labels(crop)
        found.append(
            Shown(
                SheetSample(
                    raw.detach().cpu().float().numpy(),
                    None if target is None else target.detach().cpu().float().numpy(),
                    None if predictions is None else predictions[row].detach().cpu().float().numpy(),
                    scale if raw.ndim == 3 else [s for s, n in zip(scale, shape.shape, strict=True) if n != 1] or scale,
                    "   ·   ".join(facts),
                ),
                crop.label,
                center,
                neuroglancer(crop.input_path, labels, center, float(min(scale)), serve),
                napari(crop.input_path, labels, center),
            )
        )
    return found


def by_class(target: torch.Tensor, classes: int) -> torch.Tensor | None:
    """A target as 1, 0 and NaN per class, or None where it is of a kind that has no outlines."""
    if target.is_floating_point():
        return target if len(target) == classes else None
    if len(target) == 1:  # numbers of classes
        number = torch.arange(1, classes + 1, dtype=torch.int64, device=target.device)
        number = number.reshape(-1, *[1] * (target.ndim - 1))
        return (target == number).float().masked_fill(target < 0, float("nan"))
    return (target > 0).float().masked_fill(target < 0, float("nan"))  # ids


def transforms(turn: FloatArray | None, layout: BatchLayout) -> str:
    """In words, how a patch lies in the volume and what was done to its values.

    Args:
        turn: from the patch's directions to the volume's.
        layout: has the random changes of values; what each sample drew of them is not said.
    """
    words = ["not turned"] if turn is None else _turned(turn)
    if layout.augment:
        words += [f"{name} {low:g} to {high:g}" for name, (low, high) in layout.augment.ranges.items()]
    return ", ".join(words)


def _turned(turn: FloatArray) -> list[str]:
    nearest = np.abs(turn).argmax(axis=0)
    signs = np.sign(turn[nearest, range(3)]).astype(int)
    # The nearest mirrors and exchanges, and the rotation that is left.
    plain = np.zeros((3, 3))
    plain[nearest, range(3)] = signs
    words = []
    if sorted(nearest.tolist()) == [0, 1, 2]:
        if nearest.tolist() != [0, 1, 2]:
            words.append("axes z y x show " + " ".join(AXES[i] for i in nearest.tolist()))
        mirrored = [AXES[i] for i in range(3) if signs[i] < 0]
        if mirrored:
            words.append(f"mirrored along {' '.join(mirrored)}")
        rest = turn @ plain.T
    else:
        rest = turn
    angle = math.degrees(math.acos(min(1.0, max(-1.0, (float(np.trace(rest)) - 1) / 2))))
    if angle > 0.01:
        fixed = [AXES[i] for i in range(3) if abs(rest[i, i] - 1) < 1e-6]
        words.append(f"rotated by {angle:.1f}°" + (f" about {fixed[0]}" if fixed else ""))
    return words or ["not turned"]


def _known(kind: str, given: str | None, names: Mapping[str, Any]) -> str | None:
    if given is not None and given not in names:
        raise CellMapKeyError(f"there is no {kind} {given!r}; there are {', '.join(names) or 'none'}")
    return given or next(iter(names), None)


def _alike(one: Any, other: Any) -> bool:
    return bool(one.shape == other.shape and one.scale.tolist() == other.scale.tolist())


def _box(box: Box) -> str:
    return " ".join(f"{axis} {low:.0f}..{high:.0f}" for axis, (low, high) in box.as_dict().items())


def _labels(crop: Crop) -> dict[str, str]:
    if crop.target_path is None:
        return {}
    return {name: str(crop.target_path.of(name)) for name in crop.annotated}


def collect(
    loader: CellMapDataLoader, samples: int, epoch: int = 0, serve: str = "http://localhost:8000"
) -> list[Shown]:
    """The first samples that a loader delivers in an epoch.

    Args:
        loader: delivers finished batches.
        samples: how many.
        epoch: which epoch.
        serve: see `links.neuroglancer`.

    Raises:
        CellMapValueError: a number that cannot be one.
    """
    for name, value, least in (("samples", samples, 1), ("epoch", epoch, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CellMapValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    loader.set_epoch(epoch)
    view = loader.dataset
    assert isinstance(view, Samples)
    found: list[Shown] = []
    batches = iter(loader)
    with (
        contextlib.closing(batches),
        tqdm(total=samples, desc="reading samples", unit="sample", disable=None, leave=False, delay=1) as bar,
    ):
        for number, batch in enumerate(batches):
            draws = view.draws(loader.numbers(number))
            found += show(loader.source, loader.layout, batch, draws, serve=serve)
            bar.update(len(batch["idx"]))
            if len(found) >= samples:
                break
    return found[:samples]


def write(
    shown: Sequence[Shown], classes: Sequence[str], path: Path, title: str, overlay: Any = "outline", html: bool = False
) -> list[Path]:
    """Draw a contact sheet, and with ``html`` a page beside it. Returns what was written."""
    samples = [one.sample for one in shown]
    contact_sheet(samples, classes, path=path, title=title, max_rows=len(samples), overlay=overlay)
    written = [path]
    if html:
        page = path.with_suffix(".html")
        write_page(samples, classes, page, title=title, links=[(one.neuroglancer, one.napari) for one in shown])
        written.append(page)
    return written
