"""Classes that crops annotate under another spelling than the setting ``classes``."""

import logging
from pathlib import Path

import pytest

from cellmap_lightning.crops.spelling import closest_class, other_spellings
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.splits.manifests import GROUNDTRUTH, RAW
from cellmap_lightning.splits.options import SplitOptions
from tests.geometries import write_image, write_label
from tests.make import make_split

PATCH = {"shape": [8, 8, 8], "scale": [8, 8, 8]}


@pytest.fixture
def crops(tmp_path):
    """Write three crops, the second with a class under another name; returns a function of that name."""

    def write(stored, name="mito"):
        base = tmp_path / "jrc_a" / "jrc_a.zarr"
        write_image(base / RAW, [8, 8, 8], [0, 0, 0], [48, 16, 16])
        for number in (1, 2, 3):
            for folder in (stored if number == 2 else name, "er"):
                write_label(
                    base / GROUNDTRUTH / f"crop{number}" / folder, [8] * 3, [128 * (number - 1), 0, 0], [16] * 3, 20
                )
        return tmp_path

    return write


def split(classes, n_folds=3, **source):
    rule = {"split": "kfold", "n_folds": n_folds} if "search_path" in source else {}
    arrays = {"input_arrays": {"raw": PATCH}, "target_arrays": {"labels": PATCH}, "leakage": "ignore"}
    return make_split(classes=classes, pad=True, **arrays, **rule, **source)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "spelt" in r.getMessage()]


SPELLINGS = [("Mito", "mito"), ("er-mem", "er_mem"), (" mito", "mito"), ("er mem", "er_mem"), ("MITO", "mito")]


@pytest.mark.parametrize(("stored", "name"), SPELLINGS)
def test_a_folder_is_one_warning_and_a_problem(crops, caplog, stored, name):
    folder = crops(stored, name)
    found = split([name, "er"], search_path=str(folder))
    for part in ("train", "val"):
        assert found[part].annotated_in()["er"]
    (message,) = warnings_of(caplog)
    assert f"{name!r} is {stored!r} in jrc_a/crop2;" in message
    data = {"search_path": str(folder), "classes": [name, "er"], "split": "kfold", "n_folds": 3}
    report = inspect(data, {}, None)
    (problem,) = [p for p in report.problems if p.kind == "spelling"]
    assert problem.where == "jrc_a/crop2"
    assert repr(stored) in problem.text
    assert repr(name) in problem.text


def test_a_class_of_its_own_is_none(crops, caplog):
    found = split(["mito", "Mito", "er"], search_path=str(crops("Mito")))
    assert found["train"].annotated_in()["er"]
    assert found.other_spellings == []
    assert not warnings_of(caplog)


def test_crops_that_are_filtered_out_are_not_named(crops):
    source = {"search_path": str(crops("Mito"))}
    assert [found.crop for found in split(["mito"], **source).other_spellings] == ["jrc_a/crop2"]
    assert split(["mito", "er"], only_crops=["crop1", "crop3"], n_folds=2, **source).other_spellings == []
    (found,) = split(["mito", "er"], only_crops=["crop1", "crop2", "crop3"], n_folds=3, **source).other_spellings
    assert found.stored == "Mito"


@pytest.mark.parametrize(("stored", "name"), [("Mito", "mito"), ("er-mem", "er_mem"), ("MITO", "mito")])
def test_a_bracket_is_an_error(crops, tmp_path, stored, name):
    base = crops(stored, name) / "jrc_a" / "jrc_a.zarr"
    rows = [
        f'train,{base / RAW},"{base / GROUNDTRUTH}/crop1/[{name},er]"',
        f'train,{base / RAW},"{base / GROUNDTRUTH}/crop2/[{stored},er]"',
    ]
    file = Path(tmp_path / "crops.csv")
    file.write_text("\n".join(rows))
    with pytest.raises(
        CellMapValueError, match=rf"crop2: the bracket \[{stored},er\] names {stored!r}, and .*{name!r}"
    ):
        _ = split([name, "er"], csv_path=str(file))["train"]
    report = inspect({"csv_path": str(file), "classes": [name, "er"]}, {}, None)
    assert report.refused is not None
    assert "rename the folder" in report.refused
    assert [p.where for p in report.problems if p.kind == "spelling"] == ["jrc_a/crop2"]
    # Both spellings as classes, or a crop whose class has no other name.
    assert split([name, stored, "er"], csv_path=str(file))["train"].annotated_in()[stored] == 1
    file.write_text(rows[0])
    assert split([name, "er"], csv_path=str(file))["train"].annotated_in()[name] == 1


def test_only_classes_that_a_crop_lacks_have_other_spellings():
    assert other_spellings(["mito", "er"], ["mito", "Mito", "er"]) == {}
    assert other_spellings(["mito", "er"], ["Mito", "mito_mem"]) == {"mito": "Mito"}
    assert other_spellings(["mito"], ["Mito"], known=["Mito"]) == {}


# -- classes that no crop has


@pytest.mark.parametrize(
    ("name", "stored", "closest"),
    [
        ("mitochondria", ["er", "mito", "mito_mem"], "mito"),
        ("nucleus", ["nuc", "nucpl"], "nuc"),
        ("mit", ["mito_mem", "mito"], "mito"),
        ("Mito-Mem", ["mito", "mito_mem"], "mito_mem"),
        ("mtio", ["er", "mito"], "mito"),
        ("mito_lmu", ["mito", "mito_lum"], "mito_lum"),
        ("golgi", ["er", "mito"], None),
        ("golgi", [], None),
    ],
)
def test_the_class_that_a_name_probably_means(name, stored, closest):
    assert closest_class(name, stored) == closest


@pytest.mark.parametrize(
    ("classes", "end"),
    [
        (["mitochondria"], "of the classes mitochondria; they annotate er, mito; did you mean 'mito'?"),
        (["mitochondria", "ER"], "they annotate er, mito; did you mean 'mito' for 'mitochondria', 'er' for 'ER'?"),
        (["golgi"], "of the classes golgi; they annotate er, mito"),
    ],
)
def test_blocks_of_crops_without_the_classes_name_what_is_there(crops, classes, end):
    with pytest.raises(CellMapKeyError) as caught:
        _ = split(classes, datasets=listed(crops("mito")), options=SplitOptions(split="blocks"))["val"]
    text = str(caught.value)
    assert text.startswith("split=blocks leaves nothing for validation: none of the 3 crops that it cuts annotates any")
    assert text.endswith(end)


@pytest.mark.parametrize("name", ["mitochondria", "mit"])
def test_other_splits_name_it_too(crops, name):
    with pytest.raises(CellMapValueError, match=r"it has \['mito', 'er'\]; did you mean 'mito'\?"):
        _ = split([name], datasets=listed(crops("mito")))["train"]


def listed(folder):
    base = folder / "jrc_a" / "jrc_a.zarr"
    return {"train": [{"raw": str(base / RAW), "gt": f"{base / GROUNDTRUTH}/crop{n}/[mito,er]"} for n in (1, 2, 3)]}


@pytest.mark.parametrize(("stored", "name"), [("Mito", "mito"), ("er-mem", "er_mem"), ("MITO", "mito")])
def test_a_label_map_is_named_instead_of_a_folder(crops, tmp_path, stored, name):
    base = crops(name, name) / "jrc_a" / "jrc_a.zarr"
    entry = {"raw": f"{base}/{RAW}", "gt": f"{base}/{GROUNDTRUTH}/crop1/{name}", "labels": {3: stored, 5: "er"}}
    with pytest.raises(CellMapValueError) as caught:
        _ = split([name], datasets={"train": [entry]})["train"]
    text = str(caught.value)
    assert f"the label map {{3: {stored}, 5: er}} names {stored!r}, and classes has {name!r}" in text
    assert f"write {name!r} in the label map" in text
    assert "bracket" not in text
    assert "folder" not in text
