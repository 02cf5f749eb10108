"""Every configuration composes and matches the signatures of its targets."""

import inspect
import runpy
from dataclasses import fields
from pathlib import Path

import hydra
import lightning as L
import pytest
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_keys import flat_keys
from cellmap_lightning.commands.config_values import check_target, target_nodes
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers
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
def test_every_option_composes_and_matches_signatures(option):
    text = CONFIGS.joinpath(*option.split("=")).with_suffix(".yaml").read_text()
    has_data = "override /data: demo" in text or option == "data=demo"
    nodes = dict(target_nodes(compose(*([] if has_data else REQUIRED), option, *BESIDE.get(option, []))))
    assert {"data", "trainer", "task", "model"} <= set(nodes)
    for where, node in nodes.items():
        check_target(where, node)


def test_all_trainer_arguments_are_configurable():
    node = compose(*REQUIRED)["trainer"]
    expected = set(inspect.signature(L.Trainer.__init__).parameters) - {"self", "logger", "callbacks"}
    assert set(node) - {"_target_"} == expected


def test_all_datamodule_arguments_are_configurable():
    from cellmap_lightning import CellMapDataModule

    node = compose(*REQUIRED)["data"]
    assert set(node) - {"_target_"} == set(inspect.signature(CellMapDataModule.__init__).parameters) - {"self"}


def test_all_writer_arguments_are_configurable():
    from cellmap_lightning.callbacks import make_prediction_writer

    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = OmegaConf.to_container(hydra.compose("predict"))["writer"]
    parameters = inspect.signature(make_prediction_writer).parameters
    assert set(node) - {"_target_"} == set(parameters)
    # The command chooses these two; see `set_context`.
    assert (node["blend"], node["context"]) == ("auto", "auto")
    for name, parameter in parameters.items():
        if name not in ("output", "overwrite", "blend", "context"):
            assert node[name] == (
                list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            )


def test_patch_override_changes_inputs_and_targets():
    cfg = compose(*REQUIRED, "patch.shape=[1,2,3]", "patch.scale=[4,5,6]")
    for spec in (cfg["data"]["input_arrays"]["raw"], cfg["data"]["target_arrays"]["labels"]):
        assert spec == {"shape": [1, 2, 3], "scale": [4, 5, 6]}
    assert cfg["model"]["out_channels"] == 2


@pytest.mark.parametrize(
    ("node", "match"),
    [
        ({"_target_": "torch.optim.Adamm"}, "x._target_: there is no 'torch.optim.Adamm' to import; did you mean"),
        ({"_target_": "torch.optimm.Adam"}, "there is no 'torch.optimm.Adam' to import$"),
        ({"_target_": "torch.optim.Adam.stepp"}, "there is no 'torch.optim.Adam.stepp' to import$"),
        ({"_target_": "no_module.Network"}, "'no_module' is neither installed nor in a folder of PYTHONPATH"),
        ({"_target_": "Network"}, "there is no 'Network' to import; a path is the module and the name"),
        ({"_target_": "cellmap_lightning.CellMapDataModule", "batchsize": 3}, "did you mean 'batch_size'?"),
        ({"_target_": "cellmap_lightning.training.task.SegmentationTask"}, "SegmentationTask needs network, classes"),
    ],
)
def test_check_target_errors(node, match):
    with pytest.raises(CellMapError, match=match):
        check_target("x", node)


@pytest.mark.parametrize(
    ("line", "match"),
    [("import no_module", "No module named 'no_module'"), ("from math import sinn", "cannot import name 'sinn'")],
)
def test_check_target_names_a_failed_import_in_the_module(line, match, tmp_path, monkeypatch):
    (tmp_path / "module_of_mine.py").write_text(f"{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CellMapError, match=rf"x\._target_: 'module_of_mine\.Network' cannot be imported: {match}"):
        check_target("x", {"_target_": "module_of_mine.Network"})


def composed(name, *overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(name, overrides=list(overrides)), resolve=False)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("predict", {"data", "trainer", "writer"}), ("segment", set()), ("submit", set()), ("inspect", {"data"})],
)
def test_other_commands_match_signatures(name, targets):
    nodes = dict(target_nodes(composed(name)))
    assert targets <= set(nodes)
    for where in targets:  # those of a training are checked with its configuration
        node = nodes[where]
        # The command itself reads data.input_path; the other arguments of the data are those of the checkpoint.
        check_target(where, {key: value for key, value in node.items() if key != "input_path"})


def test_submit_settings_match_its_signature():
    from cellmap_lightning.commands.submit import submit

    keys_of_submit = set(composed("submit")) - {"hydra"}
    assert keys_of_submit == set(inspect.signature(submit).parameters)


def test_segment_settings_match_its_signature():
    from cellmap_lightning.commands.segment import segment
    from cellmap_lightning.instances.options import SegmentationOptions, SourceOptions, StorageOptions
    from cellmap_lightning.runtime.scheduling import SchedulerOptions

    config = composed("segment")
    parameters = {name.replace("class_name", "class") for name in inspect.signature(segment).parameters}
    parameters -= {"options", "source", "scheduling"}
    groups = (SegmentationOptions, SourceOptions, SchedulerOptions)
    defaults = {field.name: field.default for group in groups for field in fields(group)}
    assert set(config) - {"hydra"} == parameters | set(defaults)
    for name, default in defaults.items():
        assert config[name] == (list(default) if isinstance(default, tuple) else default), name
    storage = {field.name: field.default for field in fields(StorageOptions) if field.name != "overwrite"}
    assert config["storage"] == {k: list(v) if isinstance(v, tuple) else v for k, v in storage.items()}


ROOT = Path(__file__).parents[2]
WRITER = runpy.run_path(str(ROOT / "docs" / "write_configuration.py"))


def test_configuration_page_is_up_to_date():
    assert WRITER["PAGE"].read_text(encoding="utf-8") == WRITER["page"](), "run python docs/write_configuration.py"


@pytest.mark.parametrize("name", ["train", "predict", "segment", "submit", "inspect"])
def test_configuration_page_has_every_key(name):
    page = WRITER["page"]()
    keys = [key for key, value in flat_keys(composed(name)) if not isinstance(value, dict)]
    assert keys
    for key in keys:
        assert f"| `{key}` |" in page or f"| `{key.rpartition('.')[0]}` |" in page, key


def test_configuration_page_has_comments():
    rows = {key: rest for key, *rest in WRITER["rows"](CONFIGS.joinpath("train.yaml").read_text())}
    assert rows["monitor"] == ["val/dice", "What best.ckpt is best in, and what a sweep gets back."]
    assert rows["patch.scale"] == ["[8, 8, 8]", "nm, z y x"]


@pytest.mark.parametrize(
    ("target", "key", "value", "match"),
    [
        ("lightning.Trainer", "max_epochs", "abc", "x.max_epochs must be int, got 'abc'"),
        ("lightning.Trainer", "max_epochs", True, "x.max_epochs must be int, got True"),
        ("lightning.Trainer", "detect_anomaly", "yes", "x.detect_anomaly must be bool, got 'yes'"),
        ("torch.optim.AdamW", "lr", "fast", "x.lr must be float, got 'fast'"),
        ("torch.optim.AdamW", "lr", [1], r"x.lr must be float, got \[1\]"),
    ],
)
def test_check_target_types(target, key, value, match):
    with pytest.raises(CellMapError, match=match):
        check_target("x", {"_target_": target, "_partial_": True, key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("max_epochs", None), ("max_epochs", 3), ("fast_dev_run", True), ("overfit_batches", 1)]
)
def test_check_target_accepts_valid_types(key, value):
    check_target("x", {"_target_": "lightning.Trainer", key: value})
