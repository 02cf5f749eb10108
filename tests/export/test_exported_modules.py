"""Own modules are exported as they predict, and refused where `cellmap-predict` refuses them."""

import lightning as L
import pytest
import torch

from cellmap_lightning.commands.prediction_context import ContextError, reach_of_task
from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.export.reach import Reach
from cellmap_lightning.export.saved_models import load_model
from cellmap_lightning.export.targets import TARGETS, export_model
from cellmap_lightning.export.trained_model import restore_model
from tests.commands.test_prediction_context import config


class Bare(L.LightningModule):
    """A module that only trains."""

    def __init__(self, network, classes):
        super().__init__()
        self.network = network


class OfTensors(Bare):
    def forward(self, x):
        return self.network(x)


class OfBatches(Bare):
    def forward(self, batch):
        return self.network(batch["raw"]).sigmoid()


class Both(OfTensors):
    def predict_step(self, batch, batch_idx):
        return self(batch["raw"]).sigmoid()


class CallsItself(Bare):
    def predict_step(self, batch, batch_idx):
        return self(batch["raw"])


class Unnamed(L.LightningModule):
    """A module whose network has another name."""

    def __init__(self, network, classes):
        super().__init__()
        self.layers = network

    def predict_step(self, batch, batch_idx):
        return self.layers(batch["raw"]).sigmoid()


class Hard(Unnamed):
    def predict_step(self, batch, batch_idx):
        return (self.layers(batch["raw"]) > 0).float()


def restore(save, cls, **options):
    return restore_model(save(_target_=f"{__name__}.{cls.__name__}", **options), trust=[__name__.partition(".")[0]])


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        (OfTensors, r"OfTensors has no predict_step, .* define predict_step\(self, batch, batch_idx\)"),
        (Bare, r"Bare has neither predict_step nor forward, .* define predict_step\(self, batch, batch_idx\)"),
        (CallsItself, "CallsItself: predict_step calls a module without forward"),
    ],
)
def test_modules_that_cannot_predict_are_not_exported(save, cls, match):
    with pytest.raises(CellMapTypeError, match=match):
        restore(save, cls)


@pytest.mark.parametrize("cls", [OfBatches, Both, Unnamed])
@pytest.mark.parametrize("to", [to for to in TARGETS if to in ("torchscript", "cellmap_flow")])
def test_the_export_is_what_the_module_predicts(save, tmp_path, cls, to):
    model = restore(save, cls)
    card = export_model(model, to, tmp_path / "out")
    logits = (model.module.task.layers if cls is Unnamed else model.module.task.network)(model.example)
    with torch.no_grad():
        exported = load_model(tmp_path / "out" / card.weights, "test")(model.example)
    margin = [(n - m) // 2 for n, m in zip(logits.shape[2:], exported.shape[2:], strict=True)]
    inner = logits.sigmoid()[(..., *(slice(m, n - m) for m, n in zip(margin, logits.shape[2:], strict=True)))]
    torch.testing.assert_close(exported, inner, atol=1e-5, rtol=0)


def test_the_context_of_a_checkpoint_whose_network_has_another_name(save, tmp_path):
    """It is measured on the prediction, as that of the export."""
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 5, "padding": 2}
    model = restore(save, Unnamed, network=network)
    reach = reach_of_task(config(tmp_path, (8, 16, 16)), model.module.task)
    assert reach == Reach((2, 2, 2), (1, 1, 1), 8.0, ())
    assert model.card.reach == {"halo": (2, 2, 2), "step": (1, 1, 1), "voxel_bytes": 8.0, "statistics": ()}


def test_a_prediction_without_gradients_cannot_be_measured(save, tmp_path, caplog):
    model = restore(save, Hard)
    assert isinstance(reach_of_task(config(tmp_path, (8, 16, 16)), model.module.task), ContextError)
    assert model.card.reach is None
