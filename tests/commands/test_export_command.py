"""``cellmap-export`` from the command line, and ``cellmap-predict`` with what it writes."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
import zarr

from tests.commands.test_cli import run_forked, small

REGION = "region={z: [200, 500], y: [200, 500], x: [200, 500]}"


@pytest.fixture(scope="module")
def exported(volume, tmp_path_factory):
    """A folder with a checkpoint of a short training, and its export as TorchScript."""
    folder = tmp_path_factory.mktemp("exported")
    code, text = run_forked(
        *small(volume, "trainer.max_epochs=1", "hydra.run.dir=run", "final_validation=false"), cwd=folder
    )
    assert code == 0, text
    shutil.copy(folder / "run" / "checkpoints" / "best.ckpt", folder / "best.ckpt")
    code, text = run_forked("ckpt=best.ckpt", "out=mito", cwd=folder, command="export")
    assert code == 0, text
    assert "the output differs from that of the checkpoint by" in text
    return folder


def predict(exported, volume, tmp_path, *arguments):
    overrides = [f"data.input_path={volume.raw_path}", "trainer=cpu", "picture=false", "writer.levels=1"]
    keys = [a.split("=")[0] for a in arguments]
    overrides += [d for d in [REGION, "out=out.zarr", f"ckpt={exported}/mito"] if d.split("=")[0] not in keys]
    return run_forked(*overrides, *arguments, cwd=tmp_path, command="predict")


def voxels(path, name="mito"):
    return zarr.open_array(f"{path}/{name}/s0", mode="r")[...]


def test_the_prediction_is_that_of_the_checkpoint(exported, volume, tmp_path):
    contexts = []
    for name, ckpt in [("a.zarr", "best.ckpt"), ("b.zarr", "mito"), ("c.zarr", "mito/cellmap.json")]:
        code, text = predict(
            exported,
            volume,
            tmp_path,
            f"ckpt={exported}/{ckpt}",
            f"out={name}",
            "writer.dtype=float32",
        )
        assert code == 0, text
        contexts.append([line.partition("context: ")[2] for line in text.splitlines() if "context: " in line])
    assert contexts[0]
    assert contexts[1:] == contexts[:1] * 2
    for name in ("mito", "er"):
        expected = voxels(tmp_path / "a.zarr", name)
        assert expected.std() > 0
        for other in ("b.zarr", "c.zarr"):
            np.testing.assert_allclose(voxels(tmp_path / other, name), expected, atol=1e-5)


def test_a_foreign_network_with_a_description(exported, volume, tmp_path):
    """The identity, traced: the prediction is raw, by the normalization of the description."""
    torch.jit.trace(torch.nn.Identity(), torch.zeros(1, 1, 8, 16, 16)).save(str(tmp_path / "other.pt"))
    card = {
        "weights": "other.pt", "input_shape": [8, 16, 16], "input_voxel_size": [10.48, 8, 8], "classes": ["raw"],
        "normalize": {"range": [0, 255.5]}, "invert": True,
    }  # fmt: skip
    for activation in (None, "sigmoid"):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(card | {"activation": activation}))
        out = tmp_path / f"{activation}.zarr"
        code, text = predict(exported, volume, tmp_path, "ckpt=mine.yaml", f"out={out}", "writer.dtype=float32")
        assert code == 0, text
    raw = voxels(tmp_path / "None.zarr", "raw")
    assert raw.std() > 0.01
    stored = (1 - raw) * 255.5  # whole numbers, and halves without the inversion
    np.testing.assert_allclose(stored, np.rint(stored), atol=1e-3)
    np.testing.assert_allclose(voxels(tmp_path / "sigmoid.zarr", "raw"), 1 / (1 + np.exp(-raw)), atol=1e-6)


def test_a_larger_patch(exported, volume, tmp_path):
    code, text = predict(exported, volume, tmp_path, "patch.shape=[16,32,32]", "data.batch_size=1")
    assert code == 0, text
    assert voxels(tmp_path / "out.zarr").any()
    code, text = predict(exported, volume, tmp_path, "patch.shape=[16,32]", "out=other.zarr")
    assert code == 1
    assert "must have 3 numbers" in text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": None}, "lacks weights; it must have weights, input_shape"),
        ({"classes": None, "normalize": None}, "lacks classes, normalize"),
        ({"input_shap": [1, 2, 3]}, "has the key 'input_shap'"),
        ({"input_shape": [8, 16]}, "must have one number per axis"),
        ({"input_shape": [8, 16, 0]}, "input_shape must be a whole number of at least 1, got 0"),
        ({"input_voxel_size": "8"}, "input_voxel_size must be a list of numbers"),
        ({"normalize": "max"}, "normalize must be dtype, zscore"),
        ({"activation": "relu"}, "activation must be one of None, sigmoid, softmax, got 'relu'"),
        ({"weights": "nowhere.pt"}, "weights=nowhere.pt is not a file in"),
        ({"weights": "mine.txt"}, "weights must be a file that ends in"),
        ({"weights": "text.pt"}, "is not a TorchScript file"),
        ({"channels": [{"name": "a"}, {"name": "a"}]}, "channels must have different names"),
        ({"classes": ["a", "b", "c"]}, "predict_step must return 3 channels"),
    ],
    ids=str,
)
def test_descriptions_that_are_wrong(exported, volume, tmp_path, change, match):
    card = json.loads((exported / "mito" / "cellmap.json").read_text()) | change
    removed = [key for key, value in change.items() if value is None]
    card = {key: value for key, value in card.items() if key not in removed}
    shutil.copy(exported / "mito" / "model.ts", tmp_path)
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(card))
    code, text = predict(exported, volume, tmp_path, "ckpt=mine.yaml")
    assert code == 1, text
    assert match in text
    assert "Traceback" not in text
    assert not (tmp_path / "out.zarr" / "mito").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [("a: [", "is not valid YAML"), ("- a\n", "must be a mapping"), (None, "there is no such file")],
)
def test_files_that_are_no_descriptions(exported, volume, tmp_path, content, match):
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    code, text = predict(exported, volume, tmp_path, "ckpt=mine.yaml")
    assert (code, match in text, "Traceback" in text) == (1, True, False), text


def test_several_rules_of_a_training(exported, volume, tmp_path):
    card = json.loads((exported / "mito" / "cellmap.json").read_text())
    shutil.copy(exported / "mito" / "model.ts", tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(card | {"normalize": None}))
    code, text = predict(exported, volume, tmp_path, "ckpt=mine.yaml")
    assert code == 1
    assert "normalize is null, as its training had several rules; give metadata.normalize=" in text
    code, text = predict(exported, volume, tmp_path, "ckpt=mine.yaml", "metadata.normalize=dtype")
    assert code == 0, text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["to=onx"], "to must be one of torchscript, onnx, bioimageio, cellmap_flow"),
        (["ckpt=nowhere.ckpt"], "there is no such checkpoint"),
        (["ckpt=mito"], "is a folder; it holds no checkpoints"),
        (["ckpt=mito/cellmap.json"], "is not a checkpoint"),
        (["out=mito"], "out=mito exists; set overwrite=true"),
        (["out=run"], "out=run exists and is not an export"),
        (["to=bioimageio", "out=mito.zip"], "to=bioimageio needs authors"),
        (["stored_dtype=text"], "stored_dtype must be a type of numbers"),
        (["outt=x"], "did you mean"),
        (["best.ckpt"], "did you mean ckpt=best.ckpt?"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_invalid_settings(exported, arguments, match):
    before = sorted(exported.iterdir())
    keys = [a.split("=")[0] for a in arguments]
    defaults = [d for d in ["ckpt=best.ckpt", "out=new"] if d.split("=")[0] not in keys]
    code, text = run_forked(*defaults, *arguments, cwd=exported, command="export")
    assert (code, "Traceback" in text) == (1, False), text
    assert match in text
    assert sorted(exported.iterdir()) == before


def test_training_begins_with_the_weights_of_an_export(exported, volume, tmp_path):
    own = torch.jit.load(str(exported / "mito" / "model.ts")).state_dict()
    torch.save({f"module.{name}": value for name, value in own.items()}, tmp_path / "other.pth")
    for setting in (
        [f"init_from={exported}/mito/model.ts"],
        ["init_from=other.pth", "init_from_map={module.network.:''}"],
    ):
        run = small(volume, "trainer.fast_dev_run=true", "hydra.run.dir=new", "trainer.max_epochs=1", *setting)
        code, text = run_forked(*run, cwd=tmp_path)
        assert code == 0, text
        assert "weights of the model are loaded" in text
        assert "is initialized: its size depends on the classes" in text
        assert "not in the file" not in text


@pytest.mark.slow
def test_the_prediction_of_an_onnx_file(exported, volume, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    code, text = run_forked(f"ckpt={exported}/best.ckpt", "to=onnx", "out=onnx", cwd=tmp_path, command="export")
    assert code == 0, text
    for name, ckpt in [("a.zarr", exported / "best.ckpt"), ("b.zarr", "onnx")]:
        arguments = [f"ckpt={ckpt}", f"out={name}", "writer.dtype=float32"]
        code, text = predict(exported, volume, tmp_path, *arguments)
        assert code == 0, text
    np.testing.assert_allclose(voxels(tmp_path / "b.zarr"), voxels(tmp_path / "a.zarr"), atol=1e-5)
