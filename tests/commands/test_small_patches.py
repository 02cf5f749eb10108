"""Patches that a network shrinks to a single voxel."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_values import check_model_shape
from cellmap_lightning.errors import CellMapError

UNET = {
    "_target_": "cellmap_lightning.training.unet.UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 1
}  # fmt: skip
MONAI = {"_target_": "monai.networks.nets.UNet"}
THREE = {"channels": [2, 2, 2, 2], "strides": [2, 2, 2], "num_res_units": 1}


@pytest.mark.parametrize(
    ("shape", "model", "fits"),
    [
        ([8, 8, 8], THREE, "[16, 16, 16]"),
        ([8, 8, 8], THREE | {"norm": "instance"}, "[16, 16, 16]"),
        ([8, 8, 8], THREE | MONAI, "[16, 16, 16]"),
        ([1, 4, 4], {"channels": [2, 2, 2], "strides": [2, 2], "spatial_dims": 2}, "[1, 8, 8]"),
        ([2, 4, 4], {"channels": [2, 2, 2], "strides": [[1, 2, 2], 2], "norm": ["INSTANCE", {}]}, "[4, 8, 8]"),
        ([8, 8, 16], THREE, None),
        ([16, 16, 16], THREE, None),
        ([8, 8, 8], THREE | {"norm": "BATCH"}, None),
        ([8, 8, 8], {"channels": [2, 2, 2], "strides": [2, 2]}, None),
        ([1, 8, 16], THREE | {"spatial_dims": 2}, None),
    ],
)
def test_the_check_agrees_with_the_network(shape, model, fits):
    config = OmegaConf.create({"patch": {"shape": shape}, "model": UNET | model})
    network = instantiate(config.model, _convert_="all")
    batch = torch.rand([2, 1, *(n for n in shape if n != 1)])
    if fits is None:
        check_model_shape(config)
        assert network(batch).shape == batch.shape
        return
    with pytest.raises(CellMapError) as caught:
        check_model_shape(config)
    text = str(caught.value)
    assert text.startswith(f"patch.shape={shape} is too small: model.strides=")
    assert f"; {fits} fits (one longer axis is enough), or" in text
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        network(batch)


def test_other_networks_are_not_judged():
    model = THREE | {"_target_": "mine.Net", "norm": "INSTANCE"}
    check_model_shape(OmegaConf.create({"patch": {"shape": [8, 8, 8]}, "model": model}))
