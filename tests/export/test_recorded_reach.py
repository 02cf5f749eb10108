"""Exports are predicted with the patches, the context and the blending of their checkpoints."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from cellmap_lightning.commands.prediction_context import ContextError, reach_of_task, set_context
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.export.exported_task import ExportedTask
from cellmap_lightning.export.model_card import CARD, read_card
from cellmap_lightning.export.targets import export_model
from cellmap_lightning.export.trained_model import restore_model
from tests.commands.test_prediction_context import config
from tests.export.conftest import UNET
from tests.prediction.predictions import SCALE, predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

VOLUME, PATCH, CLASSES = (40, 48, 56), (16, 16, 16), ["mito", "er"]
CONVOLUTIONS = {
    "_target_": "torch.nn.Sequential",
    "_args_": [
        {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 5, "padding": 2},
        {"_target_": "torch.nn.ReLU"},
        {"_target_": "torch.nn.Conv3d", "in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1},
    ],
}
NETWORKS = {
    "convolutions": CONVOLUTIONS,
    "strides": UNET | {"norm": "BATCH"},
    "deep strides": UNET | {"norm": "BATCH", "channels": [4, 4, 4], "strides": [2, 2]},
    "instance norm": UNET,
}


def tasks(save, tmp_path, name, to="torchscript"):
    """Return the task of a checkpoint, and that of its export."""
    path = save(network=NETWORKS[name], shape=PATCH, scale=list(SCALE))
    checkpoint = torch.load(path, weights_only=True)
    task = instantiate(next(v["task"] for v in checkpoint.values() if isinstance(v, dict) and "task" in v))
    task.load_state_dict(checkpoint["state_dict"])
    export_model(restore_model(path), to, tmp_path / "export")
    return task.eval(), ExportedTask(str(tmp_path / "export"))


def settle(path, task, memory):
    """Return the patch, blending, context and batch size of a task."""
    cfg = config(path, PATCH, memory)
    cfg.data.classes = CLASSES
    set_context(cfg, reach_of_task(cfg, task))
    context = cfg.writer.context
    return (
        tuple(cfg.data.input_arrays.raw.shape), cfg.writer.blend,
        list(context) if hasattr(context, "__len__") else context, cfg.data.batch_size,
    )  # fmt: skip


def predicted(path, task, settings, out):
    patch, blend, context, _ = settings
    predict(path, patch, out, task, CLASSES, blend=blend, context=context, block_size_mb=0.3, dtype="uint8")
    return np.stack([read(out, name) for name in CLASSES]).astype(int)


@pytest.mark.parametrize("to", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_prediction_of_an_export_is_that_of_its_checkpoint(save, tmp_path, caplog, name, to):
    if to == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    own, exported = tasks(save, tmp_path, name, to)
    path, _ = raw_volume(tmp_path, VOLUME)
    memory = 2.5 * math.prod(PATCH) * exported.card.reach["voxel_bytes"] / 2**20
    settings = settle(path, own, memory)
    with caplog.at_level(logging.INFO):
        assert settle(path, exported, memory) == settings
    assert "is not known" not in caplog.text
    assert (settings[1] == "gaussian") == (name in ("instance norm", "deep strides"))
    expected = predicted(path, own, settings, tmp_path / "own.zarr")
    assert expected.std() > 0
    assert np.abs(predicted(path, exported, settings, tmp_path / "exported.zarr") - expected).max() <= 1


def test_the_description_has_what_the_choice_depends_on(save, tmp_path):
    tasks(save, tmp_path, "strides")
    reach = json.loads((tmp_path / "export" / CARD).read_text())["reach"]
    assert reach["step"] == [2, 2, 2]
    assert reach["voxel_bytes"] > 4
    assert reach["statistics"] == []


def test_statistics_of_the_patch_are_recorded(save, tmp_path):
    assert tasks(save, tmp_path, "instance norm")[1].card.reach["statistics"] == ("InstanceNorm3d",)


def rewrite(folder, **changes):
    content = json.loads((folder / CARD).read_text()) | changes
    (folder / CARD).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return ExportedTask(str(folder))


@pytest.mark.parametrize("halo", [[3, 3, 3], [2, 0, 1], [0, 0, 0]])
def test_older_descriptions_have_a_halo_alone(save, tmp_path, caplog, halo):
    tasks(save, tmp_path, "convolutions")
    path, _ = raw_volume(tmp_path, VOLUME)
    task = rewrite(tmp_path / "export", reach=..., halo=halo)
    patch, blend, context, batch = settle(path, task, 2048)
    assert (patch, blend, batch) == (PATCH, "trim", 3)
    assert (context if isinstance(context, list) else [context] * 3) == halo


def test_an_older_description_gives_the_prediction_of_the_checkpoint(save, tmp_path, caplog):
    own, _ = tasks(save, tmp_path, "convolutions")
    path, _ = raw_volume(tmp_path, VOLUME)
    task = rewrite(tmp_path / "export", reach=...)
    expected = predicted(path, own, settle(path, own, 2048), tmp_path / "own.zarr")
    with caplog.at_level(logging.WARNING):
        found = predicted(path, task, settle(path, task, 2048), tmp_path / "exported.zarr")
    assert np.abs(found - expected).max() <= 1
    assert "seams" not in caplog.text


def test_a_file_that_takes_one_shape_keeps_its_patch(save, tmp_path):
    tasks(save, tmp_path, "convolutions")
    path, _ = raw_volume(tmp_path, VOLUME)
    folder = tmp_path / "export"
    reach = json.loads((folder / CARD).read_text())["reach"]
    assert settle(path, rewrite(folder), 2048)[0] != PATCH
    assert settle(path, rewrite(folder, reach=reach | {"voxel_bytes": 0}), 2048)[0] == PATCH


def test_descriptions_without_halo_say_so(save, tmp_path):
    tasks(save, tmp_path, "convolutions")
    path, _ = raw_volume(tmp_path, VOLUME)
    reach = reach_of_task(config(path, PATCH), rewrite(tmp_path / "export", reach=..., halo=None))
    assert isinstance(reach, ContextError)
    assert "has neither reach nor halo" in str(reach)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (3, "reach must be a mapping with halo, step, voxel_bytes, statistics, got 3"),
        ({"halo": [1, 1, 1]}, "reach must be a mapping with halo, step, voxel_bytes, statistics, got ['halo']"),
        ({"step": [0, 1, 1]}, "reach.step must be a whole number of at least 1, got 0"),
        ({"step": [1, 1]}, "reach.halo and reach.step must have one number per axis"),
        ({"voxel_bytes": -1}, "reach.voxel_bytes must be"),
        ({"statistics": "GroupNorm"}, "reach.statistics must be a list"),
    ],
    ids=str,
)
def test_invalid_reaches(save, tmp_path, change, match):
    tasks(save, tmp_path, "convolutions")
    reach = json.loads((tmp_path / "export" / CARD).read_text())["reach"]
    new = change if not isinstance(change, dict) or "halo" in change else reach | change
    with pytest.raises(CellMapError) as e:
        rewrite(tmp_path / "export", reach=new)
    assert match in str(e.value)
    assert CARD in str(e.value)


def test_the_reach_of_slices(save, tmp_path):
    model = restore_model(save(UNET | {"spatial_dims": 2, "norm": "BATCH"}, shape=[16, 16]))
    export_model(model, "torchscript", tmp_path / "out")
    assert len(read_card(tmp_path / "out", "ckpt").reach["halo"]) == 2
