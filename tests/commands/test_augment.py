"""The presets of augmentation: what they set, what takes precedence, and the commands that take them."""

import pytest
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_keys import check_known
from cellmap_lightning.errors import CellMapError, CellMapKeyError
from cellmap_lightning.transforms.intensity import IntensityTransforms
from cellmap_lightning.transforms.spatial import SpatialTransforms
from tests.commands.test_configs import CONFIGS, composed

PRESETS = sorted(path.stem for path in (CONFIGS / "augment").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if path.stem != "slurm_ddp")
TRANSFORMS = ("spatial_transforms", "intensity_transforms")


def data(*overrides, name="train"):
    return {key: composed(name, *overrides)["data"][key] for key in TRANSFORMS}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_none_changes_nothing_of_an_experiment(experiment):
    plain = data(f"experiment={experiment}")
    assert data(f"experiment={experiment}", "augment=none") == plain
    assert data(f"experiment={experiment}", "~augment") == plain


def test_without_a_preset_only_mirrors_and_an_exchange_of_x_and_y():
    plain = data()
    assert not IntensityTransforms(plain["intensity_transforms"])
    assert SpatialTransforms(plain["spatial_transforms"]) == SpatialTransforms(
        {"mirror": {"axes": {"x": 0.5, "y": 0.5, "z": 0.5}}, "transpose": {"axes": ["x", "y"]}}
    )


@pytest.mark.parametrize("name", ["train", "preview"])
@pytest.mark.parametrize("preset", PRESETS)
def test_both_commands_take_every_preset(name, preset):
    config = data(f"augment={preset}", name=name)
    SpatialTransforms(config["spatial_transforms"])
    assert bool(IntensityTransforms(config["intensity_transforms"])) == (preset != "none")


def test_the_command_line_takes_precedence_key_by_key():
    config = data(
        "augment=em_serial_section", "data.intensity_transforms.missing_section.probability=0.3",
        "data.intensity_transforms.noise=null", "data.spatial_transforms.rotate={axes:{z:[0,90]}}",
    )  # fmt: skip
    assert config["intensity_transforms"]["missing_section"] == {
        "probability": 0.3, "axis": "z", "fill": 0.0, "unknown": False,
    }  # fmt: skip
    assert config["intensity_transforms"]["noise"] is None
    assert config["intensity_transforms"]["contrast"] == [0.8, 1.2]
    assert config["spatial_transforms"]["rotate"] == {"axes": {"z": [0, 90]}}


def test_an_effect_without_a_preset_is_given_as_a_mapping():
    config = data("data.intensity_transforms.cutout={probability:0.1,size:[8,80]}")
    assert IntensityTransforms(config["intensity_transforms"]).effects["cutout"].size == (8, 80)


def test_transforms_of_an_experiment_take_precedence():
    alone, both = data("experiment=csc_mito_3d"), data("experiment=csc_mito_3d", "augment=light")
    for key in ("contrast", "brightness", "noise"):
        assert both["intensity_transforms"][key] == alone["intensity_transforms"][key]
    assert both["spatial_transforms"]["transpose"] == {"axes": ["x", "y", "z"]}
    assert both["intensity_transforms"]["gamma"] == [0.95, 1.05]


@pytest.mark.parametrize("content", [{"intensity_transforms": {"noise": [0, 1]}}, {"noise": [0, 1]}, {}])
def test_a_preset_without_its_package_line_is_refused(content):
    config = OmegaConf.create({**{k: v for k, v in composed("train").items() if k != "hydra"}, "augment": content})
    with pytest.raises(CellMapKeyError, match=r"the first line of its file must be '# @package data'"):
        check_known(config, "train")


@pytest.mark.parametrize("value", ["0.5", "[0,1]", "yes"])
def test_an_effect_that_is_no_mapping_is_refused(value):
    config = data(f"data.intensity_transforms.motion_blur={value}")
    with pytest.raises(
        CellMapError, match=r"intensity_transforms.motion_blur must be a mapping of probability, length"
    ):
        IntensityTransforms(config["intensity_transforms"])
