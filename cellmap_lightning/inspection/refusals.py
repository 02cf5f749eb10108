"""Errors of data that cannot be used, as far as the facts of an inspection show them."""

from collections.abc import Sequence
from typing import Any

from cellmap_lightning.inspection.facts import CropFacts, VolumeFacts
from cellmap_lightning.inspection.proposal import Proposal
from cellmap_lightning.validation import first_few


def refusal(
    volumes: Sequence[VolumeFacts],
    crops: Sequence[CropFacts],
    classes: Any,
    proposal: Proposal | None,
    needs_crops: bool,
) -> str | None:
    """Return the error of data that no data module can use, as far as the facts show it; None without one.

    Args:
        volumes: raw volumes.
        crops: annotated crops.
        classes: the requested classes, if any.
        proposal: the proposal, if any.
        needs_crops: False where a raw volume is inspected, which needs no readable crop.
    """
    refused = _unreadable(volumes, crops if needs_crops else (), classes)
    if refused is None and proposal is not None and not classes and not proposal.classes:
        return _no_class(crops)
    return refused


def _unreadable(volumes: Sequence[VolumeFacts], crops: Sequence[CropFacts], classes: Any) -> str | None:
    """Return an error if no volume, or no crop, can be read; otherwise None."""
    wrong = [volume for volume in volumes if not volume.present]
    if wrong and len(wrong) == len(volumes):
        text = wrong[0].wrong or "no level exists"
        return f"none of the {len(wrong)} raw volumes can be read: {wrong[0].name}: {text}"
    # With classes, the data module opens the crops, and its error lists them.
    if not classes and crops and all(crop.wrong for crop in crops):
        return f"none of the {len(crops)} annotated crops can be read: {crops[0].name}: {crops[0].wrong}"
    return None


def _no_class(crops: Sequence[CropFacts]) -> str | None:
    """Return the error if no two crops hold the same class; None without a crop that holds any."""
    held = [f"{name} only in {crop.name} ({crop.usage})" for crop in crops for name in crop.held]
    if not held:
        return None
    return (
        f"no class has foreground in two crops, one to train on and one to validate on: {first_few(held, 8)}; list the "
        "crops for training and set data.split=blocks, which cuts a part of each for validation, or give data.classes"
    )
