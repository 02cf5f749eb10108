"""A real volume, serial sections of 50 x 4.6 x 4.6 nm; skipped where it is absent."""

import numpy as np
import torch
import zarr

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import IntensityOptions


def test_patches_of_a_real_volume_are_its_voxels(real_volume):
    spec = {"shape": [16, 128, 128], "scale": [50, 4.6, 4.6]}
    crop = f"{real_volume}/recon-1/labels/groundtruth/crop2/[mito,membrane]"
    with CellMapDataset(
        f"{real_volume}/recon-1/em/fibsem-uint8",
        crop,
        ["mito", "membrane"],
        {"raw": spec},
        {"labels": spec},
        intensity=IntensityOptions(raw_value_transforms=None),
    ) as dataset:
        raw = zarr.open_array(f"{real_volume}/recon-1/em/fibsem-uint8/s0", mode="r")
        mito = zarr.open_array(f"{real_volume}/recon-1/labels/groundtruth/crop2/mito/s0", mode="r")
        for position in (0, len(dataset) // 3, len(dataset) - 1):
            sample, center = dataset[position], dataset.get_center(position)
            z, y, x = (
                round(center[a] / s - (n - 1) / 2) for a, s, n in zip("zyx", spec["scale"], spec["shape"], strict=True)
            )
            stored = np.asarray(raw[z : z + 16, y : y + 128, x : x + 128])
            assert torch.equal(sample["raw"][0], torch.from_numpy(stored).float())
            # The crop is the lower half of the volume.
            labels = np.asarray(mito[z : z + 16, y - 512 : y - 512 + 128, x : x + 128])
            assert torch.equal(sample["labels"][0], torch.from_numpy(labels).float())
