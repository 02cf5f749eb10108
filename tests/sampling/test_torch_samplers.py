"""Samplers of positions for plain data loaders, and the names of cellmap-data."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cellmap_lightning import (
    CellMapDataLoader,
    CellMapError,
    ClassBalancedSampler,
)
from cellmap_lightning.sampling.strategies import parse_strategy
from tests.sampling.sampled_crops import CLASSES, CROPS, chi_square, make, share

# ------------------------------------------------------------------------------------------------ cellmap-data's names


def test_class_balanced_sampler(volume):
    with make(volume, "uniform") as dataset:
        sampler = ClassBalancedSampler(dataset, samples_per_epoch=400, seed=1)
        assert len(sampler) == 400
        first, second = list(sampler), list(sampler)
        assert first != second  # each pass has others
        assert list(ClassBalancedSampler(dataset, 400, 1)) == first
        assert list(ClassBalancedSampler(dataset, 400, 2)) != first
        crops = np.array([dataset.crops.index(dataset.locate(p)[0]) for p in first])
        chi_square(
            share(crops, len(CROPS)), parse_strategy("class_balanced").bind(dataset.crop_table).crop_chances, 400
        )
        # Torch's own loader over the dataset, and ours, meet the same positions.
        plain = [int(b["idx"]) for b in DataLoader(dataset, sampler=ClassBalancedSampler(dataset, 6, 1))]
        loader = CellMapDataLoader(dataset, 2, sampler=ClassBalancedSampler(dataset, 6, 1))
        ours = [i for b in loader for i in b["idx"].tolist()]
        assert plain == ours == first[:6]
        again = CellMapDataLoader(loader.dataset, 2, sampler=ClassBalancedSampler(dataset, 6, 2), shuffle=False)
        assert [i for b in again for i in b["idx"].tolist()] == list(ClassBalancedSampler(dataset, 6, 2))
        with pytest.raises(CellMapError, match="samples_per_epoch must be a whole number of at least 1, got 0"):
            ClassBalancedSampler(dataset, 0)
        with make(volume, crops={1: "mito"}) as other, pytest.raises(CellMapError, match="draws positions of"):
            CellMapDataLoader(other, 2, sampler=ClassBalancedSampler(dataset, 6))


def test_worker_processes_draw_the_same(volume):
    with make(volume, "mix") as dataset:
        here = [b["idx"].tolist() for b in CellMapDataLoader(dataset, 2, samples_per_epoch=8)]
        there = [b["idx"].tolist() for b in CellMapDataLoader(dataset, 2, 2, samples_per_epoch=8)]
        assert here == there


def test_the_other_names(volume):
    with make(volume, "uniform") as dataset:
        assert dataset.get_crop_class_matrix().dtype == bool
        assert dataset.get_crop_class_matrix().shape == (len(CROPS), len(CLASSES))
        assert dataset.datasets[0].get_crop_class_matrix().tolist() == [[True, True, False, False]]
        tiles = dataset.validation_indices
        assert tiles == [dataset.tile(n) for n in range(dataset.tile_count)]
        fg, bg = dataset.class_counts, dataset.background_counts
        assert dataset.class_weights == {c: bg[c] / fg[c] for c in CLASSES}
        mito = dataset.crops[0]
        assert fg["mito"] > mito.class_counts["mito"] > 0
        assert mito.class_counts["mito"] + mito.background_counts["mito"] == pytest.approx(mito.volume)
        assert dataset.datasets[0].class_weights["nuc"] == 1  # annotated, and not there
        unknown = dataset.crops[1]
        assert unknown.class_counts["er"] + unknown.background_counts["er"] < unknown.volume
        weighted = dataset.get_weighted_sampler(4)
        assert len(list(weighted)) == 4
        assert len(dataset.get_weighted_sampler(4, samples_per_epoch=9)) == 9
        subset = list(dataset.get_subset_random_sampler(300, weighted=False, rng=torch.Generator().manual_seed(5)))
        assert len(subset) == 300
        assert subset == list(dataset.get_subset_random_sampler(300, False, torch.Generator().manual_seed(5)))
        crops = np.array([dataset.crops.index(dataset.locate(p)[0]) for p in subset])
        chi_square(share(crops, len(CROPS)), dataset.strategy.crop_chances, 300)
        assert len(list(dataset.get_subset_random_sampler(7))) == 7
