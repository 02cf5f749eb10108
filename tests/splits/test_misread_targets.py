"""Targets whose last part was read as a class, although it is a folder of classes, an array or a file."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.options import SplitOptions
from tests.io.formats import writers

SPEC = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
RAW = np.random.default_rng(0).integers(1, 255, (48, 24, 24)).astype(np.uint8)
MASK = np.where(np.indices(RAW.shape).sum(0) // 8 % 2, 255, 0).astype(np.uint8)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, voxels in (("em", RAW), ("crop1/mito", MASK // 255), ("crop1/er", MASK // 255), ("mask", MASK)):
        write_multiscale(
            tmp_path / "vol.zarr" / name, voxels, scale=(8, 8, 8), translation=(0, 0, 0),
            mode="mean" if name == "em" else "mode",
        )  # fmt: skip
    (tmp_path / "lab").mkdir()
    writers.tiff(tmp_path, MASK).rename(tmp_path / "lab" / "mito.tif")
    writers.tiff(tmp_path, MASK).rename(tmp_path / "mask.tif")


def crops(target, form="csv"):
    if form == "csv":
        Path("v1.csv").write_text(f'train,vol.zarr/em,"{target}"\n')
        return {"csv_path": "v1.csv"}, "v1.csv, line 1"
    entries = {"train": [{"raw": "vol.zarr/em", "gt": target}]}
    return {"datasets": yaml.safe_load(yaml.safe_dump(entries)) if form == "yaml" else entries}, "datasets.train[0]"


def split_of(source, classes=("mito",), rule="csv", patch=SPEC):
    return CellMapDataSplit(
        classes=list(classes), input_arrays={"raw": patch}, target_arrays={"labels": patch},
        options=SplitOptions(split=rule), read=ReadOptions(voxel_size={"gt": [8, 8, 8]}), **source,
    )  # fmt: skip


MESSAGES = {
    "vol.zarr/crop1": "'vol.zarr/crop1' is a folder of classes (er, mito); write \"vol.zarr/crop1/[mito]\"",
    "vol.zarr/mask": (
        "'vol.zarr/mask' is one array, and no folder of classes, so that its name 'mask' was read as the class: give "
        "its entry labels={255: mito} (in a CSV in the column labels, with quotes), or name it as a class: "
        "classes=[mask]"
    ),
    "vol.zarr": (
        "'vol.zarr' is neither a label image nor a folder of classes; it holds crop1, em, mask; the target of a "
        "crop is written as in .../crop1/[mito,er]"
    ),
    "lab/mito.tif": "'lab/mito.tif' is a file, whose class is named without its suffix, mito: write \"lab/[mito]\"",
}


@pytest.mark.cover(2)
@pytest.mark.parametrize("rule", ["csv", "blocks", "random"])
@pytest.mark.parametrize("form", ["csv", "yaml", "python"])
@pytest.mark.parametrize(("target", "text"), MESSAGES.items(), ids=MESSAGES)
def test_the_message_says_what_to_write(target, text, form, rule):
    source, where = crops(target, form)
    with pytest.raises(CellMapError) as caught:
        _ = split_of(source, rule=rule).entries
    assert str(caught.value) == f"{where}: {text}"


@pytest.mark.parametrize(
    ("before", "after", "labels", "classes"),
    [
        ("vol.zarr/crop1", "vol.zarr/crop1/[mito]", "", ["mito"]),
        ("vol.zarr/mask", "vol.zarr/mask", "{255: mito}", ["mito"]),
        ("vol.zarr/mask", "vol.zarr/mask", "", ["mask"]),
        ("lab/mito.tif", "lab/[mito]", "", ["mito"]),
        ("mask.tif", "mask.tif", "{255: mito}", ["mito"]),
        ("mask.tif", "[mask]", "", ["mask"]),
    ],
)
def test_what_the_message_says_is_read(before, after, labels, classes):
    with pytest.raises(CellMapError):
        _ = split_of(crops(before)[0]).entries
    Path("v2.csv").write_text(f'usage,raw,target,labels\ntrain,vol.zarr/em,"{after}","{labels}"\n')
    with split_of({"csv_path": "v2.csv"}, classes)["train"] as train:
        values = np.concatenate([train[i]["labels"].numpy().ravel() for i in range(4)])
    assert set(np.unique(values)) == {0, 1}


@pytest.mark.cover(1)
@pytest.mark.parametrize("rule", ["csv", "blocks", "random"])
@pytest.mark.parametrize(
    ("target", "classes", "bracket"),
    [
        ("mask.tif", ["mask.tif"], "[mask]"),
        ("[mask.tif]", ["mask.tif"], "[mask]"),
        ("lab/mito.tif", ["mito.tif"], "lab/[mito]"),
        ("lab/[mito.tif,er]", ["mito.tif", "er"], "lab/[mito,er]"),
    ],
)
def test_no_class_has_the_suffix_of_a_file(target, classes, bracket, rule):
    with pytest.raises(CellMapError, match="named without") as caught:
        _ = split_of(crops(target)[0], classes, rule).entries
    assert str(caught.value).endswith(f'write "{bracket}"')


@pytest.mark.parametrize("target", ["mask.tif", "[mask.tif]", "lab/mito.tif"])
def test_an_inspection_refuses_such_a_class(target):
    with pytest.raises(CellMapError, match="is a file, whose class is named without its suffix"):
        inspect(crops(target)[0], {}, None)


@pytest.mark.parametrize("target", ["vol.zarr/crop1/er", "vol.zarr/crop1/[er]", "vol.zarr/crop1/[er,mito]"])
def test_other_classes_are_no_mistake(target):
    Path("v3.csv").write_text(f'train,vol.zarr/em,"vol.zarr/crop1/[mito]"\ntrain,vol.zarr/em,"{target}"\n')
    assert len(split_of({"csv_path": "v3.csv"}, ["mito"]).entries["train"]) == 2


def test_several_targets_are_one_table():
    Path("v4.csv").write_text("train,vol.zarr/em,vol.zarr/crop1\nval,vol.zarr/em,vol.zarr/mask\n")
    with pytest.raises(CellMapError) as caught:
        _ = split_of({"csv_path": "v4.csv"}).entries
    head, first, second = str(caught.value).splitlines()
    assert head == "the targets of 2 of the 2 crops of v4.csv do not name their classes:"
    assert first.startswith("  v4.csv, line 1  'vol.zarr/crop1' is")
    assert "line 2  'vol.zarr/mask' is" in second
