"""The annotated crops that ``evaluate=true`` and ``truth`` of cellmap-predict compare with."""

import csv
import logging
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cellmap_lightning.commands.prediction_truth import truth_folders
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.splits.entries import read_mapping
from cellmap_lightning.splits.summary import write_csv
from tests.commands.test_cli import run_forked

AT = {"scale": (8, 8, 8), "translation": (0, 0, 0)}
MITO = np.zeros((24, 32, 32), np.uint8)
MITO[8:16, 8:24, 8:24] = 1


@pytest.fixture
def folder(tmp_path):
    """Raw in which the class is bright, and two crops beside it, as cellmap-convert writes them."""
    write_multiscale(tmp_path / "vol.zarr" / "em", 100 + 100 * MITO, **AT)
    for name, first in (("crop1", 0), ("crop2", 16)):
        labels = MITO[:, :, first : first + 16]
        write_multiscale(tmp_path / "vol.zarr" / name / "mito", labels, scale=(8, 8, 8), translation=(0, 0, 8 * first))
    return tmp_path


def run_of(folder, **splits):
    """Write the list of crops of a run; return the path of its checkpoint."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    write_csv(read_mapping(splits), run / "split.csv")
    return run / "checkpoints" / "best.ckpt"


def entry(folder, gt, raw="vol.zarr/em", **more):
    return {"raw": str(folder / raw), "gt": f"{folder}/{gt}", **more}


def config(folder, **more):
    given = {"truth": None, "ckpt": None, "input_path": str(folder / "vol.zarr" / "em"), "writer": {"output": "p.zarr"}}
    return OmegaConf.create(given | more)


@pytest.mark.parametrize(
    ("truth", "names"),
    [
        ("vol.zarr/crop1", ["crop1"]),
        ("vol.zarr", ["vol.zarr"]),
        (["vol.zarr/crop2", "vol.zarr/crop1"], ["crop2", "crop1"]),
    ],
)
def test_folders_are_named(folder, monkeypatch, truth, names):
    monkeypatch.chdir(folder)
    assert [path.name for path in truth_folders(config(folder, truth=truth))] == names


@pytest.mark.parametrize(
    ("truth", "error", "message"),
    [
        (
            "vol.zarr/crop9",
            CellMapFileNotFoundError,
            r"^truth=vol.zarr/crop9 does not exist; give the folder of the ann",
        ),
        ("empty", CellMapValueError, r"^truth=empty holds no crop; give the folder of the annotated crops, or of one"),
        ("vol.zarr/crop1/mito/s0", CellMapValueError, r"^truth=vol.zarr/crop1/mito/s0 holds no crop"),
    ],
)
def test_folders_without_crops(folder, monkeypatch, truth, error, message):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    with pytest.raises(error, match=message):
        truth_folders(config(folder, truth=truth))


def test_groundtruth_beside_raw_comes_before_the_crops_of_the_training(folder):
    image = folder / "jrc_a.zarr" / "recon-1" / "em" / "fibsem-uint8"
    shutil.copytree(folder / "vol.zarr" / "em", image)
    beside = folder / "jrc_a.zarr" / "recon-1" / "labels" / "groundtruth"
    shutil.copytree(folder / "vol.zarr" / "crop1", beside / "crop1")
    ckpt = str(run_of(folder, train=[entry(folder, "vol.zarr/crop1/[mito]", raw=image)]))
    assert truth_folders(config(folder, input_path=str(image), ckpt=ckpt)) == [beside]


def test_crops_of_the_training_of_this_volume(folder, caplog):
    first, second = entry(folder, "vol.zarr/crop1/[mito]"), entry(folder, "vol.zarr/crop2/[mito]")
    other = entry(folder, "vol.zarr/crop1/[mito]", raw="other.zarr/em")
    moved = second | {"translation": {"gt": [80, 0, 0]}}
    np.save(folder / "ids.npy", MITO)
    ids = entry(folder, "ids.npy", labels={1: "mito"}, voxel_size={"gt": [8, 8, 8]}, translation={"gt": [0, 0, 0]})
    ckpt = str(run_of(folder, train=[first, other, moved, ids], val=[second]))
    with caplog.at_level(logging.WARNING):
        folders = truth_folders(config(folder, ckpt=ckpt))
    assert [path.name for path in folders] == ["crop2", "crop1"], "those for validation first"
    (line,) = caplog.messages
    assert line.startswith("not compared with the prediction, as they are no group per class: ")
    assert "crop2/[mito]" in line
    assert "ids.npy" in line


@pytest.mark.parametrize("trained", [None, "another volume", "ids"])
def test_without_crops_the_message_has_the_command(folder, trained):
    np.save(folder / "ids.npy", MITO)
    entries = {
        "another volume": entry(folder, "vol.zarr/crop1/[mito]", raw="other.zarr/em"),
        "ids": entry(folder, "ids.npy", labels={1: "mito"}, voxel_size={"gt": [8, 8, 8]}),
    }
    ckpt = None if trained is None else str(run_of(folder, train=[entries[trained]]))
    message = (
        r"^evaluate=true: there is no folder .*groundtruth, .*; give .* with truth=..., or predict "
        r"without evaluate=true "
        r"and run cellmap-evaluate prediction=p.zarr truth=<folder of the crops, or of one crop>$"
    )
    with pytest.raises(CellMapFileNotFoundError, match=message):
        truth_folders(config(folder, ckpt=ckpt))


def test_raw_elsewhere_has_no_crops_here(folder):
    assert truth_folders(config(folder, input_path="s3://bucket/vol.zarr/em")) is None
    assert (
        truth_folders(config(folder, input_path="s3://bucket/vol.zarr/em", truth=str(folder / "vol.zarr"))) is not None
    )


# -- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a training on the two crops of such a volume."""
    folder = tmp_path_factory.mktemp("trained")
    write_multiscale(folder / "vol.zarr" / "em", 100 + 100 * MITO, **AT)
    for name, first in (("crop1", 0), ("crop2", 16)):
        labels = MITO[:, :, first : first + 16]
        write_multiscale(folder / "vol.zarr" / name / "mito", labels, scale=(8, 8, 8), translation=(0, 0, 8 * first))
    rows = ['train,vol.zarr/em,"vol.zarr/crop1/[mito]"', 'validate,vol.zarr/em,"vol.zarr/crop2/[mito]"']
    (folder / "crops.csv").write_text("\n".join(rows))
    code, text = run_forked(
        "data.csv_path=crops.csv", "data.classes=[mito]", "patch.shape=[8,8,8]", "patch.scale=[8,8,8]", "trainer=cpu",
        "data.batch_size=2", "data.batches_per_epoch=2", "model.channels=[4,8]", "model.strides=[2]",
        "trainer.max_epochs=1", "hydra.run.dir=run", cwd=folder,
    )  # fmt: skip
    assert code == 0, text
    assert torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    return folder


@pytest.mark.parametrize(
    ("more", "crops"),
    [
        (["evaluate=true"], {"crop2": "held out", "crop1": "train"}),
        (["truth=vol.zarr/crop2"], {"crop2": "held out"}),
        (["truth=[vol.zarr/crop1,vol.zarr/crop2]"], {"crop1": "train", "crop2": "held out"}),
        (["evaluate=true", "region={z:[0,190],y:[0,250],x:[0,124]}"], {"crop1": "train"}),
    ],
)
def test_the_command_scores_crops_anywhere(checkpoint, tmp_path, more, crops):
    given = [
        "ckpt=run/checkpoints/last.ckpt",
        "data.input_path=vol.zarr/em",
        f"out={tmp_path}/pred.zarr",
        "trainer=cpu",
    ]
    code, text = run_forked(*given, "picture=false", *more, cwd=checkpoint, command="predict")
    assert code == 0, text
    rows = list(csv.DictReader((tmp_path / "pred-scores.csv").read_text().splitlines()))
    assert {row["crop"]: row["usage"] for row in rows} == crops


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["truth=nowhere"], "Error: truth=nowhere does not exist; give the folder of the annotated crops, or of one"),
        (
            ["truth=vol.zarr/crop1", "out=s3://bucket/p.zarr"],
            "out=s3://bucket/p.zarr: evaluate=true and truth=... compare",
        ),
        (
            ["crops=test", "manifest=m.csv", "search_path=d", "truth=vol.zarr/crop1", "~data.input_path"],
            "leave out region, writer.region, writer.only, truth and data.input_path",
        ),
    ],
)
def test_errors_come_before_the_prediction(checkpoint, more, message):
    given = ["ckpt=run/checkpoints/last.ckpt", "data.input_path=vol.zarr/em", "out=none.zarr", "trainer=cpu"]
    kept = [a for a in given if not any(a.partition("=")[0] == m.lstrip("~").partition("=")[0] for m in more)]
    code, text = run_forked(*kept, *[m for m in more if not m.startswith("~")], cwd=checkpoint, command="predict")
    assert (code, message in text, "Traceback" in text) == (1, True, False), text
    assert not (checkpoint / "none.zarr").exists()
