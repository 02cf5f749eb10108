"""Every computed kind at the borders of patches and around unknown voxels."""

import numpy as np
import pytest

from tests.transforms.kinds.patches import EVERY, blobs, computed

WHOLE = (26, 36, 40)
NAMES = [spec["kind"] for spec in EVERY]


@pytest.mark.parametrize("radius", [9.0, 14.0, 40.0])
@pytest.mark.parametrize("spec", EVERY, ids=NAMES)
def test_a_patch_equals_the_crop_of_a_larger_patch(spec, radius):
    ids = blobs(1, WHOLE, 8 if radius == 40 else 60, radius)
    ids[4:6, 20:24, 8:14] = -1
    _, large = computed(spec, ids, (0, 0, 0), WHOLE)
    assert np.isfinite(large).mean() > 0.2
    for first, shape in (((3, 5, 7), (9, 12, 14)), ((0, 0, 0), (8, 8, 8)), ((15, 22, 30), (11, 14, 10))):
        _, small = computed(spec, ids, first, shape)
        crop = large[:, *(slice(f, f + n) for f, n in zip(first, shape, strict=True))]
        np.testing.assert_allclose(small, crop, atol=1e-3)


@pytest.mark.parametrize("spec", EVERY, ids=NAMES)
def test_known_values_hold_for_any_content_of_the_unknown_voxels(spec):
    """Values that are not NaN are those of a full annotation, for any values of the unknown voxels."""
    ids = blobs(2, (16, 26, 26), 16)
    hidden = np.zeros(ids.shape, bool)
    hidden[6:9, 10:13, 10:14] = True
    _, partly = computed(spec, np.where(hidden, -1, ids), (0, 0, 0), ids.shape)
    known = np.isfinite(partly)
    unaffected = np.isfinite(computed(spec, ids, (0, 0, 0), ids.shape)[1])
    assert 0 < (unaffected & ~known).sum() < known.sum()
    rng = np.random.default_rng(3)
    others = [0, 777, *np.unique(ids[hidden]).tolist(), *np.unique(ids).tolist()[:4]]
    fillings = [np.where(hidden, other, ids) for other in others]
    fillings.append(np.where(hidden, rng.choice(others, ids.shape), ids))
    for filled in fillings:
        _, full = computed(spec, filled, (0, 0, 0), ids.shape)
        np.testing.assert_allclose(partly[known], full[known], atol=1e-3)


@pytest.mark.parametrize("spec", EVERY, ids=NAMES)
def test_kinds_of_several_classes_and_of_slices(spec):
    ids = blobs(4, (1, 30, 30), 6)
    flat = {**spec, "offsets": [[0, 1, 0], [0, -3, 2]]} if "offsets" in spec else spec
    kind, one = computed(flat, ids, (0, 0, 0), ids.shape)
    assert kind.margin[0] == 0
    assert len(one) == len(kind.components) == kind.channels
    assert np.isfinite(one).mean() > 0.1
    kind, two = computed(flat, ids, (0, 0, 0), ids.shape, classes=2)
    np.testing.assert_array_equal(two, np.concatenate([one, one]))
    names = [channel["name"] for channel in kind.describe(["mito", "er"])]
    assert len(set(names)) == len(two)
    assert [name.split("_")[0] for name in names] == ["mito"] * len(one) + ["er"] * len(one)


@pytest.mark.parametrize("spec", EVERY, ids=NAMES)
def test_values_lie_in_the_range_of_the_kind(spec):
    kind, values = computed(spec, blobs(5, (14, 22, 22), 14), (0, 0, 0), (14, 22, 22))
    low, high = kind.value_range
    known = values[np.isfinite(values)]
    assert low <= known.min() < known.max() <= high
    assert kind.activation == ("tanh" if low < 0 else "sigmoid")
