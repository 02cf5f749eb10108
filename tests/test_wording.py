"""Counts in messages."""

import pytest

from cellmap_lightning.prediction.summary import Summary
from cellmap_lightning.wording import large_count, part_of, plural, size_text


@pytest.mark.parametrize(
    ("count", "noun", "several", "text"),
    [
        (0, "crop", None, "0 crops"),
        (1, "crop", None, "1 crop"),
        (2, "crop", None, "2 crops"),
        (1, "batch", "batches", "1 batch"),
        (12, "batch", "batches", "12 batches"),
        (1_234_567, "voxel", None, "1,234,567 voxels"),
    ],
)
def test_nouns_follow_their_count(count, noun, several, text):
    assert plural(count, noun, several) == text


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [(1, 1, "the only crop"), (1, 2, "1 of the 2 crops"), (3, 1200, "3 of the 1,200 crops")],
)
def test_parts_of_things(count, total, text):
    assert part_of(count, total, "crop") == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (17, "17"), (240_338, "240,338"), (240_338.4, "240,338"), (3_779_123, "3.78 million"),
        (1.25e14, "125,000,000 million"),
    ],
)  # fmt: skip
def test_small_counts_are_given_in_full(count, text):
    assert large_count(count) == text


@pytest.mark.parametrize(
    ("blocks", "voxels", "text"),
    [
        (1, 4096, "1 of 1 block done, 1 of them by this run: 4,096 voxels in 2 s, 2,048 per second"),
        (
            3,
            12_500_000,
            "3 of 3 blocks done, 3 of them by this run: 12.5 million voxels in 2 s, 6.25 million per second",
        ),
        (0, 0, "0 of 0 blocks done, 0 of them by this run: 0 voxels in 2 s, 0 per second"),
    ],
)
def test_summary_of_a_prediction(blocks, voxels, text):
    summary = Summary(blocks, blocks, written=blocks, voxels=voxels, seconds=2.0)
    assert str(summary).splitlines()[0] == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (5_610_000, "5.61 MB"), (3.5e10, "35 GB"),
        (999_900_000, "1 GB"), (1.2e12, "1.2 TB"), (999_400, "999 kB"), (5e15, "5,000 TB"),
    ],
)  # fmt: skip
def test_sizes_have_the_unit_that_suits_them(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(("blocks", "text"), [(1, "1 block"), (3, "3 blocks"), (1200, "1,200 blocks")])
def test_summary_of_a_prediction_that_was_complete(blocks, text):
    """The time and the speed of a run that wrote nothing mean nothing."""
    summary = Summary(blocks, blocks, seconds=0.0097, fractions={"mito": 0.25}, complete=True)
    assert str(summary).splitlines() == [f"complete already: {text}", "mito         25.00% of the voxels are positive"]
    for other in (Summary(blocks, blocks, written=1, complete=True), Summary(blocks, 0), Summary(0, 0, complete=True)):
        assert "complete already" not in str(other)
