"""Checkpoints in the form of ``cellmap-train``, of tiny networks that are not trained."""

from dataclasses import asdict

import pytest
import torch
from hydra.utils import instantiate

from cellmap_lightning.checkpointing.checkpoint_config import CONFIG_KEY
from cellmap_lightning.checkpointing.data_match import RECORD
from cellmap_lightning.transforms.normalization import Normalize

UNET = {
    "_target_": "monai.networks.nets.UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8],
    "strides": [2], "num_res_units": 1,
}  # fmt: skip
SHAPE, SCALE = [8, 16, 16], [16.0, 8.0, 8.0]


@pytest.fixture
def save(tmp_path):
    """Return a function that writes a checkpoint, with changes of its network, task, arrays and rule."""

    def save_checkpoint(network=None, shape=SHAPE, target=None, rule=None, classes=("mito", "er"), scale=SCALE, **task):
        patch = {"shape": list(shape), "scale": scale[-len(shape) :]}
        model = UNET if network is None else network
        config = {
            "data": {
                "input_arrays": {"raw": patch}, "target_arrays": {"labels": patch | (target or {})},
                "classes": list(classes),
            },
            "model": model,
            "task": {
                "_target_": "cellmap_lightning.training.task.SegmentationTask", "network": model,
                "classes": list(classes), **task,
            },
        }  # fmt: skip
        torch.manual_seed(0)
        built = instantiate(config["task"], _convert_="all")
        normalize = rule or Normalize("range", 10, 210, True)
        record = {"inputs": {"raw": {"values": "normalized"}}, "classes": list(classes), "normalize": asdict(normalize)}
        path = tmp_path / "best.ckpt"
        content = {
            "state_dict": built.state_dict(), CONFIG_KEY: config, "CellMapDataModule": {RECORD: record},
            "global_step": 7,
        }  # fmt: skip
        torch.save(content, path)
        return path

    return save_checkpoint
