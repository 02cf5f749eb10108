"""Leakage between training and validation, and names in brackets that are not classes."""

import csv
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule, CellMapDataset, CellMapError
from cellmap_lightning.demo.synthetic import write_group, write_multiscale
from cellmap_lightning.inspection.report import inspect
from tests.conftest import INPUTS, TARGETS
from tests.runs import GT

pytestmark = pytest.mark.usefixtures("quiet_lightning")


def module(train, val, **kwargs):
    given = {"input_arrays": INPUTS, "target_arrays": TARGETS, "datasets": {"train": train, "val": val}}
    return CellMapDataModule(["mito", "er"], **(given | kwargs))


def crop(volume, number, classes="mito,er"):
    return {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop{number}/[{classes}]"}


def linked(volume, folder):
    (folder / "link.zarr").symlink_to(volume.path)
    return {key: path.replace(str(volume.path), f"{folder}/link.zarr") for key, path in crop(volume, 2).items()}


def copied(volume, folder):
    """The labels of crop2 under another name, elsewhere."""
    shutil.copytree(f"{volume.path}/{GT}/crop2", folder / "mine" / "crop77")
    return {"raw": volume.raw_path, "gt": f"{folder}/mine/crop77/[mito,er]"}


def relative(volume, folder):
    return {key: os.path.relpath(path) for key, path in crop(volume, 2).items()}


SAME = {
    "itself": lambda volume, folder: crop(volume, 2),
    "other classes": lambda volume, folder: crop(volume, 2, "er,mito"),
    "dots": lambda volume, folder: crop(volume, 2) | {"gt": f"{volume.path}/{GT}/crop3/../crop2/[mito,er]"},
    "slashes": lambda volume, folder: crop(volume, 2) | {"raw": f"{volume.raw_path}/"},
    "a link": linked,
    "a relative path": relative,
    "a copy of the labels": copied,
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_crop_in_train_and_val(volume, tmp_path, kind, caplog):
    train, val = [crop(volume, 2), crop(volume, 3)], [SAME[kind](volume, tmp_path), crop(volume, 4)]
    with module(train, val) as data, pytest.raises(CellMapError, match="'train' and 'val' share 1 crop,") as e:
        data.setup("fit")
    assert "crop2" in str(e.value)
    assert "crop3" not in str(e.value)
    with caplog.at_level(logging.WARNING, "cellmap_lightning"), module(train, val, leakage="warn") as data:
        data.setup("fit")
    assert "crops for 'train' overlap crops for 'val':\n" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cellmap_lightning"), module(train, val, leakage="ignore") as data:
        data.setup("fit")
    assert "overlap" not in caplog.text


def test_crops_of_other_places_are_fine(volume, caplog):
    with (
        caplog.at_level(logging.WARNING, "cellmap_lightning"),
        module([crop(volume, 2), crop(volume, 3)], [crop(volume, 4)]) as data,
    ):
        data.setup("fit")
        data.setup("test")
    assert "overlap" not in caplog.text


def test_test_crops_count_too(volume):
    sets = {"train": [crop(volume, 2)], "val": [crop(volume, 3)], "test": [crop(volume, 2)]}
    with module(None, None, datasets=sets) as data:
        data.setup("fit")
        with pytest.raises(CellMapError, match="'train' and 'test' share 1 crop,"):
            data.setup("test")
    sets["test"] = sets["val"]  # as often: what validates is also tested on
    with module(None, None, datasets=sets) as data:
        data.setup()


@pytest.fixture
def small(tmp_path):
    """Raw of 32 voxels of 8 nm, a second version of it beside it, and crops in it."""
    folder = tmp_path / "jrc_a.zarr"
    rng = np.random.default_rng(0)
    for path in ("", "recon-1", "recon-1/em", "labels"):
        write_group(folder / path)
    for name, kind in (("one", np.uint8), ("two", np.uint16)):
        raw = rng.integers(0, 255, (32, 32, 32)).astype(kind)
        write_multiscale(folder / "recon-1" / "em" / name, raw, scale=(8, 8, 8), translation=(0, 0, 0), levels=1)

    def add(name, lower, shape=(16, 16, 16)):
        write_group(folder / "labels" / name)
        write_multiscale(
            folder / "labels" / name / "mito", rng.integers(0, 2, shape).astype(np.uint8), scale=(8, 8, 8),
            translation=tuple(8.0 * n for n in lower), levels=1,
        )  # fmt: skip
        return f"{folder}/labels/{name}/[mito]"

    return folder, add


SPEC = {"shape": [8, 8, 8], "scale": [8, 8, 8]}


def fit(folder, train, val, raws=("one", "one"), **kwargs):
    sets = {
        name: [{"raw": f"{folder}/recon-1/em/{raw}", "gt": path}]
        for name, path, raw in zip(("train", "val"), (train, val), raws, strict=True)
    }
    with CellMapDataModule(["mito"], {"raw": SPEC}, {"labels": SPEC}, datasets=sets, **kwargs) as data:
        data.setup("fit")


def test_crops_that_overlap_are_warned_of(small, caplog):
    folder, add = small
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        fit(folder, add("crop1", (0, 0, 0)), add("crop2", (8, 4, 0)))
    assert "jrc_a/crop1 overlaps jrc_a/crop2 by 64 x 96 x 128 nm (z y x), 38% of the latter" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        fit(folder, add("crop3", (0, 0, 0)), add("crop4", (16, 0, 0)))  # they share a face
        fit(folder, add("crop5", (0, 0, 0)), add("crop6", (16, 0, 0), (8, 8, 8)))
        fit(folder, add("crop7", (0, 0, 0)), add("crop8", (8, 4, 0)), leakage="ignore")
    assert "overlap" not in caplog.text


def test_versions_of_one_volume_are_one_volume(small):
    folder, add = small
    with pytest.raises(CellMapError, match=r"leave them out.*\n  jrc_a/crop1 is jrc_a/crop2"):
        fit(folder, add("crop1", (0, 0, 0)), add("crop2", (0, 0, 0)), raws=("one", "two"))


def manifest(folder, rows):
    with (folder / "test_crop_manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["crop_name", "dataset", "class_label", "voxel_size", "translation", "shape"])
        table.writerows(rows)
    return str(folder / "test_crop_manifest.csv")


def test_crops_that_are_held_out(small, tmp_path, caplog):
    folder, add = small
    train, val = add("crop1", (0, 0, 0)), add("crop2", (16, 16, 16))
    row = ["mito", "[8;8;8]", "[0;0;0]", "[16;16;16]"]
    with pytest.raises(
        CellMapError, match=r"'train' and 'held_out' share .*\n  jrc_a/crop1 is jrc_a/crop900 \(held out\)"
    ):
        fit(folder, train, val, held_out=manifest(tmp_path, [["900", "jrc_a", *row], ["901", "jrc_b", *row]]))
    row[2] = "[64;64;64]"
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        fit(folder, train, val, held_out=manifest(tmp_path, [["900", "jrc_a", *row]]))
    assert "overlaps jrc_a/crop900 (held out) by 64 x 64 x 64 nm" in caplog.text
    with pytest.raises(CellMapError, match="does not exist"):
        fit(folder, train, val, held_out=str(tmp_path / "none.csv"))
    with pytest.raises(CellMapError, match="leakage must be one of error, warn, ignore, got 'yes'"):
        fit(folder, train, val, leakage="yes")


def test_raw_alone_is_warned_of(volume, caplog):
    """Without annotations there is nothing to leak but raw."""
    sets = {"train": [{"raw": volume.raw_path}], "val": [{"raw": volume.raw_path}]}
    with (
        caplog.at_level(logging.WARNING, "cellmap_lightning"),
        CellMapDataModule(None, INPUTS, datasets=sets) as data,
    ):
        data.setup("fit")
    assert "crops for 'train' overlap crops for 'val'" in caplog.text


def test_inspect_lists_them(volume, small):
    folder, add = small
    sets = {"train": [crop(volume, 2)], "val": [crop(volume, 2), crop(volume, 4)]}
    found = inspect({"datasets": sets, "classes": ["mito", "er"]}, {"shape": None, "scale": None}, None)
    assert [p.text for p in found.problems if p.kind == "leakage"] == ["volume/crop2"]
    raw = f"{folder}/recon-1/em/one"
    sets = {
        "train": [{"raw": raw, "gt": add("crop1", (0, 0, 0))}],
        "test": [{"raw": raw, "gt": add("crop2", (8, 4, 0))}],
    }
    found = inspect({"datasets": sets, "classes": ["mito"]}, {"shape": None, "scale": None}, None)
    assert ["by 64 x 96 x 128 nm" in p.text for p in found.problems if p.kind == "leakage"] == [True]


# -- names in brackets


@pytest.mark.parametrize(
    ("bracket", "match"),
    [
        ("mitoo,er", "has no 'mitoo', which .*; did you mean 'mito'?"),
        ("Mito,er", "has no 'Mito', which .*; did you mean 'mito'?"),
        ("mito er,er", "has no 'mito er', which .*; did you mean 'mito'?"),
        ("mito,er,zzzzzz", "has no 'zzzzzz', which .*; it has "),
        ("mitoo", "has no 'mitoo', which .*; did you mean 'mito'?"),
    ],
)
def test_a_name_of_no_class(volume, bracket, match):
    with pytest.raises(CellMapError, match=match):
        CellMapDataset(volume.raw_path, f"{volume.path}/{GT}/crop2/[{bracket}]", ["mito", "er"], INPUTS, TARGETS)
    entry = crop(volume, 2, bracket)
    with module([crop(volume, 3)], [entry]) as data, pytest.raises(CellMapError, match=match):
        data.setup("fit")


def test_names_that_are_fine(volume, tmp_path):
    """Classes that are there and not asked for, and others of a table or a relation."""
    names = sorted(p.name for p in Path(f"{volume.path}/{GT}/crop2").iterdir() if p.is_dir())
    with CellMapDataset(
        volume.raw_path, f"{volume.path}/{GT}/crop2/[{','.join(names)}]", ["mito"], INPUTS, TARGETS
    ) as dataset:
        assert dataset.annotated == ("mito",)
    with pytest.raises(CellMapError, match="crop2000"):
        CellMapDataset(volume.raw_path, f"{volume.path}/{GT}/crop2000/[mitoo]", ["mito"], INPUTS, TARGETS)
