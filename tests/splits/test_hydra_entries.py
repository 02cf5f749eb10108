from pathlib import PurePosixPath

import pytest
from omegaconf import OmegaConf

from cellmap_lightning.splits.hydra_entries import instantiate_entries

PATH = {"_target_": "pathlib.PurePosixPath", "_args_": ["a", "b"]}


def test_only_entries_with_a_target_are_instantiated():
    plain = {"raw": "x.zarr/em", "gt": None}
    entries = instantiate_entries({"train": [plain, PATH], "val": (PATH,), "test": None})
    assert entries == {"train": [plain, PurePosixPath("a/b")], "val": [PurePosixPath("a/b")], "test": None}
    assert entries["train"][0] is plain


def test_entries_of_a_configuration():
    config = OmegaConf.create({"train": [PATH]})
    assert instantiate_entries(config) == {"train": [PurePosixPath("a/b")]}


@pytest.mark.parametrize("datasets", [None, "crops.csv", [PATH]])
def test_what_is_no_mapping_is_left_to_the_check_of_datasets(datasets):
    assert instantiate_entries(datasets) is datasets


def test_a_list_that_is_a_string_is_left_to_the_check_of_datasets():
    assert instantiate_entries({"train": "crops.csv"}) == {"train": "crops.csv"}
