"""The configuration of elastic deformation."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.elastic import Elastic
from cellmap_lightning.transforms.spatial import SpatialTransforms

GOOD = {"spacing": 100, "magnitude": 20}


def test_lengths_along_each_axis():
    one = Elastic({"spacing": {"z": 400, "y": 100, "x": 200}, "magnitude": {"y": 9, "x": 8}, "axes": ["x", "y"]})
    assert (one.spacing, one.magnitude) == ((400, 100, 200), (0, 9, 8))
    assert Elastic({**GOOD, "axes": None}).magnitude == (20, 20, 20)


def test_a_displacement_depends_on_seed_and_sample_alone():
    keys = [d.key for d in Elastic(GOOD).draw(3, range(50))]
    assert len(set(keys)) == 50
    assert Elastic(GOOD).draw(3, [7])[0].key == keys[7]
    assert Elastic(GOOD).draw(4, [7])[0].key != keys[7]


def test_golden_values():
    """Other values here would change the samples of published seeds."""
    (one,) = Elastic(GOOD).draw(42, [7])
    assert one.key == 11310732297062558305
    np.testing.assert_allclose(
        one.controls((-1, 0, 2), (1, 1, 1)).ravel(),
        [14.079409902786836, -2.3988765700702475, -13.392206100657873],
        rtol=1e-14,
    )


@pytest.mark.parametrize(("axes", "largest"), [("zyx", 40.331), ("yx", 48.866), ("z", 66.666)])
def test_the_largest_magnitude_is_named_and_works(axes, largest):
    Elastic({"spacing": 100, "magnitude": largest, "axes": list(axes)})
    with pytest.raises(
        CellMapValueError, match=rf"could fold.*{len(axes)} displaced axes it must be below {largest} nm"
    ):
        Elastic({"spacing": 100, "magnitude": largest + 0.001, "axes": list(axes)})


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (5, CellMapKeyError, "elastic must be {spacing: ..., magnitude: ..., axes: ...}, got 5"),
        ([100, 20], CellMapKeyError, "elastic must be {spacing"),
        ({}, CellMapKeyError, "elastic needs spacing and magnitude"),
        ({"spacing": 100}, CellMapKeyError, "elastic needs magnitude, got {'spacing': 100}"),
        ({"spacing": None, "magnitude": 3}, CellMapKeyError, "elastic needs spacing"),
        ({**GOOD, "magnitud": 3}, CellMapKeyError, "no option 'magnitud'; .*did you mean 'magnitude'"),
        ({**GOOD, "sigma": 3}, CellMapKeyError, "no option 'sigma'; it has spacing, magnitude, axes"),
        ({**GOOD, "probability": 1}, CellMapKeyError, "no option 'probability'"),
        ({**GOOD, "axes": ["w"]}, CellMapKeyError, "elastic.axes must name z, y and x at most once"),
        ({**GOOD, "axes": ["x", "x"]}, CellMapKeyError, "elastic.axes must name z, y and x at most once"),
        ({**GOOD, "axes": "xy"}, CellMapValueError, "elastic.axes must be .axis, ....,"),
        ({**GOOD, "spacing": 0}, CellMapValueError, r"elastic.spacing \(nm\) must be a number above 0, got 0"),
        ({**GOOD, "spacing": -5}, CellMapValueError, "elastic.spacing .* above 0, got -5"),
        ({**GOOD, "spacing": "100"}, CellMapValueError, "elastic.spacing .* above 0, got '100'"),
        ({**GOOD, "spacing": True}, CellMapValueError, "elastic.spacing .* above 0, got True"),
        ({**GOOD, "magnitude": 0}, CellMapValueError, "elastic.magnitude .* above 0, got 0"),
        ({**GOOD, "magnitude": float("nan")}, CellMapValueError, "elastic.magnitude .* above 0, got nan"),
        ({**GOOD, "magnitude": [5, 5, 5]}, CellMapValueError, "elastic.magnitude .* above 0"),
        ({**GOOD, "spacing": {"x": 100}}, CellMapKeyError, "spacing must be one length, or one for each of z, y, x"),
        (
            {**GOOD, "axes": ["x"], "magnitude": {"x": 5, "y": 5}},
            CellMapKeyError,
            "magnitude must be one length, or one for each of x, got",
        ),
        ({**GOOD, "spacing": {"z": 100, "y": 100, "x": -1}}, CellMapValueError, "spacing.x .* above 0, got -1"),
        ({**GOOD, "magnitude": 45}, CellMapValueError, "content could fold at a magnitude of 45 nm along z"),
        (
            {**GOOD, "spacing": {"z": 100, "y": 100, "x": 40}},
            CellMapValueError,
            "20 nm along x; with a spacing of 40 nm",
        ),
        ({**GOOD, "spacing": 1}, CellMapValueError, "it must be below 0.403 nm"),
    ],
)
def test_errors(config, error, match):
    with pytest.raises(error, match=match):
        SpatialTransforms({"elastic": config})


@pytest.mark.parametrize(("shape", "thin"), [([1, 8, 8], "z"), ([8, 1, 8], "y"), ([8, 8, 1], "x")])
def test_a_single_slice_is_not_bent(shape, thin):
    windows = {"raw": Window(shape, [8, 8, 8])}
    others = [a for a in "zyx" if a != thin]
    SpatialTransforms({"elastic": {**GOOD, "axes": others}}).check(windows)
    with pytest.raises(CellMapValueError, match=rf"along {thin} would bend.*set axes: \[{', '.join(others)}\]"):
        SpatialTransforms({"elastic": GOOD}).check(windows)
