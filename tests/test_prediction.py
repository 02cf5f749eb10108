"""A whole volume, predicted: what is written is what the model says, wherever blocks, ranks and kills fall."""

import datetime as dt
import hashlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import zarr
from lightning.pytorch.strategies import DDPStrategy

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import PredictionWriter
from cellmap_lightning.volumes.writer import write_multiscale

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

SCALE, TRANSLATION = (10.48, 8.0, 8.0), (5.24, 4.0, 2.0)


class Identity(L.LightningModule):
    """Gives back its input, once for each class."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels = channels
        self.batches = 0

    def predict_step(self, batch, batch_idx):
        self.batches += 1
        return batch["raw"].repeat(1, self.channels, *[1] * (batch["raw"].ndim - 2))


class Convolution(L.LightningModule):
    """Something whose borders differ from its middle."""

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, 5, padding=2), torch.nn.Conv3d(4, channels, 3, padding=1)
        )

    def forward(self, x):
        return self.network(x).sigmoid()

    def predict_step(self, batch, batch_idx):
        # One by one: what a convolution gives may differ in the last bit with the number of samples.
        return {"found": torch.cat([self(x[None]) for x in batch["raw"]])}


def raw_volume(folder, shape, dtype="uint8", **kwargs):
    """Random voxels, and where they are."""
    values = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    path = Path(folder) / "raw.zarr" / "em"
    write_multiscale(path, values, scale=SCALE, translation=TRANSLATION, chunks=(16, 16, 16), **kwargs)
    return path, values


def module(path, patch, classes=("a",), **kwargs):
    spec = {"shape": list(patch), "scale": list(SCALE)}
    given = {"datasets": {"predict": [{"raw": str(path)}]}, "batch_size": 3}
    return CellMapDataModule(list(classes), {"raw": spec}, **(given | kwargs))


def predict(path, patch, output, model=None, classes=("a",), world=1, data=None, **kwargs):
    """Run it; the writer."""
    given = {"chunks": [8, 8, 16], "block_mb": 0.05, "dtype": "float32"}
    writer = PredictionWriter(str(output), classes=list(classes), **(given | kwargs))
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=60))
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[writer],
        default_root_dir=Path(output).parent,
    )  # fmt: skip
    with module(path, patch, classes, **(data or {})) as given_data:
        assert not run.predict(model or Identity(len(classes)), datamodule=given_data)
    return writer


def read(output, name="a", level=0):
    return zarr.open_array(str(Path(output) / name / f"s{level}"), mode="r")[...]


def contents(output):
    """Every file of the data, with its bytes."""
    return {
        str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(output).rglob("*"))
        if p.is_file() and ".cellmap-prediction" not in p.parts
    }


@pytest.mark.parametrize("shape", [(32, 48, 48), (33, 41, 50), (10, 12, 90)], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
def test_an_identity_is_reproduced_bit_for_bit_by_trim(tmp_path, shape, overlap):
    path, values = raw_volume(tmp_path, shape)
    writer = predict(path, (12, 16, 20), tmp_path / "out.zarr", overlap=overlap)
    assert writer.summary.complete
    assert writer.summary.blocks > 1
    found = read(tmp_path / "out.zarr")
    assert found.shape == shape
    with module(path, (12, 16, 20)) as data:
        whole = data.predict_dataset.layout.scaling(torch.from_numpy(values)[None, None], torch.tensor([0]))[0, 0]
    assert np.array_equal(found, whole.numpy())


@pytest.mark.parametrize("shape", [(32, 48, 48), (33, 41, 50), (10, 12, 90)], ids=str)
@pytest.mark.parametrize("blend", ["average", "gaussian"])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
def test_an_identity_is_reproduced_by_weighted_means(tmp_path, shape, blend, overlap):
    path, values = raw_volume(tmp_path, shape)
    predict(path, (12, 16, 20), tmp_path / "out.zarr", blend=blend, overlap=overlap, block_mb=0.2)
    assert np.abs(read(tmp_path / "out.zarr") - values.astype(np.float32) / 255).max() < 1e-6


@pytest.mark.parametrize(("blend", "mode"), [("average", "constant"), ("gaussian", "gaussian")])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("shape", [(33, 41, 50), (10, 40, 64)], ids=str)
def test_weighted_means_are_those_of_monai(tmp_path, blend, mode, overlap, shape):
    from monai.inferers import sliding_window_inference

    path, values = raw_volume(tmp_path, shape)
    model = Convolution().eval()
    predict(path, (12, 16, 20), tmp_path / "out.zarr", model, ("a", "b"), blend=blend, overlap=overlap)
    with torch.inference_mode():
        whole = torch.from_numpy(values.astype(np.float32) / 255)[None, None]
        expected = sliding_window_inference(whole, (12, 16, 20), 2, model, overlap=overlap, mode=mode)[0]
    for name, channel in zip("ab", expected.numpy(), strict=True):
        assert np.abs(read(tmp_path / "out.zarr", name) - channel).max() < 1e-5
