"""Options of segmentations that are refused."""

import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.instances.options import SegmentationOptions, StorageOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "watersheds"}, "did you mean 'watershed'"),
        ({"method": "cc"}, "method must be one of"),
        ({"method": ""}, "method must be one of"),
        ({"halo": -1}, "halo must be a number of at least 0"),
        ({"halo": True}, "halo must be a number"),
        ({"smoothing": float("nan")}, "smoothing must be a number"),
        ({"threshold": "high"}, "threshold must be a number"),
        ({"connectivity": 8}, "connectivity must be one of"),
        ({"overlap": 0.3}, "overlap must be at least 0.5"),
        ({"min_volume": 10, "max_volume": 5}, "less than min_volume"),
        ({"strides": [1, 2]}, "strides must be three"),
    ],
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(CellMapValueError, match=message):
        SegmentationOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": "int32"}, "ids must be one of"),
        ({"block": (100, 64, 64)}, "no multiple of"),
        ({"shards": (128, 128, 128)}, "need zarr_format=3"),
        ({"zarr_format": 4}, "zarr_format must be one of"),
        ({"block_size_mb": 0}, "block_size_mb must be"),
    ],
)
def test_invalid_storage_is_an_error(options, message):
    with pytest.raises(CellMapValueError, match=message):
        StorageOptions(**options)
