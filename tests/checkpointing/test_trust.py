"""Checkpoints of strangers: what their configuration names is not run, imported or resolved, unless it is trusted."""

import copy
import importlib
import inspect
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

from cellmap_lightning.checkpointing.trust import LOADING, _target_fault, check_trusted
from cellmap_lightning.commands.config_values import target_nodes
from cellmap_lightning.commands.resolvers import CONFIGS
from cellmap_lightning.errors import CellMapValueError
from tests.commands.test_cli import run_forked, small

HANDLER = {"_target_": "logging.FileHandler", "filename": "marker"}
PATH = {"_target_": "pathlib.Path", "_args_": ["marker"]}

#: Malicious parts of a configuration, by their keys; each creates a file or a folder.
ATTACKS = {
    "a class whose constructor executes": ("task", HANDLER),
    "a function": ("task", {"_target_": "os.makedirs", "name": "marker"}),
    "a method": ("task", {"_target_": "pathlib.Path.touch", "_args_": [PATH]}),
    "nested in a network": ("task.network.act", HANDLER),
    "nested in a list": ("task.network.channels", [4, {"a": [HANDLER]}]),
    "nested in a tuple": ("task.network.channels", (4, HANDLER)),
    "an optimizer's argument": ("task.optimizer.lr", HANDLER),
    "beside a partial": ("task.optimizer", HANDLER | {"_partial_": True, "level": HANDLER}),
    "a partial that reading calls": (
        "data.raw_value_transforms",
        {"_target_": "torch.save", "_partial_": True, "f": "marker"},
    ),
    "functools.partial": ("task.network", {"_target_": "functools.partial", "_args_": [HANDLER]}),
    "hydra.utils.call": ("task.network", {"_target_": "hydra.utils.call", "config": HANDLER}),
    "hydra.utils.instantiate": ("task.network", {"_target_": "hydra.utils.instantiate", "_args_": [HANDLER]}),
    "getattr": ("task.network", {"_target_": "builtins.getattr", "_args_": [HANDLER, "emit"]}),
    "a module of this package that imports it": (
        "task.network", HANDLER | {"_target_": "cellmap_lightning.commands.program.logging.FileHandler"}),
    "a module of torch that imports it": (
        "task.network", HANDLER | {"_target_": "torch.nn.parallel.distributed.logging.FileHandler"}),
    "functools by torch": (
        "task.network", {"_target_": "torch.nn.modules.module.functools.partial", "_args_": [HANDLER]}),
    "os by torch": ("task.network", {"_target_": "torch.nn.parallel.distributed.os.mkdir", "_args_": ["marker"]}),
    "a function of this package": (
        "task.network", {"_target_": "cellmap_lightning.demo.synthetic.write_volume", "path": "marker"}),
    "a class of this package that writes": (
        "task.network",
        {"_target_": "cellmap_lightning.compat.ImageWriter", "path": "marker", "target_class": "x", "scale": [8, 8, 8],
         "bounding_box": {"z": [0, 64], "y": [0, 64], "x": [0, 64]}, "write_voxel_shape": [8, 8, 8]}),
    "a name from the environment": ("task.network", HANDLER | {"_target_": "${oc.env:NO_SUCH,logging.FileHandler}"}),
    "a name from another key": ("task.network", HANDLER | {"_target_": "${patch.name}"}),
    "arguments of the data": ("data.class_table", HANDLER),
    "the precision": ("trainer.precision", HANDLER),
    "an import": ("task.network", {"_target_": "harmful.Network"}),
    "an import of a model that is not made": ("model", {"_target_": "harmful.Network"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(volume, tmp_path_factory):
    """A checkpoint that cellmap-train has written."""
    folder = tmp_path_factory.mktemp("trained")
    code, text = run_forked(*small(volume, "trainer.max_epochs=1", "hydra.run.dir=out"), cwd=folder)
    assert code == 0, text
    return torch.load(folder / "out" / "checkpoints" / "best.ckpt", weights_only=True)


def attacked(honest, path, key, value):
    """The same checkpoint with another value in its configuration."""
    content = honest | {"cellmap_config": copy.deepcopy(honest["cellmap_config"])}
    *above, last = key.split(".")
    node = content["cellmap_config"]
    for name in above:
        node = node[name]
    node[last] = value
    content["cellmap_config"]["patch"]["name"] = "logging.FileHandler"
    torch.save(content, path)


@pytest.fixture
def harmful(tmp_path, monkeypatch):
    """A module that makes the marker when it is imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "harmful.py").write_text(
        "from pathlib import Path\nPath('marker').touch()\nfrom torch.nn import Identity as Network\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")


def predict(volume, tmp_path, *more):
    given = ["ckpt=bad.ckpt", f"data.input_path={volume.raw_path}", "region=crop2", "out=out.zarr", "trainer=cpu"]
    return run_forked(*given, *more, cwd=tmp_path, command="predict")


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.usefixtures("harmful")
def test_untrusted_targets_are_not_run(honest, volume, tmp_path, name):
    key, value = ATTACKS[name]
    attacked(honest, tmp_path / "bad.ckpt", key, value)
    torch.load(tmp_path / "bad.ckpt", weights_only=True)  # the file itself is harmless
    code, text = predict(volume, tmp_path)
    assert not (tmp_path / "marker").exists(), text
    assert code == 1
    assert "Error: ckpt=bad.ckpt: the configuration in the checkpoint could run any code" in text
    assert "trust_checkpoint=true" in text
    assert f"  {key}" in text, "the key is named"
    assert "Traceback" not in text
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.usefixtures("harmful")
def test_trusted_targets_are_run(honest, volume, tmp_path):
    attacked(honest, tmp_path / "bad.ckpt", "model", {"_target_": "harmful.Network"})
    for more in (["trust=[other.package]"], ["trust=[harmfu]"], ["trust=[harmful.Networks]"]):
        code, text = predict(volume, tmp_path, *more)
        assert (code, "'harmful.Network' is not trusted" in text) == (1, True), text
    assert not (tmp_path / "marker").exists()
    code, text = predict(volume, tmp_path, "trust=[harmful.Network]", "picture=false")
    assert code == 0, text
    assert (tmp_path / "marker").exists()
    attacked(honest, tmp_path / "bad.ckpt", "task.network.act", {"_target_": "builtins.str", "object": "PRELU"})
    assert predict(volume, tmp_path, "trust_checkpoint=true", "overwrite=true", "picture=false")[0] == 0


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("trust_checkpoint=maybe", "trust_checkpoint must be true or false, got 'maybe'"),
        ("trust=[1]", "trust must be a list of modules or classes"),
        ("trust=[a..b]", "trust must be a list of modules or classes"),
        ("trust=[a b]", "trust must be a list of modules or classes"),
    ],
)
def test_invalid_trust_settings(honest, volume, tmp_path, more, match):
    attacked(honest, tmp_path / "bad.ckpt", "model", None)
    code, text = predict(volume, tmp_path, more)
    assert (code, match in text) == (1, True), text


@pytest.mark.cover(1)
@pytest.mark.parametrize("how", ["init_from", "resume"])
@pytest.mark.parametrize("name", ["a class whose constructor executes", "arguments of the data", "an import"])
@pytest.mark.usefixtures("harmful")
def test_training_runs_no_untrusted_target(honest, volume, tmp_path, name, how):
    """Neither key takes more than weights and counts from the checkpoint; what the user configures is created."""
    attacked(honest, tmp_path / "bad.ckpt", *ATTACKS[name])
    run_forked(*small(volume, f"{how}=bad.ckpt", "trainer.max_epochs=2", "hydra.run.dir=out"), cwd=tmp_path)
    assert not (tmp_path / "marker").exists()


def test_store_options_cannot_send_credentials_elsewhere(honest, volume, tmp_path):
    attacked(honest, tmp_path / "bad.ckpt", "data.storage_options", {"anon": False, "endpoint_url": "http://evil"})
    given = ["ckpt=bad.ckpt", "out=out.zarr", "trainer=cpu", "data.input_path=s3://mine/vol.zarr"]
    code, text = run_forked(*given, cwd=tmp_path, command="predict")
    assert code == 1
    assert "data.storage_options: endpoint_url could send credentials elsewhere; set data.storage_options" in text
    code, text = predict(volume, tmp_path, "picture=false")
    assert code == 0, f"on this machine they have no effect\n{text}"


#: Names with which none of the classes can be reached that are trusted.
UNTRUSTED = [
    "torch.nn.functional.relu", "torch.nn.Module.register_forward_hook", "torch.nn.Module.__class__",
    "torch.nn.modules",
    "torch.nn.modules.module.os.system", "torch.optim.lr_scheduler.types.FunctionType", "torch.nn.modules.module.Any",
    "torch.optim.Optimizer.add_param_group", "torch.nn.utils.fusion.copy.copy", "torch.nn..Linear", ".torch.nn.Linear",
    "torch.nn.Linear ", "", "torch.nn.NoSuch", "torch.nnx.Linear", "torch.hub.load", "torch.load", "torch.save",
    "monai.networks.nets.hovernet.HoVerNet", "monai.networks.nets.HoVerNet", "monai.networks.layers.gmm.load_module",
    "monai.networks.layers.gmm.GaussianMixtureModel", "monai.networks.nets.resnet18", "monai.bundle.ConfigParser",
    "monai.networks.nets.flexible_unet.locate", "monai.networks.utils.convert_to_onnx", "monai.apps.download_url",
    "torchmetrics.utilities.imports.shutil", "torchmetrics.text.bert.BERTScore", "torchmetrics.Metric.__reduce__",
    "cellmap_lightning.__getattr__", "cellmap_lightning.import_module", "cellmap_lightning.commands.train_command.main",
    "cellmap_lightning.commands.config_values.importlib.import_module", "cellmap_lightning.demo.synthetic.demo_csv",
    "lightning.Trainer", "lightning.pytorch.callbacks.LambdaCallback",
    "cellmap_lightning.training.task.torch.nn.Linear.__init__.__globals__.get",
    "cellmap_lightning.datamodule.CellMapDataModule.load_from_checkpoint", "functools.partial", 3, None, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("target", UNTRUSTED, ids=str)
def test_names_that_are_not_trusted(target):
    with pytest.raises(CellMapValueError, match=r"m\._target_"):
        check_trusted({"m": {"_target_": target}}, "ckpt=x")


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Linear", "torch.nn.modules.conv.Conv3d", "torch.optim.AdamW", "torch.optim.lr_scheduler.OneCycleLR",
        "torch.optim.lr_scheduler.ReduceLROnPlateau", "monai.networks.nets.UNet", "monai.networks.nets.SwinUNETR",
        "monai.networks.nets.FlexibleUNet", "monai.networks.blocks.Convolution",
        "torchmetrics.classification.BinaryF1Score", "torchmetrics.MeanMetric",
        "cellmap_lightning.training.networks.ContextNet", "cellmap_lightning.training.unet.UNet",
        "cellmap_lightning.CellMapDataModule",
        "cellmap_lightning.datamodule.CellMapDataModule",
    ],
)  # fmt: skip
def test_names_that_are_trusted(target):
    check_trusted({"m": {"_target_": target}}, "ckpt=x")


@pytest.mark.parametrize(
    "value", [b"x", {1}, torch.ones(2), complex(1), {"a": [torch.float32]}, {("a",): 1}, {"${a}": 1}]
)
def test_a_configuration_is_plain(value):
    with pytest.raises(CellMapValueError, match="x"):
        check_trusted({"x": value}, "ckpt")


@pytest.mark.parametrize(
    "config",
    [
        {"data": {"csv_path": "${oc.env:HOME}"}},
        {"task": {"network": {"channels": [4, "${oc.env:AWS_SECRET_ACCESS_KEY}"]}}},
        {"writer": {"mask": "/data/${hydra:runtime.cwd}"}},
        {"task": {"_target_": "torch.nn.Linear", "in_features": "${patch.shape}"}},
    ],
)
def test_interpolations_are_not_resolved(config):
    """They could put secrets of this machine into an address."""
    with pytest.raises(CellMapValueError, match="would be resolved on this machine"):
        check_trusted(config, "ckpt=x")
    check_trusted(config, "ckpt=x", trust_checkpoint=True)


def test_names_imported_by_a_trusted_module_are_not_trusted():
    check_trusted({"_target_": "tests.foreign.WORDS"}, "x", trust_checkpoint=True)
    for target, trust in (
        ("tests.checkpointing.test_trust.torch.save", "tests"),
        ("tests.runs.nn.Linear.forward", "tests.runs"),
    ):
        with pytest.raises(CellMapValueError, match=r"which is torch.* is not trusted"):
            check_trusted({"_target_": target}, "x", [trust])
    check_trusted({"_target_": "tests.runs.module"}, "x", "tests")
    check_trusted({"_target_": "tests.runs.nn.Linear"}, "x", ["tests.runs"])  # torch's own are trusted
    check_trusted(
        {"_target_": "tests.checkpointing.test_trust.torch.save"}, "x", ["tests.checkpointing.test_trust.torch.save"]
    )


@pytest.mark.parametrize(
    "file",
    [str(f.relative_to(CONFIGS)) for group in ("model", "task") for f in sorted((CONFIGS / group).glob("*.yaml"))],
)
def test_every_class_of_the_configs_that_a_checkpoint_names_is_trusted(file):
    nodes = list(target_nodes(OmegaConf.to_container(OmegaConf.load(CONFIGS / file), resolve=False)))
    for where, node in nodes:
        assert _target_fault(node["_target_"], ()) is None, where
    assert nodes or "defaults" in (CONFIGS / file).read_text()


def test_networks_of_monai_load_no_file_that_an_argument_names():
    """Modules with code that loads weights were read; others have none."""
    importlib.import_module("monai.networks.nets")  # which imports blocks and layers

    read = {"densenet", "efficientnet", "resnet", "senet", "swin_unetr", "text_embedding"}  # fixed addresses
    read |= {"flexible_unet"}  # `locate`, which the class of the network does not call
    loads = (
        r"torch\.load\(|load_url|download_url|from_pretrained\(|hf_hub|locate\(|build_sam|[^.\w](?:open|eval|exec)\("
    )
    found = set()
    for name, module in list(sys.modules.items()):
        if re.match(r"monai\.networks\.(nets|blocks|layers)\.", name) and name not in LOADING:
            code = re.sub(r"https?://\S+|\beval\(\)", "", inspect.getsource(module))
            found |= {name.rpartition(".")[2]} if re.search(loads, code) else set()
    assert found <= read, "read what it loads, and from where"
