"""Models, volumes and runs that the tests of predictions share."""

import datetime as dt
import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import zarr
from lightning.pytorch.strategies import DDPStrategy

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.callbacks import make_prediction_writer
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale

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
    write_multiscale(
        path, values, scale=SCALE, translation=TRANSLATION, storage=ArrayOptions(chunks=(16, 16, 16)), **kwargs
    )
    return path, values


def module(path, patch, classes=("a",), **kwargs):
    spec = {"shape": list(patch), "scale": list(SCALE)}
    given: dict[str, Any] = {"datasets": {"predict": [{"raw": str(path)}]}, "batch_size": 3}
    return CellMapDataModule(list(classes), **({"input_arrays": {"raw": spec}} | given | kwargs))


def predict(path, patch, output, model=None, classes=("a",), world=1, data=None, limit=None, **kwargs):
    """Run it, or some batches of it; the writer."""
    given: dict[str, Any] = {"chunks": [8, 8, 16], "block_size_mb": 0.02, "dtype": "float32"}
    writer = make_prediction_writer(str(output), classes=list(classes), **(given | kwargs))
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=dt.timedelta(seconds=300))
    run = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[writer],
        default_root_dir=Path(output).parent, limit_predict_batches=limit,
    )  # fmt: skip
    with module(path, patch, classes, **(data or {})) as given_data:
        assert not run.predict(model or Identity(len(classes)), datamodule=given_data)
    return writer


def read(output, name="a", level=0):
    return zarr.open_array(str(Path(output) / name / f"s{level}"), mode="r")[...]


def contents(output, root=True):
    """Every file of the data, with its bytes; without the root's metadata, they hold nothing of blocks."""
    of_root = () if root else (".zattrs", ".zmetadata", "zarr.json")
    return {
        str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(output).rglob("*"))
        if p.is_file() and ".cellmap-prediction" not in p.parts and str(p.relative_to(output)) not in of_root
    }
