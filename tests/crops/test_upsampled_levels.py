"""The log line of upsampled levels, once per volume, voxel size and scale."""

import logging

import numpy as np
import pytest

from cellmap_lightning.crops.image import choose_level
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import write_multiscale


def lines(caplog, folder, groups, scales):
    """Return the lines for each (group, voxel size), at each scale, read twice."""
    for group, step in groups:
        if not (folder / group).exists():
            write_multiscale(folder / group, np.ones((4, 4, 4), np.uint8), scale=step, translation=(0, 0, 0))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            for group, _ in groups:
                for scale in scales:
                    assert choose_level(read_multiscale(folder / group), scale, group).name == "s0"
    return [record.getMessage() for record in caplog.records if "has no level as fine" in record.getMessage()]


@pytest.mark.parametrize(
    ("groups", "scales", "count"),
    [
        ([(f"a.zarr/labels/crop{n}/{name}", (16, 16, 16)) for n in (1, 2) for name in ("mito", "er")], [(8, 8, 8)], 1),
        ([("a.zarr/crop1/mito", (16, 16, 16)), ("b.zarr/crop1/mito", (16, 16, 16))], [(8, 8, 8)], 2),
        ([("a.zarr/crop1/mito", (16, 16, 16)), ("a.zarr/crop2/mito", (32, 16, 16))], [(8, 8, 8)], 2),
        ([("a.zarr/crop1/mito", (16, 16, 16))], [(8, 8, 8), (4, 4, 4)], 2),
        ([("a.zarr/crop1/mito", (8, 8, 8))], [(8, 8, 8), (16, 16, 16)], 0),
    ],
)
def test_one_line_per_volume_voxel_size_and_scale(tmp_path, caplog, groups, scales, count):
    found = lines(caplog, tmp_path, groups, scales)
    assert len(found) == count
    assert all("s0" in line and "like others of these voxels in" in line for line in found)
