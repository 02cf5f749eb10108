"""Two processes that validate together, with batches that cannot be dealt out evenly."""

import datetime as dt
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES

pytestmark = pytest.mark.usefixtures("quiet_lightning")
SPEC = {"shape": [12, 24, 24], "scale": [10.48, 8, 8]}


class Noted(SegmentationTask):
    """Writes what each rank saw and what it made of it."""

    def __init__(self, folder):
        torch.manual_seed(0)
        # Running statistics are buffers, which DDP would have every rank agree on.
        network = nn.Sequential(nn.BatchNorm3d(1), nn.Conv3d(1, len(CLASSES), 3, padding=1))
        super().__init__(network, CLASSES, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.0))
        self.folder, self.seen = folder, []

    def training_step(self, batch, batch_idx):
        self.eval()  # so that a training on other ranks' batches leaves no trace
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch["idx"].tolist())
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        stage = str(self.trainer.state.fn.value)
        found = {"seen": self.seen, "scores": self.scores.get("val")}
        (self.folder / f"{stage}-{self.global_rank}.json").write_text(json.dumps(found))
        self.seen = []

    def on_validation_end(self):
        (self.folder / "loss.json").write_text(json.dumps(float(self.trainer.callback_metrics["val/loss"])))


def validate(volume, folder, world):
    """Fit (with the few tiles of a fit) and validate; per stage what each rank saw, and the scores of each."""
    folder.mkdir()
    crops = [{"raw": volume.raw_path, "gt": f"{volume.path}/recon-1/labels/groundtruth/crop4/[mito,er,pm]"}]
    strategy = DDPStrategy(
        process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300)
    )  # a collective that not all ranks take part in is an error after a minute
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=folder,
    )  # fmt: skip
    with CellMapDataModule(
        CLASSES, {"raw": SPEC}, {"labels": SPEC}, datasets={"train": crops, "val": crops}, batches_per_epoch=2,
        val_samples=5, leakage="ignore",
    ) as data:  # fmt: skip
        run.fit(Noted(folder), data)
        run.validate(Noted(folder), data, verbose=False)
        count = data.val_dataset.tile_count
    stages = {
        stage: [json.loads((folder / f"{stage}-{rank}.json").read_text()) for rank in range(world)]
        for stage in ("fit", "validate")
    }
    return stages, json.loads((folder / "loss.json").read_text()), count


def test_two_processes_validate_each_tile_once_with_the_scores_of_one(volume, tmp_path):
    (alone, loss, count), (together, loss_of_two, _) = (validate(volume, tmp_path / f"world{n}", n) for n in (1, 2))
    for stage, tiles in (("fit", 5), ("validate", count)):
        assert tiles % 2 == 1, "so that one rank has a batch more"
        whole = alone[stage][0]["seen"]
        assert len(whole) == tiles
        first, second = (rank["seen"] for rank in together[stage])
        assert (first, second) == (whole[0::2], whole[1::2])
        assert alone[stage][0]["scores"]
        for rank in together[stage]:
            assert rank["scores"] == alone[stage][0]["scores"], "counts are whole numbers, so they agree exactly"
    assert loss_of_two == pytest.approx(loss, rel=1e-6)
