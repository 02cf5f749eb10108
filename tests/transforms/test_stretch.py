"""Zoom and shear."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.transforms.spatial import SpatialTransforms
from cellmap_lightning.transforms.stretch import Stretch

Z, Y, X = np.eye(3)


def content(config):
    """The matrix that content goes through."""
    return np.linalg.inv(SpatialTransforms(config).turns(0, [3])[0])


def test_a_factor_above_one_magnifies():
    np.testing.assert_allclose(content({"zoom": {"axes": {"y": [2, 2]}}}), np.diag([1, 2, 1]))
    np.testing.assert_allclose(content({"zoom": [0.5, 0.5]}), np.diag([0.5, 0.5, 0.5]))


def test_shear_moves_the_second_axis_along_the_first():
    """``zx: 0.2``: what lies 10 nm up in z is moved by 2 nm along x."""
    matrix = content({"shear": {"axes": {"zx": [0.2, 0.2]}}})
    np.testing.assert_allclose(matrix @ (10 * Z), 10 * Z + 2 * X)
    np.testing.assert_allclose(matrix @ (10 * X + 5 * Y), 10 * X + 5 * Y)


def test_the_order_is_rotate_zoom_shear():
    parts = {"rotate": {"axes": {"z": [90, 90]}}, "zoom": {"axes": {"y": [3, 3]}}, "shear": {"axes": {"yx": [1, 1]}}}
    # x is turned to y, which is magnified, and then moved along x as far as it lies along y.
    np.testing.assert_allclose(content(parts) @ X, 3 * Y + 3 * X, atol=1e-12)


def test_factors_are_uniform_and_each_of_its_sample():
    matrices = Stretch({"axes": {"z": [0.5, 2], "x": [1, 1.5]}}, {"axes": {"xy": [-0.3, 0.1]}}).matrices(4, range(3000))
    z, x, xy = 1 / matrices[:, 0, 0], 1 / matrices[:, 2, 2], -matrices[:, 1, 2] / matrices[:, 1, 1]
    for values, low, high in ((z, 0.5, 2), (x, 1, 1.5), (xy, -0.3, 0.1)):
        assert low <= values.min()
        assert values.max() <= high + 1e-12
        np.testing.assert_allclose(np.histogram(values, 4, (low, high))[0], 750, atol=120)
    assert abs(np.corrcoef(z, x)[0, 1]) < 0.06
    assert (matrices[:, 1, 1] == 1).all()
    np.testing.assert_array_equal(
        Stretch({"axes": {"z": [0.5, 2], "x": [1, 1.5]}}, {"axes": {"xy": [-0.3, 0.1]}}).matrices(4, [7])[0],
        matrices[7],
    )


def test_golden_values():
    """Other values here would change the samples of published seeds."""
    (matrix,) = Stretch([0.5, 2], {"axes": {"zx": [-1, 1]}}).matrices(42, [7])
    np.testing.assert_allclose(
        matrix,
        [
            [0.5636061602813166, 0.0, 0.0],
            [0.0, 0.5636061602813166, 0.0],
            [-0.2951459810734008, 0.0, 0.5636061602813166],
        ],
        rtol=1e-14,
    )


def test_one_factor_for_all_axes():
    for matrix in Stretch([0.5, 2], None).matrices(1, range(20)):
        np.testing.assert_array_equal(matrix, matrix[0, 0] * np.eye(3))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"zoom": 2}, CellMapKeyError, r"zoom must be \{axes: \{axis: value\}\}, got 2"),
        ({"zoom": {"x": [1, 2]}}, CellMapKeyError, "zoom must be .axes:"),
        ({"zoom": {"axes": {"t": [1, 2]}}}, CellMapKeyError, "zoom.axes must name z, y and x at most once, got .'t'."),
        ({"zoom": [0, 1]}, CellMapValueError, r"factors along z must be \[lowest, highest\] above 0, got \[0, 1\]"),
        ({"zoom": {"axes": {"x": [-1, 1]}}}, CellMapValueError, "along x must be .lowest, highest. above 0"),
        ({"zoom": {"axes": {"x": [2, 1]}}}, CellMapValueError, "along x must be"),
        ({"zoom": {"axes": {"x": [1, float("nan")]}}}, CellMapValueError, "along x must be"),
        ({"shear": {"axes": {"zz": [0, 1]}}}, CellMapKeyError, "shear.axes must name zy, zx, yz, yx, xz and xy"),
        ({"shear": {"axes": {"x": [0, 1]}}}, CellMapKeyError, "shear.axes must name"),
        ({"shear": [0, 1]}, CellMapKeyError, "shear must be .axes:"),
        ({"shear": {"axes": {"zx": 0.1}}}, CellMapValueError, "zx must be .lowest, highest. nm along x per nm along z"),
        ({"shear": {"axes": {"zx": [0.1, 0]}}}, CellMapValueError, "zx must be .lowest, highest."),
        ({"shear": {"axes": {"zx": [0, float("inf")]}}}, CellMapValueError, "zx must be .lowest, highest."),
    ],
)
def test_errors(config, error, match):
    with pytest.raises(error, match=match):
        SpatialTransforms(config)


@pytest.mark.parametrize(("shape", "pair"), [([1, 8, 8], "xz"), ([8, 1, 8], "zy"), ([8, 8, 1], "yx")])
def test_a_single_slice_is_not_tilted(shape, pair):
    windows = {"raw": Window(shape, [8, 8, 8])}
    SpatialTransforms({"shear": {"axes": {pair[::-1]: [0, 1]}}, "zoom": [0.5, 2]}).check(windows)
    with pytest.raises(CellMapValueError, match=rf"{pair} would tilt the single slice.*shear along its two other axes"):
        SpatialTransforms({"shear": {"axes": {pair: [0, 1]}}}).check(windows)
