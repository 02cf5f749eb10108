"""Targets that are a mask, an array of ids or a crop without its classes: the message says what to give instead."""

import shlex
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapError, MetadataError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.writer import write_multiscale
from tests.io.formats import writers

SPEC = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
RAW = np.random.default_rng(0).integers(1, 255, (16, 24, 24)).astype(np.uint8)
COMMAND = [sys.executable, "-c", "from cellmap_lightning.commands.convert_command import main; main()"]


def ids(*values):
    return np.asarray(values, np.uint8)[np.indices((16, 24, 24)).sum(0) // 8 % len(values)]


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def raw(tmp_path):
    write_multiscale(tmp_path / "vol.zarr" / "em", RAW, scale=(8, 8, 8), translation=(0, 0, 0))
    return tmp_path / "vol.zarr" / "em"


def opened(raw, target, classes=("mito",)):
    return CellMapDataset(
        raw, str(target), list(classes), {"raw": SPEC}, {"labels": SPEC}, read=ReadOptions(voxel_size={"gt": [8, 8, 8]})
    )


def calibrated(folder, voxels):
    tifffile.imwrite(
        folder / "mask.tif", voxels, imagej=True, resolution=(1 / 8, 1 / 8),
        metadata={"axes": "ZYX", "unit": "nm", "spacing": 8},
    )  # fmt: skip
    return folder / "mask.tif"


@pytest.mark.parametrize("write", [writers.tiff, writers.npy, calibrated])
@pytest.mark.parametrize(
    ("values", "classes", "label_map"),
    [
        ((0, 255), ["mito"], "{255: mito}"),
        ((0, 1), ["mito"], "{1: mito}"),
        ((0, 1, 255), ["mito"], "{1: mito, 255: unknown}"),
        ((0, 1, 2), ["mito", "er"], "{1: NAME, 2: NAME}"),
        ((0, 255), ["mito", "er"], "{255: NAME}"),
        ((0,), ["mito"], "{1: NAME}"),
    ],
)
def test_a_mask_as_target_is_explained(tmp_path, raw, write, values, classes, label_map):
    path = write(tmp_path, ids(*values))
    with pytest.raises(CellMapError) as caught:
        opened(raw, path, classes)
    text = str(caught.value)
    output = path.with_suffix(".zarr")
    assert f"it has ['{path.name}']; {path} is an array of ids: give its entry labels={label_map} (in a CSV" in text
    size = "" if write is calibrated else " voxel_size=[z,y,x]"
    assert f"cellmap-convert input={path} output={output} 'classes={label_map}'{size}, and give the target" in text
    assert text.endswith(f"{output}/[{'mito' if 'mito' in label_map else 'NAME'}]")


@pytest.mark.parametrize("folder", ["data", "my data", "[2024] a'b"])
def test_the_command_in_the_message_works(tmp_path, raw, folder):
    (tmp_path / folder).mkdir()
    path = calibrated(tmp_path / folder, ids(0, 255))
    with pytest.raises(CellMapError) as caught:
        opened(raw, path)
    command, _, target = str(caught.value).partition("cellmap-convert ")[2].partition(", and give the target ")
    arguments = shlex.split(command)
    if folder != "data":  # Hydra's own quotes for blanks, brackets and quotes in values are the user's
        assert arguments[0] == f"input={path}"
        return
    done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with opened(raw, target) as data:
        values = data[0]["labels"].numpy()
    assert set(np.unique(values)) == {0, 1}


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_the_file_of_a_class_is_named_without_its_suffix(tmp_path, raw, suffix):
    (tmp_path / "crop1").mkdir()
    writer = {".tif": writers.tiff, ".npy": writers.npy}[suffix]
    path = writer(tmp_path, ids(0, 1)).rename(tmp_path / "crop1" / f"mito{suffix}")
    with pytest.raises(CellMapError, match=r"is named without its suffix, mito: write \".*/crop1/\[mito\]\"$"):
        opened(raw, path)
    with opened(raw, path.with_suffix("")) as data:
        assert set(np.unique(data[0]["labels"].numpy())) == {0, 1}


@pytest.mark.parametrize("names", [["mito"], ["er", "mito"], ["er", "mito", "pm"]])
def test_a_crop_without_a_bracket_is_explained(tmp_path, raw, names):
    for name in names:
        group = raw.parent / "crop1" / name
        write_multiscale(group, ids(0, 1), scale=(8, 8, 8), translation=(0, 0, 0), mode="mode")
    (tmp_path / "crops.csv").write_text("train,vol.zarr/em,vol.zarr/crop1\n")
    text = str(inspect({"csv_path": str(tmp_path / "crops.csv")}, {}, None).refused)
    assert f"ame the classes of a crop in a bracket, as in {raw.parent}/crop1/[{','.join(names)}]" in text
    with pytest.raises(CellMapError) as caught:
        opened(raw, raw.parent / "crop1")
    crop = raw.parent / "crop1"
    assert str(caught.value).endswith(f"'{crop}' is a folder of classes ({', '.join(names)}); write \"{crop}/[mito]\"")


def test_other_groups_without_an_image_get_no_bracket(tmp_path, raw):
    for name in "ab":
        (tmp_path / "vol.zarr" / "crop1" / name / "labels" / "x").mkdir(parents=True)
    for target in ("vol.zarr/crop1/[a,b]", "vol.zarr/crop1/[a]/labels"):
        with pytest.raises(MetadataError) as caught:
            opened(raw, f"{tmp_path}/{target}", ["a"])
        assert "in a bracket" not in str(caught.value)
