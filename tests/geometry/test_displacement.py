"""Smooth displacements: a spline of random control points that never folds."""

import itertools

import numpy as np
import pytest
from scipy.interpolate import BSpline

from cellmap_lightning.geometry.displacement import Displacement, largest_magnitude, spline_weights
from cellmap_lightning.geometry.lattice import AffineMap
from cellmap_lightning.geometry.spline_map import SplineMap
from tests.geometry.warped_points import spline

CUBIC = BSpline.basis_element([-2, -1, 0, 1, 2])


def test_weights_are_those_of_the_cubic_spline():
    part = np.linspace(0, 1, 50, endpoint=False)
    np.testing.assert_allclose(spline_weights(part), [CUBIC(part - k) for k in (-1, 0, 1, 2)], atol=1e-15)


def test_a_control_point_depends_on_its_place_alone():
    one = Displacement(77, (10, 20, 30), (1, 2, 3))
    whole, part = one.controls((-3, -2, -4), (7, 6, 8)), one.controls((-1, 0, 1), (2, 3, 2))
    np.testing.assert_array_equal(whole[2:4, 2:5, 5:7], part)
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(Displacement(78, (10, 20, 30), (1, 2, 3)).controls((0, 0, 0), (4, 4, 4)), whole).any()


def test_control_points_are_uniform_up_to_the_magnitude():
    controls = Displacement(5, (1, 1, 1), (4.0, 0.0, 9.0)).controls((-8, -8, -8), (16, 16, 16)).reshape(-1, 3)
    assert (np.abs(controls) <= [4, 0, 9]).all()
    np.testing.assert_allclose(controls.std(axis=0), np.array([4, 0, 9]) / np.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(controls.mean(axis=0), 0, atol=0.2)


def test_content_moves_by_a_fifth_of_the_magnitude():
    """The root mean square; the weights of a cubic spline have a mean square sum of 0.479 along each axis."""
    one = Displacement(5, (30, 30, 30), (1.0, 1.0, 1.0))
    points = np.moveaxis(np.indices((20, 20, 20)), 0, -1) * 20.0
    np.testing.assert_allclose(spline(one, points).std(), 0.479**1.5 / np.sqrt(3), rtol=0.1)


def test_indices_are_those_of_the_formula():
    one = Displacement(3, (40.0, 50.0, 60.0), (15.0, 20.0, 20.0))
    matrix = np.array([[1.1, 0.2, 0], [-0.3, 0.9, 0.1], [0, 0.2, 1.2]])
    scale, start = np.array([10.0, 8.0, 4.0]), np.array([-33.0, -100.0, 7.0])
    smap = SplineMap(AffineMap(matrix, np.array([100.0, 2.0, 3.0]), (7, 30, 40)), one, start, scale)
    voxels = np.moveaxis(np.indices((7, 30, 40)), 0, -1)
    moved = voxels + spline(one, start + voxels * scale) / scale
    np.testing.assert_allclose(smap.points(), moved @ matrix.T + smap.affine.offset, atol=1e-4)
    low, high = smap.bounds()
    assert (smap.points() >= low - 1e-4).all()
    assert (smap.points() <= high + 1e-4).all()


def gradients(part):
    """Return the derivatives of the splines of the control points around a place in a cell, ``[4 ** n, n]``."""
    out = []
    for along in range(len(part)):
        product = np.ones(1)
        for axis, t in enumerate(part):
            curve = CUBIC.derivative() if axis == along else CUBIC
            values = curve(t - np.arange(-1, 3))
            product = np.multiply.outer(product, values).ravel()
        out.append(product)
    return np.stack(out, axis=-1)


def least_determinant(part, size, rng, starts=8):
    """Return the least Jacobian determinant that control points of up to ``size`` spacings reach at one place.

    The determinant is linear in each row of the Jacobian, so that the worst control points of one axis, given those of
    the others, are at their limits, with the sign of the row's cofactors.
    """
    slopes, count = gradients(part), len(part)
    least = np.inf
    for _ in range(starts):
        jacobian = np.eye(count) + size * rng.choice([-1, 1], (count, len(slopes))) @ slopes
        for row in list(range(count)) * 8:
            cofactors = [np.linalg.det(np.vstack([jacobian[:row], e, jacobian[row + 1 :]])) for e in np.eye(count)]
            jacobian[row] = np.eye(count)[row] - size * np.sign(slopes @ cofactors) @ slopes
        least = min(least, np.linalg.det(jacobian))
    return least


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_worst_control_points_do_not_fold_below_the_bound_and_do_above(axes):
    rng = np.random.default_rng(0)
    parts = list(itertools.product((0.0, 0.14, 0.28, 0.5), repeat=axes))
    parts = [p for p in parts if tuple(sorted(p)) == p]
    assert min(least_determinant(p, 0.999 * largest_magnitude(axes), rng) for p in parts) > 0
    assert min(least_determinant(p, 1.02 * largest_magnitude(axes), rng) for p in parts) < 0


@pytest.mark.parametrize("moved", [(1, 1, 1), (0, 1, 1), (1, 0, 0)])
def test_neighbours_keep_their_orientation(moved):
    """At nearly the largest magnitude, with the control points at their limits, the Jacobian stays positive."""

    class Extreme(Displacement):
        def controls(self, first, counts):
            return np.sign(super().controls(first, counts)) * self.magnitude

    spacing = np.array([30.0, 40.0, 50.0])
    magnitude = 0.99 * largest_magnitude(sum(moved)) * spacing * moved
    step, shape = 1e-3, (16, 16, 16)
    points = np.moveaxis(np.indices(shape), 0, -1) * 5.0 - 40
    least = np.inf
    for key in range(4):
        one = Extreme(key, tuple(spacing), tuple(magnitude))
        columns = [(spline(one, points + e * step) - spline(one, points - e * step)) / (2 * step) for e in np.eye(3)]
        least = min(least, np.linalg.det(np.eye(3) + np.stack(columns, axis=-1)).min())
    assert 0 < least < 0.5
