"""Crops partly outside of raw: targets are unknown there, and the share is reported once."""

import logging

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule, CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapValueError
from tests.foreign import SEMANTIC, annotated, counts_of, cube, dataset, ramp, sample, write_image, write_pair

FORMATS = [2, 3]
#: Translation of the crop, raw begins at 0: voxels of it that are outside, and the part.
SHIFTS = {
    "below": ((-64, 0, 0), np.s_[:8], 25),
    "above": ((0, 0, 128), np.s_[:, :, 16:], 50),
    "a corner": ((0, -64, -64), (slice(None), slice(None), slice(None)), 100 * (1 - 0.75**2)),
}


def outside(name):
    found = np.zeros((32, 32, 32), bool)
    if name == "a corner":
        found[:, :8], found[:, :, :8] = True, True
    else:
        found[SHIFTS[name][1]] = True
    return found


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("name", SHIFTS)
def test_targets_are_unknown_there(tmp_path, caplog, name, zarr_format, reader):
    translation, _, part = SHIFTS[name]
    stored = np.ones((32,) * 3, "u1")
    raw, target = write_pair(
        tmp_path, stored, zarr_format=zarr_format, translation=translation,
        array_attributes=annotated(SEMANTIC, counts_of(stored)),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        found = sample(raw, target, pad=True, reader=reader)
    assert np.array_equal(np.isnan(found["labels"]), outside(name))
    assert (found["labels"][~outside(name)] == 1).all()
    assert (found["raw"][outside(name)] == 0).all()
    assert (found["raw"][~outside(name)] > 0).all()
    lines = [r.message for r in caplog.records if "lies outside of raw" in r.message]
    assert len(lines) == 1
    assert f"v/crop1: {part:.3g} % of the crop" in lines[0]


@pytest.mark.parametrize(
    ("kind", "unknown"), [("labels", -100), ("instances", -1), ("sdt", np.nan), ("affinities", np.nan)]
)
def test_in_every_kind_of_target(tmp_path, kind, unknown):
    raw, target = write_pair(
        tmp_path, np.ones((32,) * 3, "u1"), translation=(-64, 0, 0), attributes=annotated(SEMANTIC)
    )
    array = {"shape": [32] * 3, "scale": [8] * 3}
    more = {"sdt": {"nm": 16}, "affinities": {"offsets": [[0, 0, 1]]}}.get(kind, {})
    targets = {"t": {**array, "kind": kind, **more}}
    with CellMapDataset(
        raw, target, ["mito"], {"raw": array}, targets, read=ReadOptions(pad=True, cache="none")
    ) as data:
        found = data[0]["t"].numpy()[0].astype(float)
    there = np.isnan(found) if np.isnan(unknown) else found == unknown
    assert there[:8].all()
    assert not there[12:-4, 4:-4, 4:-4].any()


@pytest.mark.parametrize("spatial", [{"mirror": {"axes": {"z": 1.0}}}, {"transpose": {"axes": ["z", "x"]}}, {
    "rotate": {"axes": {"z": [-180, 180]}}
}, {"elastic": {"spacing": 64, "magnitude": 25}}, {
    "misalign": {"probability": 0.2, "max_shift": 40, "thickness": 8}
}])  # fmt: skip
def test_turned_patches(tmp_path, spatial):
    """No target is known where raw is 0, whichever way the patch is turned."""
    raw, target = write_pair(
        tmp_path, np.ones((32,) * 3, "u1"), translation=(-64, 0, 0), attributes=annotated(SEMANTIC)
    )
    array = {"shape": [16] * 3, "scale": [8] * 3}
    with CellMapDataset(
        raw,
        target,
        ["mito"],
        {"raw": array},
        {"labels": array},
        is_train=True,
        spatial_transforms=spatial,
        seed=3,
        read=ReadOptions(pad=True, cache="none"),
    ) as data:
        batch = data.layout.finish(data.read(data.draw(range(24), True, 3)))
    dark, known = batch["raw"] == 0, ~batch["labels"].isnan()
    assert dark.any()
    assert known.any()
    # An interpolated voxel at the border of raw has its centre in it, and raw there.
    assert not (dark & known).any()


@pytest.mark.parametrize("inside", [(0, 0, 0), (64, 64, 64), (0, 0, 128)])
def test_crops_inside_raw_are_as_they_were(tmp_path, caplog, inside):
    raw = ramp((48,) * 3)
    paths = write_pair(tmp_path, cube(), raw=raw, translation=inside, attributes=annotated(SEMANTIC))
    with caplog.at_level(logging.WARNING), dataset(*paths, pad=True) as data:
        assert data.crop._partly_outside == []
        assert not data[0]["labels"].isnan().any()
    assert "outside of raw" not in caplog.text


def test_at_the_level_that_is_read(tmp_path):
    """A coarse level of raw may end before the volume does, and shows 0 from there on."""
    levels = {"s0": ([4] * 3, [0] * 3), "s1": ([16] * 3, [6] * 3)}
    write_image(tmp_path / "v.zarr" / "em", {"s0": ramp((67,) * 3), "s1": ramp((16,) * 3)}, levels=levels)
    stored = np.ones((67,) * 3, "u1")
    raw, target = write_pair(tmp_path, stored, scale=(4, 4, 4), attributes=annotated(SEMANTIC))
    array = {"labels": {"shape": [68] * 3, "scale": [4] * 3}}
    with CellMapDataset(
        raw,
        target,
        ["mito"],
        {"raw": {"shape": [17] * 3, "scale": [16] * 3}},
        array,
        read=ReadOptions(pad=True, cache="none"),
    ) as data:
        sample = data[0]
    assert (sample["raw"][0, -1] == 0).all()
    ends = np.isnan(sample["labels"][0].numpy())
    assert ends[:, :, 65:].all()
    assert not ends[:64, :64, :64].any()


def test_it_is_reported_once_for_all_planes(tmp_path, caplog):
    stored = np.full((32,) * 3, 255, "u1")
    stored[0] = 0
    raw, target = write_pair(tmp_path, stored, translation=(-64, 0, 0))
    array = {"shape": [16, 16], "scale": [8, 8]}
    entries = {"train": [{"raw": raw, "gt": target}]}
    with (
        CellMapDataModule(["mito"], array, array, datasets=entries, planes=["xy", "xz", "yz"]) as data,
        caplog.at_level(logging.INFO, "cellmap_lightning"),
    ):
        data.setup("fit")
        assert len(data.splits["train"].datasets) == 3
    assert sum("lies outside of raw" in r.message for r in caplog.records) == 1
    assert sum("have no encoding" in r.message for r in caplog.records) == 1


def test_a_crop_with_no_raw_at_all_is_refused(tmp_path):
    raw, target = write_pair(tmp_path, cube(), translation=(4000, 0, 0))
    with pytest.raises(CellMapValueError, match="lie outside the raw volume"):
        dataset(raw, target, pad=True)
