"""Displaced sections of a stack."""

import numpy as np
import pytest

from cellmap_lightning.geometry.sections import Sections

NUMBERS = np.arange(-400, 401)


def sections(**changes):
    return Sections(**{
        "key": 9, "axis": 0, "thickness": 40.0, "phase": 0.25, "probability": 0.2, "max_shift": 30.0, "max_angle": 4.0,
        **changes,
    })  # fmt: skip


def test_a_position_is_in_one_section():
    one = sections(thickness=10.0, phase=0.25)
    assert one.numbers(np.array([-2.6, -2.4, 0.0, 7.4, 7.6, 17.6])).tolist() == [-1, 0, 0, 0, 1, 2]


def test_single_sections_slip():
    motions = sections().motions(NUMBERS)
    moved = motions.any(axis=1)
    assert 120 < moved.sum() < 200
    assert not moved[400], "the section of the centre stays"
    assert len(np.unique(motions[moved], axis=0)) == moved.sum(), "each moves by itself"
    assert (np.abs(motions) <= [30, 30, 4]).all()
    assert (np.abs(motions).max(axis=0) > [28, 28, 3.7]).all()


def test_misaligned_sections_move_up_to_the_next():
    motions = sections(lasting=True).motions(NUMBERS)
    jumps = np.flatnonzero((motions[1:] != motions[:-1]).any(axis=1))
    assert 120 < len(jumps) < 200
    first_above, first_below = jumps[jumps >= 400][0], jumps[jumps < 400][-1]
    assert not motions[first_below + 1 : first_above + 1].any(), "around the centre none has moved"
    assert motions[first_above + 1 :].any(axis=1).all(), "beyond the first, all have"
    assert motions[: first_below + 1].any(axis=1).all()
    assert (np.abs(motions) <= [30, 30, 4]).all()


@pytest.mark.parametrize("lasting", [False, True])
def test_a_section_depends_on_its_number_alone(lasting):
    one = sections(lasting=lasting)
    whole = one.motions(NUMBERS)
    for low, high in ((390, 410), (401, 460), (0, 300), (400, 401)):
        np.testing.assert_array_equal(one.motions(NUMBERS[low:high]), whole[low:high])
    assert not np.array_equal(sections(lasting=lasting, key=10).motions(NUMBERS), whole)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(("probability", "moved"), [(0, 0), (1, 800)])
def test_none_and_all(lasting, probability, moved):
    motions = sections(lasting=lasting, probability=probability).motions(NUMBERS)
    assert motions.any(axis=1).sum() == moved


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("angle", [0.0, 5.0, 60.0, 180.0])
def test_the_extended_box_holds_all_corners(axis, angle):
    one, half = sections(axis=axis, max_angle=angle), np.array([100.0, 70.0, 150.0])
    bound = one.extended(half)
    assert bound[axis] == half[axis]
    others = [i for i in range(3) if i != axis]
    reached = np.zeros(3)
    for degrees in np.linspace(-angle, angle, 61):
        matrix = one.motion_matrix(degrees)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-15)
        reached = np.maximum(reached, np.abs(matrix) @ half)
    reached[others] += 30
    assert (reached <= bound + 1e-9).all()
    assert (bound <= 1.5 * reached).all()
