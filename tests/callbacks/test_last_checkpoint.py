"""The newest state is always saved, and a run resumes from it rather than from the best one."""

import hydra
import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
from cellmap_lightning.training.checkpoints import saved_checkpoints
from cellmap_lightning.training.task import SegmentationTask
from tests.conftest import CLASSES
from tests.loading.test_resume import BATCHES, EPOCHS, Seen, StopAfter, StopError
from tests.runs import module, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning", "no_threads_left"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor=:UserWarning"),
]


def configured(folder):
    """The callbacks of the default configuration that save."""
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        nodes = OmegaConf.to_container(hydra.compose("train").callbacks, resolve=False)
    metric = {"monitor": "val/dice"}
    saving = [node | (metric if "monitor" in node else {}) for node in nodes.values() if "dirpath" in node]
    return [instantiate(node | {"dirpath": str(folder)}) for node in saving]


class Judged(SegmentationTask):
    """A task with predefined metric values."""

    def __init__(self, values):
        torch.manual_seed(0)
        super().__init__(torch.nn.Conv3d(1, 3, 3, padding=1), CLASSES)
        self.values = list(values)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val/dice", float(self.values.pop(0)))


def run(volume, folder, values, *, stop=None, ckpt=None, **options):
    seen = Seen()
    callbacks = [seen, *configured(folder), *([StopAfter(stop)] if stop else [])]
    with module(volume, batch_size=2, val_samples=2, batches_per_epoch=BATCHES) as data:
        train = trainer(folder, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0, **options)
        try:
            train.fit(Judged(values), data, ckpt_path=ckpt, weights_only=True)
        except StopError:
            assert stop is not None
    return seen


WORSE = [1 / n for n in range(1, 20)]
NAN = [float("nan")] * 20
EPOCHWISE = {"max_epochs": EPOCHS}


@pytest.mark.parametrize(
    ("values", "before", "stop", "newest", "after"),
    [
        pytest.param(WORSE, EPOCHWISE, 10, 8, EPOCHWISE, id="a metric that worsens"),
        pytest.param(NAN, EPOCHWISE, 10, 8, EPOCHWISE, id="a metric that is NaN"),
        pytest.param(WORSE, {"max_epochs": 2}, None, 8, EPOCHWISE, id="more epochs"),
        pytest.param(
            [], EPOCHWISE | {"limit_val_batches": 0}, 6, 4, EPOCHWISE | {"limit_val_batches": 0}, id="no validation"
        ),
        pytest.param(WORSE, {"max_steps": 6}, None, 6, {"max_steps": 12}, id="max_steps in the middle of an epoch"),
        pytest.param(
            [], {"max_steps": 7, "limit_val_batches": 0}, None, 7, {"max_steps": 12, "limit_val_batches": 0},
            id="max_steps and no validation",
        ),
        pytest.param(
            WORSE, EPOCHWISE | {"val_check_interval": 0.5}, 7, 6, EPOCHWISE | {"val_check_interval": 0.5},
            id="two validations per epoch",
        ),
        pytest.param(
            WORSE, EPOCHWISE | {"val_check_interval": 3}, 8, 8, EPOCHWISE | {"val_check_interval": 3},
            id="epochs that do not end with a validation",
        ),
        pytest.param(
            WORSE, EPOCHWISE | {"check_val_every_n_epoch": 2}, 6, 4, EPOCHWISE | {"check_val_every_n_epoch": 2},
            id="every second epoch",
        ),
    ],
)  # fmt: skip
def test_newest_state_is_saved_and_resumed(volume, tmp_path, values, before, stop, newest, after):
    limits = {"max_epochs": None} if "max_steps" in before else {}
    whole = run(volume, tmp_path / "whole", values, **limits | after)
    stopped = run(volume, tmp_path / "run", values, stop=stop, **limits | before)
    saved = saved_checkpoints(tmp_path / "run")
    assert (saved[-1].step, saved[-1].path.name) == (newest, "last.ckpt")
    resumed = run(volume, tmp_path / "run", values, ckpt=saved[-1].path, **limits | after)
    assert len(whole.steps) == EPOCHS * BATCHES
    assert stopped.steps[:newest] + resumed.steps == whole.steps


class StopInStep(L.Callback):
    """Stops the Trainer after a step, like a time limit."""

    def on_train_batch_end(self, run, *_, **__):
        run.should_stop = run.global_step >= 6


def test_stop_in_the_middle_of_an_epoch(volume, tmp_path):
    whole = run(volume, tmp_path / "whole", WORSE, **EPOCHWISE)
    seen = Seen()
    with module(volume, batch_size=2, val_samples=2, batches_per_epoch=BATCHES) as data:
        callbacks = [seen, StopInStep(), *configured(tmp_path / "run")]
        train = trainer(
            tmp_path, callbacks=callbacks, enable_checkpointing=True, num_sanity_val_steps=0, min_epochs=1, **EPOCHWISE
        )
        train.fit(Judged(WORSE), data)
    newest = saved_checkpoints(tmp_path / "run")[-1]
    assert newest.step == len(seen.steps) == 6
    assert seen.steps + run(volume, tmp_path / "run", WORSE, ckpt=newest.path, **EPOCHWISE).steps == whole.steps
