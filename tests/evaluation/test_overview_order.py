"""The crops that the picture of a prediction shows: those where it can be judged come first."""

import numpy as np
import pytest

from cellmap_lightning.evaluation.crop_parts import run_crops, trained_crops
from cellmap_lightning.evaluation.overview import samples_of
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.splits.entries import read_mapping
from cellmap_lightning.splits.summary import write_csv

AT = {"scale": (8, 8, 8), "translation": (0, 0, 0)}
NAMES = ("crop1", "crop2", "crop3", "crop4", "crop5")
MITO = np.zeros((16, 16, 80), np.uint8)
MITO[4:12, 4:12, 2::4] = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prediction of a volume with five crops in a row, in one folder."""
    folder = tmp_path_factory.mktemp("order")
    write_multiscale(folder / "vol.zarr" / "em", 100 + 100 * MITO, **AT)
    write_multiscale(folder / "pred.zarr" / "mito", 255 * MITO, **AT)
    for number, name in enumerate(NAMES):
        labels = MITO[:, :, 16 * number : 16 * number + 16]
        path = folder / "crops" / name / "mito"
        write_multiscale(path, labels, scale=(8, 8, 8), translation=(0, 0, 128 * number))
    return folder


def shown(folder, tmp_path, crops, usages):
    """Return the headers of the rows with an annotation, without their places."""
    entries: dict[str, list[dict[str, str]]] = {}
    for name, split in usages.items():
        entries.setdefault(split, []).append(
            {"raw": str(folder / "vol.zarr" / "em"), "gt": f"{folder}/crops/{name}/[mito]"}
        )
    write_csv(read_mapping(entries), tmp_path / "split.csv")
    raw = folder / "vol.zarr" / "em"
    listed = run_crops(tmp_path, raw)
    samples = samples_of(
        folder / "pred.zarr", str(raw), ["mito"], crops, trained=trained_crops(tmp_path), entries=listed
    )
    return [sample.header.split(", centre")[0] for sample in samples if sample.target is not None]


@pytest.mark.parametrize("inside", [True, False], ids=["in the folder", "elsewhere"])
@pytest.mark.parametrize(
    ("usages", "headers"),
    [
        (
            dict.fromkeys(NAMES[:4], "train") | {"crop5": "val"},
            ["crop5, validation", "crop1, trained on", "crop2, trained on"],
        ),
        (
            {"crop1": "train", "crop2": "test", "crop3": "train", "crop4": "val", "crop5": "val"},
            ["crop4, validation", "crop5, validation", "crop2, test"],
        ),
        (dict.fromkeys(NAMES, "train"), ["crop1, trained on", "crop2, trained on", "crop3, trained on"]),
    ],
)
def test_crops_for_validation_come_first(folder, tmp_path, usages, headers, inside):
    crops = folder / "crops" if inside else None
    assert shown(folder, tmp_path, crops, usages) == headers


def test_crops_of_no_split_come_before_those_that_were_trained_on(folder, tmp_path):
    usages = {"crop1": "train", "crop4": "val"}
    assert shown(folder, tmp_path, folder / "crops", usages) == ["crop4, validation", "crop2", "crop3"]


def test_parts_of_a_crop_have_their_own_usage(folder, tmp_path):
    """The part for validation of a crop that is cut comes first, and the part for training last."""
    raw, gt = str(folder / "vol.zarr" / "em"), f"{folder}/crops/crop1/[mito]"
    parts = {
        "train": [{"raw": raw, "gt": gt, "box": "0:8 0:16 0:16 voxels"}],
        "val": [{"raw": raw, "gt": gt, "box": "8:16 0:16 0:16 voxels"}],
    }
    write_csv(read_mapping(parts), tmp_path / "split.csv")
    listed = run_crops(tmp_path, folder / "vol.zarr" / "em")
    given = {"trained": trained_crops(tmp_path), "entries": listed}
    samples = samples_of(folder / "pred.zarr", raw, ["mito"], [folder / "crops" / "crop1"], **given)
    headers = [sample.header.split(", centre")[0] for sample in samples if sample.target is not None]
    assert [header.rpartition(", ")[2] for header in headers] == ["validation", "trained on"]


@pytest.mark.parametrize("folders", [["crop3"], ["crop4", "crop2"]])
def test_folders_of_single_crops(folder, tmp_path, folders):
    crops = [folder / "crops" / name for name in folders]
    assert shown(folder, tmp_path, crops, {"crop5": "train"}) == [*folders, "crop5, trained on"]
