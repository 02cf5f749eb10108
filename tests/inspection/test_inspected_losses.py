"""The share of foreground that a coarser level has lost, in the report of ``cellmap-inspect``."""

import numpy as np
import pytest

from cellmap_lightning.inspection.facts import read_crop_facts
from cellmap_lightning.inspection.scale_facts import at_scale
from cellmap_lightning.inspection.text import classes_text
from cellmap_lightning.io.writer import write_group, write_multiscale
from cellmap_lightning.splits.entries import CropRecord


def solid(more=0):
    """A cube on voxels of the coarser level, and some voxels of another one, which a majority completes."""
    labels = np.zeros((32, 32, 32), np.uint8)
    labels[8:24, 8:24, 8:24] = 1
    for number in range(more):
        labels[26 + number // 4, 26 + number // 2 % 2, 26 + number % 2] = 1
    return labels


def dense(share):
    return (np.random.default_rng(0).random((32, 32, 32)) < share).astype(np.uint8)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (solid(), "0% (worst 0%)"),
        (solid(more=5), "0% (worst 0%)"),
        (dense(0.62), "0% (worst 0%)"),
        (solid(more=3), "0% (worst 0%)"),
        (dense(0.3), None),
    ],
    ids=["equal", "slightly more", "much more", "slightly less", "much less"],
)
def test_a_gain_of_foreground_is_no_loss(tmp_path, monkeypatch, labels, text):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    write_group(tmp_path / "v.zarr")
    root = tmp_path / "v.zarr"
    write_multiscale(root / "raw", np.full((16, 16, 16), 7, np.uint8), scale=(8, 8, 8), translation=(2, 2, 2))
    write_multiscale(root / "crop1" / "mito", labels, scale=(4, 4, 4), translation=(0, 0, 0), levels=2, mode="mode")
    crops = read_crop_facts([("train", CropRecord("x", str(root / "raw"), f"{root}/crop1/[mito]"))])
    found = at_scale(crops, (8.0, 8.0, 8.0), True)
    (row,) = [line for line in classes_text(found).splitlines() if line.startswith("mito")]
    lost = found[0].classes["mito"].lost
    if text is None:
        assert lost > 0.1
        assert row.endswith(f"{lost:.0%} (worst {lost:.0%})")
    else:
        assert row.endswith(f" {text}")
