"""Intervals for training and validation, as functions of lengths."""

import itertools

import pytest

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.splits.block_options import BlockOptions
from cellmap_lightning.splits.cuts import Line, cut

LINE = Line(length=400, step=8, patch=256, reach=100)  # a patch of 32 steps, a reach of 13


def test_the_default_is_a_fifth_at_the_end_behind_a_gap():
    assert cut(LINE, BlockOptions(), 0, "a") == ([(0, 307)], [(320, 400)])


def test_the_default_holds_a_patch():
    assert cut(Line(100, 8, 256, 0), BlockOptions(), 0, "a") == ([(0, 68)], [(68, 100)])


@pytest.mark.parametrize(
    ("options", "trained", "validated"),
    [
        ({"position": "start"}, [(93, 400)], [(0, 80)]),
        ({"position": "middle"}, [(0, 147), (253, 400)], [(160, 240)]),
        ({"fraction": 0.5}, [(0, 187)], [(200, 400)]),
        ({"gap_nm": 0}, [(0, 320)], [(320, 400)]),
        ({"gap_nm": 401}, [(0, 269)], [(320, 400)]),
        ({"count": 2, "position": "end"}, [(0, 147), (213, 347)], [(160, 200), (360, 400)]),
        ({"count": 2, "position": "start"}, [(53, 187), (253, 400)], [(0, 40), (200, 240)]),
    ],
)
def test_positions_fractions_gaps_and_counts(options, trained, validated):
    assert cut(LINE, BlockOptions(**options), 0, "a") == (trained, validated)


@pytest.mark.parametrize("count", [1, 2])
def test_random_positions_are_functions_of_seed_and_name(count):
    options = BlockOptions(position="random", count=count)
    cuts = {(seed, name): cut(LINE, options, seed, name) for seed, name in itertools.product(range(8), "ab")}
    assert cuts == {key: cut(LINE, options, *key) for key in cuts}
    assert len({str(value) for value in cuts.values()}) > 8
    for trained, validated in cuts.values():
        assert all(b - a >= 32 for a, b in [*trained, *validated])
        for (a, b), (c, d) in itertools.product(trained, validated):
            assert c - b >= 13 or a - d >= 13
        assert sum(b - a for a, b in validated) == 80


@pytest.mark.parametrize(
    ("line", "options", "text"),
    [
        (LINE, {"fraction": 0.05}, "is 160 nm long, and a patch needs 256 nm; use a fraction of at least 0.08"),
        (Line(60, 8, 256, 0), {}, "a part for training is 224 nm long, and a patch needs 256 nm"),
        (Line(60, 8, 256, 0), {}, "and gaps of 0 nm, 512 nm are needed, and the crop has 480 nm"),
        (LINE, {"gap_nm": 4000}, "a part for training is 0 nm long"),
        (LINE, {"gap_nm": 1e6}, "gaps of 1e+06 nm"),
        (LINE, {"count": 20}, "a part for training is 0 nm long"),
        (LINE, {"position": "middle", "gap_nm": 1200}, "now middle and 1"),
        (LINE, {"fraction": 0.99}, "a part for training is 0 nm long"),
    ],
)  # fmt: skip
def test_parts_that_hold_no_patch_are_refused(line, options, text):
    with pytest.raises(CellMapError) as caught:
        cut(line, BlockOptions(**options), 0, "a")
    assert text in str(caught.value)


@pytest.mark.parametrize("split", ["csv", "random", None, 3])
def test_other_rules_are_not_blocks(split):
    assert BlockOptions.parse(split) is None


@pytest.mark.parametrize("split", ["blocks", {"blocks": None}, {"blocks": {}}])
def test_defaults(split):
    assert BlockOptions.parse(split) == BlockOptions()


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ({"fraction": 0}, "between 0 and 1"),
        ({"fraction": 1}, "between 0 and 1"),
        ({"fraction": "a"}, "between 0 and 1"),
        ({"fraction": True}, "between 0 and 1"),
        ({"axis": "w"}, "split.blocks.axis must be one of z, y, x"),
        ({"axis": 0}, "split.blocks.axis must be one of z, y, x"),
        ({"gap_nm": -1}, "a length in nm"),
        ({"gap_nm": float("nan")}, "a length in nm"),
        ({"gap_nm": "8nm"}, "a length in nm"),
        ({"position": "ends"}, "did you mean 'end'"),
        ({"position": 3}, "split.blocks.position must be one of"),
        ({"count": 0}, "split.blocks.count"),
        ({"count": 1.5}, "split.blocks.count"),
        ({"fractions": 0.1}, "no 'fractions'; did you mean 'fraction'"),
        (0.2, "must be a mapping"),
        ([0.2], "must be a mapping"),
    ],
)
def test_invalid_options_are_refused(blocks, text):
    with pytest.raises(CellMapError) as caught:
        BlockOptions.parse({"blocks": blocks})
    assert text in str(caught.value)


@pytest.mark.parametrize("split", [{}, {"block": {}}, {"blocks": {}, "fold": 1}])
def test_other_mappings_are_refused(split):
    with pytest.raises(CellMapError, match="split must be the name of a rule"):
        BlockOptions.parse(split)
