"""Exponential moving averages of the weights: what validates, what is saved, and how a run resumes."""

from typing import ClassVar

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from cellmap_lightning.commands.resolvers import CONFIGS
from tests.runs import module, task, trainer

pytestmark = [
    pytest.mark.usefixtures("quiet_lightning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning"),
]


def average(**options):
    settings = OmegaConf.to_container(OmegaConf.load(CONFIGS / "callbacks" / "ema.yaml").ema)
    return instantiate({**settings, **options})


def weights(state):
    return {name: value.clone() for name, value in state.items() if name.startswith("network.")}


class Steps(torch.optim.SGD):
    """Records the weights after each step."""

    history: ClassVar[list] = []

    def step(self, closure=None):
        loss = super().step(closure)
        self.history.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return loss


@pytest.fixture
def run(volume, tmp_path):
    Steps.history.clear()
    model = task(optimizer=lambda parameters: Steps(parameters, lr=0.5))
    model.on_validation_batch_start = lambda batch, batch_idx: setattr(model, "validated", weights(model.state_dict()))
    # Of the last epoch: the weights that were validated last.
    best = ModelCheckpoint(tmp_path, "best", monitor="step", mode="max")
    with module(volume) as data:
        lightning = trainer(tmp_path, callbacks=[average(decay=0.5), best], enable_checkpointing=True, max_epochs=2)
        lightning.fit(model, data)
        yield model, data, lightning, best, tmp_path


def test_the_average_is_saved_and_validated(run):
    model, _, _, best, _ = run
    saved = torch.load(best.best_model_path, weights_only=True)
    steps = saved["global_step"]
    history = Steps.history[:steps]
    expected = history[0]
    for after in history[1:]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, after, strict=True)]
    for found, wanted in zip(weights(saved["state_dict"]).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    current = [value for name, value in saved["current_model_state"].items() if name.startswith("network.")]
    for found, wanted in zip(current, history[-1], strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(current[0], expected[0])
    for name, value in model.validated.items():
        torch.testing.assert_close(value, saved["state_dict"][name])


def test_a_resumed_run_continues_weights_and_average(run):
    _, data, lightning, _, folder = run
    lightning.save_checkpoint(folder / "end.ckpt")
    straight = trainer(folder, callbacks=[average(decay=0.5)], max_epochs=3)
    other = task(optimizer=lambda parameters: Steps(parameters, lr=0.5))
    before = torch.load(folder / "end.ckpt", weights_only=True)
    loaded = {}

    def remember(batch, batch_idx):
        loaded.setdefault("weights", weights(other.state_dict()))

    other.on_train_batch_start = remember
    straight.fit(other, data, ckpt_path=folder / "end.ckpt", weights_only=True)
    for name, value in loaded["weights"].items():
        torch.testing.assert_close(value, before["current_model_state"][name])
    assert straight.global_step == 9


def test_predictions_use_the_average(run):
    _, data, _, best, folder = run
    averaged = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    plain = task()
    plain.load_state_dict(averaged)
    batch = next(iter(data.val_dataloader()))
    other = task()
    trainer(folder, limit_predict_batches=1).predict(other, data, ckpt_path=best.best_model_path, weights_only=True)
    for found, wanted in zip(weights(other.state_dict()).values(), weights(averaged).values(), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(other(batch["raw"]), plain(batch["raw"]))
