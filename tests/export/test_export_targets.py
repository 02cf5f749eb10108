"""Exported models compute what their checkpoints compute."""

import json
import sys

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from cellmap_lightning.errors import CellMapError, CellMapFileExistsError, CellMapValueError, MissingExtraError
from cellmap_lightning.export.saved_models import load_model
from cellmap_lightning.export.targets import export_model
from cellmap_lightning.export.trained_model import restore_model
from tests.export.conftest import SHAPE, UNET


def has_onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("to", ["torchscript", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_file_computes_the_probabilities_of_the_checkpoint(save, tmp_path, caplog, to):
    if to == "onnx":
        has_onnx()
    path = save()
    card = export_model(restore_model(path), to, tmp_path / "out")
    network = instantiate(UNET)  # independently of the task: the weights of the checkpoint, and a sigmoid
    weights = torch.load(path, weights_only=True)["state_dict"]
    network.load_state_dict({n.removeprefix("network."): w for n, w in weights.items() if n.startswith("network.")})
    loaded = load_model(tmp_path / "out" / card.weights, "test")
    for batch, shape in [(1, SHAPE), (3, SHAPE), (2, [4, 8, 24])]:
        x = torch.rand(batch, 1, *shape)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), network.eval()(x).sigmoid(), atol=1e-5, rtol=0)
    given, expected = (np.load(tmp_path / "out" / f"test_{name}.npy") for name in ("input", "output"))
    assert given.shape == (1, 1, *SHAPE)
    np.testing.assert_allclose(loaded(torch.from_numpy(given)).detach().numpy(), expected, atol=1e-5)
    assert "torchvision" not in caplog.text
    if to == "onnx":
        axes = pytest.importorskip("onnx").load(tmp_path / "out" / card.weights).graph.input[0].type.tensor_type.shape
        assert [axis.dim_param or axis.dim_value for axis in axes.dim] == ["batch", 1, "z", "y", "x"]
    assert card.about["verified"]["max_difference"] < 1e-5
    assert card.about["verified"]["other_shape"] == [4, 8, 8]


def test_the_description(save, tmp_path):
    export_model(restore_model(save(), stored="uint16"), "torchscript", tmp_path / "out")
    card = json.loads((tmp_path / "out" / "cellmap.json").read_text())
    assert card["classes"] == ["mito", "er"]
    assert (card["input_shape"], card["output_shape"]) == (SHAPE, SHAPE)
    assert card["input_voxel_size"] == [16, 8, 8]
    assert (card["normalize"], card["invert"]) == ({"range": [10, 210]}, True)
    assert card["affine"] == {"dtype": "uint16", "offset": 210, "factor": pytest.approx(-1 / 200)}
    assert card["activation"] is None
    assert len(card["about"]["checkpoint"]["sha256"]) == 64
    assert card["about"]["versions"]["torch"] == torch.__version__
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "cellmap.json", "model.ts", "test_input.npy", "test_output.npy",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "outputs", "names", "function"),
    [
        ({"kind": "labels"}, 3, ["mito", "er"], lambda x: x.softmax(1)[:, 1:]),
        ({"kind": "sdt", "nm": 40}, 2, 2, torch.tanh),
        ({"kind": "affinities", "offsets": [[1, 0, 0], [0, 1, 0]]}, 4, 4, torch.sigmoid),
    ],
    ids=["labels", "sdt", "affinities"],
)
def test_channels_of_other_kinds(save, tmp_path, target, outputs, names, function):
    model = restore_model(save(network=UNET | {"out_channels": outputs}, target=target))
    card = export_model(model, "torchscript", tmp_path / "out")
    logits = model.module.network(model.example)
    torch.testing.assert_close(model.expected, function(logits))
    if isinstance(names, list):
        assert list(card.channel_names) == names
    else:
        assert len(card.channel_names) == names
        assert {channel["kind"] for channel in card.channels} == {target["kind"]}


def test_slices(save, tmp_path):
    card = export_model(restore_model(save(UNET | {"spatial_dims": 2}, shape=[16, 16])), "torchscript", tmp_path / "o")
    assert (card.input_shape, card.output_voxel_size) == ((16, 16), (8, 8))
    assert np.load(tmp_path / "o" / "test_input.npy").shape == (1, 1, 16, 16)


class Traced(nn.Module):
    """A network whose trace computes something else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 1)

    def forward(self, x):
        return self.layer(x) * (1.001 if torch.jit.is_tracing() else 1)


class Refusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 1)

    def forward(self, x):
        if torch.jit.is_tracing():
            raise TypeError("the shape is asked for")
        return self.layer(x)


def target_of(cls):
    return {"_target_": f"tests.export.test_export_targets.{cls.__name__}"}


def test_a_network_that_cannot_be_traced(save, tmp_path):
    model = restore_model(save(target_of(Refusing)), trust=["tests.export.test_export_targets"])
    with pytest.raises(CellMapValueError, match=r"to=torchscript: Refusing cannot be traced \(the shape is asked for"):
        export_model(model, "torchscript", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt"], "nothing is left"


def test_an_export_that_differs_is_not_written(save, tmp_path):
    model = restore_model(save(target_of(Traced)), trust=["tests.export.test_export_targets"])
    with pytest.raises(CellMapValueError, match=r"differs from that of the model by \d.*e-.*; nothing is exported"):
        export_model(model, "torchscript", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt"]


def test_outputs_that_exist(save, tmp_path):
    model = restore_model(save())
    export_model(model, "torchscript", tmp_path / "out")
    with pytest.raises(CellMapFileExistsError, match="set overwrite=true to replace it"):
        export_model(model, "torchscript", tmp_path / "out")
    (tmp_path / "out" / "old.txt").touch()
    export_model(model, "torchscript", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    for name in ("notes", "best.ckpt"):
        other = tmp_path / name
        if name == "notes":
            other.mkdir()
        with pytest.raises(CellMapFileExistsError, match="exists and is not an export"):
            export_model(model, "torchscript", other, overwrite=True)
        assert other.exists()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(CellMapFileExistsError, match="exists and is not an export"):
        export_model(model, "torchscript", tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("to", ["torch", "Onnx", None, 3])
def test_unknown_targets(save, tmp_path, to):
    with pytest.raises(CellMapValueError, match="to must be one of torchscript, onnx"):
        export_model(None, to, tmp_path / "out")


def test_checkpoints_that_cannot_be_exported(save, tmp_path):
    path = save(target_of(Traced))
    with pytest.raises(CellMapError, match="could run any code"):
        restore_model(path)
    content = torch.load(path, weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "plain.ckpt")
    with pytest.raises(CellMapValueError, match="has no configuration"):
        restore_model(tmp_path / "plain.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    with pytest.raises(CellMapValueError, match="is not a checkpoint"):
        restore_model(tmp_path / "text.ckpt")
    config = content["cellmap_config"]
    config["data"]["input_arrays"]["context"] = config["data"]["input_arrays"]["raw"]
    config["task"]["input_name"] = ["raw", "context"]
    torch.save(content, path)
    with pytest.raises(CellMapValueError, match="the inputs raw, context; networks with one input are exported"):
        restore_model(path, trust=["tests.export.test_export_targets"])
    with pytest.raises(CellMapValueError, match="stored_dtype must be a type of numbers"):
        restore_model(save(), stored="uint9")


def test_weights_of_another_network(save):
    path = save()
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop(next(name for name in content["state_dict"] if name.startswith("network.")))
    torch.save(content, path)
    with pytest.raises(CellMapValueError, match="the weights do not fit the model: Missing key"):
        restore_model(path)


class SingleUse(nn.Module):
    """A network that accepts one length alone, so that its halo cannot be measured on another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x):
        if x.shape[2] != 80:
            raise ValueError("80 voxels are needed")
        return self.layer(x)


def test_a_halo_that_cannot_be_measured(save, tmp_path, caplog):
    path = save(target_of(SingleUse), shape=[80, 80, 80])
    card = export_model(restore_model(path, ["tests.export.test_export_targets"]), "torchscript", tmp_path / "out")
    assert card.halo is None
    assert "the halo is not measured: ValueError: 80 voxels are needed" in caplog.text
    assert card.about["verified"]["other_shape"] is None


def test_a_missing_extra(save, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r'to=onnx needs onnx, .*pip install -e "\.\[export\]"'):
        export_model(restore_model(save()), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
