import logging

import pytest

from cellmap_lightning import CellMapDataset, CellMapError
from tests.conftest import CLASSES, INPUTS, TARGETS
from tests.make import make_split

GT = "recon-1/labels/groundtruth"
RAW = "recon-1/em/fibsem-uint8"


def split(csv_path=None, **kwargs):
    given = {"classes": CLASSES, "input_arrays": INPUTS, "target_arrays": TARGETS, "pad": True}
    return make_split(csv_path, **(given | kwargs))


@pytest.fixture
def write(tmp_path, volume):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "volume.zarr").symlink_to(volume.path)

    def write(*rows):
        path = tmp_path / "data" / "crops.csv"
        path.write_text("\n".join(rows))
        return path

    return write


FIVE = f'{{}},volume.zarr,{RAW},volume.zarr,"{GT}/crop{{}}/[mito,er,pm]"'
THREE = f'{{}},volume.zarr/{RAW},"volume.zarr/{GT}/crop{{}}/[mito,er,pm]"'


@pytest.mark.parametrize("row", [FIVE, THREE])
@pytest.mark.parametrize("header", [[], ["usage,raw,target"], ["# crops", ""]])
def test_rows_relative_to_the_csv(write, row, header, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    crops = split(write(*header, row.format("train", 2), row.format("train", 3), row.format("validate", 4)))
    assert [d.label for d in crops["train"].datasets] == ["volume/crop2", "volume/crop3"]
    assert [d.label for d in crops["val"].datasets] == ["volume/crop4"]
    assert all(d.is_train for d in crops["train"].datasets)
    assert not crops["val"].is_train
    assert crops["train"] is crops["train"]


def test_the_demo_csv(volume):
    crops = split(volume.csv_path)
    assert len(crops["train"].datasets) + len(crops["val"].datasets) == len(volume.crops)


def test_predict_rows_need_no_target(write):
    crops = split(write(f"predict,volume.zarr/{RAW}", f"predict,volume.zarr/{RAW},"))
    assert list(crops["predict"][0]) == ["raw", "idx"]
    assert len(crops["predict"].datasets) == 2


def test_mappings(volume):
    entry = {"raw": volume.raw_path, "gt": f"{volume.path}/{GT}/crop2/[mito,er,pm]"}
    ready = CellMapDataset(entry["raw"], entry["gt"], CLASSES, INPUTS, TARGETS)
    crops = split(
        datasets={
            "train": [entry, {"input_path": entry["raw"], "target_path": entry["gt"]}],
            "test": [ready],
            "val": None,
        },
        leakage="ignore",
    )
    assert len(crops["train"].datasets) == 2
    assert list(crops["test"].datasets) == [ready]
    with pytest.raises(KeyError, match="no crops were given for 'val'"):
        crops["val"]


def test_all_bad_rows_in_one_table(write):
    rows = [THREE.format("train", 2)] * 297
    rows[7] = "train,volume.zarr,x"
    rows[100] = "trian,a,b"
    rows[200] = f"train,volume.zarr/{RAW},volume.zarr/{GT}/crop2/[mito,er,pm]"
    rows[250] = "train,,b"
    rows[260] = "val,raw,"
    with pytest.raises(CellMapError) as caught:
        split(write(*rows))
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert text.startswith("4 rows of")
    for part in (
        "line 101  the usage 'trian' should be one of train, val,",
        "line 201  a bracket with commas needs quotes around its cell",
        "line 251  the raw path is empty",
        "line 261  the target path is empty; only crops for 'predict' need none, not 'val'",
    ):
        assert part in text


def test_all_bad_crops_in_one_table(write):
    rows = [
        THREE.format("train", 2),
        THREE.format("train", 99),
        f'train,volume.zarr/{RAW}x,"volume.zarr/{GT}/crop2/[mito]"',
        f'train,volume.zarr/{RAW},"volume.zarr/{GT}/crop2/[mito,gogli]"',
    ]
    with pytest.raises(ValueError, match="3 of the 4 crops for 'train' cannot be used") as caught:
        split(write(*rows))["train"]
    assert "line 2  " in str(caught.value)
    assert "line 3  " in str(caught.value)
    assert "did you mean 'fibsem-uint8'?" in str(caught.value)
    assert "line 4  volume/crop2 has no 'gogli', which the bracket [mito,gogli] names" in str(caught.value)


def test_unannotated_crops_are_left_out_and_logged(write, caplog):
    rows = [THREE.format("train", 2), f'train,volume.zarr/{RAW},"volume.zarr/{GT}/crop2/[nuc]"']
    with caplog.at_level(logging.WARNING):
        assert len(split(write(*rows))["train"].datasets) == 1
    assert "1 of the 2 crops for 'train' are left out" in caplog.text
    assert "line 2" in caplog.text


def test_a_class_that_no_crop_annotates(write):
    row = f'train,volume.zarr/{RAW},"volume.zarr/{GT}/crop2/[mito,er]"'
    with pytest.raises(ValueError, match="no crop for 'train' annotates 'pm'; they annotate er, mito"):
        split(write(row))["train"]


@pytest.mark.parametrize("policy", ["drop", "error", "upsample"])
def test_labels_that_are_too_coarse(write, policy, caplog):
    fine = {"labels": {"shape": [8, 8, 8], "scale": [2.62, 1.5, 1.5]}}
    crops = split(write(THREE.format("train", 2)), target_arrays=fine, too_coarse=policy)
    if policy == "upsample":
        assert crops["train"][0]["labels"].shape == (3, 8, 8, 8)
    elif policy == "drop":
        with pytest.raises(ValueError, match="none of the 1 crop for 'train' is left") as caught:
            crops["train"]
        assert "1.33x coarser than the 1.5 nm asked for" in str(caught.value)
    else:
        with pytest.raises(ValueError, match="the only crop for 'train' cannot be used"):
            crops["train"]


def test_bad_arguments(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"did you mean|has no 'cropz.csv'"):
        split(tmp_path / "cropz.csv")
    with pytest.raises(TypeError, match="either as csv_path or as datasets or as search_path; got none"):
        split()
    with pytest.raises(ValueError, match="names no crops"):
        split(write("# nothing"))
    with pytest.raises(KeyError, match="has the split 'training'"):
        split(datasets={"training": []})
    with pytest.raises(KeyError, match="has no 'colour'; it has raw, gt, labels, normalize, invert"):
        split(datasets={"train": [{"raw": "a", "colour": "b"}]})
    with pytest.raises(TypeError, match="must be a list"):
        split(datasets={"train": {"raw": "a"}})
    with pytest.raises(ValueError, match="needs a target"):
        split(datasets={"train": [{"raw": "a"}]})["train"]
    with pytest.raises(KeyError, match="there is no split 'training'"):
        split(write(THREE.format("train", 2)))["training"]
