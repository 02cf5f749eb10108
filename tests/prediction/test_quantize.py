"""The conversion of numbers to stored values, and the counts of foreground."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.prediction.quantize import StoredValues

KINDS = ["uint8", "float16", "float32", "labels"]


def expected(values, kind, threshold):
    if kind == "uint8":
        return np.rint(np.clip(values, 0, 1) * np.float32(255)).astype(np.uint8)
    return (values >= threshold).astype(np.uint8) if kind == "labels" else values.astype(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.5, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 400, 500), (3, 90, 40, 50), (2, 6, 1, 1)])
def test_any_part_of_an_array_is_filled(kind, threshold, shape):
    values = np.random.default_rng(0).random((shape[0], *(n + 2 for n in shape[1:])), dtype=np.float32)
    values[values > 0.9] = 1
    values[values < 0.1] = 0
    given = values[:, 1:-1, 1:-1, 1:-1]
    stored = StoredValues(kind, threshold)
    out = np.full((shape[0], shape[1] + 1, shape[2], shape[3] + 5), 77, stored.dtype)
    here = np.s_[:, 1:, :, 2:-3]
    stored.store(given, out[here], "it")
    reached = stored.reached(out[here], given)
    np.testing.assert_array_equal(out[here], expected(given, kind, threshold))
    assert (np.delete(out, np.arange(2, shape[3] + 2), axis=3) == 77).all()
    assert (out[:, 0] == 77).all()
    assert reached == [int(np.count_nonzero(channel >= threshold)) for channel in given]


@pytest.mark.parametrize(
    "threshold", [*np.random.default_rng(3).random(60).tolist(), 0.0, 0.5, 1.0, 0.25, 127.4 / 255, 2]
)
def test_foreground_is_counted_where_rounding_hides_it(threshold):
    """Around a threshold, numbers on both sides of it may be stored as the same."""
    near = np.float32(threshold)
    around = [near]
    for _ in range(40):
        around.append(np.nextafter(around[-1], np.float32(-1)))
    around.append(np.nextafter(near, np.float32(9)))
    values = np.clip(np.array(around, np.float32), 0, 1).reshape(1, 1, 1, -1)
    out = np.empty(values.shape, np.uint8)
    stored = StoredValues("uint8", threshold)
    stored.store(values, out, "it")
    assert stored.reached(out, values) == [np.count_nonzero(values >= threshold)]
    if threshold == 0.5:
        assert stored.least == (128,)


def test_half_precision_may_miss_by_its_noise():
    values = np.array([-0.001, -0.0, 1.0, 1.001], np.float32).reshape(1, 1, 1, 4)
    out = np.empty(values.shape, np.uint8)
    StoredValues().store(values, out, "it")
    assert out.ravel().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("kind", ["uint8", "labels"])
@pytest.mark.parametrize(
    ("bad", "said"),
    [(np.nan, "NaN"), (1.01, "values from 0 to 1.01"), (-0.5, "values from -0.5 to 0.2"),
     (np.inf, "values from 0 to inf"), (3e38, "values from 0 to (inf|3e.38)"), (-np.inf, "values from -inf to 0.2")],
)  # fmt: skip
def test_non_probabilities_are_not_stored(kind, bad, said):
    values = np.array([0.0, bad, 0.2], np.float32).reshape(1, 1, 1, 3)
    with pytest.raises(CellMapValueError, match=f"block 7: the model returned {said}, and dtype={kind} stores"):
        StoredValues(kind).store(values, np.empty(values.shape, np.uint8), "block 7")


def test_numbers_beyond_half_precision():
    values = np.array([0.0, 1e5], np.float32).reshape(1, 1, 1, 2)
    with pytest.raises(CellMapValueError, match="it: 100000 is too large for float16"):
        StoredValues("float16").store(values, np.empty(values.shape, np.float16), "it")
    values[0, 0, 0, 1] = np.inf  # which it can
    out = np.empty(values.shape, np.float16)
    stored = StoredValues("float16")
    stored.store(values, out, "it")
    assert np.isinf(out[0, 0, 0, 1])
    assert stored.reached(out, values) == [1]


def test_unknown_kind_is_an_error():
    with pytest.raises(CellMapValueError, match="dtype must be one of uint8, float16, float32, labels, got 'int8'"):
        StoredValues("int8")


@pytest.mark.parametrize("kind", ["uint8", "labels", "float16", "float32"])
def test_each_channel_has_its_threshold(kind):
    values = np.random.default_rng(5).random((3, 8, 8, 8), dtype=np.float32)
    thresholds = [0.2, 0.5, 0.9]
    stored, out = StoredValues(kind, thresholds), np.empty(values.shape, StoredValues(kind).dtype)
    stored.store(values, out, "it")
    assert stored.reached(out, values) == [int((v >= t).sum()) for v, t in zip(values, thresholds, strict=True)]
    if kind == "labels":
        np.testing.assert_array_equal(out, values >= np.array(thresholds).reshape(3, 1, 1, 1))
