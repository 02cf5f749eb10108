"""Boxes of one crop for training and validation: what patches read, what parts hold, and what is refused."""

import logging
import re

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale

SPEC = {"shape": [16] * 3, "scale": [8] * 3}
INSIDE, MARK = 100, 200


@pytest.fixture(scope="module")
def crop(tmp_path_factory):
    """A crop of 40 x 120 x 40 voxels of 8 nm in the middle of raw, with mito everywhere and er at the end of y."""
    root = tmp_path_factory.mktemp("v") / "jrc_a.zarr"
    write_group(root)
    common = {"scale": (8, 8, 8), "levels": 2, "storage": ArrayOptions(chunks=(32, 32, 32))}
    write_multiscale(root / "em", np.full((80, 160, 80), INSIDE, np.uint8), translation=(4,) * 3, mode="mean", **common)
    mito, er = np.zeros((2, 40, 120, 40), np.uint8)
    mito[:, ::7] = 1
    er[3:5, 110:, 9] = 1
    for name, stored in (("mito", mito), ("er", er)):
        write_multiscale(root / "crop1" / name, stored, translation=(164, 164, 164), mode="mode", **common)
    return {"raw": f"{root}/em", "gt": f"{root}/crop1/[mito,er]"}


def module(crop, blocks=None, context=16, **options):
    given = {
        "datasets": {"train": [crop]}, "split": {"blocks": blocks} if blocks else "blocks", "pad": True,
        "cache": "memory", "samples_per_epoch": 64, "batch_size": 8,
    }  # fmt: skip
    arrays = {"raw": {"shape": [context] * 3, "scale": [8] * 3}}
    data = CellMapDataModule(["mito", "er"], arrays, {"labels": SPEC}, **(given | options))
    data.setup("fit")
    return data


def boxes(data, split):
    return [crop.box.as_dict() for crop in data.splits[split].crops]


def test_the_longest_axis_is_cut_and_the_rest_stays(crop):
    data = module(crop, {"fraction": 0.25})
    (train,), (val,) = boxes(data, "train"), boxes(data, "val")
    assert train["z"] == train["x"] == val["z"] == val["x"] == [160, 480]
    assert train["y"][0] == 160
    assert val["y"] == [880, 1120]
    assert train["y"][1] == 856  # two voxels of raw and one of the patch, for interpolation
    assert data.splits.table().splitlines()[-1].split() == ["crops", "1", "1"]


@pytest.mark.parametrize(
    ("spatial", "context"),
    [
        ({"mirror": {"axes": {"y": 0.5}}}, 16),
        ({"mirror": {"axes": {"y": 0.5}}}, 32),
        ({"transpose": {"axes": ["x", "y", "z"]}}, 24),
        ({"rotate": {"axes": {"z": [-180, 180]}}}, 16),
        ({"rotate": {"axes": {"y": [-180, 180]}}}, 24),
        ({"rotate": {"axes": {"z": [-180, 180], "x": [-90, 90]}}, "transpose": {"axes": ["x", "y"]}}, 16),
        ({"zoom": [0.6, 1.25], "elastic": {"spacing": 64, "magnitude": 12}}, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [8, 12])
def test_no_training_patch_shows_a_voxel_of_validation(crop, tmp_path, spatial, context, scale):
    options = {"spatial_transforms": spatial, "raw_value_transforms": None}
    arrays = {"raw": {"shape": [context] * 3, "scale": [scale] * 3}}
    first = CellMapDataModule(
        ["mito"], arrays, {"labels": {"shape": [16] * 3, "scale": [scale] * 3}}, datasets={"train": [crop]},
        split={"blocks": {"position": "middle", "fraction": 0.2 if scale == 8 else 0.25}}, **options,
    )  # fmt: skip
    (val,) = boxes(first, "val")
    raw = np.full((80, 160, 80), INSIDE, np.uint8)
    raw[:, round(val["y"][0] / 8) : round(val["y"][1] / 8)] = MARK
    write_group(tmp_path / "marked.zarr")
    write_multiscale(
        tmp_path / "marked.zarr/em", raw, scale=(8, 8, 8), translation=(4,) * 3, levels=1, mode="mean",
        storage=ArrayOptions(chunks=(32, 32, 32)),
    )  # fmt: skip
    marked = [{**crop, "raw": f"{tmp_path}/marked.zarr/em", "box": box_of(box)} for box in boxes(first, "train")]
    data = CellMapDataModule(
        ["mito"], arrays, {"labels": {"shape": [16] * 3, "scale": [scale] * 3}}, datasets={"train": marked},
        samples_per_epoch=64, **options,
    )  # fmt: skip
    train = data.splits["train"]
    highest, before = 0.0, 0
    for crop, y in zip(train.crops, (-1, 0), strict=True):  # the positions next to validation
        z, along, x = crop.placement.counts
        for number in range(24):
            index = crop.placement.index((number % z, y % along, 5 * number % x))
            highest = max(highest, float(train[before + index]["raw"].max()))
        before += len(crop.placement)
    assert highest == INSIDE
    first.splits.close()
    data.splits.close()


def box_of(box):
    return {f"{side}_nm": [box[axis][number] for axis in "zyx"] for number, side in enumerate(("min", "max"))}


def test_a_smaller_gap_is_used_with_a_warning(crop, caplog):
    with caplog.at_level(logging.WARNING):
        data = module(crop, {"gap_nm": 0}, context=32)
    assert boxes(data, "train")[0]["y"][1] == boxes(data, "val")[0]["y"][0]
    assert "the gap of 0 nm is smaller than the reach of training patches, which show up to 88 nm" in caplog.text


def test_a_class_in_one_part_alone_is_named_with_its_voxels(crop, caplog):
    with caplog.at_level(logging.WARNING):
        module(crop, {"position": "end"})
    assert "er has 20 voxels in validation and none in training, so it is not learnt" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        module(crop, {"position": "start"})
    assert "er has 20 voxels in training and none in validation, so it has no score" in caplog.text
    assert "mito" not in caplog.text
    with caplog.at_level(logging.INFO):
        module(crop, {"position": "start"})
    assert re.search(
        r"at the resolution of the targets, mito has [\d,]+ voxels in training and [\d,]+ in validation", caplog.text
    )


def test_samples_and_batches_are_deterministic(crop):
    batches = []
    for _ in range(2):
        data = module(crop, {"position": "random", "fraction": 0.2})
        batches.append(next(iter(data.train_dataloader())))
        data.splits.close()
    for name, value in batches[0].items():
        torch.testing.assert_close(value, batches[1][name], equal_nan=True)


def test_raw_alone_is_cut(crop):
    data = CellMapDataModule(
        None, {"raw": SPEC}, datasets={"train": [{"raw": crop["raw"]}]}, split={"blocks": {"axis": "z"}}
    )
    data.setup("fit")
    assert boxes(data, "val") == [{"z": [512, 640], "y": [0, 1280], "x": [0, 640]}]
    assert boxes(data, "train") == [{"z": [0, 488], "y": [0, 1280], "x": [0, 640]}]


def test_named_crops_are_cut_and_others_train(crop):
    other = {**crop, "gt": crop["gt"].replace("crop1/[mito,er]", "crop1/mito"), "weight": 2}
    data = module(crop, {"crops": ["crop1"]}, datasets={"train": [crop, other]}, leakage="ignore")
    assert len(boxes(data, "val")) == 2
    with pytest.raises(CellMapError, match=r"split.blocks.crops: 'crop7' matches nothing"):
        module(crop, {"crops": ["crop7"]})
    with pytest.raises(CellMapError, match=r"split.blocks.crops is an empty list"):
        module(crop, {"crops": []})


def test_a_box_is_cut_inside(crop):
    data = module({**crop, "box": "0:40 20:100 0:40 voxels"})
    assert boxes(data, "train")[0]["y"][0] == 320
    assert boxes(data, "val")[0]["y"] == [832, 960]


def test_several_boxes(crop):
    data = module(crop, {"count": 2, "position": "end", "fraction": 0.3})
    assert [box["y"] for box in boxes(data, "val")] == [[496, 640], [976, 1120]]
    assert [box["y"] for box in boxes(data, "train")] == [[160, 472], [664, 952]]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fold": 1}, "fold=1 is an option of rules such as split=kfold"),
        ({"n_folds": 3}, "n_folds=3 is an option of rules"),
        ({"val_fraction": 0.3}, "set split.blocks.fraction"),
        ({"split": {"blocks": {}, "folds": 3}}, "split must be the name of a rule"),
    ],
)
def test_options_of_other_rules_are_refused(crop, options, text):
    with pytest.raises(CellMapError) as caught:
        module(crop, **options)
    assert text in str(caught.value)


def test_crops_for_validation_beside_it_are_refused(crop):
    with pytest.raises(
        CellMapError, match=r"split=blocks cuts validation out of .* and datasets gives 1 for validation"
    ):
        module(crop, datasets={"train": [crop], "val": [crop]})
    with pytest.raises(CellMapError, match=r"split=blocks cuts crops for training, and datasets has none"):
        _ = module(crop, datasets={"test": [crop]}).splits.entries


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ({"gap_nm": 2000}, "jrc_a/crop1, along y: a part for training is 0 nm long, and a patch needs 128 nm"),
        ({"fraction": 0.05}, "jrc_a/crop1, along y: the part for validation is 48 nm long, and a patch needs 128 nm"),
        ({"axis": "z", "position": "middle"}, "are needed, and the crop has 320 nm"),
    ],
)
def test_parts_that_are_too_small_are_refused(crop, blocks, text):
    with pytest.raises(CellMapError) as caught:
        module(crop, blocks)
    assert text in str(caught.value)
