"""Pictures of predictions of volumes whose crops are not in the layout of the challenge."""

import logging

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.commands.prediction_report import describe_prediction
from cellmap_lightning.evaluation.crop_parts import run_crops
from cellmap_lightning.evaluation.overview import samples_of
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.splits.entries import read_mapping
from cellmap_lightning.splits.summary import write_csv

#: First voxel and shape of the crop, and the voxels of the prediction, which is right everywhere.
FIRST, SHAPE = (8, 16, 24), (24, 32, 32)
MITO = np.zeros((48, 64, 64), bool)
MITO[12:30, 20:40, 30:50] = True
AT = {"scale": (8, 8, 8), "translation": (0, 0, 0)}
PART = tuple(slice(a, a + n) for a, n in zip(FIRST, SHAPE, strict=True))
PLACE = {"voxel_size": {"gt": [8, 8, 8]}, "translation": {"gt": [8 * n for n in FIRST]}}


@pytest.fixture
def folder(tmp_path):
    """Raw, a prediction, and the annotation of a crop in several forms."""
    write_multiscale(tmp_path / "vol.zarr" / "em", (200 - 100 * MITO).astype(np.uint8), **AT)
    write_multiscale(tmp_path / "pred.zarr" / "mito", (255 * MITO).astype(np.uint8), **AT)
    labels = MITO[PART].astype(np.uint8)
    write_multiscale(tmp_path / "mine" / "crop1" / "mito", labels, scale=(8, 8, 8), translation=[8 * n for n in FIRST])
    np.save(tmp_path / "ids.npy", 7 * labels)
    np.save(tmp_path / "unannotated.npy", np.where(np.arange(SHAPE[0])[:, None, None] < 4, 99, labels))
    return tmp_path


def entry(folder, gt, **more):
    return {"raw": str(folder / "vol.zarr" / "em"), "gt": f"{folder}/{gt}", **more}


ENTRIES = {
    "groups": lambda folder: entry(folder, "mine/crop1/[mito]"),
    "label map": lambda folder: entry(folder, "ids.npy", labels={7: "mito"}, **PLACE),
    "unknown ids": lambda folder: entry(folder, "unannotated.npy", labels={1: "mito", 99: "unknown"}, **PLACE),
    "box": lambda folder: entry(folder, "mine/crop1/[mito]", box="0:20 0:32 0:32 voxels"),
}


def run_of(folder, **splits):
    """Write the files of a run with these crops, as a training does."""
    run = folder / "run"
    write_csv(read_mapping(splits), run / "split.csv")
    return run


@pytest.mark.parametrize("form", ENTRIES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_of_the_training_are_shown_in_their_place(folder, form, split):
    run = run_of(folder, **{split: [ENTRIES[form](folder)]})
    entries = run_crops(run, folder / "vol.zarr" / "em")
    samples = samples_of(folder / "pred.zarr", str(folder / "vol.zarr" / "em"), ["mito"], entries=entries)
    (sample,) = [sample for sample in samples if sample.target is not None]
    known = ~np.isnan(sample.target)
    np.testing.assert_array_equal(sample.prediction[known], sample.target[known])
    assert (sample.target == 1).any()
    assert known.all() == (form != "unknown ids")
    assert sample.raw.shape == ((20, 32, 32) if form == "box" else SHAPE)
    assert ("trained on" in sample.header) == (split == "train")
    assert ("[60:220" in sample.header) == (form == "box")


def test_crops_for_validation_come_first_and_other_volumes_are_left_out(folder):
    crop, other = ENTRIES["groups"](folder), ENTRIES["label map"](folder)
    run = run_of(folder, train=[other, crop | {"raw": str(folder / "other.zarr")}], val=[crop])
    entries = run_crops(run, folder / "vol.zarr" / "em")
    assert [split for split, _ in entries] == ["val", "train"]
    samples = samples_of(folder / "pred.zarr", str(folder / "vol.zarr" / "em"), ["mito"], entries=entries)
    headers = [sample.header for sample in samples if sample.target is not None]
    assert [("trained on" in header) for header in headers] == [False, True]


def test_annotations_that_are_gone_or_not_covered_are_no_error(folder, caplog):
    crop, gone = ENTRIES["groups"](folder), ENTRIES["label map"](folder)
    far = crop | {"translation": {"gt": [4000, 0, 0]}}
    run = run_of(folder, train=[gone, far])
    entries = run_crops(run, folder / "vol.zarr" / "em")
    (folder / "ids.npy").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        samples = samples_of(folder / "pred.zarr", str(folder / "vol.zarr" / "em"), ["mito"], entries=entries)
    assert all(sample.target is None for sample in samples)
    assert "the picture does not show the annotation" in caplog.text


@pytest.mark.parametrize("form", ENTRIES)
def test_the_picture_of_the_command_shows_the_annotation(folder, form):
    """With the annotation the picture has a panel more, and so another shape."""
    run = run_of(folder, train=[ENTRIES[form](folder)])
    (run / "checkpoints").mkdir()
    writer = make_prediction_writer(output=folder / "pred.zarr", classes=["mito"])
    sizes = []
    for checkpoint in (run / "checkpoints" / "best.ckpt", folder / "elsewhere.ckpt"):
        cfg = {
            "picture": True, "evaluate": False, "metadata": {}, "ckpt": str(checkpoint), "data": {"classes": ["mito"]},
            "input_path": str(folder / "vol.zarr" / "em"),
        }  # fmt: skip
        text = describe_prediction(OmegaConf.create(cfg), writer, ["mito"])
        assert text.endswith("pred.png")
        with Image.open(folder / "pred.png") as picture:
            sizes.append(picture.size)
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("damaged", ["one is empty", "all are empty", "one is cut"])
def test_a_picture_never_fails_a_finished_prediction(folder, damaged):
    """Empty chunks show the fill value, as the prediction read them; others that are damaged leave the picture out."""
    write_multiscale(folder / "v.zarr" / "em", MITO.astype(np.uint8) + 1, **AT, storage=ArrayOptions(chunks=(16,) * 3))
    chunks = sorted(path for path in (folder / "v.zarr" / "em" / "s0").glob("*/*/*") if path.is_file())
    for chunk in chunks if damaged == "all are empty" else chunks[:1]:
        chunk.write_bytes(chunk.read_bytes()[:-9] if damaged == "one is cut" else b"")
    writer = make_prediction_writer(output=folder / "pred.zarr", classes=["mito"])
    cfg = {
        "picture": True, "evaluate": False, "metadata": {}, "ckpt": None, "data": {"classes": ["mito"]},
        "input_path": str(folder / "v.zarr" / "em"),
    }  # fmt: skip
    text = describe_prediction(OmegaConf.create(cfg), writer, ["mito"])
    assert (folder / "pred.png").exists() == (damaged != "one is cut")
    if damaged == "one is cut":
        assert text.startswith("\n\nno picture: ")
        assert "s0: voxels z[0:16], y[0:16], x[0:16] could not be read" in text
        return
    (shown, *_) = samples_of(folder / "pred.zarr", cfg["input_path"], ["mito"])
    assert (shown.raw == 0).sum() == (16**3 if damaged == "one is empty" else shown.raw.size)
