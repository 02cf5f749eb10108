"""Names of metrics that nothing logs are reported before the first training step."""

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import DataWaitMonitor, LastCheckpoint
from cellmap_lightning.commands.monitors import MonitorCheck, describe_best, logged_names
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


class Literal(L.LightningModule):
    """A module that logs its metrics by their names."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["raw"]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/jaccard", self.layer(batch["raw"]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Shared(Literal):
    """A module that composes names of a stage and a metric."""

    def training_step(self, batch, batch_idx):
        return self.step(batch, "fit")

    def step(self, batch, stage):
        loss = self.layer(batch["raw"]).square().mean()
        self.log(f"{stage}_error", loss)
        return loss


class Dictionary(Literal):
    """A module that logs several metrics of the training at once, by the constant keys of a dict."""

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["raw"]).square().mean()
        self.log_dict({"train/loss": loss, "train/bce": loss, "train/jaccards": loss}, on_step=False, on_epoch=True)
        return loss


class Listed(Literal):
    """A module that logs metrics of the training by the names in an attribute."""

    names = (("train/loss",), {"other": "train/mse"})

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["raw"]).square().mean()
        self.log_dict(dict.fromkeys([*self.names[0], *self.names[1]], loss), on_step=False, on_epoch=True)
        return loss


class Later(Literal):
    """A module that logs a metric of the validation after the sanity validation alone."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.global_step:
            self.log("val/iou", 1.0)


class Prefixed(Literal):
    """A module that logs a metric only if a class occurs."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        for name in ["mito"] if self.global_step else []:
            self.log(f"val/{name}", 1.0)


class Blind(Literal):
    """A module without validation."""

    validation_step = L.LightningModule.validation_step


class Reducing(Literal):
    """A module whose scheduler depends on a metric that is not logged, but that its code could log."""

    monitor = "val/mean"

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class LoggingCallback(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("mine", 1.0)


class SilentCallback(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs = trainer.current_epoch


@pytest.fixture
def fit(volume, tmp_path, quiet_lightning):
    def fit(task, monitor="val/dice", more=(), options=None, resume=None, **callbacks):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        own = {"checkpoint": ModelCheckpoint(folder / "checkpoints", monitor=monitor), **callbacks}
        steps = []

        class Steps(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                steps.append(batch_idx)

        options = {
            "max_epochs": 1, "num_sanity_val_steps": 1, "limit_val_batches": 1, "limit_train_batches": 1,
        } | (options or {})  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", logger=CSVLogger(folder / "logs"), enable_progress_bar=False, enable_model_summary=False,
            log_every_n_steps=1,
            callbacks=[*own.values(), *more, Steps(), MonitorCheck(monitor, own)], **options,
        )  # fmt: skip
        fit.trainer = trainer
        arguments = {
            "csv_path": volume.csv_path, "classes": CLASSES, "input_arrays": {"raw": PATCH}, "batch_size": 1,
            "target_arrays": {"labels": PATCH}, "batches_per_epoch": 2,
        }  # fmt: skip
        with CellMapDataModule(**arguments) as data:
            try:
                trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
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


# -- modules of other code


@pytest.mark.parametrize(
    ("task", "monitor", "settings", "text"),
    [
        (Literal, "val/jacard", {}, "monitor=val/jacard is not measured; did you mean 'val/jaccard'?"),
        (Literal, "val/dice", {}, "monitor=val/dice is not measured"),
        (Literal, "val/jaccard", {"stop": EarlyStopping("val_jaccard")}, "callbacks.stop.monitor=val_jaccard is not"),
        (Later, "val/loss", {}, "monitor=val/loss is not measured"),
        (Shared, "error", {}, "monitor=error is not measured"),
    ],
)
def test_a_wrong_name_is_an_error_after_the_sanity_validation(fit, task, monitor, settings, text):
    with pytest.raises(CellMapKeyError) as info:
        fit(task(), monitor, **settings)
    assert text in str(info.value)
    assert f"{task.__name__} measures val/jaccard\ntrainer.num_sanity_val_steps=0 skips" in str(info.value)
    assert fit.steps == []


@pytest.mark.parametrize(
    ("task", "monitor", "callbacks"),
    [
        (Literal, "val/jaccard", {}),
        (Literal, "train/loss", {}),
        (Shared, "fit_error", {}),
        (Dictionary, "train/bce", {}),
        (Dictionary, "train/jaccards", {}),
        (Listed, "train/loss", {}),
        (Listed, "other", {}),
        (Later, "val/iou", {}),
        (Prefixed, "val/mito", {}),
        (Literal, "mine", {"logs": LoggingCallback()}),
    ],
)
def test_names_that_the_sanity_validation_lacks_are_no_error(fit, task, monitor, callbacks):
    fit(task(), monitor, **callbacks)
    assert fit.steps == [0]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("task", "monitor", "options", "settings", "text"),
    [
        (Literal, "val/jacard", {"num_sanity_val_steps": 0}, {}, "monitor=val/jacard is not measured; did you mean"),
        (Prefixed, "val/er", {}, {}, "monitor=val/er is not measured"),
        (
            Literal, "val/jaccard", {"num_sanity_val_steps": 0}, {"stop": EarlyStopping("val/jac")},
            "callbacks.stop.monitor=val/jac is not measured; did you mean 'val/jaccard'?",
        ),
        (
            Reducing, "val/jaccard", {}, {},
            "monitor of the scheduler ReduceLROnPlateau=val/mean is not measured",
        ),
        (
            Literal, "val/jacard", {"num_sanity_val_steps": 0, "val_check_interval": 1, "limit_train_batches": 2}, {},
            "monitor=val/jacard is not measured",
        ),
    ],
    ids=["no sanity", "composed", "early stopping", "scheduler", "in an epoch"],
)  # fmt: skip
def test_an_epoch_is_saved_before_lightning_ends_it(fit, tmp_path, task, monitor, options, settings, text):
    last = LastCheckpoint(tmp_path)
    with pytest.raises((MisconfigurationException, RuntimeError)):
        fit(task(), monitor, more=[last], options=options, **settings)
    (check,) = [c for c in fit.trainer.callbacks if isinstance(c, MonitorCheck)]
    assert text in str(check.error)
    assert f"{tmp_path / 'last.ckpt'} has the state of this epoch; resume=auto" in str(check.error)
    steps, trained = len(fit.steps), 2 * options.get("limit_train_batches", 1)
    module = task()
    module.monitor = "val/jaccard"
    fit(module, "val/jaccard", options=options | {"max_epochs": 2}, resume=tmp_path / "last.ckpt")
    assert steps + len(fit.steps) == trained


@pytest.mark.parametrize(
    ("task", "monitor", "options", "text"),
    [
        (Literal, "train/los", {"limit_val_batches": 0}, "monitor=train/los is not measured; did you mean 'train/lo"),
        (Literal, "loss", {"limit_val_batches": 0, "max_epochs": 2}, "monitor=loss is not measured"),
        (Blind, "val/jaccard", {}, "monitor=val/jaccard is not measured\nBlind measures train/loss"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.filterwarnings("ignore:.*but have no `validation_step`")
def test_without_validation_the_first_epoch_shows_the_names(fit, tmp_path, task, monitor, options, text):
    with pytest.raises(CellMapKeyError) as info:
        fit(task(), monitor, more=[LastCheckpoint(tmp_path)], options=options)
    assert text in str(info.value)
    assert fit.steps == [0]
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize("monitor", ["val/jaccard", "train/loss", "step"])
def test_without_validation_right_names_are_no_error(fit, monitor):
    fit(Literal(), monitor, options={"limit_val_batches": 0})
    assert fit.steps == [0]


@pytest.mark.parametrize(
    ("monitor", "mode", "validates", "text"),
    [
        ("val/dice", "max", True, "best.ckpt: the highest val/dice; callbacks.checkpoint.mode changes it"),
        ("train/loss", "min", False, "best.ckpt: the lowest train/loss; callbacks.checkpoint.mode changes it"),
        ("val/dice", "max", False, "no best.ckpt: with trainer.limit_val_batches=0 val/dice is not measured; "),
    ],
)  # fmt: skip
def test_log_line_of_the_best_checkpoint(monitor, mode, validates, text):
    callbacks = [ModelCheckpoint(filename="best", monitor=monitor, mode=mode), ModelCheckpoint(filename="recent")]
    (line,) = describe_best(callbacks, validates)
    assert line.startswith(text)
