"""Properties that all intensity effects share, and the errors of their options."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cellmap_lightning.commands.resolvers import CONFIGS
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.placement import Window
from cellmap_lightning.runtime.rng import uniforms
from cellmap_lightning.transforms.effects import column
from cellmap_lightning.transforms.intensity import EFFECTS, NAMES, ORDER, IntensityTransforms

SCALE = [16.0, 4.0, 8.0]
#: Every effect, half of the time.
HALF = {
    "low_resolution": {"probability": 0.5, "voxel_size": [8, 40], "axes": ["z", "y", "x"]},
    "motion_blur": {"probability": 0.5, "length": [0, 40]},
    "match_histogram": {"probability": 0.5, "quantiles": [[0.1, 0.2, 0.7], [0.0, 0.9]], "amount": [0.5, 1]},
    "section_contrast": {"probability": 0.5, "contrast": [0.5, 1.5], "brightness": [-0.2, 0.2]},
    "dark_section": {"probability": 0.5},
    "stripes": {"probability": 0.5, "amplitude": [0, 0.3], "width": [10, 40]},
    "poisson": {"probability": 0.5, "counts": [10, 100]},
    "salt_pepper": {"probability": 0.5, "fraction": [0, 0.2]},
    "cutnoise": {"probability": 0.5, "size": [20, 60], "std": [0.1, 0.3], "count": 2},
    "cutout": {"probability": 0.5, "size": [20, 60], "count": 2},
    "missing_section": {"probability": 0.5},
}
SAMPLES = list(range(3, 15))


def patches(count=12, shape=(9, 21, 17)):
    return torch.from_numpy(np.random.default_rng(0).random((count, 1, *shape), np.float32))


def change(config, raw, samples=SAMPLES, seed=1, number=0, scale=SCALE, reference=None):
    return IntensityTransforms(config)(raw, seed, samples, number, scale, reference)


def test_each_name_is_applied_once_and_has_a_separate_stream():
    assert sorted(ORDER) == sorted([*NAMES, *EFFECTS])
    assert sorted(kind.stream for kind in EFFECTS.values()) == list(range(len(EFFECTS)))
    assert sorted(HALF) == sorted(EFFECTS)


@pytest.mark.parametrize("name", HALF)
def test_a_sample_depends_on_seed_and_number_alone(name):
    config, raw = {name: HALF[name]}, patches()
    before = raw.clone()
    whole = change(config, raw)
    assert torch.equal(raw, before), "the input must not change"
    assert not torch.equal(whole, raw)
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()
    for size in (1, 5):
        parts = [change(config, raw[at : at + size], SAMPLES[at : at + size]) for at in range(0, len(SAMPLES), size)]
        assert torch.equal(torch.cat(parts), whole)
    order = [7, 0, 11, 3]
    assert torch.equal(change(config, raw[order], [SAMPLES[i] for i in order]), whole[order])
    assert not torch.equal(change(config, raw, seed=2), whole)
    assert not torch.equal(change(config, raw, [n + 1 for n in SAMPLES]), whole)


@pytest.mark.parametrize("name", HALF)
def test_half_of_the_samples_or_sections_change(name):
    raw = patches(200, (5, 8, 8)) if "section" in name else patches(200, (8, 8, 8))
    changed = change({name: HALF[name]}, raw, range(200), scale=[8, 8, 8]) != raw
    rows = changed.amax((1, 3, 4)) if "section" in name else changed.flatten(1).any(1)
    # Some ranges hold the identity, and some boxes no voxel: not more than half, and not much less.
    assert 0.35 < rows.float().mean() < 0.6


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("probability", [0, 0.0])
def test_probability_0_changes_nothing(name, probability):
    transforms = IntensityTransforms({name: {**HALF[name], "probability": probability}})
    assert not transforms
    raw = patches()
    assert transforms(raw, 1, SAMPLES, 0, SCALE) is raw


@pytest.mark.parametrize("name", HALF)
def test_the_last_bit_depends_on_neither_threads_nor_the_default_dtype(name):
    raw, config, samples = patches(3, (37, 65, 63)), {name: {**HALF[name], "probability": 1}}, [0, 1, 2]
    whole = change(config, raw, samples)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(change(config, raw, samples), whole)
        assert torch.equal(change(config, raw[1:2], [1])[0], whole[1])
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", HALF)
def test_extreme_and_constant_patches_stay_free_of_nan(name):
    for value in (0.0, 1.0, -3.0, 1e-38, 1e6):
        raw = torch.full((2, 1, 4, 6, 6), value)
        assert change({name: {**HALF[name], "probability": 1}}, raw, [0, 1]).isfinite().all()
    for shape in ((1, 6, 7), (6, 1, 7), (2, 2, 2)):
        raw = patches(2, shape)
        assert change({name: {**HALF[name], "probability": 1}}, raw, [0, 1]).shape == raw.shape


def test_effects_do_not_change_the_numbers_of_the_older_transforms():
    raw = patches()
    ranges = {"blur": [0, 8], "contrast": [0.5, 1.5], "brightness": [-0.1, 0.1], "gamma": [0.5, 2], "noise": [0, 0.1]}
    missing = change({**ranges, "missing_section": {"probability": 0.5, "fill": -9.0}}, raw)
    plain = change(ranges, raw)
    assert torch.equal(missing[missing != -9], plain[missing != -9])
    assert (missing == -9).any()


def test_golden_values_of_effects():
    """An upgrade must not change the samples of published seeds unnoticed."""
    raw = torch.linspace(0, 1, 4 * 6 * 5).reshape(1, 1, 4, 6, 5).repeat(2, 1, 1, 1, 1)
    weights = torch.from_numpy(np.random.default_rng(5).random(raw.shape[2:]))
    sums = {}
    for name, options in HALF.items():
        changed = change(
            {name: {**options, "probability": 0.5 if "section" in name else 1}}, raw, [4, 5], 7, scale=[8, 8, 8]
        )
        sums[name] = (changed[:, 0].double() * weights).sum((1, 2, 3)).tolist()
    assert sums == {name: pytest.approx(values, abs=1e-3) for name, values in GOLDEN.items()}


GOLDEN = {
    "low_resolution": [30.77, 30.724],
    "motion_blur": [30.738, 30.748],
    "match_histogram": [29.184, 29.144],
    "section_contrast": [28.092, 32.157],
    "dark_section": [17.6, 26.625],
    "stripes": [32.789, 31.705],
    "poisson": [28.971, 31.073],
    "salt_pepper": [30.685, 33.271],
    "cutnoise": [31.092, 32.404],
    "cutout": [16.485, 11.558],
    "missing_section": [7.583, 23.172],
}


def test_columns_of_sections_are_distinct_and_start_at_the_first():
    columns = column(np.arange(-50, 50))
    assert sorted(columns.tolist()) == list(range(100))
    assert column(np.arange(3)).tolist() == [0, 2, 4]
    long, short = uniforms(3, 9, [1, 2], 20), uniforms(3, 9, [1, 2], 4)
    assert np.array_equal(long[:, :4], short)


def test_equality_and_hash():
    one, same = IntensityTransforms(HALF), IntensityTransforms(dict(HALF))
    assert one == same
    assert hash(one) == hash(same)
    assert one != IntensityTransforms({**HALF, "cutout": {"probability": 0.5, "size": [20, 61], "count": 2}})
    assert "stripes" in repr(one)


PROBABILITY = r"must be a probability in \[0, 1\]"
ERRORS = [
    ("missing_sektion", {"probability": 1}, "has no 'missing_sektion'; did you mean 'missing_section'"),
    ("motionblur", {}, "did you mean 'motion_blur'"),
    ("qqqq", {}, "has no 'qqqq'; it has low_resolution, motion_blur"),
    ("missing_section", {"probabilty": 1}, "missing_section has no 'probabilty'; did you mean 'probability'"),
    ("cutout", {"probability": 1, "sizes": [1, 2]}, "cutout has no 'sizes'; did you mean 'size'"),
    ("cutout", {"probability": 1, "qqq": 1}, "cutout has no 'qqq'; it has probability, size, count, fill"),
    ("missing_section", 0.5, "missing_section must be a mapping of probability, axis"),
    ("missing_section", [0, 1], "must be a mapping"),
    ("missing_section", "yes", "must be a mapping"),
    ("missing_section", {}, "missing_section needs probability"),
    ("motion_blur", {"length": [0, 1]}, "motion_blur needs probability"),
    ("stripes", {"probability": 1}, "stripes needs amplitude and width"),
    ("cutout", {"probability": 1, "size": None}, "cutout needs size"),
    *[("dark_section", {"probability": p}, f"dark_section.probability {PROBABILITY}") for p in (-0.1, 1.5, True, "1")],
    *[
        ("motion_blur", {"probability": 1, "length": span}, r"length must be \[lowest, highest\] nm, none below 0")
        for span in (5, [1], [5, 1], [-1, 3], [0, float("inf")], ["a", "b"])
    ],
    *[
        ("stripes", {"probability": 1, "amplitude": [0, 1], "width": span}, "width must be .* nm, none below 1")
        for span in ([0, 9], [9, 8], "wide")
    ],
    *[
        ("salt_pepper", {"probability": 1, "fraction": span}, "fraction must be .* none below 0, none above 1")
        for span in ([0, 2], [-1, 1], [1, 0])
    ],
    *[
        ("section_contrast", {"probability": 1, "brightness": span}, r"brightness must be \[lowest, highest\], got")
        for span in ([1, 0], 3, [0, float("nan")])
    ],
    *[
        ("missing_section", {"probability": 1, "axis": axis}, "axis must be one of z, y, x, got")
        for axis in ("w", 0, ["z"])
    ],
    *[
        ("low_resolution", {"probability": 1, "voxel_size": [8, 9], "axes": axes}, "axes must name 1 to 3 of the axes")
        for axes in ("z", [], ["z", "z"], ["q"], [0])
    ],
    *[
        ("motion_blur", {"probability": 1, "length": [0, 9], "axes": axes}, "axes must name 2 of the axes")
        for axes in (["z"], ["z", "y", "x"], "yx")
    ],
    *[
        ("missing_section", {"probability": 1, "thickness": nm}, r"thickness \(nm\) must be a number above 0")
        for nm in (0, -8, "40", float("inf"))
    ],
    *[
        ("missing_section", {"probability": 1, "fill": fill}, "fill must be a number in normalized units or 'nearest'")
        for fill in ("neighbour", [0], float("nan"), True)
    ],
    *[
        ("cutout", {"probability": 1, "size": [1, 2], "fill": fill}, "fill must be a number, got")
        for fill in ("nearest", [0], float("inf"))
    ],
    *[
        ("missing_section", {"probability": 1, "unknown": value}, "unknown must be true or false, got")
        for value in (1, "yes", [])
    ],
    *[
        ("cutout", {"probability": 1, "size": [1, 2], "count": value}, "count must be a whole number of at least 1")
        for value in (0, 1.5, True)
    ],
    *[
        ("match_histogram", {"probability": 1, "quantiles": value}, "quantiles must be lists of ascending quantiles")
        for value in ([], [1], [2, 1], [[0, 1], [1, 0]], [[0, "a"]], 3, [1, 1], [[0, 1], 3])
    ],
    ("match_histogram", {"probability": 1, "quantiles": "no.json"}, "quantiles \\(no.json\\): there is no such file"),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS)
def test_invalid_options_are_refused(name, options, message):
    with pytest.raises(CellMapError, match=f"^intensity_transforms.*{message}"):
        IntensityTransforms({name: options})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[0, 1", "not valid JSON"), ("{}", "ascending"), ("[[3, 2]]", "ascending"), ("", "not valid JSON")],
)
def test_invalid_files_of_quantiles_are_refused(tmp_path, text, message):
    path = tmp_path / "quantiles.json"
    path.write_text(text)
    with pytest.raises(CellMapError, match=rf"quantiles.json\).*{message}"):
        IntensityTransforms({"match_histogram": {"probability": 1, "quantiles": str(path)}})


def test_a_file_of_quantiles_equals_the_list(tmp_path):
    path = tmp_path / "quantiles.json"
    path.write_text(json.dumps([[0.1, 0.4, 0.6]]))
    one, other = (
        IntensityTransforms({"match_histogram": {"probability": 1, "quantiles": value}})
        for value in (str(path), [0.1, 0.4, 0.6])
    )
    assert one == other


def test_the_patch_of_another_input_shows_the_same_sections():
    """An input of half the voxel size and half as thick, in the middle of the first one."""
    config = {"missing_section": {"probability": 0.4, "fill": -1}, "dark_section": {"probability": 0.3}}
    reference = Window([12, 4, 4], [40, 8, 8])
    first = change(config, torch.ones(12, 1, 12, 4, 4), scale=[40, 8, 8])
    other = change(config, torch.ones(12, 1, 12, 4, 4), scale=[20, 8, 8], number=1, reference=reference)
    assert torch.equal(other[:, :, ::2], first[:, :, 3:9])
    assert torch.equal(other[:, :, 1::2], first[:, :, 3:9])
    assert (first == -1).any()


@pytest.mark.parametrize("preset", sorted(Path(CONFIGS, "augment").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid_and_change_raw(preset):
    config = yaml.safe_load(preset.read_text()) or {}
    transforms = IntensityTransforms(config.get("intensity_transforms"))
    raw = patches(shape=(8, 16, 16))
    changed = transforms(raw, 0, SAMPLES, 0, [8, 8, 8])
    assert torch.equal(changed, raw) == (preset.stem == "none")
