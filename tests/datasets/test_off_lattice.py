"""Crops off the lattice of raw: which of raw and labels is copied, and where the other one is read."""

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset
from cellmap_lightning.io.writer import write_multiscale

LOWER = 64.0  # nm, on the lattice of raw


def first_sample(folder, offset, label_size, target_size):
    """Return the stored raw (8 nm) and labels (shifted along all axes), the first sample, and its centre."""
    rng = np.random.default_rng(0)
    raw, labels = rng.integers(0, 256, (40, 40, 40), np.uint8), rng.integers(0, 2, (32, 32, 32), np.uint8)
    write_multiscale(folder / "raw", raw, scale=(8.0,) * 3, translation=(4.0,) * 3)
    translation = (LOWER + offset + label_size / 2,) * 3
    write_multiscale(folder / "gt" / "mito", labels, scale=(label_size,) * 3, translation=translation, levels=1)
    target = {"labels": {"shape": [round(64 / target_size)] * 3, "scale": [target_size] * 3}}
    dataset = CellMapDataset(
        str(folder / "raw"), str(folder / "gt/[mito]"), ["mito"], {"raw": {"shape": [8] * 3, "scale": [8] * 3}}, target
    )
    return raw, labels, dataset[0], dataset.get_center(0)["z"]


def box(values, start, count, step=1):
    along = slice(start, start + count * step, step)
    return values[along, along, along]


@pytest.mark.parametrize("offset", [2.0, 4.0, 6.0, 7.5])
def test_labels_of_the_voxel_size_of_raw_are_copied(tmp_path, offset):
    raw, labels, sample, centre = first_sample(tmp_path, offset, 8.0, 8.0)
    assert centre == LOWER + offset + 32
    np.testing.assert_array_equal(sample["labels"][0], box(labels, 0, 8))
    weight, value = offset / 8, sample["raw"][0].numpy() * 255  # interpolated between two voxels along each axis
    expected = box(raw, 8, 9).astype(float)
    for axis in range(3):
        expected = np.diff(expected, axis=axis) * weight + np.take(expected, range(8), axis)
    np.testing.assert_allclose(value, expected, atol=0.51)


@pytest.mark.parametrize(
    ("offset", "label_size", "target_size", "start", "step"),
    [
        # The centre of the first target voxel is at 1, 2.75, 2.5, 2.25 and 2 voxels from the labels' lower edge.
        (0.0, 4.0, 8.0, 0, 2), (1.0, 4.0, 8.0, 2, 2), (2.0, 4.0, 8.0, 2, 2), (3.0, 4.0, 8.0, 2, 2),
        (4.0, 4.0, 8.0, 1, 2),
        # At 2.25, 2 and 1.75 voxels.
        (1.0, 4.0, 4.0, 2, 1), (2.0, 4.0, 4.0, 1, 1), (3.0, 4.0, 4.0, 1, 1),
    ],
)  # fmt: skip
def test_labels_are_the_lower_voxel_on_an_edge(tmp_path, offset, label_size, target_size, start, step):
    raw, labels, sample, centre = first_sample(tmp_path, offset, label_size, target_size)
    np.testing.assert_allclose(sample["raw"][0] * 255, box(raw, round(centre / 8) - 4, 8), atol=1e-3)
    expected = box(labels, start, round(64 / target_size), step)
    np.testing.assert_array_equal(sample["labels"][0, :12, :12, :12], expected[:12, :12, :12])
