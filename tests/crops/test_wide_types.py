"""Raw of 32 and 64 bits, whose values are nearly constant in the whole range of their type, is warned of."""

import logging

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset, IntensityOptions
from cellmap_lightning.io.writer import write_multiscale

PATCH = {"raw": {"shape": [8, 8, 8], "scale": [8, 8, 8]}}


def warnings_of(folder, dtype, caplog, normalize="dtype"):
    values = np.random.default_rng(0).integers(0, 200, (16, 16, 16)).astype(dtype)
    write_multiscale(folder / "raw.zarr", values, scale=(8, 8, 8), translation=(0, 0, 0))
    for _ in range(2):  # one warning for all crops of a volume
        with CellMapDataset(
            folder / "raw.zarr", classes=None, input_arrays=PATCH, intensity=IntensityOptions(normalize=normalize)
        ):
            pass
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_wide_types_are_warned_of_once(tmp_path, caplog, dtype):
    (message,) = warnings_of(tmp_path, dtype, caplog)
    assert f"raw {tmp_path / 'raw.zarr'}: normalize=dtype maps the whole range of {dtype}" in message


@pytest.mark.parametrize(
    ("dtype", "normalize"),
    [("uint8", "dtype"), ("int16", "dtype"), ("int32", "zscore"), ("int32", {"range": [0, 200]})],
)
def test_other_types_and_rules_are_not(tmp_path, caplog, dtype, normalize):
    assert warnings_of(tmp_path, dtype, caplog, normalize) == []
