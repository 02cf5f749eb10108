"""A training whose weights are NaN ends before it is saved; a loss alone is a warning."""

import logging
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from cellmap_lightning import CellMapError
from cellmap_lightning.callbacks import LastCheckpoint, LossMonitor
from cellmap_lightning.training.masked import masked_bce
from tests.runs import module, trainer

pytestmark = [pytest.mark.usefixtures("quiet_lightning", "no_threads_left")]


def unmasked(step, logits, labels):
    return bce(logits, labels)


def masked_by_a_product(step, logits, labels):
    return (bce(logits, labels, reduction="none") * ~labels.isnan()).mean()


def root(step, logits, labels):
    return logits.sqrt().mean()


def without_voxels(step, logits, labels):
    """NaN, with gradients of 0."""
    return bce(logits[labels > 2], labels[labels > 2])


def masked(step, logits, labels):
    return masked_bce(logits, labels).mean()


def growing(step, logits, labels):
    """Diverges in the third of the steps."""
    return masked(step, logits, labels) * (math.inf if step == 2 else 1)


class Own(L.LightningModule):
    def __init__(self, loss, lr=0.1, manual=False):
        super().__init__()
        self.network = nn.Conv3d(1, 3, 3, padding=1)
        self.loss, self.lr, self.automatic_optimization = loss, lr, not manual

    def training_step(self, batch, batch_idx):
        batch["labels"][:, 0] = torch.nan  # a class that is not annotated
        loss = self.loss(batch_idx, self.network(batch["raw"]), batch["labels"])
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(volume, folder, task, **more):
    with module(volume, batches_per_epoch=6) as data:
        run = trainer(folder, **({"callbacks": [LossMonitor()], "limit_val_batches": 0} | more))
        try:
            run.fit(task, data)
        finally:
            task.steps = run.global_step
    return run


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("loss", [unmasked, masked_by_a_product, root])
def test_weights_that_are_nan_end_the_training_in_the_first_step(volume, tmp_path, loss, manual):
    task = Own(loss, manual=manual)
    with pytest.raises(
        CellMapError, match=r"optimizer step 1: the loss of Own is NaN.*and so are its weights \(network"
    ):
        fit(volume, tmp_path, task)
    assert task.steps == 1


@pytest.mark.parametrize(("every", "steps"), [(1, 3), (4, 4), (50, 6)])
def test_a_loss_that_diverges_later_is_found_when_steps_are_logged(volume, tmp_path, every, steps):
    task, last = Own(growing), LastCheckpoint(tmp_path / "checkpoints")
    with pytest.raises(CellMapError, match=rf"optimizer step {steps}: the loss of Own is NaN or infinite, and so"):
        fit(volume, tmp_path, task, callbacks=[last, LossMonitor(every)], enable_checkpointing=True)
    assert task.steps == steps
    assert not (tmp_path / "checkpoints").exists(), "nothing was saved"


class Skips(Own):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()  # as a gradient scaler does


@pytest.mark.parametrize("task", [Skips(unmasked), Skips(growing), Own(without_voxels)])
def test_a_loss_that_leaves_the_weights_finite_is_a_warning_once(volume, tmp_path, caplog, task):
    fit(volume, tmp_path, task, callbacks=[LossMonitor(1)], max_epochs=2)
    warnings = [r for r in caplog.records if r.name.endswith("loss_monitor")]
    assert [r.levelno for r in warnings] == [logging.WARNING]
    assert "its weights are not; targets are NaN where unannotated" in warnings[0].getMessage()


@pytest.mark.parametrize("loss", [masked, lambda *given: {"loss": masked(*given), "more": math.nan}])
def test_finite_losses_are_trained(volume, tmp_path, caplog, loss):
    assert fit(volume, tmp_path, Own(loss), callbacks=[LossMonitor(2)]).global_step == 6
    assert not [r for r in caplog.records if r.name.endswith("loss_monitor")]


def test_steps_without_a_loss_are_left_out(volume, tmp_path):
    class Silent(Own):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    assert fit(volume, tmp_path, Silent(masked, manual=True)).global_step == 6


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_a_number_of_steps_is_at_least_one(number):
    with pytest.raises(CellMapError, match="every_n_steps"):
        LossMonitor(number)


@pytest.mark.parametrize(("eps", "dies"), [(1e-8, True), (1e-4, False)])
def test_adam_in_float16_needs_a_larger_eps(volume, tmp_path, eps, dies):
    class Half(Own):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=eps)

    task = Half(masked)
    if dies:
        with pytest.raises(CellMapError, match=r"so are its weights .* in 16-true the optimizer's eps to 1e-4"):
            fit(volume, tmp_path, task, precision="16-true")
    else:
        assert fit(volume, tmp_path, task, precision="16-true").global_step == 6
