"""Crops with known class counts, and statistics of samples."""

import numpy as np

from cellmap_lightning import (
    CellMapMultiDataset,
)
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.runtime.rng import PLACE, uniforms
from cellmap_lightning.sampling.strategy import NUMBERS
from tests.make import make_dataset

CLASSES = ["mito", "er", "nuc", "pm"]
SPEC = {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}
CROPS = {1: "mito,er,nuc", 2: "mito,er,nuc,pm", 3: "pm,mito,er", 5: "mito"}
MANY = 4000


def make(volume, strategy="mix", spec=SPEC, classes=CLASSES, crops=CROPS, balance=False, **kwargs):
    return CellMapMultiDataset(
        [
            make_dataset(
                volume.raw_path,
                f"{volume.path}/recon-1/labels/groundtruth/crop{n}/[{names}]",
                classes,
                {"raw": spec},
                {"labels": spec},
                is_train=True,
                read=ReadOptions(pad=True),
                **kwargs,
            )
            for n, names in crops.items()
        ],
        strategy,
        balance,
    )


def choose(dataset, count=MANY, seed=0):
    return dataset.strategy.choose(uniforms(seed, PLACE, range(count), NUMBERS), [None] * count)


def share(chosen, choices):
    return np.bincount(chosen, minlength=choices) / len(chosen)


def chi_square(found, expected, count):
    """Below 4 standard deviations of what chance alone gives."""
    there = expected > 0
    assert not found[~there].any()
    statistic = count * ((found - expected)[there] ** 2 / expected[there]).sum()
    freedom = max(1, there.sum() - 1)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (found, expected)
