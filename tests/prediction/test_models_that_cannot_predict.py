"""Modules without ``predict_step`` and ``forward`` are refused in one sentence, before anything is written."""

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from cellmap_lightning.commands.predict import run
from cellmap_lightning.errors import CellMapTypeError
from tests.prediction.predictions import SCALE, Identity, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning")


class Bare(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Conv3d(1, 1, 1)

    def training_step(self, batch, batch_idx):
        return self.network(batch["raw"]).mean()


class Derived(Bare):
    def validation_step(self, batch, batch_idx):
        return None


class Misspelt(Bare):
    def predict_steps(self, batch, batch_idx):
        return batch["raw"]


class OnlyForward(Bare):
    def forward(self, batch):
        return batch["raw"]


class DerivedIdentity(Identity):
    pass


def assigned():
    model = Bare()
    model.predict_step = lambda batch, batch_idx: batch["raw"]
    return model


@pytest.mark.parametrize("cls", [Bare, Derived, Misspelt])
def test_a_module_that_cannot_predict_is_refused(tmp_path, cls):
    path, _ = raw_volume(tmp_path, (8, 16, 16))
    with pytest.raises(CellMapTypeError) as info:
        predict(path, (8, 8, 8), tmp_path / "out.zarr", cls())
    text = str(info.value)
    assert text.startswith(f"{cls.__name__} has neither predict_step nor forward")
    assert "define predict_step(self, batch, batch_idx)" in text
    assert "\n" not in text
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("make", [OnlyForward, DerivedIdentity, assigned])
def test_any_own_way_to_predict_is_accepted(tmp_path, make):
    path, values = raw_volume(tmp_path, (8, 16, 16))
    predict(path, (8, 8, 8), tmp_path / "out.zarr", make())
    assert read(tmp_path / "out.zarr").shape == values.shape


class CallsItself(Bare):
    """Its forward is missing, which torch notices when it is called."""

    def predict_step(self, batch, batch_idx):
        return self(batch["raw"])


class CallsAPart(Bare):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Module()

    def predict_step(self, batch, batch_idx):
        return self.network(batch["raw"])


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Bare, "Bare has neither predict_step nor forward, so that it cannot predict"),
        (CallsItself, "CallsItself: predict_step calls a module without forward"),
        (CallsAPart, "CallsAPart: predict_step calls a module without forward"),
    ],
)
def test_the_command_says_it_in_one_sentence(tmp_path, cls, text):
    path, _ = raw_volume(tmp_path, (8, 16, 16))
    spec = {"shape": [8, 8, 8], "scale": list(SCALE)}
    cfg = OmegaConf.create(
        {
            "ckpt": None, "picture": False, "evaluate": False,
            "data": {
                "_target_": "cellmap_lightning.CellMapDataModule", "datasets": {"predict": [{"raw": str(path)}]},
                "classes": ["a"], "input_arrays": {"raw": spec},
            },
            "writer": {
                "_target_": "cellmap_lightning.callbacks.make_prediction_writer", "output": str(tmp_path / "out.zarr")
            },
            "trainer": {"_target_": "lightning.Trainer", "accelerator": "cpu"},
        }
    )  # fmt: skip
    with pytest.raises(CellMapTypeError) as info:
        run(cfg, cls())
    assert str(info.value).startswith(text)
    assert "\n" not in str(info.value)
