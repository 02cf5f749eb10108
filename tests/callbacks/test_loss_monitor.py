"""A training whose weights are NaN ends before it is saved; a loss alone is a warning."""

import logging
import math
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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


@pytest.mark.parametrize(("every", "steps"), [(1, 3), (3, 3), (50, 4)])
def test_a_loss_that_diverges_later_is_found_when_steps_are_logged(volume, tmp_path, every, steps):
    task, last = Own(growing), LastCheckpoint(tmp_path / "checkpoints")
    with pytest.raises(CellMapError, match=rf"optimizer step {steps}: the loss of Own is NaN or infinite, and so"):
        fit(volume, tmp_path, task, callbacks=[last, LossMonitor(every)], enable_checkpointing=True)
    assert task.steps == steps
    assert not (tmp_path / "checkpoints").exists(), "nothing was saved"


@pytest.mark.parametrize("when", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(microseconds=1)}])
def test_checkpoints_in_the_middle_of_an_epoch_are_written_before_it_alone(volume, tmp_path, when):
    saves = ModelCheckpoint(tmp_path / "checkpoints", "{step}", save_top_k=-1, **when)
    with pytest.raises(CellMapError, match="optimizer step 3: the loss of Own is NaN or infinite, and so"):
        fit(volume, tmp_path, Own(growing), callbacks=[saves, LossMonitor()], enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


def test_a_checkpoint_of_the_validation_in_an_epoch_is_not_written(volume, tmp_path):
    last = LastCheckpoint(tmp_path / "checkpoints")
    with pytest.raises(CellMapError, match="optimizer step 4: the loss of Own is NaN or infinite, and so"):
        fit(
            volume, tmp_path, Own(growing), callbacks=[last, LossMonitor()], enable_checkpointing=True,
            val_check_interval=4, limit_val_batches=1,
        )  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


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


class Validated(Own):
    """Logs what it is given in each validation."""

    def __init__(self, *values, name="val/loss"):
        super().__init__(masked)
        self.values, self.name = list(values), name

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log(self.name, self.values[self.trainer.current_epoch], batch_size=2)


def validated(volume, folder, task, monitor=None, epochs=2):
    saves = ModelCheckpoint(folder / "checkpoints", "best", monitor=monitor, mode="min")
    callbacks = [LossMonitor(), *([saves] if monitor else [])]
    fit(
        volume, folder, task, callbacks=callbacks, enable_checkpointing=monitor is not None, limit_val_batches=1,
        max_epochs=epochs,
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_monitored_loss_that_is_not_finite_ends_the_training(volume, tmp_path, value):
    with pytest.raises(CellMapError, match=rf"epoch 0, optimizer step 6: val/loss={value} in the validation, by which"):
        validated(volume, tmp_path, Validated(value), "val/loss")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_monitored_score_alone_that_is_not_finite_is_a_warning(volume, tmp_path, caplog, value):
    """No class occurs in the validation."""
    validated(volume, tmp_path, Validated(value, value, name="val/score"), "val/score")
    warnings = [r.getMessage() for r in caplog.records if r.name.endswith("loss_monitor")]
    assert len(warnings) == 1
    assert f"val/score={value} in the validation; a score is NaN where no class occurs" in warnings[0]


def test_a_monitored_metric_that_becomes_nan_keeps_the_best_checkpoint(volume, tmp_path):
    with pytest.raises(CellMapError, match="epoch 1, optimizer step 12: val/loss=nan"):
        validated(volume, tmp_path, Validated(0.5, math.nan), "val/loss")
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_monitored_is_a_warning_once(volume, tmp_path, caplog, value):
    validated(volume, tmp_path, Validated(value, value))
    warnings = [r.getMessage() for r in caplog.records if r.name.endswith("loss_monitor")]
    assert len(warnings) == 1
    assert f"val/loss={value} in the validation; targets are NaN where unannotated" in warnings[0]


def test_finite_validations_and_other_metrics_are_no_matter(volume, tmp_path, caplog):
    validated(volume, tmp_path, Validated(0.5, 0.4), "val/loss")
    validated(volume, tmp_path, Validated(math.nan, 0.5, name="val/other"))
    assert not [r for r in caplog.records if r.name.endswith("loss_monitor")]
