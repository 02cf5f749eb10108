"""Checks of arguments."""

import math

import pytest

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.validation import did_you_mean, first_few, int_at_least, one_of, positive_number


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


def test_hints_and_lists():
    assert did_you_mean("mitoo", ["mito", "er"]) == "; did you mean 'mito'?"
    assert did_you_mean("golgi", ["mito", "er"], "; there are mito, er") == "; there are mito, er"
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(["a", "b", "c", "d", "e"], 2) == "a, b and 3 more"
