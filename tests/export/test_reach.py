"""The reach of a network, measured axis by axis, against the formula of its layers."""

import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.halo import measure_halo
from cellmap_lightning.export.reach import measure_reach


@pytest.mark.parametrize(
    ("network", "halo", "step"),
    [
        (nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 1, (1, 5, 7), padding=(0, 2, 3))), (1, 3, 4), 1),
        (nn.Sequential(nn.Conv3d(1, 2, 5), nn.ReLU(), nn.Conv3d(2, 1, 3)), (3, 3, 3), 1),
        (nn.Sequential(nn.MaxPool3d(4), nn.Upsample(scale_factor=4)), (3, 3, 3), 4),
        (nn.Sequential(nn.Conv3d(1, 2, 2, stride=2), nn.ConvTranspose3d(2, 1, 2, stride=2)), (1, 1, 1), 2),
    ],
    ids=["convolutions", "without padding", "pool of 4", "stride of 2"],
)
def test_reach_and_step_of_layers(network, halo, step):
    reach = measure_reach(network, (32, 32, 32))
    assert (reach.halo, reach.step, reach.statistics) == (halo, (step,) * 3, ())


def test_slabs_give_the_halo_of_a_large_input():
    network = UNet(2, 1, 1, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="BATCH")
    reach = measure_reach(network, (16, 16))  # smaller than the receptive field
    assert (reach.halo, True) == measure_halo(network, (128, 128))
    assert reach.step == (4, 4)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.InstanceNorm3d(2), ("InstanceNorm3d",)),
        (nn.GroupNorm(2, 2), ("GroupNorm",)),
        (nn.InstanceNorm3d(2, track_running_stats=True), ()),
        (nn.BatchNorm3d(2), ()),
    ],
)
def test_statistics_of_the_patch_are_named(layer, names):
    reach = measure_reach(nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), layer), (16, 16, 16))
    assert (reach.halo, reach.statistics) == ((1, 1, 1), names)


def test_bytes_of_the_outputs_of_all_layers():
    network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 16, 2, stride=2), nn.Upsample(scale_factor=2))
    assert measure_reach(network, (16, 16, 16)).voxel_bytes == 4 * (8 + 16 / 8 + 16)


class Global(nn.Module):
    def forward(self, x):
        return x + x.mean((2, 3, 4), keepdim=True)


class Fixed(nn.Module):
    def forward(self, x):
        return x * torch.ones(16, 16, 16, dtype=x.dtype)


@pytest.mark.parametrize(("network", "match"), [(Global(), "depends on all of 512"), (Fixed(), "is not accepted")])
def test_networks_without_a_reach(network, match):
    with pytest.raises(CellMapValueError, match=match):
        measure_reach(network, (16, 16, 16))
