"""Report of the classes that only one part of crops that are cut holds."""

import logging

from cellmap_lightning.datasets.multidataset import CellMapMultiDataset
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


def report_parts(train: CellMapMultiDataset, val: CellMapMultiDataset) -> None:
    """Log the voxels of each class in training and in validation; warn of classes with voxels in one of them alone.

    Voxels are counted in the index of the foreground at the resolution of the targets, which is cached, and which the
    sampling of training patches needs anyway; see `CropLabels.foreground_index`.

    Args:
        train: the boxes for training.
        val: the boxes for validation.
    """
    trained, validated = _voxels(train), _voxels(val)
    lines, counts = [], []
    for name in train.classes:
        here, there = trained.get(name, 0), validated.get(name, 0)
        if here and there:
            counts.append(f"{name} has {plural(here, 'voxel')} in training and {there:,} in validation")
        elif here:
            lines.append(f"{name} has {plural(here, 'voxel')} in training and none in validation, so it has no score")
        elif there:
            lines.append(f"{name} has {plural(there, 'voxel')} in validation and none in training, so it is not learnt")
    if counts:
        log.info("split=blocks: at the resolution of the targets, %s", "; ".join(counts))
    if lines:
        log.warning(
            "split=blocks: %s; another split.blocks.position, axis or count divides them otherwise", "; ".join(lines)
        )


def _voxels(dataset: CellMapMultiDataset) -> dict[str, int]:
    """Return the foreground voxels of each class, summed over the crops."""
    voxels: dict[str, int] = {}
    for crop in dataset.crops:
        for name in crop.annotated:
            voxels[name] = voxels.get(name, 0) + len(crop.foreground_index(name))
    return voxels
