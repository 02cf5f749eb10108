"""Weights that became NaN in a training without `LossMonitor` are one warning."""

import logging

import lightning as L
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from cellmap_lightning.callbacks import LossMonitor
from cellmap_lightning.errors import CellMapValueError
from tests.runs import module, trainer

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Careless(L.LightningModule):
    """A module whose loss is NaN from a step on."""

    def __init__(self, nan_from):
        super().__init__()
        self.layer, self.nan_from = torch.nn.Conv3d(1, 3, 3, padding=1), nan_from

    def training_step(self, batch, batch_idx):
        target = batch["labels"].nan_to_num(0)
        if self.global_step >= self.nan_from:
            target = torch.full_like(target, float("nan"))
        return binary_cross_entropy_with_logits(self.layer(batch["raw"]), target)

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize(
    ("nan_from", "epochs", "where"),
    [
        (0, 3, "epoch 1, optimizer step 2: "),
        (3, 3, "epoch 2, optimizer step 4: "),
        (1, 1, "epoch 1, optimizer step 2: "),
        (9, 2, None),
    ],
    ids=["at once", "in the second epoch", "in the only epoch", "never"],
)
def test_weights_are_checked_once_per_epoch(volume, tmp_path, caplog, nan_from, epochs, where):
    with module(volume, batches_per_epoch=2) as data, caplog.at_level(logging.WARNING, "cellmap_lightning"):
        trainer(tmp_path, max_epochs=epochs, limit_val_batches=0).fit(Careless(nan_from), data)
    lines = [r.getMessage() for r in caplog.records if "are NaN or infinite" in r.getMessage()]
    assert len(lines) == (where is not None)
    if where is not None:
        start = f"{where}the weights of Careless are NaN or infinite (layer.weight and 1 more); targets are NaN where"
        assert lines[0].startswith(start)
        assert "Trainer(callbacks=[LossMonitor()]) of cellmap_lightning.callbacks" in lines[0]


def test_with_a_loss_monitor_it_is_its_error_alone(volume, tmp_path, caplog):
    with module(volume, batches_per_epoch=2) as data, pytest.raises(CellMapValueError, match="and so are its weights"):
        trainer(tmp_path, limit_val_batches=0, callbacks=[LossMonitor()]).fit(Careless(0), data)
    assert "the weights of Careless" not in caplog.text
