"""Weights in the files of other trainings: which are loaded, and which files are refused."""

import os
import zipfile

import pytest
import torch
import yaml
from torch import nn

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.training.weight_files import load_weights, read_weights, rename_weights


def network(channels=2):
    torch.manual_seed(channels)
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, channels, 1))


def packaged(path, formats, files):
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("rdf.yaml", yaml.safe_dump({"weights": formats}))
        for name, file in files.items():
            package.write(file, name)


def write(kind, folder):
    """Write the weights of the network in a form; return the file."""
    state, path = network().state_dict(), folder / "weights.pth"
    if kind.startswith("torchscript") or kind == "bioimageio torchscript":
        torch.jit.trace(network().eval(), torch.zeros(1, 1, 4, 4, 4)).save(str(path))
    elif "." in kind or kind == "checkpoint":
        key = kind.partition(".")[2] or "state_dict"
        torch.save({key: state, "epoch": 3, "pytorch-lightning_version": "2.5"}, path)
    else:
        torch.save(state, path)
    if kind.startswith("bioimageio"):
        name = kind.split()[1]
        packaged(folder / "package.zip", {name: {"source": "w/weights.pth"}}, {"w/weights.pth": path})
        return folder / "package.zip"
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "state_dict", "state_dict.model_state_dict", "state_dict.model", "checkpoint", "torchscript",
        "bioimageio pytorch_state_dict", "bioimageio torchscript",
    ],
)  # fmt: skip
def test_weights_are_read(tmp_path, kind):
    file = read_weights(write(kind, tmp_path), "init_from")
    assert file.kind == kind.partition(".")[0].partition(" ")[0]
    expected = network().state_dict()
    assert set(file.weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(file.weights[name], value)


def test_a_report_names_what_fits(tmp_path):
    weights = read_weights(write("state_dict", tmp_path), "init_from").weights | {"extra": torch.zeros(1)}
    other = network(3)
    before = other[2].weight.clone()
    report = load_weights(other, weights, "init_from=x", skip={"2.bias"})
    assert "7 of the 9 weights of the model are loaded" in report
    assert "2.weight is initialized: [2, 4, 1, 1, 1] saved, [3, 4, 1, 1, 1] needed" in report
    assert "2.bias is initialized: its size depends on the classes" in report
    assert "not used: extra" in report
    torch.testing.assert_close(other[0].weight, network().state_dict()["0.weight"])
    assert torch.equal(other[2].weight, before)


def test_names_are_mapped():
    weights = {"model.a.w": torch.zeros(1), "model.b": torch.ones(1), "c": torch.ones(2)}
    assert set(rename_weights(weights, {"model.": "", "model.a.": "x."}, "f")) == {"x.w", "b", "c"}
    assert set(rename_weights(weights, {"": "network."}, "f")) == {"network.model.a.w", "network.model.b", "network.c"}
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    with pytest.raises(CellMapValueError, match=r"none of its 9 weights fits the 9 of the model; .*init_from_map"):
        load_weights(network(), state, "init_from=x")
    assert "9 of the 9" in load_weights(network(), rename_weights(state, {"module.": ""}, "f"), "init_from=x")


@pytest.mark.parametrize(
    ("prefixes", "error", "match"),
    [
        ({"modle.": ""}, CellMapKeyError, "no weight of f begins with 'modle.'; they are a.w, b.w"),
        ({"a.": "", "b.": ""}, CellMapValueError, "two weights of f get the name 'w'"),
        (["a."], CellMapTypeError, r"init_from_map must be \{old prefix: new prefix\}"),
        ({"a.": None}, CellMapTypeError, r"init_from_map must be \{old prefix: new prefix\}"),
    ],
)
def test_maps_that_are_wrong(prefixes, error, match):
    with pytest.raises(error, match=match):
        rename_weights({"a.w": torch.zeros(1), "b.w": torch.zeros(1)}, prefixes, "f")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"epoch": 1}, "holds no weights: it has epoch"),
        ([1, 2], "holds no weights: it is a list"),
        ({"state_dict": {}}, "holds no weights: it has state_dict"),
    ],
)
def test_files_without_weights(tmp_path, content, match):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CellMapValueError, match=match):
        read_weights(tmp_path / "w.pth", "init_from")


@pytest.mark.parametrize(
    ("formats", "match"),
    [
        ({"onnx": {"source": "w"}}, "has weights as onnx; pytorch_state_dict or torchscript is needed"),
        ({"torchscript": {"source": "https://example.org/w.pt"}}, "are not in the package"),
        ({"pytorch_state_dict": {"source": "text"}}, "is not a checkpoint"),
        ({"torchscript": {"source": "text"}}, "is not a TorchScript file"),
        ([1], "has weights as nothing"),
    ],
)
def test_packages_that_are_wrong(tmp_path, formats, match):
    (tmp_path / "text").write_text("weights")
    packaged(tmp_path / "p.zip", formats, {"text": tmp_path / "text"})
    with pytest.raises(CellMapValueError, match=match):
        read_weights(tmp_path / "p.zip", "init_from")


@pytest.mark.parametrize("inside", [False, True])
def test_pickled_code_is_not_run(tmp_path, inside):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1), "b": Harmful()}, path)
    if inside:
        packaged(tmp_path / "p.zip", {"pytorch_state_dict": {"source": "w.pth"}}, {"w.pth": path})
        path = tmp_path / "p.zip"
    with pytest.raises(CellMapValueError, match="could run code"):
        read_weights(path, "init_from")
    assert not (tmp_path / "harmed").exists()
