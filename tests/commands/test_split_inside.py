"""``cellmap-train`` with one crop: the proposal, and the training that it leads to."""

import csv

import pytest
import torch

from cellmap_lightning.evaluation.crop_parts import trained_crops
from tests.boxed import write_crops
from tests.commands.test_cli import run, run_forked

SMALL = [
    "data.csv_path=crops.csv", "data.classes=[mito,nuc]", "patch.shape=[16,16,16]", "patch.scale=[8,8,8]",
    "model=unet_small", "trainer=cpu", "trainer.max_epochs=1", "data.batches_per_epoch=1", "data.batch_size=1",
    "data.val_samples=2", "hydra.run.dir=out",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    raw, whole, _ = write_crops(tmp_path)
    (tmp_path / "crops.csv").write_text(f'train,{raw},"{whole}"\n')
    return tmp_path


def test_the_error_proposes_an_override(folder):
    code, text = run_forked(*SMALL, cwd=folder)
    assert code == 1
    assert "crops.csv has no crops for validation; list some; or data.split=blocks cuts those for training (" in text
    assert "jrc_a/crop1: cut along x into 536 nm for training and 144 nm for validation" in text
    assert not (folder / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_one_crop_is_trained_on_and_validated(folder):
    done = run(*SMALL, "data.split=blocks", cwd=folder)
    assert done.returncode == 0, done.stderr
    with (folder / "out/split.csv").open() as file:
        boxes = [(row["usage"], row["box"]) for row in csv.DictReader(file)]
    assert boxes == [
        ("train", "128:768 128:704 128:664 nm"), ("validate", "128:768 128:704 688:832 nm")
    ]  # fmt: skip
    ((first, second),) = trained_crops(folder / "out").values()
    assert (first.trained, second.trained) == (True, False)
    checkpoint = torch.load(folder / "out/checkpoints/last.ckpt", weights_only=True)
    (record,) = [v["trained_on"] for v in checkpoint.values() if isinstance(v, dict) and "trained_on" in v]
    assert record["boxes"] == {
        "train": [["jrc_a/crop1", "128:768 128:704 128:664 nm"]],
        "val": [["jrc_a/crop1", "128:768 128:704 688:832 nm"]],
    }


def test_a_crop_that_cannot_be_cut_is_explained(folder):
    code, text = run_forked(*SMALL, "patch.shape=[48,48,48]", cwd=folder)
    assert code == 1
    assert (
        "those for training can neither be divided nor cut; trainer.limit_val_batches=0 trains without validation"
        in text
    )
    assert "a patch needs 384 nm" in text
