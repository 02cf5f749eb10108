"""Crops to search on, and crops held out, by name and by number."""

import pytest

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.evaluation.held_out import split_crops

CROPS = ("jrc_a.zarr/crop1", "jrc_a.zarr/crop12", "jrc_b.zarr/crop1")


@pytest.mark.parametrize(
    ("crops", "held_out", "expected"),
    [
        (None, 1, (CROPS[:2], CROPS[2:])),
        (None, 0, (CROPS, ())),
        (None, None, (CROPS, ())),
        (None, 9, (CROPS[:1], CROPS[1:])),
        (["crop12"], 1, (CROPS[1:2], CROPS[2:])),
        ([12], ["jrc_b/crop1"], (CROPS[1:2], CROPS[2:])),
        (None, ["jrc_b.zarr/crop1", "12"], (CROPS[:1], CROPS[1:])),
        (["jrc_b.zarr/crop1", "jrc_a/crop1", "jrc_a.zarr/crop1"], 0, ([CROPS[0], CROPS[2]], ())),
    ],
)
def test_crops_are_split(crops, held_out, expected):
    assert split_crops(CROPS, crops, held_out) == tuple(list(part) for part in expected)


@pytest.mark.parametrize(
    ("crops", "held_out", "message"),
    [
        (["crop1"], 1, "'crop1' is the name of several crops; give one of jrc_a.zarr/crop1, jrc_b.zarr/crop1"),
        (None, [1], "'1' is the name of several crops"),
        (["crop13"], 1, "no crop 'crop13' is both predicted and annotated; there are jrc_a.zarr/crop1, "),
        (["jrc_b.zarr/crop12"], 1, "did you mean 'jrc_b.zarr/crop1'"),
        ("crop12", 1, "crops must be a list of names"),
        (None, True, "held_out must be names of crops or a number"),
        (None, -2, "held_out must be names of crops or a number"),
        (["crop12"], ["crop12"], "no crop is left for the search"),
    ],
)
def test_wrong_names_of_crops(crops, held_out, message):
    with pytest.raises(CellMapError, match=message):
        split_crops(CROPS, crops, held_out)


@pytest.mark.parametrize(
    ("trained", "held_out", "expected"),
    [
        ("a", 1, ("bc", "d")),
        ("d", 1, ("ab", "c")),
        ("abd", 1, ("c", "d")),  # the only one that was not trained on is searched
        ("acd", 2, ("b", "cd")),
        ("abcd", 1, ("abc", "d")),
        ("bc", ["a"], ("d", "a")),
        ("ab", 0, ("cd", "")),
        ("", 1, ("abc", "d")),
    ],
)
def test_crops_that_were_not_trained_on_are_searched_first(trained, held_out, expected):
    assert split_crops("abcd", None, held_out, trained) == tuple(list(part) for part in expected)


@pytest.mark.parametrize(("trained", "expected"), [("a", ("a", "d")), ("acd", ("a", "b")), ("abcd", ("a", "d"))])
def test_crops_that_are_named_are_searched(trained, expected):
    assert split_crops("abcd", ["a"], 1, trained) == tuple(list(part) for part in expected)
