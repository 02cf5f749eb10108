"""The share of the voxels of crops that no tile of an evaluation shows, for the log."""

import logging
from collections.abc import Sequence

from cellmap_lightning.crops.crop import LEAST_OUTSIDE, Crop

log = logging.getLogger(__name__)


def report_left_out(crops: Sequence[Crop], label: str) -> None:
    """Log in one line the share of the crops that no tile shows, of each target, or of each input without targets.

    Args:
        crops: the crops, which all have the same arrays.
        label: the dataset, for the message.
    """
    shares = []
    for name in crops[0].arrays.targets or crops[0].arrays.inputs:
        parts = [crop.placement.left_out(crop.box, crop.plane.in_volume(crop.windows[name])) for crop in crops]
        total = sum(part * crop.volume for part, crop in zip(parts, crops, strict=True)) / sum(c.volume for c in crops)
        if total >= LEAST_OUTSIDE:
            worst = max(range(len(crops)), key=lambda number: parts[number])
            share = f"{100 * total:.3g} % of {name!r}"
            shares.append(share if len(crops) == 1 else f"{share} ({100 * parts[worst]:.3g} % in {crops[worst].label})")
    if not shares:
        return
    if crops[0].read_options.pad:
        remedy = "a dataset that is made with is_train=False has tiles up to the edges"
    else:
        remedy = "with pad=False patches stay inside the crop and raw, and pad=True has tiles up to the edges"
    log.warning("%s: no tile shows %s, at the edges; %s", label, ", and ".join(shares), remedy)
