"""Each intensity effect equals an independent formula."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.runtime.rng import EFFECT, hashes, uniforms
from cellmap_lightning.transforms.histogram import measure_quantiles
from cellmap_lightning.transforms.intensity import EFFECTS, IntensityTransforms

SCALE = [16.0, 4.0, 8.0]
SAMPLES = [5, 6, 7, 8]


def patches(shape=(8, 12, 10), count=4):
    return torch.from_numpy(np.random.default_rng(0).random((count, 1, *shape), np.float32))


def change(name, options, raw, samples=SAMPLES, scale=SCALE, number=0, reference=None):
    config = {name: {"probability": 1, **options}}
    return IntensityTransforms(config)(raw, 1, samples, number, scale, reference)


def drawn(name, count, samples=SAMPLES):
    """The documented random numbers of an effect: the decision, and those of its options."""
    return uniforms(1, EFFECT + 2 * EFFECTS[name].stream, samples, count)


def section_column(section):
    return 2 * section if section >= 0 else -2 * section - 1


# -- sections


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_missing_sections_are_those_whose_number_is_below_the_probability(axis):
    raw, at = patches(), "zyx".index(axis)
    expected = raw.numpy().copy()
    size = raw.shape[2 + at]
    numbers = drawn("missing_section", 2 * size)
    for row in range(4):
        for section in range(size):
            if numbers[row, section_column(section)] < 0.3:
                expected[(row, 0, *[slice(None)] * at, section)] = -0.5
    found = change("missing_section", {"probability": 0.3, "axis": axis, "fill": -0.5}, raw)
    assert np.array_equal(found, expected)
    assert (found == -0.5).any()
    assert (found != -0.5).any()


def test_missing_sections_of_a_given_thickness_are_whole():
    """40 nm on voxels of 16 nm: section k holds the voxels whose centres lie in [40 k, 40 k + 40) nm."""
    raw = torch.ones(1, 1, 12, 3, 3)
    found = change("missing_section", {"probability": 0.5, "thickness": 40}, raw, [2])[0, 0, :, 0, 0]
    numbers = drawn("missing_section", 20, [2])[0]
    expected = [float(numbers[section_column(int((i + 0.5) * 16 // 40))] >= 0.5) for i in range(12)]
    assert found.tolist() == expected
    assert 0 < sum(expected) < 12


def test_missing_sections_filled_with_the_nearest_present_one():
    raw = patches((10, 3, 3))
    missing = change("missing_section", {"probability": 0.4, "fill": -1.0}, raw)[:, 0, :, 0, 0].numpy() == -1
    found = change("missing_section", {"probability": 0.4, "fill": "nearest"}, raw)
    for row in range(4):
        present = np.flatnonzero(~missing[row])
        for z in range(10):
            source = min(present, key=lambda p: (abs(p - z), p))
            assert torch.equal(found[row, 0, z], raw[row, 0, source])
    assert missing.any()
    everything = change("missing_section", {"fill": "nearest"}, raw)
    assert torch.equal(everything, raw), "without a present section there is nothing to copy"


def test_a_single_section_is_never_missing():
    raw = patches((1, 8, 8))
    assert torch.equal(change("missing_section", {}, raw), raw)


def test_dark_sections_are_multiplied():
    raw = patches()
    found = change("dark_section", {"probability": 0.5, "factor": [0.2, 0.6]}, raw).numpy()
    numbers = drawn("dark_section", 2 * 2 * 8).reshape(4, -1, 2)
    for row in range(4):
        for z in range(8):
            decision, uniform = numbers[row, section_column(z)]
            factor = 0.2 + 0.4 * uniform if decision < 0.5 else 1.0
            np.testing.assert_allclose(found[row, 0, z], raw[row, 0, z] * factor, rtol=1e-6)
    assert not np.array_equal(found, raw)


def test_section_contrast_is_about_one_half():
    raw = patches()
    options = {"contrast": [0.5, 1.5], "brightness": [-0.2, 0.1], "axis": "y"}
    found = change("section_contrast", options, raw).numpy()
    numbers = drawn("section_contrast", 3 * 2 * 12).reshape(4, -1, 3)
    for row in range(4):
        for y in range(12):
            _, contrast, brightness = numbers[row, section_column(y)]
            expected = (raw[row, 0, :, y] - 0.5) * (0.5 + contrast) + 0.5 - 0.2 + 0.3 * brightness
            np.testing.assert_allclose(found[row, 0, :, y], expected, atol=1e-6)


# -- imaging


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_low_resolution_is_a_mean_and_a_linear_interpolation(factor):
    raw = patches((12, 4, 3))
    found = change("low_resolution", {"voxel_size": [16 * factor] * 2}, raw).numpy()
    for row in range(4):
        means = raw[row, 0].double().numpy().reshape(12 // factor, factor, 4, 3).mean(1)
        centers = np.arange(12 // factor) * factor + (factor - 1) / 2
        for y, x in np.ndindex(4, 3):
            np.testing.assert_allclose(
                found[row, 0, :, y, x], np.interp(np.arange(12), centers, means[:, y, x]), atol=1e-6
            )


def test_low_resolution_by_a_broken_ratio_is_the_integral_over_the_larger_voxels():
    """Means over 2.5 voxels, from a cumulated sum; the patch of 12 holds 5 larger voxels, two of them cut off."""
    raw = patches((12, 1, 2), 1)
    found = change("low_resolution", {"voxel_size": [40, 40]}, raw, [5]).numpy()[0, 0, :, 0]
    values = raw[0, 0, :, 0].double().numpy()
    for x in range(2):
        integral = np.concatenate([[0], values[:, x].cumsum()])
        edges = np.clip(6 + 2.5 * (np.arange(6) - 2.5), 0, 12)
        means = np.diff(np.interp(edges, np.arange(13), integral)) / np.diff(edges)
        centers = 5.5 + 2.5 * (np.arange(5) - 2)
        np.testing.assert_allclose(found[:, x], np.interp(np.arange(12), centers, means), atol=1e-6)


def test_low_resolution_keeps_constants_lines_and_finer_voxels():
    raw = patches((16, 16, 16))
    assert torch.equal(change("low_resolution", {"voxel_size": [0, 4], "axes": ["z", "y", "x"]}, raw), raw)
    flat = torch.full((4, 1, 9, 9, 9), 0.3)
    options = {"voxel_size": [17, 90], "axes": ["z", "y", "x"]}
    torch.testing.assert_close(change("low_resolution", options, flat), flat)
    ramp = torch.arange(16.0).reshape(1, 1, 16, 1, 1).expand(4, 1, 16, 2, 2)
    found = change("low_resolution", {"voxel_size": [32, 32]}, ramp.clone())
    torch.testing.assert_close(found[:, :, 1:-1], ramp[:, :, 1:-1].contiguous())


def test_motion_blur_of_a_point_is_the_line():
    raw = torch.zeros(4, 1, 3, 41, 41)
    raw[:, :, 1, 20, 20] = 1
    found = change("motion_blur", {"length": [60, 60]}, raw, scale=[16, 4, 4])
    assert torch.equal(found[:, :, 0], raw[:, :, 0]), "each section by itself"
    numbers = drawn("motion_blur", 3)
    y, x = np.mgrid[-20:21, -20:21] * 4.0
    for row in range(4):
        weights = found[row, 0, 1].double().numpy()
        assert abs(weights.sum() - 1) < 1e-6
        covariance = np.array([[(weights * a * b).sum() for a in (y, x)] for b in (y, x)])
        angle = math.pi * numbers[row, 2]
        direction = np.array([math.sin(angle), math.cos(angle)])
        # The variance of a uniform line is length² / 12; bilinear shares add less than a quarter of a voxel's square.
        assert abs(direction @ covariance @ direction - 60**2 / 12) < 35
        across = np.array([direction[1], -direction[0]])
        assert 0 <= across @ covariance @ across < 4


def test_motion_blur_equals_the_mean_of_shifted_images():
    raw = patches((2, 24, 20), 1)
    found = change("motion_blur", {"length": [24, 24]}, raw, [6]).numpy()[0, 0]
    angle = math.pi * drawn("motion_blur", 3, [6])[0, 2]
    extent = np.array([24 / 4 * math.sin(angle), 24 / 8 * math.cos(angle)])
    points = np.linspace(-0.5, 0.5, 2 * math.ceil(np.abs(extent).max()) + 1)
    for z in range(2):
        image = raw[0, 0, z].double().numpy()
        expected = np.mean([ndimage.shift(image, -p * extent, order=1, mode="nearest") for p in points], 0)
        np.testing.assert_allclose(found[z], expected, atol=1e-6)


def test_motion_blur_of_length_0_changes_nothing():
    raw = patches()
    assert torch.equal(change("motion_blur", {"length": [0, 0]}, raw), raw)


def test_stripes_are_an_interpolated_random_profile():
    raw = patches()
    found = change("stripes", {"amplitude": [0.3, 0.3], "width": [20, 20]}, raw).numpy()
    positions = (np.arange(10) - 4.5) * 8 / 20
    numbers = drawn("stripes", 20)
    for row in range(4):
        knots = np.arange(-2, 3)
        values = [0.3 * (2 * numbers[row, 3 + section_column(int(k))] - 1) for k in knots]
        expected = raw[row, 0].numpy() + np.interp(positions, knots, values)
        np.testing.assert_allclose(found[row, 0], expected, atol=1e-6)


def test_stripes_are_at_the_same_place_in_a_finer_input():
    options = {"amplitude": [0.3, 0.3], "width": [32, 32], "axis": "y"}
    coarse = change("stripes", options, torch.zeros(4, 1, 2, 16, 2), scale=[8, 8, 8])
    fine = change("stripes", options, torch.zeros(4, 1, 2, 32, 2), scale=[8, 4, 4], number=1)
    between = (fine[:, :, :, ::2] + fine[:, :, :, 1::2]) / 2
    # Linear between the points at multiples of 32 nm, on which no voxel of 8 nm straddles.
    torch.testing.assert_close(between, coarse)


# -- detector


def test_salt_and_pepper_are_as_frequent_as_drawn():
    raw = torch.full((2, 1, 40, 40, 40), 0.5)
    found = change("salt_pepper", {"fraction": [0.1, 0.1], "values": [-1, 2]}, raw, [1, 2])
    assert sorted(found.unique().tolist()) == [-1.0, 0.5, 2.0]
    for value in (-1, 2):
        count = int((found == value).sum())
        assert abs(count - 0.05 * raw.numel()) < 5 * math.sqrt(0.05 * raw.numel())
    assert not torch.equal(found[0], found[1])


def test_poisson_has_the_distribution_of_counts():
    raw = torch.full((1, 1, 40, 40, 40), 0.5)
    found = change("poisson", {"counts": [20, 20]}, raw, [1]).double().numpy().ravel() * 20
    counts = np.round(found)
    np.testing.assert_allclose(found, counts, atol=1e-4)
    observed = np.bincount(counts.astype(int), minlength=40)[:40]
    expected = stats.poisson(10).pmf(np.arange(40)) * counts.size
    enough = expected > 20
    assert (
        stats.chisquare(observed[enough], expected[enough] / expected[enough].sum() * observed[enough].sum()).pvalue
        > 1e-4
    )
    below = change("poisson", {"counts": [20, 20]}, raw - 1, [1])
    assert torch.equal(below, raw - 1), "values below 0 are no intensities"


@pytest.mark.parametrize("name", ["salt_pepper", "poisson", "cutnoise"])
def test_noise_of_voxels_differs_between_inputs(name):
    options = {"salt_pepper": {"fraction": [0.5, 0.5]}, "poisson": {"counts": [9, 9]},
               "cutnoise": {"size": [90, 90], "std": [1, 1]}}[name]  # fmt: skip
    raw = patches()
    assert not torch.equal(change(name, options, raw, number=0), change(name, options, raw, number=1))


# -- boxes


def boxes(name, numbers, raw, low, high, reference):
    """Masks of the boxes that follow from seven numbers each."""
    masks = []
    for box in numbers.reshape(-1, 7):
        mask = np.ones(raw.shape[2:], bool)
        for axis in range(3):
            size = raw.shape[2 + axis]
            centers = (np.arange(size) - (size - 1) / 2) * SCALE[axis]
            middle = (box[axis] - 0.5) * reference[axis]
            inside = np.abs(centers - middle) <= (low + (high - low) * box[3 + axis]) / 2
            mask &= inside.reshape([-1 if a == axis else 1 for a in range(3)])
        masks.append(mask)
    return masks


def test_cutout_fills_boxes_in_nm():
    raw = patches()
    found = change("cutout", {"size": [20, 60], "count": 2, "fill": 7.0}, raw)
    numbers = drawn("cutout", 15)
    for row in range(4):
        mask = np.any(boxes("cutout", numbers[row, 1:], raw, 20, 60, [128, 48, 80]), 0)
        assert np.array_equal(found[row, 0] == 7, mask)
        assert torch.equal(found[row, 0][~torch.from_numpy(mask)], raw[row, 0][~torch.from_numpy(mask)])
    assert (found == 7).any()


def test_boxes_lie_at_the_same_place_in_every_input():
    options, reference = {"size": [40, 80], "fill": 9.0}, Window([16, 16, 16], [8, 8, 8])
    coarse = change("cutout", options, torch.zeros(4, 1, 16, 16, 16), scale=[8, 8, 8])
    wide = change("cutout", options, torch.zeros(4, 1, 48, 48, 48), scale=[8, 8, 8], number=1, reference=reference)
    assert torch.equal(wide[:, :, 16:32, 16:32, 16:32], coarse)


def test_a_box_covers_the_thin_axis_of_a_slice():
    found = change("cutout", {"size": [30, 30], "fill": 1.0}, torch.zeros(4, 1, 1, 40, 40), scale=[8, 4, 4])
    assert (found.sum((1, 2, 3, 4)) > 0).all()


def test_cutnoise_is_gaussian_in_its_box_alone():
    raw = torch.zeros(4, 1, 30, 60, 40)
    found = change("cutnoise", {"size": [150, 200], "std": [0.3, 0.3]}, raw)
    numbers = drawn("cutnoise", 8)
    for row in range(4):
        (mask,) = boxes("cutnoise", numbers[row, 1:], raw, 150, 200, [480, 240, 320])
        noise = found[row, 0].numpy()
        assert np.array_equal(noise != 0, mask)
        assert abs(noise[mask].std() - 0.3) < 0.02
        assert stats.kstest(noise[mask] / 0.3, "norm").pvalue > 1e-4


# -- histograms


def test_match_histogram_maps_quantiles_linearly():
    raw = patches((10, 20, 20))
    wanted = [0.2, 0.25, 0.5, 0.9, 1.3]
    found = change("match_histogram", {"quantiles": wanted}, raw).numpy()
    for row in range(4):
        own = np.quantile(raw[row].numpy(), np.linspace(0, 1, 5))
        np.testing.assert_allclose(found[row, 0], np.interp(raw[row, 0], own, wanted), atol=2e-3)
        np.testing.assert_allclose(np.quantile(found[row], np.linspace(0, 1, 5)), wanted, atol=2e-3)


def test_match_histogram_is_partial_by_its_amount():
    raw = patches((10, 20, 20))
    full = change("match_histogram", {"quantiles": [0.5, 0.6, 2]}, raw)
    half = change("match_histogram", {"quantiles": [0.5, 0.6, 2], "amount": [0.5, 0.5]}, raw)
    torch.testing.assert_close(half, (raw + full) / 2)


def test_match_histogram_draws_one_of_the_volumes():
    raw = patches((6, 20, 20), 40)
    found = change("match_histogram", {"quantiles": [[0, 1], [10, 11]]}, raw, range(40))
    high = (found > 5).flatten(1).all(1)
    assert np.array_equal(high, drawn("match_histogram", 2, range(40))[:, 1] >= 0.5)
    assert 5 < high.sum() < 35


def test_match_histogram_is_monotone_where_values_repeat():
    raw = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (1, 1, 10, 20, 20)).astype(np.float32) / 4)
    found = change("match_histogram", {"quantiles": np.linspace(0, 1, 33).tolist()}, raw, [3])
    levels = [found[raw == value].unique() for value in raw.unique()]
    assert all(len(level) == 1 for level in levels)
    assert torch.cat(levels).diff().min() > 0.1


def test_match_histogram_leaves_a_patch_of_one_value():
    flat = torch.full((1, 1, 4, 4, 4), 0.4)
    assert torch.equal(change("match_histogram", {"quantiles": [0, 1]}, flat, [0]), flat)


@pytest.mark.parametrize("invert", [False, True])
def test_measured_quantiles_are_those_of_the_normalized_volume(tmp_path, invert):
    volume = np.random.default_rng(0).integers(1, 200, (32, 32, 32)).astype(np.uint8)
    write_multiscale(tmp_path / "raw", volume, scale=[8, 8, 8], translation=[0, 0, 0])
    found = measure_quantiles(str(tmp_path / "raw"), invert=invert, count=5)
    values = 1 - volume / 255 if invert else volume / 255
    np.testing.assert_allclose(found, np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), atol=0.005)
    (tmp_path / "quantiles.json").write_text(json.dumps([found]))
    IntensityTransforms({"match_histogram": {"probability": 1, "quantiles": str(tmp_path / "quantiles.json")}})


def test_generators_of_voxels_follow_the_documented_hash():
    raw = torch.full((1, 1, 4, 4, 4), 0.5)
    stream = EFFECT + 2 * EFFECTS["salt_pepper"].stream + 1
    seed = int(hashes(1, stream, [9], 3)[0, 2]) >> 1
    uniform = torch.empty(4, 4, 4).uniform_(generator=torch.Generator().manual_seed(seed))
    found = change("salt_pepper", {"fraction": [0.4, 0.4], "values": [0, 1]}, raw, [9], number=2)[0, 0]
    assert torch.equal(found, torch.where(uniform < 0.2, 0.0, torch.where(uniform >= 0.8, 1.0, 0.5)))
