"""The automatic context: blocks give the prediction of the whole volume, and what it decides is logged."""

import logging
import math

import lightning as L
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from omegaconf import ListConfig, OmegaConf
from torch import nn

from cellmap_lightning.commands.patch_plan import PatchNeeds, plan_patch
from cellmap_lightning.commands.prediction_context import reach_of_task, set_context
from cellmap_lightning.errors import CellMapValueError
from tests.prediction.predictions import SCALE, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

SHAPE = (48, 64, 64)


class Task(L.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def predict_step(self, batch, batch_idx):
        return torch.cat([self.network(x[None]) for x in batch["raw"]]).sigmoid()


def unet(norm):
    torch.manual_seed(0)
    network = UNet(3, 1, 1, channels=(4, 4, 8), strides=(2, 2), num_res_units=1, norm=norm)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):  # statistics that change something
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


def dilated():
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 4, 3, padding=(3, 1, 2), dilation=(3, 1, 2)), nn.ReLU(), nn.Conv3d(4, 1, 5, padding=2)]
    return nn.Sequential(*layers)


def pooled():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.MaxPool3d(2), nn.PReLU(), nn.Conv3d(4, 4, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(4, 1, 3, padding=1),
    )  # fmt: skip


def config(path, patch=(16, 16, 16), memory=2048, adjustable=True, **writer):
    return OmegaConf.create(
        {
            "writer": {"blend": "auto", "overlap": None, "context": "auto", "region": None} | writer,
            "data": {
                "classes": ["a"], "input_arrays": {"raw": {"shape": list(patch), "scale": list(SCALE)}},
                "target_arrays": {}, "batch_size": 3, "planes": None,
            },
            "adjustable": {"patch": adjustable, "batch_size": True}, "patch": {"memory_mb": memory},
            "metadata": {"unit": None}, "input_path": str(path),
        }
    )  # fmt: skip


def settled(network, cfg):
    set_context(cfg, reach_of_task(cfg, Task(network)))
    return tuple(cfg.data.input_arrays.raw.shape), cfg.writer.blend, cfg.writer.context


@pytest.mark.parametrize(
    ("make", "share"), [(lambda: unet("BATCH"), 0.85), (dilated, 0.1), (pooled, 0.1)], ids=["unet", "dilated", "pooled"]
)
def test_blocks_give_the_prediction_of_the_whole_volume(tmp_path, caplog, make, share):
    network = make()
    path, values = raw_volume(tmp_path, SHAPE)
    reach = reach_of_task(config(path), Task(network))
    cfg = config(path, memory=share * math.prod(SHAPE) * reach.voxel_bytes / 2**20)
    patch, blend, context = settled(network, cfg)
    assert (blend, patch) != ("trim", SHAPE)
    with caplog.at_level(logging.WARNING):
        predict(path, patch, tmp_path / "out.zarr", Task(network), context=context, block_size_mb=0.2)
    assert "seams" not in caplog.text
    with torch.no_grad():
        whole = network.eval()(torch.from_numpy(values.astype(np.float32) / 255)[None, None])[0, 0].sigmoid().numpy()
    assert np.abs(read(tmp_path / "out.zarr") - whole).max() < 1e-5
    # Half of that context would show.
    half = [n // 2 for n in context] if isinstance(context, ListConfig) else context // 2
    predict(path, patch, tmp_path / "half.zarr", Task(network), context=half, check_context=False)
    assert np.abs(read(tmp_path / "half.zarr") - whole).max() > 1e-4


def test_the_cost_is_logged_in_words(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, SHAPE)
    with caplog.at_level(logging.INFO):
        settled(unet("BATCH"), config(path, memory=6))
    assert "context: each patch of [48, 48, 48] voxels (z, y, x) is computed with [0, 16, 16] voxels" in caplog.text
    assert f"{(2 * 48 / 64) ** 2:.1f} times the voxels of the output" in caplog.text


def test_one_patch_that_is_the_volume_needs_no_context(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, SHAPE)
    cfg = config(path)
    with caplog.at_level(logging.INFO):
        assert settled(unet("BATCH"), cfg) == (SHAPE, "trim", 0)
    assert "none is needed" in caplog.text
    assert cfg.data.batch_size == 3


def test_memory_limits_the_batch(tmp_path):
    path, _ = raw_volume(tmp_path, SHAPE)
    network = unet("BATCH")
    reach = reach_of_task(config(path), Task(network))
    cfg = config(path, memory=2.5 * math.prod(SHAPE) * reach.voxel_bytes / 2**20)
    assert settled(network, cfg)[0] == SHAPE
    assert cfg.data.batch_size == 2


@pytest.mark.parametrize("norm", ["INSTANCE", ("GROUP", {"num_groups": 1})])
def test_normalization_of_patches_is_blended_at_the_size_of_the_training(tmp_path, caplog, norm):
    path, _ = raw_volume(tmp_path, SHAPE)
    with caplog.at_level(logging.INFO):
        assert settled(unet(norm), config(path)) == ((16, 16, 16), "gaussian", None)
    assert "normalizes by the whole patch" in caplog.text
    # Patches of 16 voxels, 8 apart: 5, 7 and 7 of them.
    assert f"{5 * 7 * 7 * 16**3 / math.prod(SHAPE):.1f} times the voxels of the output" in caplog.text


@pytest.mark.parametrize(
    ("writer", "result"),
    [
        ({"context": 3}, ("trim", 3)),
        ({"context": [1, 2, 3]}, ("trim", [1, 2, 3])),
        ({"context": None}, ("trim", None)),
        ({"overlap": 0.5}, ("trim", None)),
        ({"blend": "average"}, ("average", None)),
        ({"blend": "gaussian", "overlap": 0.25}, ("gaussian", None)),
    ],
)
def test_given_values_win(tmp_path, writer, result):
    path, _ = raw_volume(tmp_path, SHAPE)
    assert settled(unet("BATCH"), config(path, **writer)) == ((16, 16, 16), *result)


def test_a_given_patch_is_not_changed(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, SHAPE)
    given = {"patch": (40, 40, 40), "adjustable": False}
    assert settled(dilated(), config(path, **given)) == ((40, 40, 40), "trim", [5, 3, 4])
    given = {"patch": (16, 16, 16), "adjustable": False}
    assert settled(unet("BATCH"), config(path, **given)) == ((16, 16, 16), "gaussian", None)
    assert settled(unet("BATCH"), config(path, blend="trim", **given)) == ((16, 16, 16), "trim", None)
    assert "give a larger patch.shape" in caplog.text


def test_networks_that_cannot_be_measured_use_the_overlap(tmp_path, caplog):
    path, _ = raw_volume(tmp_path, SHAPE)
    cfg = config(path)
    with caplog.at_level(logging.INFO):
        set_context(cfg, reach_of_task(cfg, L.LightningModule()))
    assert (cfg.writer.blend, cfg.writer.context) == ("trim", None)
    assert "LightningModule has neither a network nor a predict_step that can be measured" in caplog.text


@pytest.mark.parametrize("context", ["automatic", "", "16"])
def test_a_context_that_is_a_word(tmp_path, context):
    with pytest.raises(CellMapValueError, match=r"writer.context must be auto, a number of voxels"):
        set_context(config(tmp_path, context=context), None)


@pytest.mark.parametrize("volume", [(100, 300, 500), (64, 64, 64), (40, 1000, 70)])
def test_the_cheapest_patch_within_the_memory(volume):
    needs = PatchNeeds(volume, (0, 0, 0), volume, (32, 32, 32), (8, 8, 8), (8, 8, 8), 100, 100 * 96**3)
    plan = plan_patch(needs)
    assert math.prod(plan.patch) <= 96**3
    assert all(n == 32 or n <= m for n, m in zip(plan.patch, volume, strict=True))
    assert all(c == (0 if n >= m else 8) for c, n, m in zip(plan.context, plan.patch, volume, strict=True))
    cube = plan_patch(PatchNeeds(**(vars(needs) | {"fixed": True})))
    assert plan.computed < cube.computed
    assert plan_patch(PatchNeeds(**(vars(needs) | {"fixed": True, "context": (16, 16, 16)}))) is None
