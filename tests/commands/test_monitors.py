"""Names of metrics that nothing logs are reported before the first training step."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import DataWaitMonitor
from cellmap_lightning.commands.monitors import MonitorCheck, logged_names
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.training.reconstruction import ReconstructionTask
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES

PATCH = {"shape": [8, 16, 16], "scale": [16, 16, 16]}


def network(channels=None):
    channels = channels or len(CLASSES)
    return torch.nn.Conv3d(1, channels, 3, padding=1)


class Quiet(SegmentationTask):
    """A derived task that logs nothing itself."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Plateau(SegmentationTask):
    monitor = "val/los"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class RightPlateau(Plateau):
    monitor = "val/loss"


class Logging(SegmentationTask):
    """A derived task that logs a metric after the epoch, and none in the sanity validation."""

    def on_train_epoch_end(self):
        self.log("mine", 1.0)


class OwnModule(L.LightningModule):
    """A module that is not of this package, which logs what it monitors after the first epoch alone."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def training_step(self, batch, batch_idx):
        return self.layer(batch["raw"]).mean()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("mine", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class LoggingCallback(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("mine", 1.0)


class SilentCallback(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs = trainer.current_epoch


@pytest.fixture
def fit(volume, tmp_path, quiet_lightning):
    def fit(task, monitor="val/dice", more=(), **callbacks):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        own = {"checkpoint": ModelCheckpoint(folder / "checkpoints", monitor=monitor), **callbacks}
        steps = []

        class Steps(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                steps.append(batch_idx)

        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, num_sanity_val_steps=1, limit_val_batches=1, limit_train_batches=1,
            logger=CSVLogger(folder / "logs"), enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=1,
            callbacks=[*own.values(), *more, Steps(), MonitorCheck(monitor, own)],
        )  # fmt: skip
        arguments = {
            "csv_path": volume.csv_path, "classes": CLASSES, "input_arrays": {"raw": PATCH}, "batch_size": 1,
            "target_arrays": {"labels": PATCH}, "batches_per_epoch": 1,
        }  # fmt: skip
        with CellMapDataModule(**arguments) as data:
            try:
                trainer.fit(task, datamodule=data)
            finally:
                fit.steps = steps

    return fit


def segmentation(cls=SegmentationTask):
    return cls(network(), classes=CLASSES)


@pytest.mark.parametrize(
    ("task", "settings", "text"),
    [
        (SegmentationTask, {"monitor": "val/dise"}, "monitor=val/dise is not measured; did you mean 'val/dice'?"),
        (Quiet, {"monitor": "val_loss"}, "monitor=val_loss is not measured; did you mean 'val/loss'?"),
        (
            SegmentationTask,
            {"stop": EarlyStopping("val/dice_mit")},
            "callbacks.stop.monitor=val/dice_mit is not measured; did you mean 'val/dice_mito'?",
        ),
        (
            SegmentationTask,
            {"second": ModelCheckpoint(monitor="train/los")},
            "callbacks.second.monitor=train/los is not measured; did you mean 'train/loss'?",
        ),
        (
            Plateau,
            {},
            "monitor of the scheduler ReduceLROnPlateau=val/los is not measured; did you mean 'val/loss'?",
        ),
    ],
    ids=["monitor", "derived", "early stopping", "checkpoint", "scheduler"],
)
def test_a_wrong_name_is_an_error_before_the_first_step(fit, task, settings, text):
    with pytest.raises(CellMapKeyError) as info:
        fit(segmentation(task), **settings)
    assert text in str(info.value)
    assert f"{task.__name__} measures dice" not in str(info.value)
    assert f"{task.__name__} measures val/dice" in str(info.value)
    assert fit.steps == []


@pytest.mark.parametrize(
    ("task", "monitor", "callbacks"),
    [
        (SegmentationTask, "val/score", {"stop": EarlyStopping("val/loss")}),
        (SegmentationTask, "train/loss", {}),
        (SegmentationTask, "step", {"waits": DataWaitMonitor(), "third": ModelCheckpoint(monitor="data/wait_s")}),
        (RightPlateau, "val/dice", {}),
        (Logging, "mine", {}),
        (SegmentationTask, "mine", {"logs": LoggingCallback()}),
        (SegmentationTask, "val/dice", {"silent": SilentCallback()}),
    ],
    ids=["score", "train", "data", "scheduler", "derived", "callback", "silent"],
)
def test_right_names_and_those_of_other_code_are_no_error(fit, task, monitor, callbacks):
    fit(segmentation(task), monitor, **callbacks)
    assert fit.steps == [0]


def test_a_module_of_other_code_is_not_checked(fit):
    fit(OwnModule(), "mine")
    assert fit.steps == [0]


def test_learning_rates_are_metrics_of_their_callback(fit):
    fit(segmentation(), "val/dice", more=[LearningRateMonitor()], second=ModelCheckpoint(monitor="lr-AdamW"))
    assert fit.steps == [0]
    with pytest.raises(CellMapKeyError, match="did you mean 'val/dice'"):
        fit(segmentation(), "val/dise", more=[LearningRateMonitor()])


@pytest.mark.parametrize(
    ("task", "callbacks", "known"),
    [
        (ReconstructionTask(network(1)), [], ["val/loss", "val/constant", "train/loss"]),
        (ReconstructionTask(network(1)), [SilentCallback()], ["val/loss", "val/constant", "train/loss"]),
        (ReconstructionTask(network(1)), [LoggingCallback()], None),
        (OwnModule(), [], None),
        (segmentation(), [], None),  # its targets are not known yet
    ],
)
def test_names_are_known_only_where_nothing_else_logs(task, callbacks, known):
    names = logged_names(task, callbacks)
    assert (names is None) == (known is None)
    assert known is None or names[: len(known)] == known
