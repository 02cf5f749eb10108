"""Every configuration composes, and every `_target_` in it takes the keys that it is given."""

import inspect

import hydra
import lightning as L
import pytest
from omegaconf import OmegaConf

from cellmap_lightning.cli import CONFIGS, check_target, register_resolvers, target_nodes
from cellmap_lightning.errors import CellMapError

register_resolvers()


def compose(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", overrides=list(overrides))
    # What Hydra itself fills in when a job runs.
    OmegaConf.register_new_resolver("hydra", lambda *_: "folder", replace=True)
    return OmegaConf.to_container(cfg, resolve=True)


OPTIONS = [
    f"{group.name}={option.stem}"
    for group in sorted(CONFIGS.iterdir())
    if group.is_dir()
    for option in group.glob("*.yaml")
]
REQUIRED = ["data.csv_path=x.csv", "data.classes=[mito,er]"]
#: What an option needs that is none by itself.
BESIDE = {"model=unet_context": ["+data.input_arrays.context={shape:[64,64,64],scale:[32,32,32]}"]}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_fits_its_targets(option):
    text = CONFIGS.joinpath(*option.split("=")).with_suffix(".yaml").read_text()
    has_data = "override /data: demo" in text or option == "data=demo"
    nodes = dict(target_nodes(compose(*([] if has_data else REQUIRED), option, *BESIDE.get(option, []))))
    assert {"data", "trainer", "task", "model"} <= set(nodes)
    for where, node in nodes.items():
        check_target(where, node)


def test_every_argument_of_the_trainer_is_listed():
    node = compose(*REQUIRED)["trainer"]
    expected = set(inspect.signature(L.Trainer.__init__).parameters) - {"self", "logger", "callbacks"}
    assert set(node) - {"_target_"} == expected


def test_every_argument_of_the_datamodule_is_listed():
    from cellmap_lightning import CellMapDataModule

    node = compose(*REQUIRED)["data"]
    assert set(node) - {"_target_"} == set(inspect.signature(CellMapDataModule.__init__).parameters) - {"self"}


def test_every_argument_of_the_writer_is_listed():
    from cellmap_lightning.callbacks import PredictionWriter

    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = OmegaConf.to_container(hydra.compose("predict"))["writer"]
    parameters = inspect.signature(PredictionWriter.__init__).parameters
    assert set(node) - {"_target_"} == set(parameters) - {"self"}
    for name, parameter in parameters.items():
        if name not in ("self", "output", "overwrite"):
            assert node[name] == (
                list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            )


def test_one_override_changes_inputs_and_targets():
    cfg = compose(*REQUIRED, "patch.shape=[1,2,3]", "patch.scale=[4,5,6]")
    for spec in (cfg["data"]["input_arrays"]["raw"], cfg["data"]["target_arrays"]["labels"]):
        assert spec == {"shape": [1, 2, 3], "scale": [4, 5, 6]}
    assert cfg["model"]["out_channels"] == 2


@pytest.mark.parametrize(
    ("node", "match"),
    [
        ({"_target_": "torch.optim.Adamm"}, "x._target_: there is no 'torch.optim.Adamm'"),
        ({"_target_": "cellmap_lightning.CellMapDataModule", "batchsize": 3}, "did you mean x.batch_size?"),
        ({"_target_": "cellmap_lightning.task.SegmentationTask"}, "SegmentationTask needs network, classes"),
    ],
)
def test_targets_are_checked(node, match):
    with pytest.raises(CellMapError, match=match):
        check_target("x", node)
