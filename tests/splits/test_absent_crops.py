"""Manifests of which only some datasets or crops are on disk."""

import shutil

import pytest

from cellmap_lightning.crops.crop_name import CropName
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.manifests import GROUNDTRUTH, raw_of
from cellmap_lightning.splits.options import SplitOptions
from tests.commands.test_cli import run_forked
from tests.geometries import write_challenge

CROPS = [("jrc_a", 1), ("jrc_a", 2), ("jrc_a", 3), ("jrc_b", 4), ("jrc_b", 5), ("jrc_c", 6)]
STEP, SHAPE = [8.0, 8.0, 8.0], [32, 32, 32]


@pytest.fixture
def data(tmp_path):
    """Three datasets with three, two and one crops, and their manifest."""
    crops = {(dataset, f"crop{n}"): (STEP, [320.0 * n, 4.0, 4.0], SHAPE, ["mito", "er"]) for dataset, n in CROPS}
    write_challenge(tmp_path / "data", crops, share=2)
    lines = ["crop_name,dataset,class_label,voxel_size,translation,shape"]
    for (dataset, crop), (step, origin, shape, names) in crops.items():
        lists = ",".join("[" + ";".join(map(str, values)) + "]" for values in (step, origin, shape))
        lines += [f"{crop[4:]},{dataset},{name},{lists}" for name in names]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    return tmp_path


def settings(data, **more):
    return {"search_path": str(data / "data"), "manifest": str(data / "manifest.csv"), **more}


@pytest.mark.parametrize(
    ("removed", "lines", "hint"),
    [
        (["jrc_b"], ["  jrc_b: the dataset is not there, 2 crops"], {"only_datasets": ["jrc_a", "jrc_c"]}),
        (
            ["jrc_c", "jrc_b"],
            ["  jrc_b: the dataset is not there, 2 crops", "  jrc_c: the dataset is not there, 1 crop"],
            {"only_datasets": ["jrc_a"]},
        ),
        (
            [f"jrc_a/jrc_a.zarr/{GROUNDTRUTH}/crop2"],
            ["  jrc_a: 1 of its 3 crops: crop2"],
            {"only_crops": ["jrc_a/crop1", "jrc_a/crop3", "jrc_b/crop4", "jrc_b/crop5", "jrc_c/crop6"]},
        ),
    ],
)
def test_one_line_per_dataset_and_a_hint_that_works(data, removed, lines, hint):
    inspect(settings(data), {}, None)
    for name in removed:
        shutil.rmtree(data / "data" / name)
    with pytest.raises(CellMapFileNotFoundError) as caught:
        inspect(settings(data), {}, None)
    first, *found, last = str(caught.value).splitlines()
    assert "crops that manifest.csv lists are not in search_path" in first
    assert found == lines
    ((key, names),) = hint.items()
    assert last.startswith(f"data.{key}=[{','.join(names)}] takes the")
    assert inspect(settings(data, **hint), {}, None).refused is None


def test_nothing_on_disk_asks_for_the_folder(data):
    for name in ("jrc_a", "jrc_b", "jrc_c"):
        shutil.rmtree(data / "data" / name)
    with pytest.raises(CellMapFileNotFoundError, match="none is there: is search_path the folder of"):
        inspect(settings(data), {}, None)


def test_the_command_prints_few_lines(data):
    shutil.rmtree(data / "data" / "jrc_a")
    code, text = run_forked("data.search_path=data", "data.manifest=manifest.csv", cwd=data, command="inspect")
    assert code == 1
    assert len(text.splitlines()) < 8
    assert "data.only_datasets=[jrc_b,jrc_c]" in text


def test_predictions_name_the_crops_that_are_there(data):
    names = [CropName(dataset, f"crop{n}") for dataset, n in CROPS]
    assert list(raw_of(data / "data", names)) == ["jrc_a", "jrc_b", "jrc_c"]
    shutil.rmtree(data / "data" / "jrc_a")
    with pytest.raises(CellMapFileNotFoundError) as caught:
        raw_of(data / "data", names)
    first, line, last = str(caught.value).splitlines()
    assert first.endswith("does not hold 1 of the 3 datasets of these crops:")
    assert line == "  jrc_a: 3 crops"
    assert "crops=[4,5,6] takes those" in last
    shutil.rmtree(data / "data" / "jrc_b")
    with pytest.raises(CellMapFileNotFoundError, match=r"2 of the 3 datasets[^!]*crops=\[6\]"):
        raw_of(data / "data", names)


@pytest.mark.parametrize(
    ("listed", "hint"),
    [
        ("jrc_A", "did you mean 'jrc_a'?"),
        ("jrc__a", "did you mean 'jrc_a'?"),
        ("jrc-a", "did you mean 'jrc_a'?"),
        ("other", ""),
    ],
)
def test_a_dataset_under_another_name(data, listed, hint):
    manifest = data / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",jrc_a,", f",{listed},"))
    with pytest.raises(CellMapFileNotFoundError) as caught:
        inspect(settings(data), {}, None)
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith(f"  {listed}: ")]
    assert line == f"  {listed}: the dataset is not there, 3 crops" + f"; {hint}" * bool(hint)


def test_datasets_of_other_numbers_are_others(data):
    for old, new in (("jrc_b", "jrc_mus-2"), ("jrc_c", "jrc_mus-3")):
        (data / "data" / old / f"{old}.zarr").rename(data / "data" / old / f"{new}.zarr")
        (data / "data" / old).rename(data / "data" / new)
    manifest = data / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",jrc_b,", ",jrc_mus-1,").replace(",jrc_c,", ",jrc_mus-3,"))
    with pytest.raises(CellMapFileNotFoundError, match="jrc_mus-1: the dataset is not there, 2 crops\n"):
        inspect(settings(data), {}, None)


@pytest.mark.parametrize(
    ("name", "close"), [("mitos", "'mito'"), ("er_membrane", "'er'"), ("mit", "'mito'"), ("golgi", None)]
)
def test_a_misspelt_class_beside_another(data, name, close):
    """The error lists the classes of the crops, not those alone that are read."""
    classes = ["er", name] if name != "er_membrane" else ["mito", name]
    spec = {"shape": [16] * 3, "scale": STEP}
    split = CellMapDataSplit(
        search_path=str(data / "data"), classes=classes, input_arrays={"raw": spec}, target_arrays={"labels": spec},
        options=SplitOptions(split="stratified"),
    )  # fmt: skip
    with pytest.raises(CellMapValueError) as caught:
        split["train"]
    assert f"no crop for 'train' annotates {name!r}" in str(caught.value)
    assert "; they annotate er, mito: " in str(caught.value)
    assert (f"did you mean {close}?" in str(caught.value)) == (close is not None)


@pytest.mark.parametrize(
    ("dataset", "hint"),
    [("jrc_A", "; did you mean 'jrc_a'?"), ("jrc-b", "; did you mean 'jrc_b'?"), ("mouse", ""), ("jrc_a2", "")],
)
def test_predictions_name_the_dataset_that_is_meant(data, dataset, hint):
    with pytest.raises(CellMapFileNotFoundError) as caught:
        raw_of(data / "data", [CropName(dataset, "crop1")])
    assert str(caught.value).splitlines()[1] == f"  {dataset}: 1 crop{hint}"
