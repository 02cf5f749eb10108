"""Targets of missing sections, of every kind and of other voxel sizes than the input."""

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapDataLoader
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.effects import PatchGrid
from cellmap_lightning.transforms.intensity import IntensityTransforms
from tests.make import make_dataset

RAW = {"shape": [8, 16, 16], "scale": [10.48, 8, 8]}
KINDS = {
    "binary": {},
    "numbers": {"kind": "labels"},
    "instances": {"kind": "instances"},
    "stored": {"kind": "ids"},
    "pairs": {"kind": "affinities", "offsets": [[1, 0, 0], [0, -2, 1]]},
    "near": {"kind": "sdt", "nm": 50},
}
UNKNOWN = {"numbers": -100, "instances": -1}


def batches(volume, targets, missing, inputs=None, **options):
    with make_dataset(
        volume.raw_path,
        volume.label_path(volume.crops[1], "[mito,er,pm]"),
        ["mito", "er"],
        inputs or {"raw": RAW},
        targets,
        is_train=True,
        seed=3,
        read=ReadOptions(pad=True),
        intensity_transforms={"missing_section": missing},
        **options,
    ) as dataset:
        return list(CellMapDataLoader(dataset, 3, samples_per_epoch=6))


def test_targets_of_every_kind_are_unknown_in_missing_sections_alone(volume):
    targets = {name: {**RAW, **kind} for name, kind in KINDS.items()}
    missing = {"probability": 0.3, "fill": -1.0, "unknown": True}
    plain, changed = batches(volume, targets, {**missing, "unknown": False}), batches(volume, targets, missing)
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one["raw"], other["raw"])
        absent = (other["raw"] == -1).expand(-1, 1, -1, -1, -1)
        assert 0 < absent.float().mean() < 1
        for name in KINDS:
            channels = other[name].shape[1]
            there = absent.expand(-1, channels, -1, -1, -1)
            unknown = other[name][there]
            assert (unknown == UNKNOWN[name]).all() if name in UNKNOWN else unknown.isnan().all()
            assert other[name].dtype == one[name].dtype
            assert torch.equal(one[name][~there].nan_to_num(9), other[name][~there].nan_to_num(9))


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_the_axis_may_be_any(volume, axis):
    missing = {"probability": 0.3, "fill": -1.0, "unknown": True, "axis": axis}
    for batch in batches(volume, {"labels": RAW}, missing):
        absent = (batch["raw"] == -1).expand_as(batch["labels"])
        assert batch["labels"][absent].isnan().all()
        assert not batch["labels"][~absent].isnan().all()


def test_without_nan_targets_the_mask_is_false(volume):
    missing = {"probability": 0.4, "fill": -1.0, "unknown": True}
    for batch in batches(volume, {"labels": RAW}, missing, nan_targets=False):
        absent = (batch["raw"] == -1).expand_as(batch["labels"])
        assert not batch["labels_mask"][absent].any()
        assert batch["labels"][absent].eq(0).all()


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((16, 4, 4), 20.0),
        ((4, 4, 4), 80.0),
        ((10, 4, 4), 32.0),
        ((3, 4, 4), 40.0),
        ((8, 4, 4), 40.0),
        ((24, 4, 4), 40.0),
    ],
)
def test_hidden_voxels_are_those_that_overlap_a_missing_section(shape, scale):
    """By brute force in nm: a section is an interval about the common centre, and so is a voxel."""
    transforms = IntensityTransforms({"missing_section": {"probability": 0.4, "fill": -1.0, "unknown": True}})
    reference, target, samples = Window([30, 4, 4], [40, 8, 8]), Window(shape, [scale, 8, 8]), list(range(40))
    raw = transforms(torch.zeros(40, 1, 30, 4, 4), 0, samples, 0, reference.scale.tolist())
    missing = raw[:, 0, :, 0, 0].numpy() == -1
    hidden = transforms.hidden(0, samples, target, reference, torch.device("cpu"))
    sections = (np.arange(30) - 15) * 40.0
    voxels = (np.arange(shape[0]) - shape[0] / 2) * scale
    overlap = np.minimum(sections[:, None] + 40, voxels + scale) - np.maximum(sections[:, None], voxels) > 1e-3
    expected = (missing[:, :, None] & overlap).any(1)
    assert np.array_equal(hidden[:, 0, :, 0, 0].numpy(), expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("unknown", [False, True])
def test_targets_stay_known_without_the_option(unknown):
    transforms = IntensityTransforms({"missing_section": {"probability": 0.4, "unknown": unknown}})
    window = Window([30, 4, 4], [40, 8, 8])
    hidden = transforms.hidden(0, [0, 1], window, window, torch.device("cpu"))
    assert (hidden is not None) == unknown
    slices = Window([1, 4, 4], [40, 8, 8])
    assert transforms.hidden(0, list(range(50)), slices, slices, torch.device("cpu")) is None


def test_a_target_beyond_the_input_has_sections_too():
    grid = PatchGrid(Window([6, 1, 1], [10, 8, 8]), Window([4, 1, 1], [10, 8, 8]))
    first, last = grid.sections(0)
    assert first.tolist() == last.tolist() == [-1, 0, 1, 2, 3, 4]
    assert grid.nearest_section(0).tolist() == first.tolist()


def test_inputs_of_a_dataset_miss_the_same_sections(volume):
    """The second input has voxels of half the thickness, and is half as thick."""
    inputs = {"raw": RAW, "fine": {"shape": [8, 16, 16], "scale": [5.24, 8, 8]}}
    for batch in batches(volume, {"labels": RAW}, {"probability": 0.3, "fill": -1.0}, inputs):
        coarse, fine = ((batch[name] == -1).all(4).all(3)[:, 0] for name in inputs)
        assert torch.equal(fine, coarse[:, 2:6].repeat_interleave(2, 1))
        assert coarse.any()


def test_infinite_raw_does_not_become_nan():
    from cellmap_lightning.batches.arrays import parse_inputs
    from cellmap_lightning.batches.compact_batch import CompactBatch
    from cellmap_lightning.batches.layout import BatchLayout
    from cellmap_lightning.transforms.normalization import Scaling
    from tests.transforms.test_effects import HALF

    for name, options in HALF.items():
        augment = IntensityTransforms({name: {**options, "probability": 1}})
        layout = BatchLayout(
            parse_inputs({"raw": RAW}), {}, (), np.dtype(np.float32), np.dtype(np.int16), {}, {}, Scaling.none(),
            augment=augment,
        )  # fmt: skip
        raw = torch.rand(2, 1, 8, 16, 16)
        raw[0, 0, 2, 3, 4], raw[1, 0, 2, 3, 4], raw[1, 0, 0, 0, 0] = float("inf"), float("nan"), -float("inf")
        numbers = torch.arange(2)
        batch = layout.finish(CompactBatch({"raw": raw, "idx": numbers, "sample": numbers}, layout))
        assert not batch["raw"].isnan().any(), name
