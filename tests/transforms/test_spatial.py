import numpy as np
import pytest

from cellmap_lightning import CellMapError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.spatial import SpatialTransforms, rotation

Z, Y, X = np.eye(3)


def test_rotations_are_right_handed():
    """90 degrees about z move what lies along x to y; likewise y to z about x, z to x about y."""
    for axis, start, end in (("z", X, Y), ("x", Y, Z), ("y", Z, X)):
        np.testing.assert_array_equal(rotation(axis, 90) @ start, end)
        np.testing.assert_array_equal(rotation(axis, -90) @ end, start)
        np.testing.assert_allclose(rotation(axis, 30) @ rotation(axis, 60), rotation(axis, 90), atol=1e-15)
        np.testing.assert_allclose(np.linalg.det(rotation(axis, 17)), 1)


def test_quarter_turns_are_exact():
    for axis in "zyx":
        for k in range(-4, 5):
            assert set(np.abs(rotation(axis, 90 * k)).ravel()) <= {0.0, 1.0}


def test_only_the_named_axes_are_mirrored():
    turns = SpatialTransforms({"mirror": {"axes": {"x": 1.0, "z": 0.0}}}).turns(0, range(5))
    for turn in turns:
        np.testing.assert_array_equal(turn, np.diag([1, 1, -1]))


def test_only_the_named_axes_are_exchanged():
    turns = SpatialTransforms({"transpose": {"axes": ["y", "x"]}}).turns(0, range(200))
    swapped = sum(bool(turn[1, 2]) for turn in turns)
    assert all(turn[0, 0] == 1 for turn in turns)
    assert 70 < swapped < 130
    three = {
        tuple(t.argmax(1)) for t in SpatialTransforms({"transpose": {"axes": ["z", "y", "x"]}}).turns(0, range(200))
    }
    assert len(three) == 6


def test_probabilities_and_angles_are_uniform():
    flips = SpatialTransforms({"mirror": {"axes": {"y": 0.25}}}).turns(1, range(2000))
    assert 400 < sum(t[1, 1] < 0 for t in flips) < 600
    turns = SpatialTransforms({"rotate": {"axes": {"z": [-30, 60]}}}).turns(1, range(2000))
    # The matrix takes the patch's directions back: the content turned by the angle.
    angles = np.degrees([np.arctan2((t.T @ X)[1], (t.T @ X)[2]) for t in turns])
    assert -30 <= angles.min() < -28
    assert 58 < angles.max() <= 60
    assert 13 < angles.mean() < 17


def test_a_turn_depends_on_seed_and_sample_alone():
    transforms = SpatialTransforms({"mirror": {"axes": {"x": 0.5}}, "rotate": {"axes": {"y": [0, 360]}}})
    whole = transforms.turns(7, range(10))
    np.testing.assert_array_equal(whole[6], transforms.turns(7, [6])[0])
    assert not np.array_equal(whole[6], transforms.turns(8, [6])[0])


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"flip": {}}, "has no .'flip'.; it has mirror, transpose, rotate, zoom, shear, elastic, slip and misalign"),
        ({"mirror": {"axes": {"x": 1.5}}}, r"probability for x must be in \[0, 1\], got 1.5"),
        ({"mirror": {"axes": ["x"]}}, "must be {axis: value}"),
        ({"mirror": {"axes": {"w": 0.5}}}, "must name z, y and x at most once, got .'w'."),
        ({"mirror": {"x": 0.5}}, "must be {axes:"),
        ({"transpose": {"axes": ["x", "x"]}}, "at most once"),
        ({"transpose": {"axes": "xy"}}, "must be .axis, ....,"),
        ({"rotate": {"axes": {"z": 90}}}, "must be .lowest, highest. degrees, got 90"),
        ({"rotate": {"axes": {"z": [90, 0]}}}, "must be .lowest, highest. degrees"),
    ],
)
def test_errors(config, match):
    with pytest.raises(CellMapError, match=match):
        SpatialTransforms(config)


def test_a_single_slice_stays_in_its_plane():
    windows = {"raw": Window([1, 64, 64], [8, 8, 8])}
    SpatialTransforms({"rotate": {"axes": {"z": [0, 90]}}, "transpose": {"axes": ["x", "y"]}}).check(windows)
    with pytest.raises(CellMapError, match=r"rotation about x would tilt the single slice.*rotate about z instead"):
        SpatialTransforms({"rotate": {"axes": {"x": [0, 90]}}}).check(windows)
    with pytest.raises(CellMapError, match="exchanging z would turn the single slice"):
        SpatialTransforms({"transpose": {"axes": ["x", "z"]}}).check(windows)
