"""Masks with gray edges: an error that says to threshold them, and none for ids."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.writer import write_multiscale

RANDOM = np.random.default_rng(0)
BALL = np.linalg.norm(np.mgrid[:24, :24, :24] - np.full((3, 1, 1, 1), 12), axis=0) < 8
SMOOTH = (gaussian_filter(BALL.astype(float), 1) * 255).round().astype(np.uint8)
JPEG = np.where(BALL, 255 - RANDOM.integers(0, 6, BALL.shape), RANDOM.integers(0, 6, BALL.shape)).astype(np.uint8)
RESIZED = (BALL.reshape(12, 2, 12, 2, 12, 2).mean((1, 3, 5)) * 255).astype(np.uint8).repeat(2, 0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


def refusal(folder, voxels):
    for name in ("em", "crop1/mito"):
        write_multiscale(folder / "a.zarr" / name, voxels, scale=(8, 8, 8), translation=(0, 0, 0))
    patch = {"shape": [8, 8, 8], "scale": [8, 8, 8]}
    entry = {"raw": f"{folder}/a.zarr/em", "gt": f"{folder}/a.zarr/crop1/[mito]"}
    data = CellMapDataModule(
        classes=["mito"], input_arrays={"raw": patch}, target_arrays={"labels": patch},
        datasets={"train": [entry]}, batch_size=1, batches_per_epoch=1,
    )  # fmt: skip
    with data, pytest.raises(CellMapError) as e:
        data.setup("fit")
    return str(e.value)


@pytest.mark.parametrize("voxels", [SMOOTH, JPEG, RESIZED, SMOOTH.astype(np.float32)])
def test_a_mask_with_gray_edges(tmp_path, voxels):
    text = refusal(tmp_path, voxels)
    assert f"other ids and 255, {len(np.unique(voxels))} different values: a mask that was resized" in text
    assert "needs a threshold, as in (mask >= 128) * 255" in text


@pytest.mark.parametrize("most", [2, 9, 100])
def test_ids_beside_255(tmp_path, most):
    voxels = RANDOM.integers(0, most + 1, (16, 16, 16)).astype(np.uint8)
    voxels[0] = 255
    text = refusal(tmp_path, voxels)
    assert "whether 255 means unknown or is an id: set unknown=255 or unknown=null" in text
    assert "threshold" not in text
