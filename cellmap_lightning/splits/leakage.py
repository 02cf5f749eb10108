"""Leakage: crops for training that are also used, wholly or in part, for validation or test."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import Box, FloatArray, to_vector
from cellmap_lightning.io.store import StorePath, parts_of
from cellmap_lightning.splits.manifests import manifest_crops
from cellmap_lightning.validation import one_of
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

Leakage: TypeAlias = Literal["error", "warn", "ignore"]

#: Tolerance, in nm, within which two edges are the same.
_TOLERANCE = 1e-3


def check_leakage_rule(rule: str) -> None:
    """Check the setting ``leakage``.

    Raises:
        CellMapKeyError: the value is invalid.
    """
    one_of("leakage", rule, get_args(Leakage), CellMapKeyError)


@dataclass(frozen=True)
class PlacedCrop:
    """A crop and its location.

    Attributes:
        name: name in messages.
        volume: identity of the raw volume.
        box: the crop, nm.
        labels: identity of its label group; None without labels.
        restricted: True if the crop is a part of its labels, see `CropBox`.
    """

    name: str
    volume: str
    box: Box
    labels: str | None = None
    restricted: bool = False

    @property
    def dataset(self) -> str:
        """The dataset in its name."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Overlap:
    """Two crops of two splits that share voxels; see docs/data.md.

    Attributes:
        trained: the crop for training.
        other: the crop for validation or test.
        same: True if they are the same crop, parts of one crop that overlap, or the same box of the same volume.
        box: their intersection, nm.
    """

    trained: PlacedCrop
    other: PlacedCrop
    same: bool
    box: Box

    @property
    def part(self) -> float:
        """The share of the crop for validation or test that overlaps."""
        return float(np.prod(self.box.extent) / np.prod(self.other.box.extent))

    def __str__(self) -> str:
        if self.same and not (self.trained.restricted or self.other.restricted):
            name, other = self.trained.name, self.other.name
            return name if name == other else f"{name} is {other}"
        size = " x ".join(f"{n:g}" for n in self.box.extent)
        return f"{self.trained.name} overlaps {self.other.name} by {size} nm (z y x), {self.part:.0%} of the latter"


def identity(path: StorePath) -> str:
    """Return a canonical path, with links and relative parts resolved."""
    return os.path.realpath(path) if isinstance(path, Path) else str(path).rstrip("/")


def volume_identity(path: StorePath) -> str:
    """Return the identity of a raw volume: that of its folder ``em`` if it has one, which other versions share."""
    volume = identity(path)
    parent = parts_of(volume).parent
    return str(parent) if parent.name == "em" else volume


def overlaps(trained: Iterable[PlacedCrop], others: Sequence[PlacedCrop]) -> list[Overlap]:
    """Return the pairs of crops that are the same, or share voxels."""
    by_volume: dict[str, list[PlacedCrop]] = {}
    by_labels: dict[str, list[PlacedCrop]] = {}
    for other in others:
        by_volume.setdefault(other.volume, []).append(other)
        if other.labels is not None:
            by_labels.setdefault(other.labels, []).append(other)
    pairs: dict[tuple[PlacedCrop, PlacedCrop], Overlap] = {}
    for crop in trained:
        for other in by_labels.get(crop.labels or "", ()):
            lower, upper = _intersection(crop, other)
            parts = crop.restricted or other.restricted
            if not parts:
                pairs[crop, other] = Overlap(crop, other, True, crop.box)
            elif bool((upper - lower > _TOLERANCE).all()):
                pairs[crop, other] = Overlap(crop, other, True, Box(to_vector(lower), to_vector(upper)))
        for other in by_volume.get(crop.volume, ()):
            lower, upper = _intersection(crop, other)
            if (crop, other) not in pairs and bool((upper - lower > _TOLERANCE).all()):
                corners = [crop.box.lower, crop.box.upper], [other.box.lower, other.box.upper]
                same = bool(np.abs(np.subtract(*corners)).max() <= _TOLERANCE)
                pairs[crop, other] = Overlap(crop, other, same, Box(to_vector(lower), to_vector(upper)))
    return list(pairs.values())


def _intersection(crop: PlacedCrop, other: PlacedCrop) -> tuple[FloatArray, FloatArray]:
    """Return the lower and the upper corner of what two crops share; of no volume where these are not in order."""
    return np.maximum(crop.box.lower, other.box.lower), np.minimum(crop.box.upper, other.box.upper)


def held_out_crops(manifest: str | Path, trained: Iterable[PlacedCrop]) -> list[PlacedCrop]:
    """Return the crops of a manifest, such as the challenge's ``test_crop_manifest.csv``, in the volumes of others.

    Args:
        manifest: see `manifest_rows`.
        trained: the crops for training; the manifest's crops of other datasets than theirs are left out.
    """
    crops = manifest_crops(manifest)
    return [
        PlacedCrop(f"{crop.name} (held out)", volume, crop.box())
        for dataset, volume in dict.fromkeys((crop.dataset, crop.volume) for crop in trained)
        for crop in crops
        if crop.name.dataset == dataset
    ]


def check_leakage(
    split: str, built: Mapping[str, CellMapMultiDataset], rule: Leakage, held_out: str | Path | None = None
) -> None:
    """Check that a split shares no crops with the splits that it must be disjoint from.

    Args:
        split: the split that was built last.
        built: the datasets of the splits that exist.
        rule: see `SplitOptions`.
        held_out: see `SplitOptions`.

    Raises:
        CellMapValueError: annotated crops of the train split are also in the validation or test split.
    """
    if rule == "ignore" or "train" not in built or split == "predict":
        return
    trained = _placed(built["train"])
    others = {name: _placed(built[name]) for name in built if name in ("val", "test") and split in ("train", name)}
    if split == "train" and held_out is not None:
        others["held_out"] = held_out_crops(held_out, trained)
    for name, crops in others.items():
        pairs = overlaps(trained, crops)
        same = [pair for pair in pairs if pair.same and pair.trained.labels is not None]
        if same and rule == "error":
            listed = "".join(f"\n  {pair}" for pair in same)
            raise CellMapValueError(
                f"'train' and {name!r} share {plural(len(same), 'crop')}, so that scores would not show how the model "
                f"generalises; leave them out of one of the two, or set leakage=warn:{listed}"
            )
        if pairs:
            log.warning("crops for 'train' overlap crops for %r:%s", name, "".join(f"\n  {pair}" for pair in pairs))


def _placed(dataset: CellMapMultiDataset) -> list[PlacedCrop]:
    """Return the crops of a dataset and their locations, each once."""
    placed = (
        PlacedCrop(
            crop.label,
            volume_identity(crop.raw_at),
            crop.box,
            identity(crop.target_path.crop) if crop.target_path is not None else None,
            crop.within is not None,
        )
        for crop in dataset.crops
    )
    return list(dict.fromkeys(placed))
