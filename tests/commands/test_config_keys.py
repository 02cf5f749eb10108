"""Keys of a configuration that only values in lists refer to, and required ones in lists."""

import pytest
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_keys import check_known, check_missing
from cellmap_lightning.commands.resolvers import register_resolvers
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from tests.commands.test_augment import composed

register_resolvers()
DATASETS = "data.datasets"


def config(**changed):
    own = {key: value for key, value in composed("train").items() if key != "hydra"}
    cfg = OmegaConf.create(own)
    for key, value in changed.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    "datasets",
    [
        [{"raw": "${root}/a.zarr/raw", "target": "a.zarr/labels/[mito]"}],
        ["${root}/a.zarr"],
        [["x"], [{"target": {"mito": "${.root}/mito", "er": "${oc.env:HOME,${root}}"}}]],
        {"train": [{"raw": "a"}, {"raw": "${root}"}], "validate": []},
    ],
)
def test_a_key_that_entries_of_lists_refer_to_is_known(datasets):
    check_known(config(root="/data", data__datasets=datasets), "train")
    with pytest.raises(CellMapKeyError, match=r"there is no 'rot'; did you mean|there is no 'rot'"):
        check_known(config(rot="/data", data__datasets=datasets), "train")


@pytest.mark.parametrize(
    ("datasets", "where"),
    [
        ([{"raw": "???"}], r"data.datasets\[0\].raw is required: set it in data.datasets"),
        ([{"raw": "a"}, {"target": {"mito": "???"}}], r"data.datasets\[1\].target.mito is required"),
        ({"train": ["???"]}, r"data.datasets.train\[0\] is required: set it in data.datasets.train"),
    ],
)
def test_a_required_value_in_a_list_is_named(datasets, where):
    with pytest.raises(CellMapValueError, match=where):
        check_missing(config(data__datasets=datasets, data__classes=["mito"]))
