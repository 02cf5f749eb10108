"""Checks of arguments."""

import math
import re

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule, CellMapDataset
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.validation import did_you_mean, first_few, int_at_least, one_of, positive_number, whole_number


@pytest.mark.parametrize("value", ["disk", "none"])
def test_an_option_is_returned(value):
    assert one_of("cache", value, ("disk", "none")) == value


@pytest.mark.parametrize(
    ("value", "hint"), [("dsk", r"; did you mean 'disk'\?"), ("xyz", ""), (None, ""), (["disk"], "")]
)
def test_another_value_is_an_error_that_names_the_options(value, hint):
    with pytest.raises(CellMapValueError, match=r"^cache must be one of disk, memory, got .*" + hint + "$"):
        one_of("cache", value, ("disk", "memory"))
    with pytest.raises(CellMapKeyError):
        one_of("cache", value, ("disk", "memory"), CellMapKeyError)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True])
def test_not_a_whole_number(value):
    with pytest.raises(CellMapValueError, match=r"batch_size must be a whole number of at least 1, got"):
        int_at_least("batch_size", value, 1)
    assert int_at_least("fold", 0, 0) == 0


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, "1", None, False])
def test_not_a_positive_number(value):
    with pytest.raises(CellMapValueError, match=r"seconds must be a number above 0, got"):
        positive_number("seconds", value)
    assert positive_number("seconds", 2) == 2.0


@pytest.mark.parametrize("value", ["abc", "7", 1.5, 7.0, None, True, [1]])
def test_seeds_that_are_no_whole_numbers(volume, value):
    arrays = {"shape": [16] * 3, "scale": [8] * 3}
    text = re.escape(f"seed must be a whole number, got {value!r}")
    with pytest.raises(CellMapValueError, match=text):
        CellMapDataModule(["mito"], arrays, arrays, csv_path=volume.csv_path, seed=value)
    with pytest.raises(CellMapValueError, match=text):
        CellMapDataset("raw.zarr/em", "raw.zarr/crop1/[mito]", ["mito"], arrays, arrays, seed=value)
    assert whole_number("seed", np.int64(-5)) == -5


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("storage_options", [5, "anon", ["anon"], {1: 2}], "must be a mapping such as {anon: true}, or null, got"),
        ("nan_targets", ["no", 0, None], "must be true or false, got"),
        ("pad", ["no", 1, None], "must be true or false, got"),
        ("timeout", [-1, "60", None, math.inf], "must be a number of at least 0, got"),
        ("max_upsampling", [0, -2, "2", None], "must be a number above 0, got"),
    ],
)
def test_settings_of_another_type(volume, name, values, text):
    arrays = {"shape": [16] * 3, "scale": [8] * 3}
    for value in values:
        with pytest.raises(CellMapValueError, match=re.escape(f"{name} {text} {value!r}")):
            CellMapDataModule(["mito"], arrays, arrays, csv_path=volume.csv_path, **{name: value})


@pytest.mark.parametrize("value", [5, "anon", ["anon"]])
def test_storage_options_of_an_entry(value):
    arrays = {"shape": [16] * 3, "scale": [8] * 3}
    entry = {"raw": "a.zarr/em", "gt": "a.zarr/crop1/[mito]", "storage_options": value}
    with pytest.raises(CellMapValueError, match=r"train\[0\]: storage_options must be a mapping"):
        CellMapDataModule(["mito"], arrays, arrays, datasets={"train": [entry]}).setup("fit")


def test_hints_and_lists():
    assert did_you_mean("mitoo", ["mito", "er"]) == "; did you mean 'mito'?"
    assert did_you_mean("golgi", ["mito", "er"], "; there are mito, er") == "; there are mito, er"
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d", "e"], 2) == "a, b and 3 more"
