import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapError
from cellmap_lightning.io.statistics import Statistics
from cellmap_lightning.transforms.normalization import Normalize, Scaling

STATISTICS = Statistics(100.0, 20.0, tuple(np.linspace(50, 150, 1001)))


def scaled(values, dtype, rule, invert=False):
    affine = Normalize.parse(rule, invert).affine(np.dtype(dtype), STATISTICS)
    raw = torch.from_numpy(np.asarray([values], dtype))
    return Scaling.of([0], [affine])(raw, torch.tensor([0]))[0].tolist()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32"])
def test_the_range_of_the_type(dtype):
    info = np.iinfo(dtype)
    assert scaled([info.min, info.max], dtype, "dtype") == pytest.approx([0, 1])
    assert scaled([info.min, info.max], dtype, "dtype", invert=True) == pytest.approx([1, 0])


def test_floats_keep_their_values():
    assert scaled([-3, 700], "float32", "dtype") == [-3, 700]
    raw = torch.tensor([[1.0]])
    assert Scaling.none()(raw, torch.tensor([0])) is not raw


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ({"range": [10, 20]}, [10, 15, 20, 25], [0, 0.5, 1, 1.5]),
        ({"percentile": [0, 100]}, [50, 100, 150], [0, 0.5, 1]),
        ({"percentile": [10, 90]}, [60, 140], [0, 1]),
    ],
)
def test_ranges(rule, values, expected):
    assert scaled(values, "uint8", rule) == pytest.approx(expected)
    assert scaled(values, "uint8", rule, invert=True) == pytest.approx([1 - v for v in expected])


def test_zscore():
    assert scaled([100, 120], "uint8", "zscore") == pytest.approx([0, 1])
    assert scaled([100, 120], "uint8", "zscore", invert=True) == pytest.approx([0, -1])


def test_each_sample_by_the_crop_of_its_position():
    scaling = Scaling.of([0, 10, 25], [(0.0, 1.0), (10.0, 0.1), (20.0, -1.0)])
    raw = torch.full((5, 1, 2), 20, dtype=torch.uint8)
    out = scaling(raw, torch.tensor([0, 9, 10, 24, 25]))
    assert out[:, 0, 0].tolist() == pytest.approx([20, 20, 1, 1, 0])


@pytest.mark.parametrize(
    "rule",
    ["minmax", {"range": [2, 1]}, {"percentile": [-1, 50]}, {"percentile": [0]}, {"range": [0, 1], "x": 1}, None, 5],
)
def test_errors(rule):
    with pytest.raises(CellMapError, match="normalize must be dtype, zscore"):
        Normalize.parse(rule)


def test_a_flat_volume_cannot_be_normalized_by_its_values():
    flat = Statistics(7.0, 0.0, (7.0,) * 1001)
    for rule in ("zscore", {"percentile": [1, 99]}):
        with pytest.raises(CellMapError, match=r"volume.zarr: normalize .* needs values that differ; all are about 7"):
            Normalize.parse(rule).affine(np.dtype("uint8"), flat, "volume.zarr")
